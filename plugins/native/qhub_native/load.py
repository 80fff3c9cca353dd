"""From a QuantizedModel's folder to a decoder in memory."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub import DecoderConfig, misfit, open_decoder
from qhub_native import packs
from qhub_native._native import Architecture, Decoder, Embedding, Linear, Pool
from qhub_native.matrices import STACKS, Matrices, Run, pack_all
from qhub_native.selector import Selector, ShapeKey, by_shape

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

    config: DecoderConfig
    decoder: Decoder
    pool: Pool
    options: Options
    packed_bytes: int
    bytes_per_token: int
    from_cache: bool
    selector: Selector
    owners: tuple[Any, ...]


def load(folder: Path, options: Options) -> Loaded:
    """Open the QuantizedModel in `folder`.

    :raises Unsupported: when the family or a scheme has no kernels here.
    :raises QhubError: when the folder is not a whole QuantizedModel.
    """
    files = open_decoder(folder, "native")
    try:
        return _Loader(Matrices(files), options).load()
    except (ValueError, TypeError, OverflowError, MemoryError) as error:  # what the binding and numpy say of shapes that do not fit
        raise misfit(folder, error) from None


class _Loader:
    def __init__(self, matrices: Matrices, options: Options) -> None:
        self.matrices, self.options = matrices, options
        self.files, self.tensors, self.config = matrices.files, matrices.tensors, matrices.files.config
        self.pool = Pool(options.threads)

    def load(self) -> Loaded:
        opened = self._open_pack()
        linears = {name: Linear.quantized(opened.matrix(name), entry.shape, entry.exponent) for name, entry in opened.entries.items()}
        decoder = self._decoder(linears)
        total = sum(entry.shape.packed_bytes for entry in opened.entries.values())
        dense = sum(self.tensors.info(f"{name}.weight").bytes for name, linear in linears.items() if not linear.is_packed)
        selector, owners = self._selector(opened, linears), (opened, self.tensors)
        return Loaded(self.config, decoder, self.pool, self.options, total, total + dense, opened.from_cache, selector, owners)

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
        decoder = Decoder(_architecture(self.config), list(self.config.tables), self.pool, self.options.kernel, self.options.exact)
        for block in range(self.config.layers):
            stacks = {stack: self._stack(linears, self.matrices.runs[block, stack]) for stack in STACKS}
            decoder.add_layer(**stacks, norms=self.files.norms(block), window=self.config.windows[block], rope=self.config.ropes[block])
        rows = self.tensors.info(f"{self.files.embedding}.weight")
        embedding = Embedding(str(rows.file), rows.offset, rows.dtype, *rows.shape)
        head = linears.get(self.matrices.head) or linears.setdefault(self.matrices.head, self._dense(self.matrices.head))
        decoder.set_ends(embedding, head, self.files.last_norm())
        return decoder

    def _stack(self, linears: dict[str, Linear], runs: list[Run]) -> list[Linear]:
        stack = []
        for names in runs:
            linear = linears.get(names[0]) or linears.setdefault(names[0], self._dense(names[0]))
            biases = [self.files.bias(name) for name in names]
            if any(bias is not None for bias in biases):
                linear.set_bias(np.concatenate([self._filled(name, bias) for name, bias in zip(names, biases, strict=True)]))
            stack.append(linear)
        return stack

    def _filled(self, name: str, bias: NDArray[np.float32] | None) -> NDArray[np.float32]:
        return np.zeros(self.files.shape(name)[0], dtype=np.float32) if bias is None else bias

    def _dense(self, name: str) -> Linear:
        info = self.tensors.info(f"{name}.weight")
        return Linear.dense(self.tensors.raw(f"{name}.weight"), info.dtype, *info.shape)


def _keep(path: Path, key: str, made: packs.Pack) -> None:
    """Write the pack while the model already runs; on a full or read-only disk the next start packs again."""

    def write() -> None:
        with contextlib.suppress(OSError):
            packs.write_pack(path, key, made)

    threading.Thread(target=write, name="qhub-native-pack").start()


def _architecture(config: DecoderConfig) -> Architecture:
    made = Architecture()
    for name in (*_SIZES, *_FACTORS):
        setattr(made, name, getattr(config, name))
    return made
