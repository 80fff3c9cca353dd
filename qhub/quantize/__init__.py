"""MAKE IT SMALL: from a recipe to a quantized model on disk, one decoder block at a time."""
