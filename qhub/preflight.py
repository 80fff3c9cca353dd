"""Refuse before spending: what can be known to fail before a run begins, from headers, names and the disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from qhub.data.read import data_sha256
from qhub.errors import QhubError, UsageError
from qhub.plugins import Plugins
from qhub.route.estimate import weight_bytes
from qhub.route.recipe import file_sha256, from_yaml, model_sha256
from qhub.rundir import RECIPE, STATE, RunDir
from qhub.stage import hidden_limit_bytes
from qhub.tokens import documents
from qhub.types import FLOAT, Calibration, Difference, ModelProfile, Recipe, Scheme, last_match
from qhub.units import human_bytes

_BASE_BYTES = 500 << 20  # Python with torch and transformers, measured
_TOKENS_AT_ONCE = 4096  # in one forward pass
_FRAGMENTS = 1.2  # what an allocator takes for tensors that come and go, measured
_HALF_MADE = {f"{RECIPE}.partial"}  # all that is there when a run ends before its recipe is written


class ChangedInputs(QhubError):
    """What a recipe starts from is not what it was written for; `differences` names each."""

    def __init__(self, message: str, differences: tuple[Difference, ...], *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.differences = differences


def estimate(found: ModelProfile, recipe: Recipe, bound: int | None = None) -> dict[str, int | float | None]:
    """Sizes before work begins: of the result, the peak of memory while quantizing, and the disk a run needs.

    Basis: in memory are Python with torch and transformers (measured), the tensors outside the blocks, three copies of the
    largest block (stored, folded in float32), four K×K float32 matrices of its widest layer, one batch's activations, and what
    is kept of the calibration tokens, up to a limit. The rest of that goes to disk, as do the hidden states of two streams
    before and after a block.
    """
    spooled, weights = _spooled_bytes(found, recipe), _quantized_bytes(found, recipe)
    in_memory = min(spooled, hidden_limit_bytes(bound))
    copies = 2 if recipe.exporter else 1
    disk = copies * weights + 2 * _stream_bytes(found, recipe) + spooled - in_memory
    return {"weight_bytes": weights, "peak_bytes": _fixed_bytes(found, recipe) + in_memory, "disk_bytes": disk, "seconds": None}


def _fixed_bytes(found: ModelProfile, recipe: Recipe) -> int:
    blocks: dict[int, int] = {}
    for layer in found.layers:
        if layer.block is not None:
            blocks[layer.block] = blocks.get(layer.block, 0) + layer.bytes
    outside, widest = found.weight_bytes - sum(blocks.values()), _widest(found)
    statistics = 0 if recipe.calibration is None else 4 * widest**2 * 4 + _TOKENS_AT_ONCE * 4 * widest * 4
    return _BASE_BYTES + outside + 3 * max(blocks.values(), default=0) + statistics


def _widest(found: ModelProfile) -> int:
    return max((layer.shape[-1] for layer in found.linears()), default=0)


def _stream_bytes(found: ModelProfile, recipe: Recipe) -> int:
    """The hidden states of the calibration tokens, in the float and in the quantized model."""
    data = recipe.calibration
    item = 4 if (found.hidden_size or 0) < 1024 or found.dtype == "fp32" else 2  # small models are calibrated in float32
    return 0 if data is None else 2 * data.samples * data.seq_len * (found.hidden_size or 0) * item


def _spooled_bytes(found: ModelProfile, recipe: Recipe) -> int:
    """The streams, and in the widest block what enters its groups or leaves them, in the float model and for replays."""
    hidden = max(found.hidden_size or 0, 1)
    return int(_stream_bytes(found, recipe) / 2 * (6 + _widest(found) / hidden) * _FRAGMENTS)


def _quantized_bytes(found: ModelProfile, recipe: Recipe) -> int:
    if recipe.evaluation is not None and not recipe.evaluation.seq_len:  # a network
        return weight_bytes(found, Scheme.parse(recipe.scheme))
    total = float(found.weight_bytes)
    for layer in found.linears():
        pattern = last_match(layer.name.removesuffix(".weight"), recipe.overrides)
        chosen = recipe.scheme if pattern is None else recipe.overrides[pattern]
        if chosen != FLOAT:
            total += layer.shape[0] * layer.shape[-1] * Scheme.parse(chosen).bits_per_weight / 8 - layer.bytes
    return int(total)


def check_model(found: ModelProfile) -> None:
    """Refuse a model without a tokenizer: neither calibration nor evaluation could read a text.

    :raises QhubError: when it has none.
    """
    if found.task == "llm" and not found.has_tokenizer:
        raise QhubError(f"`{found.path}` has no tokenizer", hint="put the model's tokenizer.json beside its weights")


def check_experts(found: ModelProfile, *, trust_remote_code: bool) -> None:
    """Refuse blocks whose experts are no linear layers; only transformers knows, so only a model with experts is asked about.

    :raises Unsupported: naming the weights.
    """
    if not any(layer.kind == "expert" for layer in found.layers):
        return
    from qhub.quantize.observe import each_matrix
    from qhub.quiet import quiet_libraries
    from qhub.skeleton import FloatWeights, Skeleton

    with quiet_libraries():
        skeleton = Skeleton(FloatWeights(Path(found.path)), trust_remote_code=trust_remote_code)
    for index in range(len(skeleton.block_names)):
        each_matrix(skeleton.empty_block(index))


def check_text(data: Calibration | None) -> None:
    """Read the beginning of a text.

    :raises QhubError: when the file is not there or does not hold text.
    """
    if data is None:
        return
    path = Path(data.data)
    if not any(text.strip() for text in documents(path)):
        raise QhubError(f"`{path}` holds no text", hint="give a file with text")


def check_inputs(recipe: Recipe, path: Path) -> None:
    """Compare model and texts with the digests that the recipe in `path` has of them; reads all of them once.

    :raises ChangedInputs: naming each that is another one. :raises QhubError: when one is not there.
    """
    found, said, hint = [], [], "get the same file again, or start a new run"
    model = model_sha256(Path(recipe.model_path))
    if model != recipe.model_sha256:
        found.append(Difference("source", recipe.model_path, recipe.model_sha256, model))
        said.append(f"the model at `{recipe.model_path}` is not the one that `{path}` was written for (its sha256 differs)")
        hint = f"get the same files again, or start a new run: `qhub run {recipe.model_path}`"
    for data, option in ((recipe.calibration, "--calib"), (recipe.evaluation, "--eval")):
        if data is None:
            continue
        text = _digest_of(data, option)
        if not data.data_sha256 or text == data.data_sha256:
            continue
        found.append(Difference("data", data.data, data.data_sha256, text))
        said.append(f"`{data.data}` is not the text that the recipe was written for (its sha256 differs)")
    if found:
        raise ChangedInputs("; ".join(dict.fromkeys(said)), tuple(dict.fromkeys(found)), hint=hint)


def _digest_of(data: Calibration, option: str) -> str:
    """The digest of a text, or of labelled data, as they are now.

    :raises UsageError: when they are not there. :raises QhubError: when they hold nothing.
    """
    if not data.seq_len:
        return data_sha256(data.data)
    if not Path(data.data).is_file():
        raise UsageError(f"data file `{data.data}` does not exist", hint=f"say where it is: `{option} TEXT`")
    check_text(data)
    return file_sha256(Path(data.data))


def check_overrides(found: ModelProfile, recipe: Recipe, plugins: Plugins) -> None:
    """Refuse an override that matches nothing, or asks for what the method does not write, and a recipe that leaves all in float.

    :raises UsageError: naming the override.
    """
    kinds = ("linear", "expert") if found.task == "llm" else ("linear", "conv", "head", "other")
    names = [layer.name.removesuffix(".weight") for layer in found.layers if layer.kind in kinds]
    patterns = [last_match(name, recipe.overrides) for name in names]
    if names and all(pattern is not None and recipe.overrides[pattern] == FLOAT for pattern in patterns):
        raise UsageError(f"every layer of `{found.source}` is to stay float: nothing is left to quantize", hint="leave out an `--override`")
    for pattern, chosen in recipe.overrides.items():
        alike = (pattern, pattern.partition(".")[2] or pattern)  # files may lack the prefix that the running model has
        if not any(last_match(name, alike) for name in names):
            hint = f"a pattern is the end of a layer's name, or has `*`; e.g. `{names[0].rpartition('.')[2]}`" if names else None
            raise UsageError(f"override `{pattern}={chosen}` matches no layer of `{found.source}`", hint=hint)
        if chosen == FLOAT:
            continue
        refusals = [plugins.quantizers[name].reject for name in recipe.method.split("+")]
        refusals += [exporter.reject for name, exporter in plugins.exporters.items() if name == recipe.exporter]
        for reject in refusals:
            why = reject(found, Scheme.parse(chosen))
            if why is not None:
                raise UsageError(f"override `{pattern}={chosen}`: {why}", hint=f"to keep layers as they are: `{pattern}={FLOAT}`")


def check_options(recipe: Recipe, plugins: Plugins) -> None:
    """Let each quantizer look at its options.

    :raises UsageError: when it does not know one, or the recipe has options for a method that it does not use.
    """
    for name, options in recipe.options.items():
        if name not in recipe.method.split("+"):
            message = f"the recipe has options for `{name}`, which its method `{recipe.method}` does not use"
            raise UsageError(message, hint=f"leave them out, or change the method: `{recipe.method}+{name}`")
        type(plugins.quantizers[name])(**options)


def check_memory(found: ModelProfile, recipe: Recipe, needed: int, bound: int | None) -> None:
    """Refuse a bound that cannot hold.

    :raises QhubError: saying how much is needed.
    """
    if bound is None or needed <= bound:
        return
    fixed = _fixed_bytes(found, recipe)
    enough = -(-(fixed + min(_spooled_bytes(found, recipe), fixed // 3)) // 10**7) / 100  # a quarter of it is for what is kept
    message = f"quantizing `{found.source}` needs about `{enough:.2f}` GB of memory, more than the bound of {bound / 1e9:.2f} GB"
    raise QhubError(message, hint=f"`--max-memory {enough:.2f}` or more")


def check_disk(out: Path, needed: int) -> None:
    """Refuse a place that cannot be written to, or is too full.

    :raises QhubError: naming it.
    """
    where = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    elsewhere = "give another directory: `--out DIR`"
    if not where.is_dir():
        raise UsageError(f"`{where}` is a file, not a directory", hint=elsewhere)
    if not os.access(where, os.W_OK | os.X_OK):
        raise QhubError(f"`{where}` is not writable", hint=elsewhere)
    free = shutil.disk_usage(where).free
    if free < needed:
        message = f"`{where}` has `{human_bytes(free)}` free; the run needs about {human_bytes(needed)}"
        raise QhubError(message, hint="free some space, or give a directory on another disk: `--out DIR`")


def check_out(out: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuse a directory that is in use for something else, or that has nothing to resume.

    :raises UsageError: saying what it holds. :raises QhubError: when its state is damaged.
    """
    held = {path.name for path in out.iterdir()} - _HALF_MADE if out.is_dir() else set()
    if RECIPE not in held:
        if resume:
            raise nothing_to_resume(out)
        if held:
            raise UsageError(f"`{out}` is not empty and not a run", hint="give a new directory: `--out DIR`")
        return
    if not resume:
        hint = f"continue it: `qhub run --resume --out {out}`, or give a new directory: `--out DIR`"
        raise UsageError(f"`{out}` already holds a run", hint=hint)
    try:
        from_yaml((out / RECIPE).read_text(encoding="utf-8"))
    except (ValueError, QhubError):
        raise QhubError(f"`{out / RECIPE}` is damaged", hint=f"`rm -r {out}`, then start again") from None
    if not same_recipe(out, recipe):
        hint = f"leave out MODEL and options: `qhub run --resume --out {out}`"
        raise UsageError(f"`{out}` holds a run of another recipe", hint=hint)
    if STATE in held:
        RunDir.open(out)


def nothing_to_resume(out: Path) -> UsageError:
    """The error for a directory without a run."""
    return UsageError(f"`{out}` has no {RECIPE}: there is nothing to resume", hint="leave out `--resume` to start a run")


def same_recipe(out: Path, recipe: Recipe) -> bool:
    """Whether the run in `out` is one of `recipe`; where files lie and which versions are installed does not count."""
    try:
        there = from_yaml((out / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, QhubError):
        return False
    return _decisive(there) == _decisive(recipe)


def _decisive(recipe: Recipe) -> Recipe:
    def placeless(data: Calibration | None) -> Calibration | None:
        return None if data is None else replace(data, data="")

    calibration, evaluation = placeless(recipe.calibration), placeless(recipe.evaluation)
    return replace(recipe, model="", model_path="", versions={}, hardware={}, calibration=calibration, evaluation=evaluation)
