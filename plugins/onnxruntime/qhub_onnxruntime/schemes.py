"""Which schemes fit ONNX Runtime's operators, and how."""

from __future__ import annotations

from qhub import Scheme

#: Bits of a field that a code lies in, and inputs per block of `MatMulNBits`.
WIDTHS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)


def width_of(bits: int) -> int:
    """Bits of the field that a code of `bits` lies in."""
    return next(width for width in WIDTHS if width >= bits)


def block_size_of(scheme: Scheme, inputs: int) -> int | None:
    """Inputs per block of a layer (K = `inputs`): what its groups are made of; None if there is no such block."""
    if scheme.group_size:
        return next((size for size in BLOCKS if scheme.group_size % size == 0), None)
    return next((size for size in BLOCKS[1:] if size <= inputs), BLOCKS[-1])


def why_not(scheme: Scheme) -> str | None:
    """Why no layer of `scheme` can be multiplied here."""
    if not scheme.is_weight_only:
        return f"`onnx` as written here does not carry scheme `{scheme}` of a language model"
    if not 2 <= scheme.weight_bits <= WIDTHS[-1]:
        return f"`onnx` has codes of 2 to 8 bits; it does not carry scheme `{scheme}`"
    if block_size_of(scheme, BLOCKS[0]) is None:
        return f"`onnx` has blocks of 16 inputs or more, and groups of {scheme.group_size} are not made of those"
    return None
