"""From a QuantizedModel's folder to a decoder in memory."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub import QhubError, Scheme, Unsupported
from qhub_native import packs
from qhub_native._native import Architecture, Decoder, Embedding, Linear, Pool
from qhub_native.families import Family, family_of
from qhub_native.matrices import STACKS, Matrices, Run, pack_all
from qhub_native.selector import Selector, ShapeKey, by_shape
from qhub_native.tensors import Tensors

_SIZES = ("hidden", "heads", "kv_heads", "dim", "ffn", "vocabulary", "context", "eps", "gate")
_FACTORS = ("embedding_scale", "attention_scale", "attention_softcap", "logit_softcap")


@dataclass(frozen=True)
class Options:
    """How a model is opened. `exact` multiplies in float32 and keeps float layers as they are; else a float head is rounded to 8 bits."""

    threads: int
    kernel: str
    exact: bool = False
    forced: bool = False  # the kernel was named: nothing else is tried
    cache: bool = True
    cache_bits: int = 16  # of keys and values on the fast path: 16 or 8


@dataclass
class Loaded:
    """A model in memory: what `Session` works with. `owners` keeps the memory that the decoder looks at.

    `bytes_per_token` of weights are read for a new token: every matrix. `from_cache`: they came packed from there.
    """

    family: Family
    decoder: Decoder
    pool: Pool
    options: Options
    packed_bytes: int
    bytes_per_token: int
    from_cache: bool
    selector: Selector
    owners: tuple[Any, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    :raises QhubError: when it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QhubError(
            f"`{path.parent}` is not a model that qhub quantized: it has no {path.name}", hint="`qhub run MODEL` makes one"
        ) from None
    except (ValueError, OSError) as error:
        raise QhubError(f"`{path}` cannot be read: {error}", hint="quantize the model again") from None
    if not isinstance(value, dict):
        raise QhubError(f"`{path}` is not a JSON object", hint="quantize the model again")
    return value


def load(folder: Path, options: Options) -> Loaded:
    """Open the QuantizedModel in `folder`.

    :raises Unsupported: when the family or a scheme has no kernels here.
    :raises QhubError: when the folder is not a whole QuantizedModel.
    """
    if not (folder / "qhub.json").exists():
        raise Unsupported(
            f"`{folder}` is not a model that qhub quantized: it has no qhub.json", hint="`qhub run MODEL` makes such a folder"
        )
    metadata = read_json(folder / "qhub.json")
    try:
        family = family_of(read_json(folder / "config.json"))
        schemes = {str(name): Scheme.parse(text) for name, text in metadata["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise QhubError(
            f"`{folder}` is damaged: its config.json or qhub.json lacks or garbles {error}", hint="quantize the model again"
        ) from None
    if metadata.get("transposed"):
        raise Unsupported("`native` does not run layers that are stored transposed", hint="`--runtime hf` opens it with transformers")
    try:
        return _Loader(Matrices(Tensors(folder), family, schemes), options).load()
    except (ValueError, TypeError, OverflowError, MemoryError) as error:  # what the binding and numpy say of shapes that do not fit
        first = str(error).strip().partition("\n")[0]
        raise QhubError(f"`{folder}` does not fit its config.json: {first}", hint="quantize the model again") from None


class _Loader:
    def __init__(self, matrices: Matrices, options: Options) -> None:
        self.matrices, self.options = matrices, options
        self.tensors, self.family = matrices.tensors, matrices.family
        self.pool = Pool(options.threads)

    def load(self) -> Loaded:
        opened = self._open_pack()
        linears = {name: Linear.quantized(opened.matrix(name), entry.shape, entry.exponent) for name, entry in opened.entries.items()}
        decoder = self._decoder(linears)
        total = sum(entry.shape.packed_bytes for entry in opened.entries.values())
        dense = sum(self.tensors.info(f"{name}.weight").bytes for name, linear in linears.items() if not linear.is_packed)
        selector, owners = self._selector(opened, linears), (opened, self.tensors)
        return Loaded(self.family, decoder, self.pool, self.options, total, total + dense, opened.from_cache, selector, owners)

    def _open_pack(self) -> packs.Pack:
        key = packs.key_of(self.tensors.files.files(), {"exact": self.options.exact, "head": self.matrices.head})
        path = packs.cache_folder() / f"{key[:32]}.pack"
        opened = packs.open_pack(path, key, self.pool) if self.options.cache else None
        if opened is None:
            opened = pack_all(self.matrices, self.pool, exact=self.options.exact)
            if self.options.cache:
                _keep(path, key, opened)
        return opened

    def _selector(self, opened: packs.Pack, linears: dict[str, Linear]) -> Selector:
        keys = {name: ShapeKey(made.inputs, made.rows, made.bits, made.group, made.symmetric) for name, made in opened.entries.items()}
        forced = self.options.kernel if self.options.forced else None
        return Selector(by_shape((key, linears[name]) for name, key in keys.items()), keys.get(self.matrices.head), self.pool, forced)

    def _decoder(self, linears: dict[str, Linear]) -> Decoder:
        decoder = Decoder(_architecture(self.family), list(self.family.tables), self.pool, self.options.kernel, self.options.exact)
        for block in range(self.family.layers):
            stacks = {stack: self._stack(linears, self.matrices.runs[block, stack]) for stack in STACKS}
            decoder.add_layer(**stacks, norms=self._norms(block), window=self.family.windows[block], rope=self.family.ropes[block])
        rows = self.tensors.info(f"{self.matrices.prefix}embed_tokens.weight")
        embedding = Embedding(str(rows.file), rows.offset, rows.dtype, *rows.shape)
        head = linears.get(self.matrices.head) or linears.setdefault(self.matrices.head, self._dense(self.matrices.head))
        decoder.set_ends(embedding, head, self._norm(f"{self.matrices.prefix}norm"))
        return decoder

    def _stack(self, linears: dict[str, Linear], runs: list[Run]) -> list[Linear]:
        stack = []
        for names in runs:
            linear = linears.get(names[0]) or linears.setdefault(names[0], self._dense(names[0]))
            if any(f"{name}.bias" in self.tensors for name in names):
                linear.set_bias(np.concatenate([self._bias(name) for name in names]))
            stack.append(linear)
        return stack

    def _bias(self, name: str) -> NDArray[np.float32]:
        if f"{name}.bias" in self.tensors:
            return self.tensors.floats(f"{name}.bias")
        return np.zeros(int(self.tensors.array(f"{name}.weight_shape")[0]), dtype=np.float32)

    def _dense(self, name: str) -> Linear:
        info = self.tensors.info(f"{name}.weight")
        return Linear.dense(self.tensors.raw(f"{name}.weight"), info.dtype, *info.shape)

    def _norms(self, block: int) -> dict[str, NDArray[np.float32]]:
        at = f"{self.matrices.prefix}layers.{block}"
        names = {"attention": f"{at}.input_layernorm", "mlp": f"{at}.post_attention_layernorm"}
        if self.family.gemma:
            names |= {
                "attention_out": names["mlp"],
                "mlp": f"{at}.pre_feedforward_layernorm",
                "mlp_out": f"{at}.post_feedforward_layernorm",
            }
        if self.family.head_norms:
            names |= {"query": f"{at}.self_attn.q_norm", "key": f"{at}.self_attn.k_norm"}
        return {place: self._norm(name) for place, name in names.items()}

    def _norm(self, name: str) -> NDArray[np.float32]:
        weight = self.tensors.floats(f"{name}.weight")
        return weight + np.float32(1) if self.family.gemma else weight


def _keep(path: Path, key: str, made: packs.Pack) -> None:
    """Write the pack while the model already runs; on a full or read-only disk the next start packs again."""

    def write() -> None:
        with contextlib.suppress(OSError):
            packs.write_pack(path, key, made)

    threading.Thread(target=write, name="qhub-native-pack").start()


def _architecture(family: Family) -> Architecture:
    made = Architecture()
    for name in (*_SIZES, *_FACTORS):
        setattr(made, name, getattr(family, name))
    return made
