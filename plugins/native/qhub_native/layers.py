"""How the layers of a QuantizedModel become matrices of the kernels."""

from __future__ import annotations

from qhub import DecoderFiles, PackedLayer, Scheme, Unsupported
from qhub_native._native import Part, Shape

GROUPS = (128, 64, 32)


def part_of(layer: PackedLayer) -> Part:
    """The layer as `pack` takes it."""
    return Part(layer.codes, layer.scale, layer.zero, bits=layer.scheme.weight_bits, every=layer.every)


def group_of(scheme: Scheme, inputs: int) -> int:
    """Inputs per group of the packed matrix: the largest that the scheme's groups are made of.

    :raises Unsupported: when there is none.
    """
    every = scheme.group_size or (inputs if inputs % 32 == 0 else 32)  # the last group of a whole row is filled up
    found = next((group for group in GROUPS if every % group == 0), None)
    if found is None:
        raise Unsupported(f"`native` has no kernel for groups of {scheme.group_size}", hint="use a scheme with g32, g64 or g128")
    return found


def packed_shape(files: DecoderFiles, names: tuple[str, ...]) -> Shape:
    """The shape of the matrix that layers of one scheme and input become, one below the other; reads no codes."""
    scheme, sizes = files.schemes[names[0]], [files.shape(name) for name in names]
    inputs = sizes[0][1]
    bits = 4 if scheme.weight_bits <= 4 else 8
    return Shape(sum(rows for rows, _ in sizes), inputs, group=group_of(scheme, inputs), bits=bits, symmetric=scheme.symmetric)
