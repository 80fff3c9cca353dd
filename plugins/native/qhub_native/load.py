"""From a QuantizedModel's folder to a decoder in memory."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub import QhubError, Scheme, Unsupported
from qhub_native import packs
from qhub_native._native import Architecture, Decoder, Embedding, Linear, Pool, Shape, pack, pack_float
from qhub_native.families import Family, family_of
from qhub_native.layers import Stored, packed_shape, read_layer
from qhub_native.selector import Selector, ShapeKey, by_shape
from qhub_native.tensors import Tensors

_HEAD_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Options:
    """How a model is opened. `exact` multiplies in float32 and keeps float layers as they are; else a float head is rounded to 8 bits."""

    threads: int
    kernel: str
    exact: bool = False
    forced: bool = False  # the kernel was named: nothing else is tried
    cache: bool = True
    cache_bits: int = 16  # of keys and values on the fast path: 16 or 8


@dataclass(frozen=True)
class Slot:
    """Where layers go: a stack of a decoder block, e.g. qkv of block 3, and the layers' full names."""

    block: int
    stack: str
    names: tuple[str, ...]


@dataclass
class Loaded:
    """A model in memory: what `Session` works with. `owners` keeps the memory that the decoder looks at.

    `bytes_per_token` of weights are read for a new token: every matrix. `mapped`: they came packed from the cache.
    """

    family: Family
    decoder: Decoder
    pool: Pool
    options: Options
    packed_bytes: int
    bytes_per_token: int
    mapped: bool
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
        raise Unsupported("`native` does not run layers that are stored transposed", hint="qhub eval DIR --runtime hf")
    try:
        return _Loader(Tensors(folder), family, schemes, options).load()
    except (ValueError, TypeError, OverflowError, MemoryError) as error:  # what the binding and numpy say of shapes that do not fit
        first = str(error).strip().partition("\n")[0]
        raise QhubError(f"`{folder}` does not fit its config.json: {first}", hint="quantize the model again") from None


