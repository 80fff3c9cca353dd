"""Activation-aware weight quantization (AWQ)."""
