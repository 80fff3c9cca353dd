"""`qhub native`: what the kernels are, and which of them a model's shapes get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qhub_native.selector import Choice, ShapeKey


@click.group()
def native() -> None:
    """The native CPU runtime: its kernels, and what they reach here."""


@native.command()
@click.argument("model", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--kernel", metavar="NAME", help="Time this kernel only; an error if it does not run here.")
@click.option("--threads", metavar="N", type=click.IntRange(min=1), help="Default: the physical (fast) cores.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def kernels(app: Any, model: Path | None, kernel: str | None, threads: int | None, *, as_json: bool) -> None:  # noqa: ANN401 - qhub's App
    """Print the kernels that run here; with MODEL, time them on its shapes and print the fastest of each.

    GB/s and its share are of the weights read and of the memory bandwidth measured just before; GOP/s counts two operations
    per weight and row.
    """
    from qhub import OpenOptions
    from qhub_native import _native
    from qhub_native.selector import bandwidth
    from qhub_native.settings import chosen

    options = chosen(OpenOptions(threads=threads, kernel=kernel))
    pool = _native.Pool(options.threads)
    bytes_per_s = bandwidth(pool)
    found = {
        "kernels": _native.kernel_names(),
        "default": options.kernel,
        "threads": options.threads,
        "bandwidth_bytes_per_s": bytes_per_s,
        "shapes": [] if model is None else list(_timed(model, options, bytes_per_s)),
    }
    if as_json:
        app.output.json(found)
    else:
        _show(app.output, found)


def _timed(model: Path, options: Any, bandwidth: float) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - load.Options
    from qhub_native.load import load
    from qhub_native.selector import ROWS

    selector = load(model, options).selector
    for key, alike in selector.linears.items():
        for bucket, rows in enumerate(ROWS):
            candidates = list(selector.candidates(alike, bucket))
            best = min(candidates, key=lambda choice: choice.seconds)
            yield {
                **_figures(key, best, rows, bandwidth),
                "layers": len(alike),
                "candidates": [vars(choice) for choice in candidates],
            }


def _figures(key: ShapeKey, choice: Choice, rows: int, bandwidth: float) -> dict[str, Any]:
    per_group = 2 + (0 if key.symmetric else 1)
    read = key.outputs * key.inputs * (key.bits / 8 + per_group / key.group)
    return {
        "shape": str(key),
        "rows": rows,
        "kernel": choice.kernel,
        "tile_rows": choice.rows,
        "tile_blocks": choice.blocks,
        "microseconds": choice.seconds * 1e6,
        "bytes_per_s": read / choice.seconds,
        "bandwidth_share": read / choice.seconds / bandwidth,
        "ops_per_s": 2 * key.inputs * key.outputs * rows / choice.seconds,
    }


def _show(output: Any, found: dict[str, Any]) -> None:  # noqa: ANN401 - qhub's Output
    memory = f"{found['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s on {found['threads']} threads"
    rows = [(name, "default" if name == found["default"] else "") for name in found["kernels"]]
    output.table(("kernel", ""), rows, title=f"kernels that run here, best first (memory gives {memory})")
    if found["shapes"]:
        names = ("shape", "layers", "rows", "kernel", "tile", "µs", "GB/s", "of memory", "GOP/s")
        output.table(names, [_row(entry) for entry in found["shapes"]], right=names[1:3] + names[5:])


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    gigabytes, share = f"{entry['bytes_per_s'] / 1e9:.1f}", f"{100 * entry['bandwidth_share']:.0f} %"
    tile = f"{entry['tile_rows']} × {entry['tile_blocks'] or 'share'}"
    speed = (gigabytes, share, f"{entry['ops_per_s'] / 1e9:.0f}")
    return (entry["shape"], str(entry["layers"]), str(entry["rows"]), entry["kernel"], tile, f"{entry['microseconds']:.0f}", *speed)
