"""Which schemes of language models fit OpenVINO's types, and how."""

from __future__ import annotations

from pathlib import Path

from qhub import QhubError, Scheme, decoder_config, read_json

ENGINE = "openvino"
#: Bits of the types that codes lie in: u4 and i4, u8 and i8.
WIDTHS = (4, 8)


def width_of(bits: int) -> int:
    """Bits of the type that a code of `bits` lies in."""
    return next(width for width in WIDTHS if width >= bits)


def why_not(scheme: Scheme) -> str | None:
    """Why no layer of `scheme` can be carried."""
    if not scheme.is_weight_only:
        return f"`openvino` as written here does not carry scheme `{scheme}` of a language model"
    if not 2 <= scheme.weight_bits <= WIDTHS[-1]:
        return f"`openvino` has codes of up to 8 bits; it does not carry scheme `{scheme}`"
    return None


def why_no_decoder(config: Path) -> str | None:
    """Why the model with this config.json is not built here; None also where there is no such file to ask."""
    if not config.is_file():
        return None
    try:
        decoder_config(read_json(config), ENGINE)
    except QhubError as error:
        return error.message
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        return f"`{config}` lacks or garbles {error}"
    return None
