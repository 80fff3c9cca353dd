"""Static and dynamic INT8 and 16-bit floats for networks that are graphs."""
