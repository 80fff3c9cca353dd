"""The values that travel through qhub: frozen, standard library only, units in names.

One value per arrow of the sentence in DESIGN §1:
MODEL → `ModelProfile` → `Route` → `Recipe` → `QuantizedModel` → `Artifact` → `Report`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qhub.errors import UsageError

Family = Literal["qat", "weight-only", "static", "dynamic", "float16"]
Task = Literal["llm", "vision", "detection", "nlp", "embedding", "speech", "generative", "unknown"]
Activation = Literal["float", "static", "dynamic"]

FLOAT = "float"  # in overrides: a layer that stays as it is
FLOAT_SCHEMES = ("fp16", "bf16")
_WEIGHT_SCHEME = re.compile(r"w(?P<bits>[2-8])(?:a16)?(?:-g(?P<group>\d+)|-(?P<channel>channel))?(?:-(?P<kind>sym|asym))?")
_ACTIVATION_SCHEME = re.compile(r"w(?P<bits>[2-8])a(?P<act>[2-8])-(?P<when>static|dynamic)")
_GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How numbers are stored, e.g. `w4a16-g128-asym`; `Scheme.parse(str(scheme)) == scheme`.

    `weight_bits` and `activation_bits` are bits per number; `group_size` is the number of consecutive weights along K
    that share a scale, None for one scale per output channel; `symmetric` fixes the zero at 2**(bits-1).
    """

    weight_bits: int
    activation_bits: int = 16
    group_size: int | None = None
    symmetric: bool = True
    activation: Activation = "float"
    name: str | None = None  # schemes that are a name rather than a grid: fp16, bf16, nf4

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme string.

        :raises UsageError: when `text` is not one of the forms that `str()` writes (or a shorthand such as `w4-g128`).
        """
        text = text.strip().lower()
        if text in FLOAT_SCHEMES:
            return cls(weight_bits=16, name=text)
        if text == "nf4":
            return cls(weight_bits=4, group_size=64, name=text)
        if match := _ACTIVATION_SCHEME.fullmatch(text):
            return cls(int(match["bits"]), int(match["act"]), None, True, match["when"])  # type: ignore[arg-type]
        if match := _WEIGHT_SCHEME.fullmatch(text):
            return cls._weight_only(text, match)
        message = f"unknown scheme `{text}`"
        raise UsageError(message, hint="write it like `w4a16-g128-asym`, `w8a16`, `w8a8-static`, `fp16` or `nf4`")

    @classmethod
    def _weight_only(cls, text: str, match: re.Match[str]) -> Scheme:
        group_size = int(match["group"]) if match["group"] else None
        if group_size is not None and group_size not in _GROUP_SIZES:
            message = f"scheme `{text}` has group size `{group_size}`, which is not one of {', '.join(map(str, _GROUP_SIZES))}"
            raise UsageError(message, hint=f"try `{text.replace(f'g{group_size}', 'g128')}`")
        grouped = group_size is not None
        symmetric = match["kind"] == "sym" if match["kind"] else not grouped
        return cls(int(match["bits"]), 16, group_size, symmetric)

    def __str__(self) -> str:
        if self.name:
            return self.name
        if self.activation != "float":
            return f"w{self.weight_bits}a{self.activation_bits}-{self.activation}"
        if self.group_size is None and self.symmetric:
            return f"w{self.weight_bits}a16"
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.weight_bits}a16-{group}-{'sym' if self.symmetric else 'asym'}"

    @property
    def is_float(self) -> bool:
        """Whether weights stay floating point (`fp16`, `bf16`)."""
        return self.name in FLOAT_SCHEMES

    @property
    def is_weight_only(self) -> bool:
        """Whether weights are integers and activations stay float: what a QTensor holds."""
        return self.name is None and self.activation == "float"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with the 16-bit scale and the packed zero of each group."""
        if self.group_size is None:
            return float(self.weight_bits)
        zero_bits = 0 if self.symmetric else self.weight_bits
        return self.weight_bits + (16 + zero_bits) / self.group_size


