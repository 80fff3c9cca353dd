"""qhub-native: int4 and int8 kernels for CPUs, and a runtime for language models on them."""
