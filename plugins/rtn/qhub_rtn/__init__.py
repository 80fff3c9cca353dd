"""Round-to-nearest weight quantization."""
