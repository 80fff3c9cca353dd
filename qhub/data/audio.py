"""One recording: PCM `.wav` files by the standard library, and another rate where scipy is there."""

from __future__ import annotations

import wave
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub.data.dataset import Sound
from qhub.errors import QhubError

SUFFIXES = frozenset({".wav"})
_TYPES = {1: "u1", 2: "<i2", 4: "<i4"}


def read_wav(path: Path) -> Sound:
    """The recording in a file: PCM of 8, 16 or 32 bits, channels averaged.

    :raises QhubError: when it is no such file, or holds no sound.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError, RuntimeError) as error:  # RuntimeError: a chunk that ends elsewhere
        raise QhubError(f"`{path}` is not a PCM .wav file ({error or 'it is cut off'})", hint=_convert(path)) from None
    if width not in _TYPES:
        raise QhubError(f"`{path}` has `{8 * width}` bits per sample; read are 8, 16 and 32", hint=_convert(path))
    if len(data) < width * channels:
        raise QhubError(f"`{path}` holds no sound", hint="replace it, or take it out of the folder")
    whole = len(data) // (width * channels) * width * channels
    return Sound(_floats(np.frombuffer(data[:whole], np.dtype(_TYPES[width])).reshape(-1, channels)), rate)


def at_rate(sound: Sound, rate: int, where: str) -> NDArray[np.float32]:
    """The samples of `sound` at `rate` per second.

    :raises QhubError: when the rate is another and scipy is not installed.
    """
    if sound.rate == rate:
        return sound.samples
    try:
        from scipy.signal import resample_poly
    except ImportError:
        message = f"{where} has {sound.rate} samples per second, the model takes {rate}, and resampling needs scipy"
        raise QhubError(message, hint=f"pip install scipy, or convert it: ffmpeg -i IN.wav -ar {rate} OUT.wav") from None
    common = gcd(sound.rate, rate)
    return np.asarray(resample_poly(sound.samples, rate // common, sound.rate // common), dtype=np.float32)


def _floats(pcm: NDArray[Any]) -> NDArray[np.float32]:
    """(T, channels) PCM to (T,) float32 in -1 .. 1; 8 bits are unsigned."""
    bits = 8 * pcm.dtype.itemsize
    values = pcm.astype(np.float64) - (128 if bits == 8 else 0)
    return np.asarray(values.mean(axis=1) / 2 ** (bits - 1), dtype=np.float32)


def _convert(path: Path) -> str:
    return f"convert it: ffmpeg -i {path} -c:a pcm_s16le OUT.wav"
