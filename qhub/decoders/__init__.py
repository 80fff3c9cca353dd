"""Decoders as files describe them: one description that every engine builds from (numpy only)."""
