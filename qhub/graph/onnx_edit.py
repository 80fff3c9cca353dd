"""An ONNX model while it is being rewritten: who makes a value, who reads it, and which values are constants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]


class OnnxEditor:
    """The nodes and initializers of `model`; `finish` puts them back, without what nobody reads."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.stored: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = [value.name for value in model.graph.output]
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                self.stored.setdefault(node.output[0], node.attribute[0].t)
        self._made: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output}
        self._names = set(self._made) | set(self.stored) | {value.name for value in model.graph.input}

    def maker(self, name: str, op: str = "") -> NodeProto | None:
        """The node that makes the value, if it is an `op`."""
        node = self._made.get(name)
        return node if node is not None and op in ("", node.op_type) else None

    def made_by(self, node: NodeProto) -> None:
        """Remember what a node makes, after its outputs were renamed."""
        self._made.update({name: node for name in node.output})

    def readers(self, name: str) -> list[NodeProto]:
        """The nodes that read the value."""
        return [node for node in self.nodes if name in node.input]

    def constant(self, name: str) -> Array | None:
        """The numbers of a constant, past a cast."""
        if name in self.stored:
            numbers: Array = numpy_helper.to_array(self.stored[name])
            return numbers
        cast = self.maker(name, "Cast")
        inner = None if cast is None else self.constant(cast.input[0])
        return None if inner is None or cast is None else inner.astype(helper.tensor_dtype_to_np_dtype(attributes(cast)["to"]))

    def store(self, name: str, numbers: Array) -> str:
        """Keep numbers as an initializer of that name, in place of one that is there."""
        self.stored[name] = numpy_helper.from_array(np.asarray(numbers, order="C"), name)
        self._names.add(name)
        return name

    def name(self, wanted: str) -> str:
        """A name that no value has yet."""
        found, count = wanted, 0
        while found in self._names:
            count += 1
            found = f"{wanted}_{count}"
        self._names.add(found)
        return found

    def insert(self, before: NodeProto, nodes: Iterable[NodeProto]) -> None:
        """Put nodes where `before` stands, in front of it."""
        place, new = self._place(before), list(nodes)
        self.nodes[place:place] = new
        self._made.update({name: node for node in new for name in node.output})

    def insert_after(self, node: NodeProto, new: NodeProto) -> None:
        """Put a node behind another."""
        self.nodes.insert(self._place(node) + 1, new)
        for one in (node, new):
            self.made_by(one)

    def replace(self, old: NodeProto, nodes: Iterable[NodeProto]) -> None:
        """Put nodes in the place of one, which they do the work of."""
        self.insert(old, nodes)
        del self.nodes[self._place(old)]

    def bypass(self, node: NodeProto, source: str) -> None:
        """Let everyone who reads the node's output read `source` instead."""
        for reader in self.readers(node.output[0]):
            reader.input[:] = [source if name == node.output[0] else name for name in reader.input]

    def _place(self, node: NodeProto) -> int:
        return next(place for place, other in enumerate(self.nodes) if other is node)

    def finish(self) -> onnx.ModelProto:
        """Write the nodes and initializers that the outputs need into the model, which is returned."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output) and not (node.op_type == "Constant" and node.output[0] in self.stored):
                kept.append(node)
                needed.update(node.input)
                needed.update(name for name in _inner(node))
        graph = self.model.graph
        stored = [tensor for name, tensor in self.stored.items() if name in needed]
        for tensor, name in zip(stored, [name for name in self.stored if name in needed], strict=True):
            tensor.name = name  # what a Constant node held has none
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        tensors = [TensorProto.FromString(tensor.SerializeToString()) for tensor in stored]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensors)
        return self.model


def _inner(node: NodeProto) -> Iterable[str]:
    """What the graphs within a node read, of themselves or from outside."""
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for child in inner.node:
                yield from child.input
                yield from _inner(child)
            yield from (value.name for value in inner.output)


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def int4(codes: Array) -> Array:
    """Codes −8 … 7 as ONNX packs them, two in a byte."""
    return codes.astype(ml_dtypes.int4)
