"""OpenVINO: IR with a QuantizedModel's own numbers, and the engine that runs it."""
