"""ONNX Runtime: ONNX graphs with a QuantizedModel's own numbers, and the engine that runs them."""
