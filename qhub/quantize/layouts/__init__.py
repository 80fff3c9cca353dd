"""How others store quantized layers: one file per layout, each with its reading, its writing and what it cannot carry."""
