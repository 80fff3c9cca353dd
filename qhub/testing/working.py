"""What a plugin does, checked on a tiny random model: quantize, export, open; again, after a kill, and with damaged weights."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401 - what it reads and writes when it is imported is not the plugin's doing

from qhub.errors import QhubError
from qhub.events import Events
from qhub.interfaces import Exporter, Quantizer, Runtime
from qhub.plugins import Plugins
from qhub.prove.parity import MOST_OFF, read_codes, reference_logits, share_off
from qhub.quantize.block import LayerChoice
from qhub.quantize.grid import quantize_rtn
from qhub.quantize.qtensor import QTensor
from qhub.quantize.store import QuantizedWeights, finish, folder_digest, open_model
from qhub.quantize.walk import WalkPlan, WalkResult, walk
from qhub.route.profile import profile
from qhub.testing import tiny
from qhub.testing.probe import Job, Record
from qhub.testing.result import CheckFailedError, CheckSkippedError
from qhub.types import Artifact, ModelSource, OpenOptions, QuantizedModel, Recipe, Scheme

EXPORTED = ("w4a16-g128-asym", "w4a16-g128-sym", "w4a16-g32-asym", "w4a16-g32-sym", "w8a16", "w4a16-channel-sym", "w4a16-channel-asym")
_LAST_NOTE = "block-00001.json"  # of the walk: the second block is done when it appears
_NEW_TOKENS = 4


class _Nearest(Quantizer):
    """What models are quantized with when it is not the quantizer that is checked."""

    name = "nearest"

    def quantize_layer(self, weight: torch.Tensor, scheme: Scheme, block: Any) -> QTensor:  # noqa: ANN401 - a Block
        return quantize_rtn(weight, scheme, block.dtype)


def _quantizer(job: Job, record: Record, folder: Path) -> None:
    """The checks of a quantizer."""
    title = f"quantizer {job.component}"
    made = _make(job)
    scheme = Scheme.parse(made.default_scheme)
    if made.whole or not scheme.is_weight_only:
        what = "methods that take whole models" if made.whole else f"scheme `{scheme}`"
        for name in ("quantizes", "deterministic", "resumable", "clean-errors"):
            record.check(name, title, lambda: _skip(f"the kit cannot check {what} yet"))
        return
    model = tiny.write_model(folder / "model", scheme, "bfloat16")
    if not record.check("quantizes", title, lambda: _quantizes(job, model, folder / "first")):
        return
    record.check("deterministic", title, lambda: _deterministic(job, model, folder))
    record.check("resumable", title, lambda: _resumable(job, model, folder))
    record.check("clean-errors", title, lambda: _clean_errors(job, model, folder))


def _victim(job: Job, record: Record, folder: Path) -> None:
    """Quantize the model, and die when its second block is about to be noted."""

    def die(event: str, details: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.path.basename(os.fspath(details[1])) == _LAST_NOTE:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    _run(_make(job), folder.parent / "model", folder.parent / "resumed")


def _exporter(job: Job, record: Record, folder: Path) -> None:
    """The checks of an exporter."""
    title = f"exporter {job.component}"
    exporter = Plugins.load().exporters[job.component]
    written: list[Artifact] = []
    if not record.check("exports", title, lambda: written.append(_exports(exporter, folder))):
        return
    record.check("exact", title, lambda: _exact(exporter, folder / "quantized" / "model", written[0].path))
    record.check("deterministic", title, lambda: _exports_again(exporter, folder, written[0]))


def _runtime(job: Job, record: Record, folder: Path) -> None:
    """The checks of a runtime."""
    title = f"runtime {job.component}"
    plugins = Plugins.load()
    runtime = plugins.runtimes[job.component]
    if record.check("opens", title, lambda: _opens(runtime, plugins, folder)):
        record.check("generates", title, lambda: _generates(runtime, folder / "artifact"))


MODES = {"quantizer": _quantizer, "victim": _victim, "exporter": _exporter, "runtime": _runtime}


def _make(job: Job) -> Quantizer:
    found: Quantizer = Plugins.load().quantizers[job.component]
    return found


def _skip(reason: str) -> None:
    raise CheckSkippedError(reason)


def _run(quantizer: Quantizer, source: Path, out: Path, scheme: Scheme | None = None) -> WalkResult:
    """Quantize `source` into `out/model`, going on where an interrupted walk stopped."""
    folder, work = out / "model", out / "work"
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    scheme = scheme or Scheme.parse(quantizer.default_scheme)
    ids = tiny.random_ids(8, 32) if quantizer.needs or quantizer.scales else None
    result = walk(WalkPlan(source, folder, work, quantizer, LayerChoice(scheme, {}), ids), Events())
    layers = {name: str(chosen) for name, chosen in result.schemes.items()}
    facts = {"scheme": str(scheme), "method": quantizer.name, "layers": layers}
    finish(folder, source, result.schemes, result.ignored, {**facts, "transposed": result.transposed, "subclassed": result.subclassed})
    return result


def _quantizes(job: Job, model: Path, out: Path) -> None:
    quantizer, returned = _make(job), {}
    group_method = quantizer.quantize_group

    def watched(group: Any, block: Any) -> Mapping[str, QTensor]:  # noqa: ANN401 - a Group and a Block
        found = group_method(group, block)
        returned.update({f"{block.name}.{name}": tensor for name, tensor in found.items()})
        return found

    quantizer.quantize_group = watched  # type: ignore[method-assign]
    result = _run(quantizer, model, out)
    if len(result.schemes) != 7 * tiny.BLOCKS:
        raise CheckFailedError(f"{len(result.schemes)} of {7 * tiny.BLOCKS} layers were quantized")
    stored = QuantizedWeights(out / "model")
    for name, tensor in returned.items():
        if name in stored.schemes:
            _check_same(name, tensor, stored.layer(name), "scale must be rounded with `round_scale`, zero an integer from 1 up")
    worst = max(result.errors)
    if not worst < 1:  # also when it is NaN
        raise CheckFailedError(f"the blocks' relative squared error reaches {worst:.3g}: no better than weights of zero")


def _check_same(name: str, one: QTensor, other: QTensor, rule: str) -> None:
    for part in ("codes", "scale", "zero"):
        left, right = getattr(one, part), getattr(other, part)
        if not torch.equal(left.float(), right.float()):
            raise CheckFailedError(f"`{name}`: {part} differs from what is stored; {rule}")
    if one.scale.dtype == torch.float32 and not torch.equal(one.scale, one.scale.half().float()):
        raise CheckFailedError(f"`{name}`: scale is not exact in fp16; round it with `round_scale`")


def _deterministic(job: Job, model: Path, folder: Path) -> None:
    _run(_make(job), model, folder / "second")
    _check_bytes(folder / "first" / "model", folder / "second" / "model")


def _check_bytes(one: Path, other: Path) -> None:
    names = {path.relative_to(folder) for folder in (one, other) for path in folder.rglob("*") if path.is_file()}
    for name in sorted(names):
        pair = [folder / name for folder in (one, other)]
        if not all(path.exists() for path in pair) or pair[0].read_bytes() != pair[1].read_bytes():
            raise CheckFailedError(f"`{name}` is not the same")


def _resumable(job: Job, model: Path, folder: Path) -> None:
    job.save(folder / "victim")
    command = [sys.executable, "-m", "qhub.testing.probe", str(folder / "victim"), "victim"]
    died = subprocess.run(command, cwd=folder / "victim", check=False, stdin=subprocess.DEVNULL)
    notes = folder / "resumed" / "work"
    if died.returncode == 0 or not (notes / "block-00000.json").exists() or (notes / _LAST_NOTE).exists():
        raise CheckFailedError("it did not get as far as the second block in a process of its own")
    _run(_make(job), model, folder / "resumed")
    _check_bytes(folder / "first" / "model", folder / "resumed" / "model")


def _clean_errors(job: Job, model: Path, folder: Path) -> None:
    damaged = tiny.damage(model, folder / "damaged")
    try:
        _run(_make(job), damaged, folder / "from-damaged")
    except QhubError:
        return
    except Exception as error:  # noqa: BLE001 - a plugin's own code
        raise CheckFailedError(f"weights with NaN end in {type(error).__name__}, not in a QhubError: {error}") from None
    raise CheckFailedError("a model was made from weights with NaN")


def _exports(exporter: Exporter, folder: Path) -> Artifact:
    source = tiny.write_model(folder / "source", Scheme.parse(EXPORTED[0]), "bfloat16")
    found = profile(ModelSource("tiny", source, ""), Plugins.load())
    refusals = {text: exporter.reject(found, Scheme.parse(text)) for text in EXPORTED}
    scheme = next((text for text, refusal in refusals.items() if refusal is None), None)
    if scheme is None:
        raise CheckSkippedError(f"it takes none of the kit's models: {refusals[EXPORTED[0]]}")
    _run(_Nearest(), source, folder / "quantized", Scheme.parse(scheme))
    return _export(exporter, folder, "artifact")


def _export(exporter: Exporter, folder: Path, name: str) -> Artifact:
    model, out = open_model(folder / "quantized" / "model"), folder / name
    before = folder_digest(model.path)
    out.mkdir()
    artifact = exporter.export(model, out, _recipe(model))
    size_bytes, digest = folder_digest(out)
    wrong = {
        "it wrote nothing": size_bytes == 0,
        "it changed the model that it was given": folder_digest(model.path) != before,
        f"the artifact's path `{artifact.path}` is not in `out`": not artifact.path.resolve().is_relative_to(out.resolve()),
        f"the artifact says format `{artifact.format}`, the exporter `{exporter.format}`": artifact.format != exporter.format,
        f"the artifact says {artifact.bytes} bytes, there are {size_bytes}": artifact.bytes != size_bytes,
        "the artifact's sha256 is not `folder_digest(out)`": artifact.sha256 != digest,
    }
    if said := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise CheckFailedError("; ".join(said))
    return artifact


def _recipe(model: QuantizedModel) -> Recipe:
    return Recipe("tiny", str(model.path), "", "host", model.method, model.scheme)


def _exports_again(exporter: Exporter, folder: Path, first: Artifact) -> None:
    _export(exporter, folder, "again")
    _check_bytes(folder / "artifact", folder / "again")


def _exact(exporter: Exporter, model: Path, artifact: Path) -> None:
    expected, found = QuantizedWeights(model), exporter.read_layers(artifact)
    if found is None:
        same = read_codes(model, artifact).identical
        if same is None:
            raise CheckSkippedError("it has no `read_layers`, so only a runtime of this format can tell")
        if not same:
            raise CheckFailedError("codes, scales and zeros of the folder are not those that were quantized")
        return
    if set(found) != set(expected.schemes):
        odd = sorted(set(found) ^ set(expected.schemes))
        raise CheckFailedError(f"layers differ: `{odd[0]}`" + (f" and {len(odd) - 1} more" if len(odd) > 1 else ""))
    for name in expected.schemes:
        _check_same(name, found[name], expected.layer(name), "what is exported must be what was quantized")


def _opens(runtime: Runtime, plugins: Plugins, folder: Path) -> None:
    scheme = Scheme.parse(EXPORTED[0])
    source = tiny.write_model(folder / "source", scheme, "float32")
    _run(_Nearest(), source, folder / "quantized", scheme)
    model = folder / "quantized" / "model"
    _artifact(runtime, plugins, folder)
    ids = tiny.random_ids(2, 16)
    expected = reference_logits(model, ids)
    found = _with_session(runtime, folder / "artifact", lambda session: session.logits(ids.numpy()))
    if tuple(found.shape) != tuple(expected.shape) or str(found.dtype) != "float32":
        raise CheckFailedError(f"logits are {found.dtype} {tuple(found.shape)}, not float32 {tuple(expected.shape)}")
    difference = share_off(torch.from_numpy(found), expected)
    if not difference <= MOST_OFF:
        raise CheckFailedError(f"logits differ from the reference by {difference:.2%}; at most {MOST_OFF:.0%} is rounding")


def _artifact(runtime: Runtime, plugins: Plugins, folder: Path) -> None:
    """Put an artifact that the runtime opens at `folder/artifact`."""
    model = open_model(folder / "quantized" / "model")
    exporter = next((one for one in plugins.exporters.values() if one.format in runtime.formats), None)
    if exporter is not None:
        (folder / "artifact").mkdir()
        exporter.export(model, folder / "artifact", _recipe(model))
    elif "compressed-tensors" in runtime.formats:  # the QuantizedModel itself is one
        shutil.copytree(model.path, folder / "artifact")
    else:
        formats = ", ".join(f"`{name}`" for name in runtime.formats)
        raise CheckSkippedError(f"the plugin writes no {formats}: check it together with an exporter")


def _with_session(runtime: Runtime, artifact: Path, use: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - a Session's results
    session = runtime.open(artifact, OpenOptions(threads=1, exact=runtime.rounds_activations))  # as artifacts are verified
    try:
        return use(session)
    finally:
        session.close()


def _generates(runtime: Runtime, artifact: Path) -> None:
    start = tiny.random_ids(1, 8)[0].tolist()

    def use(session: Any) -> tuple[list[int], list[int]]:  # noqa: ANN401 - a Session
        found = [int(token) for token in session.generate(start, _NEW_TOKENS, until_stop=False)]
        tokens = list(start)
        for _ in found:
            tokens.append(int(session.logits(torch.tensor([tokens]).numpy())[0, -1].argmax()))
        return found, tokens[len(start) :]

    found, expected = _with_session(runtime, artifact, use)
    if len(found) != _NEW_TOKENS:
        raise CheckFailedError(f"asked to go on past stop tokens it generated {len(found)} of {_NEW_TOKENS} tokens")
    if found != expected:
        raise CheckFailedError(f"it generated {found} where its own logits say {expected}")
