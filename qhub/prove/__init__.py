"""SHOW THAT IT HOLDS: evaluation, parity, speed, and the report."""
