"""Integer operations (QLinearConv, QLinearMatMul, …) in place of pairs of quantize and dequantize: as onnxruntime itself fuses them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx


def integer_operations(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnxruntime rewrites it for any CPU; operations of the domain `com.microsoft` are among them."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source.onnx", Path(folder) / "made.onnx"
        onnx.save_model(model, source, save_as_external_data=True, location="source.data")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(made)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return onnx.load(made)
