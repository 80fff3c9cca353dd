"""`qhub convert`: a quantized model into another layout, beside its place and renamed into it when it is complete."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qhub import preflight
from qhub.errors import QhubError, UsageError
from qhub.events import Events
from qhub.rundir import locked
from qhub.stage import as_system_error, sync


def convert(path: Path, to: str, out: Path | None, events: Events) -> dict[str, Any]:
    """Write the quantized model in `path`, a folder or a run, in layout `to`; returns what `qhub convert --json` prints.

    :raises UsageError: when `out` holds something. :raises Unsupported: when the layout cannot carry the model.
    """
    from qhub.quantize.layouts.reader import open_packed
    from qhub.quantize.layouts.writer import layout_called
    from qhub.quantize.store import folder_digest

    source = path / "quantized" if (path / "quantized").is_dir() else path
    layout_called(to)
    out = out or Path(f"{path.resolve().name}-{to}")
    _check_out(out)
    preflight.check_disk(out, sum(info.bytes for info in open_packed(source).files.values()) * 11 // 10)
    written = _written(source, out, to, events)
    size_bytes, digest = folder_digest(out)
    return {
        "source": str(source),
        "from": written.was,
        "to": to,
        "path": str(out),
        "bytes": size_bytes,
        "sha256": digest,
        "layers": written.layers,
        "schemes": dict(written.schemes),
        "codes_identical": True,
        "how": "codes, scales and zeros of every layer read back from the files",
        "warnings": list(written.warnings),
    }


def _written(source: Path, out: Path, to: str, events: Events) -> Any:  # noqa: ANN401 - a Written; torch is not imported here
    """The conversion, in a directory beside `out` that becomes `out` only when it is complete."""
    from qhub.quantize.layouts.writer import write_layout

    partial = out.with_name(f"{out.name}.partial")
    with _gone_if_empty(partial), locked(partial):
        _empty(partial)  # of what a killed process left
        try:
            written = write_layout(source, partial, to, events)
            sync(partial)
            _check_out(out)
            partial.replace(out)
        except BaseException as error:
            _empty(partial)
            known = as_system_error(error) if isinstance(error, Exception) and not isinstance(error, (QhubError, OSError)) else None
            if known is not None:
                raise known from error
            raise
    return written


@contextlib.contextmanager
def _gone_if_empty(folder: Path) -> Iterator[None]:
    """Remove `folder` at the end, also where a killed process had made it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _check_out(out: Path) -> None:
    """Refuse a place that is taken.

    :raises UsageError: naming it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"`{out}` is not empty", hint="give another directory: `--out DIR`")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
