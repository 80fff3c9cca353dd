"""The IR of a decoder: what `qhub.DecoderConfig` describes, in the forms that OpenVINO's plugins fuse.

Inputs are those that openvino-genai and optimum-intel give: input_ids (batch, sequence), attention_mask (batch, positions so
far), position_ids (batch, sequence), beam_idx (batch); keys and values are states inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qhub import DecoderFiles
from qhub_openvino.attention import Attention, Batch
from qhub_openvino.constants import Constants
from qhub_openvino.linear import Linears
from qhub_openvino.norms import rms_norm
from qhub_openvino.vendor import ops, ov

_INPUTS = {"input_ids": 2, "attention_mask": 2, "position_ids": 2}
BEAMS, LOGITS, LAST = "beam_idx", "logits", "last_hidden_state"


class DecoderIR:
    """Builds the IR of one model from its files."""

    def __init__(self, constants: Constants, files: DecoderFiles) -> None:
        self.files, self.config = files, files.config
        self.linears = Linears(constants, files)

    def build(self) -> ov.Model:
        """All of it."""
        config, batch, parameters = self.config, *_inputs()
        attention = Attention(config, batch)
        hidden = ops.gather(self.linears.matrix(self.files.embedding), batch.ids, 0).output(0)
        if config.embedding_scale != 1.0:
            hidden = ops.multiply(hidden, np.float32(config.embedding_scale)).output(0)
        for block in range(config.layers):
            hidden = self._block(block, hidden, attention)
        hidden = rms_norm(hidden, self.files.last_norm(), config.eps)
        hidden.get_node().set_friendly_name(LAST)
        logits = self._head(hidden)
        result = ops.result(logits, name=LOGITS)
        result.output(0).set_names({LOGITS})
        return ov.Model([result], attention.sinks, parameters, config.kind)

    def _block(self, block: int, hidden: ov.Output, attention: Attention) -> ov.Output:
        places, norms, eps = self.files.linears(block), self.files.norms(block), self.config.eps
        parts = self._project(places["qkv"], rms_norm(hidden, norms["attention"], eps))
        out = self.linears.apply(places["out"][0], attention.apply(block, parts, norms))
        if "attention_out" in norms:
            out = rms_norm(out, norms["attention_out"], eps)
        hidden = ops.add(hidden, out).output(0)
        out = self.linears.apply(places["down"][0], self._gated(places["gate_up"], rms_norm(hidden, norms["mlp"], eps)))
        if "mlp_out" in norms:
            out = rms_norm(out, norms["mlp_out"], eps)
        return ops.add(hidden, out).output(0)

    def _project(self, names: Sequence[str], source: ov.Output) -> list[ov.Output]:
        """query, key and value."""
        found = [self.linears.apply(name, source) for name in names]
        heads, kv, dim = self.config.heads, self.config.kv_heads, self.config.dim
        return found if len(found) == 3 else _split(found[0], (heads * dim, kv * dim, kv * dim))

    def _gated(self, names: Sequence[str], source: ov.Output) -> ov.Output:
        found = [self.linears.apply(name, source) for name in names]
        gate, up = found if len(found) == 2 else _split(found[0], (self.config.ffn, self.config.ffn))
        return ops.multiply(self._gate(gate), up).output(0)

    def _gate(self, source: ov.Output) -> ov.Output:
        if self.config.gate == 0:
            return ops.swish(source).output(0)
        return ops.gelu(source, "tanh" if self.config.gate == 1 else "erf").output(0)

    def _head(self, source: ov.Output) -> ov.Output:
        logits, cap = self.linears.apply(self.files.head, source), self.config.logit_softcap
        if not cap:
            return logits
        return ops.multiply(ops.tanh(ops.divide(logits, np.float32(cap))), np.float32(cap)).output(0)


def _inputs() -> tuple[Batch, list[ov.op.Parameter]]:
    parameters = [_input(name, ov.Type.i64, rank) for name, rank in _INPUTS.items()] + [_input(BEAMS, ov.Type.i32, 1)]
    return Batch(*(parameter.output(0) for parameter in parameters)), parameters


def _input(name: str, kind: ov.Type, rank: int) -> ov.op.Parameter:
    parameter = ops.parameter([-1] * rank, kind, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _split(source: ov.Output, sizes: Sequence[int]) -> list[ov.Output]:
    parts: list[ov.Output] = ops.variadic_split(source, -1, np.array(sizes, dtype=np.int64)).outputs()
    return parts