@dataclass(frozen=True, slots=True)
class Fact:
    """A number about a device, with where it comes from. `value` is in the unit that the field's name says."""

    value: float
    source: str
    date: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Hardware facts of one device; no list of formats: a Runtime decides from these whether it runs there."""

    name: str
    summary: str
    os: str  # "linux", "macos", "windows", "ios", "android", "none"
    arch: str  # "x86_64", "aarch64", "armv7m", …
    isa: tuple[str, ...] = ()  # e.g. ("avx2", "avx512_vnni", "amx_int8"), ("neon", "dotprod")
    accelerators: tuple[str, ...] = ()  # e.g. ("cuda-8.7",), ("metal", "ane")
    cores: int | None = None
    memory_bytes: int | None = None
    usable_memory_bytes: int | None = None
    bandwidth_bytes_per_s: Fact | None = None
    int8_ops_per_s: Fact | None = None
    fp16_flops_per_s: Fact | None = None
    notes: tuple[str, ...] = ()
    vendor: str = ""  # who designed the CPU: "intel", "amd", "arm", "apple"; "" if unknown, or if the CPU is not what computes
    flash_bytes: int | None = None  # what a microcontroller stores weights in, besides `memory_bytes` of SRAM


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a runtime opens an artifact: number of threads (None: what is best there), float32 where it has the choice, a forced kernel."""

    threads: int | None = None
    exact: bool = False
    kernel: str | None = None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One weight of a model: `kind` is linear, expert, embedding, head, norm, conv or other; shape (N, K) for matrices."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    block: int | None = None


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """What can be known of a model from its config and its tensor headers, without reading a weight."""

    source: str
    path: str
    task: Task
    architecture: str
    parameters: int
    dtype: str
    weight_bytes: int
    layers: tuple[LayerShape, ...] = ()
    blocks: int | None = None
    hidden_size: int | None = None
    kv_bytes_per_token: int | None = None  # at 16 bits
    vocabulary: int | None = None
    context_length: int | None = None
    macs_per_item: int | None = None  # multiply-adds of one image, one sentence, …, where the source states them
    has_tokenizer: bool = False
    tied_embeddings: bool = False
    quantization: str | None = None  # the method that already quantized it
    own_code: bool = False  # its code comes with it (`auto_map`), not from transformers
    experts: int | None = None
    experts_per_token: int | None = None
    format: str = "safetensors"  # or "config" (no weights), "hub", "onnx", "pt2", "gguf", "tflite"
    complete: bool = True  # False: what the weights are does not follow from the files; parameters, layers or bytes are then 0 or empty

    def weights(self) -> Iterator[LayerShape]:
        """Every tensor that counts: a head that is tied to the embedding is the embedding."""
        return (layer for layer in self.layers if not (self.tied_embeddings and layer.kind == "head"))

    def linears(self) -> tuple[LayerShape, ...]:
        """The matrices inside the blocks: what a weight quantizer works on."""
        return tuple(layer for layer in self.layers if layer.kind in ("linear", "expert"))


@dataclass(frozen=True, slots=True)
class Goals:
    """What the user asks of the result; None means "no limit given"."""

    max_drop_pct: float = 2.0
    max_size_bytes: int | None = None
    max_latency_ms: float | None = None
    max_memory_bytes: int | None = None
    retrain: bool = False
    batch: int = 1  # requests at once; from 16 on arithmetic bounds decoding, not bandwidth


@dataclass(frozen=True, slots=True)
class Step:
    """One answered question on the way through the flowchart."""

    node: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Estimates:
    """What is expected before anything ran; `basis` says from which facts."""

    weight_bytes: int | None = None
    peak_bytes: int | None = None
    tokens_per_s: float | None = None
    latency_ms: float | None = None
    accuracy_drop_pct: float | None = None
    basis: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """One way from a model to a device: who quantizes, who exports, who runs, and why."""

    target: str
    method: str  # quantizer names joined with "+", e.g. "awq+gptq"
    family: Family
    scheme: str
    quantizer: str
    exporter: str | None
    runtime: str | None
    path: tuple[Step, ...] = ()
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # distributions to install
    fits: bool = True
    estimates: Estimates = field(default_factory=Estimates)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A route that was looked at and left, with the reason."""

    route: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Ranked routes for one model: best first for each target, and what was rejected."""

    model: ModelProfile
    goals: Goals
    routes: tuple[Route, ...]
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which samples the statistics are taken from."""

    data: str  # path of the text, or of labelled data
    data_sha256: str = ""
    samples: int = 64
    seq_len: int = 512  # tokens per sample of text; 0: samples are items, each as long as it is


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything needed to repeat a run; read and written as YAML by `qhub.route.recipe`."""

    model: str
    model_path: str
    model_sha256: str
    target: str
    method: str
    scheme: str
    exporter: str | None = None
    runtime: str | None = None
    calibration: Calibration | None = None
    evaluation: Calibration | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)  # layer name pattern → scheme or "float"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # quantizer name → its options
    seed: int = 0
    goals: Goals = field(default_factory=Goals)
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] = field(default_factory=dict)  # cpu, isa, threads, os, accelerators
    preprocess: Mapping[str, Any] | None = None  # how items become inputs (docs/data.md), where the model's files do not say


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was: `kind` is source, data, recipe, version, hardware, file, damage, artifact or metric."""

    kind: str
    name: str
    recorded: str
    found: str
    part: str = ""  # where in it, if that can be said


def last_match(name: str, patterns: Iterable[str]) -> str | None:
    """The last of the override patterns that means layer `name`: the end of its name, or all of it with `*`."""
    found = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern) or name.endswith(f".{pattern}")]
    return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that a plugin brings along: `name` is what the user writes, e.g. `demo:llm`."""

    name: str
    path: Path
    summary: str
    calibration: Path | None = None
    evaluation: Path | None = None


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A directory that holds a quantized model; `kind` is weights (Hugging Face folder) or graph (`model.pt2`)."""

    path: Path
    kind: Literal["weights", "graph"]
    scheme: str
    method: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """What an exporter wrote. `bytes` is the size of all files together, `sha256` the digest over their digests."""

    path: Path
    format: str
    bytes: int
    sha256: str
    recipe_digest: str = ""


def as_json(value: Any) -> Any:  # noqa: ANN401 - any value in, JSON out
    """Turn a value of this file (or a container of them) into what `json.dumps` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
