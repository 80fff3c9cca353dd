"""Recordings to inputs of a model: by transformers' feature extractor, or as they are at a given rate and length."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qhub.data.audio import at_rate
from qhub.data.dataset import Sound
from qhub.data.pictures import Inputs, Where, stack, unplaced
from qhub.errors import QhubError


@dataclass(frozen=True, slots=True)
class Waves:
    """Samples as they are, (B, T) float32: brought to `samples` by cutting or adding silence at the end, else all of one length."""

    name: str
    sampling_rate: int
    samples: int | None = None

    def batch(self, items: Sequence[Sound], where: Where = unplaced) -> Inputs:
        """`{name: (B, T)}`.

        :raises QhubError: when a rate is another and scipy is missing, or lengths differ and `samples` is None.
        """
        waves = [at_rate(sound, self.sampling_rate, where(index)) for index, sound in enumerate(items)]
        if self.samples is not None:
            waves = [np.pad(wave[: self.samples], (0, max(0, self.samples - len(wave)))) for wave in waves]
        return {self.name: stack(waves, where)}


@dataclass(frozen=True, slots=True, eq=False)
class Extractor:
    """The feature extractor that a model folder describes, run by transformers."""

    extractor: Any

    def batch(self, items: Sequence[Sound], where: Where = unplaced) -> Inputs:
        """What the extractor names, such as `input_values` (B, T) or `input_features` (B, F, T); shorter recordings are padded.

        :raises QhubError: when a rate is another and scipy is missing.
        """
        rate = int(self.extractor.sampling_rate)
        waves = [at_rate(sound, rate, where(index)) for index, sound in enumerate(items)]
        padding = inspect.signature(self.extractor.__call__).parameters.get("padding")
        more = {"padding": True} if padding is not None and padding.default is False else {}
        found = self.extractor(waves, sampling_rate=rate, return_tensors="np", **more)
        return {name: np.asarray(value) for name, value in found.items()}


def load_extractor(folder: Path) -> Extractor:
    """The feature extractor of a model folder.

    :raises QhubError: when transformers is missing or cannot use the folder's `preprocessor_config.json`.
    """
    try:
        from transformers import AutoFeatureExtractor
    except ImportError:
        raise QhubError(f"the feature extractor of `{folder}` needs transformers", hint="pip install 'qhub-core[llm]'") from None
    try:
        return Extractor(AutoFeatureExtractor.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # noqa: BLE001 - what a broken config raises is not defined
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QhubError(f"`{folder}` has no usable feature extractor ({reason})", hint="get preprocessor_config.json again") from None