class _Loader:
    def __init__(self, tensors: Tensors, family: Family, schemes: Mapping[str, Scheme], options: Options) -> None:
        self.tensors, self.family, self.schemes, self.options = tensors, family, schemes, options
        self.pool = Pool(options.threads)
        self.prefix = "model." if "model.embed_tokens.weight" in tensors else ""
        self.head_name = f"{self.prefix}embed_tokens" if family.tied or "lm_head.weight" not in tensors else "lm_head"
        self.groups = self._grouped()

    def load(self) -> Loaded:
        opened = self._open_pack()
        linears = {name: Linear.quantized(opened.matrix(name), entry.shape, entry.exponent) for name, entry in opened.entries.items()}
        decoder = self._decoder(linears)
        total = sum(entry.shape.packed_bytes for entry in opened.entries.values())
        dense = sum(self.tensors.info(f"{name}.weight").bytes for name, linear in linears.items() if not linear.is_packed)
        selector, owners = self._selector(opened, linears), (opened, self.tensors)
        return Loaded(self.family, decoder, self.pool, self.options, total, total + dense, opened.mapped, selector, owners)

    def _selector(self, opened: packs.Pack, linears: Mapping[str, Linear]) -> Selector:
        keys = {
            name: ShapeKey(entry.inputs, entry.rows, entry.bits, entry.group, entry.symmetric) for name, entry in opened.entries.items()
        }
        return Selector(
            by_shape((key, linears[name]) for name, key in keys.items()), self.pool, self.options.kernel if self.options.forced else None
        )

    def _slots(self) -> list[Slot]:
        slots = []
        for block in range(self.family.layers):
            at = f"{self.prefix}layers.{block}"
            attention, mlp = f"{at}.self_attn", f"{at}.mlp"
            qkv = (f"{attention}.qkv_proj",) if self.family.fused else tuple(f"{attention}.{x}_proj" for x in "qkv")
            gate_up = (f"{mlp}.gate_up_proj",) if self.family.fused else (f"{mlp}.gate_proj", f"{mlp}.up_proj")
            slots += [Slot(block, "qkv", qkv), Slot(block, "out", (f"{attention}.o_proj",))]
            slots += [Slot(block, "gate_up", gate_up), Slot(block, "down", (f"{mlp}.down_proj",))]
        return slots

    def _grouped(self) -> dict[tuple[int, str], list[tuple[str, ...]]]:
        """Each stack's layers, those of one scheme that follow one another together."""
        found: dict[tuple[int, str], list[tuple[str, ...]]] = {}
        for slot in self._slots():
            runs: list[tuple[str, ...]] = []
            for name in slot.names:
                alike = runs and name in self.schemes and self.schemes.get(runs[-1][0]) == self.schemes[name]
                runs[-1:] = [(*runs[-1], name)] if alike else [*runs[-1:], (name,)]
            found[slot.block, slot.stack] = runs
        return found

    def _open_pack(self) -> packs.Pack:
        key = packs.key_of(self.tensors.files.files(), {"exact": self.options.exact, "head": self.head_name})
        path = packs.cache_folder() / f"{key[:32]}.pack"
        opened = packs.open_pack(path, key, self.pool) if self.options.cache else None
        if opened is None:
            opened = self._pack()
            if self.options.cache:
                _keep(path, key, opened)
        return opened

    def _pack(self) -> packs.Pack:
        shapes = {
            names[0]: packed_shape(self.tensors, names, self.schemes[names[0]])
            for runs in self.groups.values()
            for names in runs
            if names[0] in self.schemes
        }
        if not self.options.exact:
            shapes[self.head_name] = self._head_shape()
        entries = packs.plan(shapes)
        memory = aligned(max(entry.offset + entry.shape.packed_bytes for entry in entries.values()))
        made = packs.Pack(entries, memory, 0)
        for runs in self.groups.values():
            for names in runs:
                if names[0] in self.schemes:
                    parts = [read_layer(self.tensors, name, self.schemes[name]) for name in names]
                    entries[names[0]] = replace(
                        entries[names[0]], exponent=self._pack_parts(shapes[names[0]], parts, made.matrix(names[0]))
                    )
                    self.tensors.release()
        if self.head_name in entries:
            self._pack_head(entries[self.head_name].shape, made.matrix(self.head_name))
        for name, entry in entries.items():
            entries[name] = replace(entry, checksum=packs.checksum(self.pool, made.matrix(name)))
        return made

    def _pack_parts(self, shape: Shape, parts: list[Stored], memory: NDArray[np.uint8]) -> int:
        try:
            return int(pack(self.pool, shape, [part.part() for part in parts], memory))
        except ValueError as error:
            raise QhubError(
                f"a layer of `{self.tensors.files.folder}` does not fit its scheme: {error}", hint="quantize the model again"
            ) from None

    def _head_shape(self) -> Shape:
        rows, inputs = self.tensors.info(f"{self.head_name}.weight").shape
        group = next((size for size in _HEAD_GROUPS if inputs % size == 0), 32)
        return Shape(rows, inputs, group=group, bits=8, symmetric=True)

    def _pack_head(self, shape: Shape, memory: NDArray[np.uint8]) -> None:
        name = f"{self.head_name}.weight"
        pack_float(self.pool, shape, self.tensors.raw(name), self.tensors.info(name).dtype, memory)
        self.tensors.release()

    def _decoder(self, linears: dict[str, Linear]) -> Decoder:
        decoder = Decoder(_architecture(self.family), list(self.family.tables), self.pool, self.options.kernel, self.options.exact)
        for block in range(self.family.layers):
            stacks = {stack: self._stack(linears, self.groups[block, stack]) for stack in ("qkv", "out", "gate_up", "down")}
            decoder.add_layer(**stacks, norms=self._norms(block), window=self.family.windows[block], rope=self.family.ropes[block])
        rows = self.tensors.info(f"{self.prefix}embed_tokens.weight")
        embedding = Embedding(str(rows.file), rows.offset, rows.dtype, *rows.shape)
        head = linears.get(self.head_name) or linears.setdefault(self.head_name, self._dense(self.head_name))
        decoder.set_ends(embedding, head, self._norm(f"{self.prefix}norm"))
        return decoder

    def _stack(self, linears: dict[str, Linear], runs: list[tuple[str, ...]]) -> list[Linear]:
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
        at = f"{self.prefix}layers.{block}"
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


def aligned(count: int) -> NDArray[np.uint8]:
    """`count` bytes that begin at a multiple of 4096."""
    memory = np.empty(count + 4096, dtype=np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + count]


def _architecture(family: Family) -> Architecture:
    made = Architecture()
    for name in ("hidden", "heads", "kv_heads", "dim", "ffn", "vocabulary", "context", "eps", "gate", "embedding_scale"):
        setattr(made, name, getattr(family, name))
    made.attention_scale, made.attention_softcap, made.logit_softcap = (
        family.attention_scale,
        family.attention_softcap,
        family.logit_softcap,
    )
    return made
