"""Intel Neural Compressor's methods for qhub."""
