"""Hugging Face: the compressed-tensors layout for transformers and vLLM, and transformers as a runtime."""
