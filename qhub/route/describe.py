"""The sentences of a route: why it was chosen, what to look out for, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qhub.interfaces import Exporter
from qhub.route.accuracy import SMALL_MODEL_GROUP, SMALL_MODEL_PARAMETERS
from qhub.route.estimate import (
    OVERHEAD_SHARE,
    RUNTIME_BYTES,
    is_quantized,
    largest_fitting_parameters,
    milliseconds,
    outer_bytes,
    weight_bytes,
)
from qhub.route.registry import IndexEntry
from qhub.route.ways import Method, Search
from qhub.types import Estimates, ModelProfile, Scheme, Target
from qhub.units import human_bytes

#: What to try, cheapest first, when the accuracy goal is missed.
LADDER = "smaller groups, asymmetric, `--plugin awq --plugin gptq`, 8 bits for the worst layers (`--override`), 8 bits"
_LARGE_REST = 0.2
LESS_CONTEXT = 2048
#: Formats that are no folder with safetensors → the distribution that would quantize them.
READERS = {"tflite": "qhub-tflite", "gguf": "qhub-gguf"}


def reasons(search: Search, method: Method, scheme: Scheme) -> Iterator[str]:
    """Why this method and this scheme."""
    if search.wanted.quantizers:
        yield f"`{method.name}` was asked for"
    elif scheme.is_float:
        pass
    elif method.uses_data:
        yield f"`{method.name}` uses calibration text, which keeps more accuracy than rounding alone"
    else:
        yield f"`{method.name}` needs no data"
    yield from scheme_reasons(search, scheme)


def scheme_reasons(search: Search, scheme: Scheme) -> Iterator[str]:
    """Why this scheme."""
    profile = search.merged
    if search.scheme is not None:
        yield f"scheme `{scheme}` was asked for"
    elif scheme.group_size is not None and scheme.group_size <= SMALL_MODEL_GROUP and profile.parameters <= SMALL_MODEL_PARAMETERS:
        yield f"groups of {scheme.group_size}: models up to 2 B parameters lose much to larger groups"
    if scheme.is_weight_only and profile.task == "llm":
        yield from _rest(profile, scheme)


def _rest(profile: ModelProfile, scheme: Scheme) -> Iterator[str]:
    total, rest = weight_bytes(profile, scheme), outer_bytes(profile, scheme)
    if rest > _LARGE_REST * total and profile.parameters <= SMALL_MODEL_PARAMETERS:
        sizes = f"{human_bytes(rest)} of {human_bytes(total)}"
        yield f"embeddings and head stay at 16 bits: {sizes}; formats with an 8-bit head (GGUF) save half of it"


def warnings(search: Search, target: Target, scheme: Scheme, expected: Estimates) -> Iterator[str]:
    """What speaks against a route that is possible."""
    if any(not is_quantized(layer, scheme) for layer in search.merged.linears()):
        yield from _left_float(search.profile, scheme)
    yield from _above_goal(search, scheme, expected)
    yield from _input(search.profile)
    if search.goals.max_latency_ms is not None and milliseconds(expected) is None:
        yield "whether --max-latency holds is unknown before a run: the estimate says why"


def _left_float(profile: ModelProfile, scheme: Scheme) -> Iterator[str]:
    if not scheme.is_weight_only:
        return
    left = [layer for layer in profile.linears() if not is_quantized(layer, scheme)]
    if left:
        widths = ", ".join(str(width) for width in sorted({layer.shape[-1] for layer in left}))
        yield f"groups of {scheme.group_size} do not divide K = {widths} of {len(left)} layers such as `{left[0].name}`: they stay float"


def _input(profile: ModelProfile) -> Iterator[str]:
    """What has to happen before `qhub run` can work on a model in this format."""
    if profile.format == "config":
        yield "only the config is here: `qhub run` needs the weights too"
    elif profile.format == "hub":
        yield f"the weights are not here: `hf download {profile.source}` before `qhub run`"
    elif profile.format in READERS:
        reader = f"`{READERS[profile.format]}` (planned, not published yet)"
        yield f"`qhub run` starts from a Hugging Face folder, a .pt2 or an .onnx file; {reader} would read {profile.format}"


def _above_goal(search: Search, scheme: Scheme, expected: Estimates) -> Iterator[str]:
    drop, allowed = expected.accuracy_drop_pct, search.goals.max_drop_pct
    if drop is None or drop <= allowed:
        return
    text = f"about {drop:g} % are expected to be lost at `{scheme}`, more than the {allowed:g} % of --max-drop; a run measures it"
    yield f"{text}; if it is missed: {LADDER}" if scheme.is_weight_only else text


def ends_early(search: Search, target: Target, exporter: Exporter | None = None) -> Iterator[str]:
    """That nothing installed runs the result there, and what would; or that it ends with the artifact that was asked for."""
    if exporter is not None and exporter.name in search.wanted.exporters:
        yield f"nothing installed runs `{exporter.format}` on `{target.name}`: the run ends with that artifact, and does not open it"
        return
    finishers = search.registry.finishers(target, search.profile.task)
    who = named(finishers) if finishers else "no known plugin"
    yield f"nothing installed runs this on `{target.name}`: the run ends with the QuantizedModel; {who} would finish it"


def named(entries: Sequence[IndexEntry]) -> str:
    """The distributions that can be installed, and those that cannot yet."""
    there = " or ".join(f"`{entry.distribution}`" for entry in entries if not entry.is_planned)
    planned = " or ".join(f"`{entry.distribution}`" for entry in entries if entry.is_planned)
    return " or ".join([*([there] if there else []), *([f"{planned} (planned, not published yet)"] if planned else [])])


def does_not_fit(profile: ModelProfile, scheme: Scheme, target: Target, broken: Iterable[str]) -> Iterator[str]:
    """Which limits are broken, and the largest model that would fit."""
    for text in broken:
        yield f"does not fit: {text}"
        largest = largest_fitting_parameters(profile, scheme, target)
        if f" of `{target.name}` allows" in text and largest is not None:
            yield f"at `{scheme}` a model of up to about {_parameters(largest)} parameters fits `{target.name}`"
            yield from _with_less(profile, scheme, target)


def _with_less(profile: ModelProfile, scheme: Scheme, target: Target) -> Iterator[str]:
    """Whether it fits with what some formats do: embeddings and head at 8 bits, and half the context."""
    if profile.task != "llm" or target.usable_memory_bytes is None:
        return
    cache = LESS_CONTEXT * (profile.kv_bytes_per_token or 0)
    need = (weight_bytes(profile, scheme) - outer_bytes(profile, scheme) / 2 + cache) * (1 + OVERHEAD_SHARE) + RUNTIME_BYTES
    if need <= target.usable_memory_bytes:
        how = f"with embeddings and head at 8 bits, as GGUF has them, and {LESS_CONTEXT} tokens of context"
        yield f"{how} it needs {human_bytes(need)}, which fits"


def _parameters(count: int) -> str:
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.2g} {unit}" if count < 99.5 * factor else f"{count / factor:.0f} {unit}"
    return str(count)
