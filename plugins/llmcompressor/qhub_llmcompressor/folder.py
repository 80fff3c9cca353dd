"""Reads the folder that llm-compressor saves: the compressed-tensors pack-quantized layout, without changing a number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from qhub import PluginError, QTensor, Scheme, read_layer

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


class CompressedFolder:
    """A compressed folder as a `qhub.WholeResult`; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Look at the headers.

        :raises PluginError: when the folder is in another format.
        """
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
        if found.get("format") != "pack-quantized":
            message = f"llm-compressor wrote the format `{found.get('format')}`, not `pack-quantized`"
            raise PluginError(message, hint="use a scheme such as `w4a16-g128-asym`")
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))

    def tensor_names(self) -> Iterator[str]:
        """All tensors that are no part of a quantized layer."""
        return (name for name in self._files if name.rpartition(".")[2] not in _PARTS)

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` as stored."""
        with safe_open(self._files[name], "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def layer(self, name: str) -> QTensor:
        """Layer `name`, its numbers as stored.

        :raises PluginError: when it was left float, or its columns are in an order of their own.
        """
        if f"{name}.weight_packed" not in self._files or f"{name}.weight_g_idx" in self._files:
            message = f"llm-compressor left `{name}` float, or ordered its columns"
            raise PluginError(message, hint="keep such layers float: `--override 'PATTERN=float'`")
        words = self.tensor(f"{name}.weight_packed").shape[1]
        bits = words * 32 // int(self.tensor(f"{name}.weight_shape")[1])  # exact for 32 columns and more
        symmetric = f"{name}.weight_zero_point" not in self._files
        return read_layer(self.tensor, name, Scheme(bits, 16, None, symmetric))
