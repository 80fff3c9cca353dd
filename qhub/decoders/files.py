"""A decoder's QuantizedModel folder: its config, the scheme of each layer, and which tensor belongs where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub.decoders.config import DecoderConfig, decoder_config
from qhub.decoders.packed import PackedLayer, packed_layer
from qhub.decoders.tensors import MappedTensors
from qhub.errors import QhubError, Unsupported
from qhub.types import Scheme

_AGAIN = "quantize the model again"


class DecoderFiles:
    """The folder opened: names are full ones, as the files have them; a layer's is without `.weight`.

    `prefix` is what they begin with, `embedding` the layer of the rows, `head` the layer of the logits (the same if tied).
    """

    def __init__(self, folder: Path, config: DecoderConfig, schemes: Mapping[str, Scheme]) -> None:
        self.folder, self.config, self.schemes = folder, config, schemes
        self.tensors = MappedTensors(folder)
        self.prefix = "model." if "model.embed_tokens.weight" in self.tensors else ""
        own_head = not config.tied and ("lm_head.weight" in self.tensors or "lm_head" in schemes)
        self.embedding = f"{self.prefix}embed_tokens"
        self.head = "lm_head" if own_head else self.embedding

    def linears(self, block: int) -> dict[str, tuple[str, ...]]:
        """The layers of a block by their place, in execution order: qkv, out, gate_up, down; several read one input."""
        attention, mlp = f"{self.prefix}layers.{block}.self_attn", f"{self.prefix}layers.{block}.mlp"
        fused = self.config.fused
        return {
            "qkv": (f"{attention}.qkv_proj",) if fused else tuple(f"{attention}.{x}_proj" for x in "qkv"),
            "out": (f"{attention}.o_proj",),
            "gate_up": (f"{mlp}.gate_up_proj",) if fused else (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            "down": (f"{mlp}.down_proj",),
        }

    def norms(self, block: int) -> dict[str, NDArray[np.float32]]:
        """The norms of a block by their place: attention, mlp; attention_out, mlp_out (Gemma); query, key (of heads)."""
        at = f"{self.prefix}layers.{block}"
        names = {"attention": f"{at}.input_layernorm", "mlp": f"{at}.post_attention_layernorm"}
        if self.config.gemma:
            names |= {
                "attention_out": names["mlp"],
                "mlp": f"{at}.pre_feedforward_layernorm",
                "mlp_out": f"{at}.post_feedforward_layernorm",
            }
        if self.config.head_norms:
            names |= {"query": f"{at}.self_attn.q_norm", "key": f"{at}.self_attn.k_norm"}
        return {place: self._norm(name) for place, name in names.items()}

    def last_norm(self) -> NDArray[np.float32]:
        """The norm before the head."""
        return self._norm(f"{self.prefix}norm")

    def bias(self, name: str) -> NDArray[np.float32] | None:
        """The bias (N) of layer `name`, if it has one."""
        return self.tensors.floats(f"{name}.bias") if f"{name}.bias" in self.tensors else None

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of layer `name`, quantized or not; reads no codes."""
        if name in self.schemes:
            rows, inputs = (int(number) for number in self.tensors.array(f"{name}.weight_shape"))
        else:
            rows, inputs = self.tensors.info(f"{name}.weight").shape
        return rows, inputs

    def packed(self, name: str) -> PackedLayer:
        """The quantized layer `name`."""
        return packed_layer(self.tensors, name, self.schemes[name])

    def _norm(self, name: str) -> NDArray[np.float32]:
        weight = self.tensors.floats(f"{name}.weight")
        return weight + np.float32(1) if self.config.gemma else weight


def open_decoder(folder: Path, engine: str) -> DecoderFiles:
    """Open the QuantizedModel in `folder` for `engine`, which errors name.

    :raises Unsupported: when the family is not known, or layers are stored transposed.
    :raises QhubError: when the folder is not a whole QuantizedModel.
    """
    if not (folder / "qhub.json").exists():
        raise Unsupported(
            f"`{folder}` is not a model that qhub quantized: it has no qhub.json", hint="`qhub run MODEL` makes such a folder"
        )
    metadata = read_json(folder / "qhub.json")
    try:
        config = decoder_config(read_json(folder / "config.json"), engine)
        schemes = {str(name): Scheme.parse(text) for name, text in metadata["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise QhubError(f"`{folder}` is damaged: its config.json or qhub.json lacks or garbles {error}", hint=_AGAIN) from None
    if metadata.get("transposed"):
        raise Unsupported(f"`{engine}` does not run layers that are stored transposed", hint="`--runtime hf` opens it with transformers")
    try:
        return DecoderFiles(folder, config, schemes)
    except ValueError as error:
        raise misfit(folder, error) from None


def misfit(folder: Path, error: Exception) -> QhubError:
    """The error for tensors that do not have the sizes that config.json says."""
    first = str(error).strip().partition("\n")[0]
    return QhubError(f"`{folder}` does not fit its config.json: {first}", hint=_AGAIN)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    :raises QhubError: when it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"`{path.parent}` is not a model that qhub quantized: it has no {path.name}"
        raise QhubError(message, hint="`qhub run MODEL` makes one") from None
    except (ValueError, OSError) as error:
        raise QhubError(f"`{path}` cannot be read: {error}", hint=_AGAIN) from None
    if not isinstance(value, dict):
        raise QhubError(f"`{path}` is not a JSON object", hint=_AGAIN)
    return value
