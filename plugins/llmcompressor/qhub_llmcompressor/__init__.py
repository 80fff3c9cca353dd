"""llm-compressor's methods for qhub."""
