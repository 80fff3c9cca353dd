"""Where a network is rounded so that its operations can compute in integers: from the kinds of its operations alone.

- A convolution and a linear layer read rounded numbers.
- What a convolution makes is rounded for everyone who reads it, after a ReLU where one follows: engines then write integers.
- Sums and products of what convolutions made (residual connections) compute in integers; residual streams that run from
  norm to norm, as in transformers, stay float: rounding them costs accuracy and saves no product.
- What only moves numbers is rounded as what it moves.
Sources: the quantizer propagation of NNCF, and onnxruntime's Q/DQ selectors (which operations run in integers between which pairs).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qhub.graph.values import Op, Point


def place(ops: Sequence[Op]) -> tuple[Point, ...]:
    """Every tensor to round, in the order in which they are made."""
    return _Placement(ops).points()


class _Placement:
    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = {op.name: op for op in ops}
        self.users: dict[str, list[Op]] = {}
        for op in ops:
            for name in dict.fromkeys(op.inputs):
                self.users.setdefault(name, []).append(op)
        self.from_conv = self._made_by_convolutions(ops)
        self.joins = self._integer_joins(ops)

    def points(self) -> tuple[Point, ...]:
        readers: dict[str, tuple[str, ...]] = {}
        like: dict[str, str] = {}
        inputs = [name for op in self.ops.values() for name in op.inputs if name not in self.ops]
        for tensor in (*dict.fromkeys(inputs), *self.ops):
            carried = self._carried(tensor, readers)
            there = self.users.get(tensor, []) if carried or self._written_rounded(tensor) else self._readers(tensor)
            if there:
                readers[tensor] = tuple(op.name for op in there)
                if carried:
                    like[tensor] = like.get(carried, carried)
        return tuple(Point(tensor, there, like.get(tensor)) for tensor, there in readers.items())

    def _made_by_convolutions(self, ops: Iterable[Op]) -> set[str]:
        """The tensors that a convolution made, or a ReLU, a sum, an average or a move of such ones."""
        found: set[str] = set()
        for op in ops:
            if op.kind == "conv" or (op.kind in ("clip", "carry", "join", "pool") and any(name in found for name in op.inputs)):
                found.add(op.name)
        return found

    def _integer_joins(self, ops: Iterable[Op]) -> set[str]:
        """Joins of what convolutions made, unless a norm or a float join reads the result."""
        joins = {op.name for op in ops if op.kind == "join" and op.name in self.from_conv and len(op.inputs) == 2}
        while True:
            bad = {name for name in joins if any(self._stays_float(op, joins) for op in self._following(name))}
            if not bad:
                return joins
            joins -= bad

    def _stays_float(self, op: Op, joins: set[str]) -> bool:
        return op.kind == "norm" or (op.kind == "join" and op.name not in joins)

    def _following(self, name: str) -> list[Op]:
        """Who reads the tensor, past what clips it."""
        return [after for op in self.users.get(name, []) for after in (self._following(op.name) if op.kind == "clip" else [op])]

    def _computes(self, op: Op) -> bool:
        """Whether the operation computes in integers."""
        return op.has_weight or op.name in self.joins or (op.kind == "pool" and op.name in self.from_conv)

    def _written_rounded(self, tensor: str) -> bool:
        """Whether an integer operation writes the tensor, itself or with the clip that is its only reader."""
        op = self.ops.get(tensor)
        if op is None or self._only_clipped(tensor):
            return False
        maker = self.ops.get(op.inputs[0]) if op.kind == "clip" else op
        if maker is None or (op.kind == "clip" and not self._only_clipped(maker.name)):
            return False
        return maker.kind == "conv" or maker.name in self.joins or (maker.kind == "pool" and self._computes(maker))

    def _only_clipped(self, tensor: str) -> bool:
        """Whether all that happens to the tensor is that it is clipped."""
        users = self.users.get(tensor, [])
        return len(users) == 1 and users[0].kind == "clip"

    def _readers(self, tensor: str) -> list[Op]:
        """The integer operations that read the tensor."""
        return [op for op in self.users.get(tensor, []) if self._computes(op)]

    def _carried(self, tensor: str, readers: dict[str, tuple[str, ...]]) -> str | None:
        """The rounded tensor that this one is a move of; an operation of several inputs has a grid of its own."""
        op = self.ops.get(tensor)
        if op is None or op.kind != "carry" or len(op.inputs) != 1 or op.inputs[0] not in readers:
            return None
        return op.inputs[0] if op.name in readers[op.inputs[0]] else None
