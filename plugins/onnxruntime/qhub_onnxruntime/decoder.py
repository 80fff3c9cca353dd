"""The graph of a decoder: what `qhub.DecoderConfig` describes, in the operators that ONNX Runtime is fast at.

Inputs are those that onnxruntime-genai gives: input_ids (batch, sequence), attention_mask (batch, positions so far),
past_key_values.N.key and .value (batch, kv heads, past, head). One more has a default, so that nobody needs to give it:
`logits_from` (1), the first token whose logits are wanted, 0 for all of them, −1 for the last one only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, ValueInfoProto, helper

from qhub import DecoderConfig, DecoderFiles
from qhub_onnxruntime.graph import MICROSOFT, Graph
from qhub_onnxruntime.linear import Linears, Quantized

LOGITS_FROM = "logits_from"
ROPE = "rope."  # the beginning of the names of rotary tables
_END = np.iinfo(np.int64).max
_QUERY_KEY = ("query", "key")


@dataclass(frozen=True)
class Positions:
    """Names of what attention needs to know of the batch: seqlens_k (batch), positions in all, ids (batch, sequence)."""

    last: str
    total: str
    ids: str


def cache_names(block: int, end: str = "past_key_values") -> tuple[str, str]:
    """The names of the keys and the values of a block: `past_key_values.N.…` or `present.N.…`."""
    return f"{end}.{block}.key", f"{end}.{block}.value"


class DecoderGraph:
    """Writes the nodes of one model into `graph`."""

    def __init__(self, graph: Graph, files: DecoderFiles, quantized: Quantized) -> None:
        self.graph, self.files, self.config = graph, files, files.config
        self.linears = Linears(graph, files, quantized)

    def build(self) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
        """All nodes; returns the inputs and outputs."""
        config, graph = self.config, self.graph
        graph.constant(LOGITS_FROM, np.zeros(1, dtype=np.int64))
        positions = self._positions()
        hidden = self.linears.rows(self.files.embedding, "input_ids")
        if config.embedding_scale != 1.0:
            hidden = graph.node("Mul", [hidden, self._scalar("embedding_scale", config.embedding_scale)], "embedded")
        added: str | None = None  # what is not yet added to `hidden`: the next norm adds it
        for block in range(config.layers):
            hidden, added = self._block(block, hidden, added, positions)
        wanted = (f"{name}/wanted" for name in ("hidden", "added"))
        hidden, added = (self._from(name, to) for name, to in zip((hidden, added or hidden), wanted, strict=True))
        _, normed = self._add_norm(hidden, added, self.files.last_norm(), "last")
        self._head(normed)
        return self._inputs(), self._outputs()

    def _positions(self) -> Positions:
        graph = self.graph
        one, zero = graph.constant("one", np.array([1])), graph.constant("zero", np.array([0]))
        counted = graph.node("ReduceSum", ["attention_mask", one], "mask/counted", keepdims=0)
        last = graph.node("Cast", [graph.node("Sub", [counted, one], "mask/last")], "seqlens_k", to=TensorProto.INT32)
        width = graph.node("Shape", ["attention_mask"], "mask/total", start=1, end=2)
        total = graph.node("Cast", [graph.node("Squeeze", [width, zero], "mask/scalar")], "total_sequence_length", to=TensorProto.INT32)
        length = graph.node("Shape", ["input_ids"], "ids/length", start=1, end=2)
        first = graph.node("Max", [graph.node("Sub", [counted, length], "ids/before"), zero], "ids/first")  # padded prompts begin at 0
        scalars = [
            graph.constant("begin", np.array(0)),
            graph.node("Squeeze", [length, zero], "ids/scalar"),
            graph.constant("step", np.array(1)),
        ]
        offsets = graph.node("Range", scalars, "ids/offsets")
        ids = graph.node("Add", [graph.node("Unsqueeze", [first, one], "ids/column"), offsets], "position_ids")
        return Positions(last, total, ids)

    def _block(self, block: int, hidden: str, added: str | None, positions: Positions) -> tuple[str, str]:
        """Returns hidden states, and what is to be added to them."""
        places, norms = self.files.linears(block), self.files.norms(block)
        hidden, normed = self._add_norm(hidden, added, norms["attention"], f"block.{block}/attention_in")
        attended = self._attention(block, self._project(places["qkv"], normed), positions)
        out = self.linears.apply(places["out"][0], attended)
        if "attention_out" in norms:
            out = self._norm(out, norms["attention_out"], f"block.{block}/attention_out")
        hidden, normed = self._add_norm(hidden, out, norms["mlp"], f"block.{block}/mlp_in")
        out = self.linears.apply(places["down"][0], self._gated(places["gate_up"], normed, f"block.{block}/mlp"))
        if "mlp_out" in norms:
            out = self._norm(out, norms["mlp_out"], f"block.{block}/mlp_out")
        return hidden, out

    def _project(self, names: Sequence[str], source: str) -> list[str]:
        """query, key and value."""
        found = [self.linears.apply(name, source) for name in names]
        if len(found) == 3:
            return found
        heads, kv, dim = self.config.heads, self.config.kv_heads, self.config.dim
        sizes = self.graph.constant("qkv/sizes", np.array([heads * dim, kv * dim, kv * dim]))
        parts = [f"{names[0]}/{part}" for part in ("query", "key", "value")]
        self.graph.node("Split", [found[0], sizes], parts, axis=-1)
        return parts

    def _attention(self, block: int, parts: list[str], positions: Positions) -> str:
        config, norms, at = self.config, self.files.norms(block), f"block.{block}/attention"
        counts = (config.heads, config.kv_heads)
        for index, (place, count) in enumerate(zip(_QUERY_KEY, counts, strict=True)):
            if place in norms:
                parts[index] = self._head_norm(parts[index], norms[place], count, f"{at}/{place}")
        tables = self._tables(config.ropes[block])
        inside = _turns_inside(config)
        if not inside:
            for index, (place, count) in enumerate(zip(_QUERY_KEY, counts, strict=True)):
                parts[index] = self._turned(parts[index], (positions.ids, *tables), count, f"{at}/{place}_turned")
        inputs = [*parts, *cache_names(block), positions.last, positions.total, *(tables if inside else ())]
        attributes = {
            "num_heads": config.heads,
            "kv_num_heads": config.kv_heads,
            "scale": config.attention_scale,
            "softcap": config.attention_softcap,
            "do_rotary": int(inside),
            "local_window_size": config.windows[block] or -1,
        }
        return self.graph.node("GroupQueryAttention", inputs, [at, *cache_names(block, "present")], MICROSOFT, **attributes)

    def _tables(self, index: int) -> tuple[str, str]:
        """Cosines and sines (context, half) of rotary table `index`, in float32 as transformers computes angles."""
        frequencies, factor = self.config.tables[index]
        names = f"{ROPE}{index}.cos", f"{ROPE}{index}.sin"
        if names[0] not in self.graph.initializers:
            angles = np.arange(self.config.context, dtype=np.float32)[:, None] * frequencies
            for name, function in zip(names, (np.cos, np.sin), strict=True):
                self.graph.constant(name, (function(angles) * np.float32(factor)).astype(np.float32))
        return names

    def _turned(self, source: str, others: Sequence[str], heads: int, name: str) -> str:
        turned = 2 * len(self.config.tables[0][0])
        part = {"rotary_embedding_dim": turned} if turned < self.config.dim else {}
        return self.graph.node("RotaryEmbedding", [source, *others], name, MICROSOFT, num_heads=heads, **part)

    def _head_norm(self, source: str, weight: NDArray[np.float32], heads: int, name: str) -> str:
        apart = self.graph.constant(f"heads.{heads}", np.array([0, 0, heads, self.config.dim]))
        together = self.graph.constant(f"joined.{heads}", np.array([0, 0, heads * self.config.dim]))
        split = self.graph.node("Reshape", [source, apart], f"{name}/heads")
        return self.graph.node("Reshape", [self._norm(split, weight, f"{name}/normed"), together], name)

    def _gated(self, names: Sequence[str], source: str, at: str) -> str:
        found = [self.linears.apply(name, source) for name in names]
        if len(found) == 1:
            self.graph.node("Split", found, [f"{at}/gate", f"{at}/up"], axis=-1, num_outputs=2)
            found = [f"{at}/gate", f"{at}/up"]
        return self.graph.node("Mul", [self._gate(found[0], at), found[1]], f"{at}/gated")

    def _gate(self, source: str, at: str) -> str:
        if self.config.gate == 0:
            return self.graph.node("Mul", [source, self.graph.node("Sigmoid", [source], f"{at}/sigmoid")], f"{at}/silu")
        return self.graph.node("Gelu", [source], f"{at}/gelu", approximate="tanh" if self.config.gate == 1 else "none")

    def _norm(self, source: str, weight: NDArray[np.float32], name: str) -> str:
        gamma = self.graph.constant(f"{name}.weight", weight)
        return self.graph.node("RMSNormalization", [source, gamma], name, axis=-1, epsilon=self.config.eps)

    def _add_norm(self, hidden: str, added: str | None, weight: NDArray[np.float32], name: str) -> tuple[str, str]:
        """(hidden + added, its norm)."""
        if added is None:
            return hidden, self._norm(hidden, weight, name)
        gamma, total = self.graph.constant(f"{name}.weight", weight), f"{name}/sum"
        outputs = [name, "", "", total]
        self.graph.node("SkipSimplifiedLayerNormalization", [hidden, added, gamma], outputs, MICROSOFT, epsilon=self.config.eps)
        return total, name

    def _from(self, source: str, name: str) -> str:
        """The tokens from `logits_from` on."""
        ends = [self.graph.constant("ends", np.array([_END])), self.graph.constant("one", np.array([1]))]
        return self.graph.node("Slice", [source, LOGITS_FROM, *ends], name)

    def _head(self, source: str) -> None:
        logits = self.linears.apply(self.files.head, source)
        cap = self.config.logit_softcap
        if cap:
            scalar = self._scalar("logit_softcap", cap)
            bent = self.graph.node("Tanh", [self.graph.node("Div", [logits, scalar], "head/divided")], "head/bent")
            logits = self.graph.node("Mul", [bent, scalar], "head/capped")
        self.graph.node("Identity", [logits], "logits")

    def _scalar(self, name: str, value: float) -> str:
        return self.graph.constant(name, np.array(value, dtype=np.float32))

    def _inputs(self) -> list[ValueInfoProto]:
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
        mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])
        return [ids, mask, *self._caches("past_key_values", "past"), helper.make_tensor_value_info(LOGITS_FROM, TensorProto.INT64, [1])]

    def _outputs(self) -> list[ValueInfoProto]:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "wanted", self.config.vocabulary])
        return [logits, *self._caches("present", "kept")]

    def _caches(self, end: str, length: str) -> list[ValueInfoProto]:
        shape = ["batch", self.config.kv_heads, length, self.config.dim]
        names = [name for block in range(self.config.layers) for name in cache_names(block, end)]
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]


def _turns_inside(config: DecoderConfig) -> bool:
    """Whether `GroupQueryAttention` turns heads of this size itself."""
    half = len(config.tables[0][0])
    return config.dim % 16 == 0 and half % 8 == 0
