"""Which models and schemes fit ONNX Runtime's operators, and how; reads no weights."""

from __future__ import annotations

from pathlib import Path

from qhub import DecoderConfig, QhubError, Scheme, decoder_config, read_json

ENGINE = "onnxruntime"

#: Bits of a field that a code lies in, and inputs per block of `MatMulNBits` where a whole row has one scale.
WIDTHS = (2, 4, 8)
ROW_BLOCKS = (128, 64, 32, 16)
HEADS_OF = 8  # what numbers in a head are a multiple of


def width_of(bits: int) -> int:
    """Bits of the field that a code of `bits` lies in."""
    return next(width for width in WIDTHS if width >= bits)


def block_size_of(scheme: Scheme, inputs: int) -> int:
    """Inputs per block of a layer (K = `inputs`): its groups, or pieces of a whole row."""
    return scheme.group_size or next((size for size in ROW_BLOCKS if size <= inputs), ROW_BLOCKS[-1])


def why_not(scheme: Scheme) -> str | None:
    """Why no layer of `scheme` can be multiplied here."""
    return None if scheme.is_weight_only else f"`onnx` as written here does not carry scheme `{scheme}` of a language model"


def why_no_decoder(config: Path) -> str | None:
    """Why the model with this config.json is not built here; None also where there is no such file to ask."""
    if not config.is_file():
        return None
    try:
        return why_not_heads(decoder_config(read_json(config), ENGINE))
    except QhubError as error:
        return error.message
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        return f"`{config}` lacks or garbles {error}"


def why_not_heads(config: DecoderConfig) -> str | None:
    """Why heads of this size have no attention here."""
    fits = config.dim % HEADS_OF == 0
    return None if fits else f"ONNX Runtime's attention takes heads of a multiple of {HEADS_OF} numbers; these have {config.dim}"
