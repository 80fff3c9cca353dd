"""GPTQ weight quantization."""
