"""Microseconds of one matrix product with 4-bit weights (group 128) in one engine.

    PYTHON matmul.py ENGINE        ENGINE: qhub, onnxruntime, openvino, torch

Reads lines `K N M threads copies repeats` and answers each with one line: microseconds per product, one figure per repeat.
`copies` distinct matrices are multiplied one after another, so that with enough of them none is in a cache; a repeat runs over
all of them. Runs in the environment of the engine: imports it, numpy, and nothing else.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

GROUP = 128
ZERO = 8
Measure = Callable[[], float]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """K inputs × N outputs, M rows of activations; what an engine prepares is kept as long as nothing of this changes."""

    inputs: int
    outputs: int
    rows: int
    threads: int
    copies: int

    @property
    def groups(self) -> int:
        """Groups per output."""
        return self.inputs // GROUP

    def packed(self, seed: int) -> Bytes:
        """Random codes, two in a byte: (N, K/2) uint8."""
        return np.random.default_rng(seed).integers(0, 256, (self.outputs, self.inputs // 2), dtype=np.uint8)

    def scale(self) -> Floats:
        """(N, groups), all positive, exact in half precision."""
        return np.random.default_rng(0).uniform(0.001, 0.002, (self.outputs, self.groups)).astype(np.float16).astype(np.float32)

    def x(self) -> Floats:
        """Activations (M, K)."""
        return np.random.default_rng(1).standard_normal((self.rows, self.inputs), dtype=np.float32)


def per_product(case: Case, call: Callable[[], object]) -> Measure:
    """Seconds per product of a call that goes through all copies."""

    def measure() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) / case.copies

    return measure


def qhub(case: Case) -> Measure:
    """This project's kernels with the plan that its selector finds for these rows; timed behind the binding, as the runtime calls it."""
    from qhub_native._native import Linear, Part, Pool, Shape, bucket, pack, time_plan
    from qhub_native.matrices import aligned
    from qhub_native.selector import Selector

    pool = Pool(case.threads)
    shape = Shape(case.outputs, case.inputs, group=GROUP, bits=4, symmetric=True)
    matrices = []
    for seed in range(case.copies):
        memory = aligned(shape.packed_bytes)
        part = Part(case.packed(seed), case.scale(), None, bits=4, every=GROUP)
        matrices.append(Linear.quantized(memory, shape, pack(pool, shape, [part], memory)))
    plan = Selector({}, None, pool, None).measure(matrices, bucket(case.rows))
    settings = (pool, case.rows, plan.kernel, plan.rows, plan.blocks, case.copies * plan.seconds)
    return lambda: statistics.fmean(time_plan(matrices, *settings))


def onnxruntime(case: Case) -> Measure:
    """`MatMulNBits` of the CPU provider with int8 activations (accuracy level 4): one graph over all copies."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], [numpy_helper.from_array(case.scale().ravel(), "scale")]
    for i in range(case.copies):
        blocks = case.packed(i).reshape(case.outputs, case.groups, GROUP // 2)
        constants.append(numpy_helper.from_array(blocks, f"b{i}"))
        settings = {"K": case.inputs, "N": case.outputs, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", ["x", f"b{i}", "scale"], [f"y{i}"], domain="com.microsoft", **settings))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.rows, case.inputs])
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [case.rows, case.outputs]) for i in range(case.copies)]
    graph = helper.make_graph(nodes, "products", [x], outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = ort.InferenceSession(onnx.ModelProto.SerializeToString(model), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", case.x())
    for i in range(case.copies):
        place = ort.OrtValue.ortvalue_from_shape_and_type([case.rows, case.outputs], np.float32)
        binding.bind_ortvalue_output(f"y{i}", place)
    return per_product(case, lambda: session.run_with_iobinding(binding))


def openvino(case: Case) -> Measure:
    """int4 weights as NNCF writes them (u4, zero points, half scales), the plugin's default precision: one graph over all copies."""
    import openvino as ov
    from openvino import opset13 as op

    shape = [case.outputs, case.groups, GROUP]
    half = op.constant(case.scale().reshape(case.outputs, case.groups, 1).astype(np.float16))
    inputs, results = [], []
    for i in range(case.copies):
        codes = ov.op.Constant(ov.Tensor(case.packed(i), shape, ov.Type.u4), False)
        zeros = np.full((case.outputs, (case.groups + 1) // 2), ZERO | ZERO << 4, np.uint8)
        zero = ov.op.Constant(ov.Tensor(zeros, [case.outputs, case.groups, 1], ov.Type.u4), False)
        centred = op.subtract(op.convert(codes, "f16"), op.convert(zero, "f16"))
        flat = op.reshape(op.multiply(centred, half), [case.outputs, case.inputs], special_zero=False)
        x = op.parameter([case.rows, case.inputs], np.float32)
        inputs.append(x)
        results.append(op.matmul(x, op.convert(flat, "f32"), False, True))
    compiled = ov.Core().compile_model(ov.Model(results, inputs), "CPU", {"INFERENCE_NUM_THREADS": case.threads})
    request = compiled.create_infer_request()
    x = ov.Tensor(case.x())
    for i in range(case.copies):
        request.set_input_tensor(i, x)
    return per_product(case, request.infer)


def torch(case: Case) -> Measure:
    """`_weight_int4pack_mm_for_cpu`, activations in bfloat16."""
    import torch

    torch.set_num_threads(case.threads)
    scale = torch.from_numpy(case.scale()).T.bfloat16()
    scale_zero = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()
    matrices = []
    for seed in range(case.copies):
        packed = case.packed(seed)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(case.outputs, case.inputs).astype(np.int32)
        matrices.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes), 1))
    x = torch.from_numpy(case.x()).bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return per_product(case, lambda: [multiply(x, matrix, GROUP, scale_zero) for matrix in matrices])


ENGINES = {"qhub": qhub, "onnxruntime": onnxruntime, "openvino": openvino, "torch": torch}


def main() -> None:
    """Answer lines until stdin ends."""
    prepare = lru_cache(maxsize=1)(ENGINES[sys.argv[1]])
    for line in sys.stdin:
        *sizes, repeats = map(int, line.split())
        measure = prepare(Case(*sizes))
        measure()
        print(*(f"{measure() * 1e6:.2f}" for _ in range(repeats)), flush=True)


if __name__ == "__main__":
    main()
