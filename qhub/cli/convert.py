"""`qhub convert`: a quantized model, whoever quantized it, in another layout."""

from __future__ import annotations

from pathlib import Path

import click

from qhub.cli import App
from qhub.units import human_bytes

#: The layouts by name, here too so that `--help` imports nothing heavy; a test compares them.
LAYOUT_NAMES = ("compressed-tensors", "awq", "gptq", "gptq_v2")


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", type=click.Choice(LAYOUT_NAMES), required=True, help="The layout to write.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to; default: MODEL's name and the layout's, here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def convert(app: App, model: Path, to: str, out: Path | None, *, as_json: bool) -> None:
    """Write MODEL, a quantized folder or a run, in another layout with the same codes, scales and zeros, bit for bit.

    A layout that cannot carry them is refused with the reason.
    """
    from qhub.convert import convert as carry_out
    from qhub.events import Events
    from qhub.quiet import quiet_libraries

    with quiet_libraries():
        found = carry_out(model, to, out, Events(listener=app.output.progress))
    if as_json:
        app.output.json(found)
    else:
        schemes = ", ".join(f"{count} × {name}" for name, count in found["schemes"].items())
        rows = [("from", f"{found['from']}: {found['source']}"), ("to", f"{to}: {found['path']}"), ("size", human_bytes(found["bytes"]))]
        app.output.table(("", model.resolve().name), [*rows, ("layers", schemes), ("same", found["how"])])
    for text in found["warnings"]:
        app.output.warning(text)
