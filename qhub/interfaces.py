"""What a plugin implements: `Quantizer`, `Exporter`, `Runtime` and the `Session` a runtime opens.

A complete quantizer plugin, in one file:

    from qhub import Quantizer, hookimpl

    class Nearest(Quantizer):
        name = "nearest"
        summary = "round to nearest"
        distribution = "qhub-nearest"

        def quantize_layer(self, weight, scheme, block):
            from qhub import quantize_rtn  # imports torch: only where it is needed

            return quantize_rtn(weight, scheme, block.dtype)

    @hookimpl
    def qhub_quantizers():
        return [Nearest()]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qhub.errors import UsageError
from qhub.types import Artifact, Family, ModelProfile, OpenOptions, QuantizedModel, Recipe, Scheme, Target

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from qhub.graph.values import Batch, GraphInput, Op, Quantization
    from qhub.quantize.qtensor import QTensor


class Component:
    """What every plugin component says of itself; all of it cheap and free of heavy imports."""

    name: str = ""
    summary: ClassVar[str] = ""
    #: Importable modules that the work needs; a missing one shows as "not usable here: pip install …".
    requires: ClassVar[tuple[str, ...]] = ()
    #: The distribution to install when something in `requires` is missing, e.g. "qhub-awq".
    distribution: ClassVar[str] = ""


class Statistics(Protocol):
    """What calibration saw at the input of a layer: T tokens of K channels.

    The arrays belong to the walk; a quantizer must not modify them.
    """

    tokens: int

    @property
    def gram(self) -> torch.Tensor | None:
        """Mean of x xᵀ, (K, K) float32; None unless the quantizer asked for "gram" and there is data."""

    @property
    def abs_mean(self) -> torch.Tensor | None:
        """Mean |x| per channel, (K,) float32; None without data. In `quantize_group` only if asked for ("abs_mean")."""


class Group(Protocol):
    """Layers of one block that read the same input tensor, in execution order (q/k/v; gate/up; a single layer)."""

    @property
    def stats(self) -> Statistics:
        """What calibration saw at the group's input."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Layer name inside the block → weight (N, K) float32; the quantizer must not modify it."""

    @property
    def foldable(self) -> bool:
        """Whether a per-channel input scale can be folded into the module that produces the input."""

    def shortfall(self, name: str) -> torch.Tensor | None:
        """What layer `name` gives less than in the float model: mean of (y_float − y) xᵀ, (N, K) float32; `compensate` uses it.

        x is what the layer reads in the quantized model, y its output with the residual stream it is added to, if it is.
        None unless the quantizer asked for "shortfall" and there is data, and for layers that share their input.
        """

    def tied(self, values: torch.Tensor) -> torch.Tensor:
        """values (K,) made equal (geometric mean) where one producer channel feeds several inputs (grouped-query attention)."""

    def output_error(self, weights: Mapping[str, torch.Tensor]) -> float:
        """Mean squared change of the containing module's output (sampled tokens) with `weights` in place of the group's.

        The weights act on the unscaled input: pass `dequantized / scale` to judge an input scale. Only inside
        `scale_group`, and only for groups of several layers.
        """


class Block(Protocol):
    """One decoder block on its way through the walk."""

    index: int
    name: str
    #: the dtype that scales are stored in: pass it to `round_scale`.
    dtype: torch.dtype

    def observed(self) -> Iterator[Group]:
        """All groups in execution order, with statistics from one pass through the float block."""

    def groups(self) -> Iterator[Group]:
        """The groups in execution order; the statistics of each see the groups before it already quantized."""

    def schemes(self, group: Group) -> Mapping[str, Scheme]:
        """The scheme of each layer of `group` (overrides applied)."""

    def fold(self, group: Group, scale: torch.Tensor) -> bool:
        """Divide the group's input by `scale` (K,) in its producer and multiply the weights' columns by it.

        Returns False and changes nothing when the block's float output would change. Only before anything is kept.
        """

    def keep(self, group: Group, result: Mapping[str, QTensor]) -> None:
        """Put the quantized weights of `group` in place; later groups see them."""

    def note(self, group: Group, text: str) -> None:
        """Say in the report that the group's layers were treated differently (a fallback, a dead input)."""


class Quantizer(Component):
    """A method. Override the finest level that the method needs; the default of each calls the next finer one.

    `family` is the leaf of the flowchart that the method serves; `families` are all of them where it serves several.
    `needs` names the statistics to collect: "gram", "shortfall", "abs_mean"; empty means that no calibration pass is run at all.
    """

    family: ClassVar[Family] = "weight-only"
    families: ClassVar[tuple[Family, ...]] = ()
    default_scheme: ClassVar[str] = "w4a16-g128-asym"
    needs: frozenset[str] = frozenset()
    #: Whether `scale_group` may return a scale: then `a+b` takes a's scales and b's rounding.
    scales: ClassVar[bool] = False
    #: Whether it takes the model as a whole (`WholeModel`), so that all of it is in memory at once.
    whole: ClassVar[bool] = False
    #: Whether it takes a network as a graph (`GraphQuantizer`).
    graph: ClassVar[bool] = False
    #: option name → default; what a recipe's `options` may set.
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - options are plain YAML values
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            message = f"quantizer `{self.name}` has no option `{unknown[0]}`"
            raise UsageError(message, hint=f"its options are: {', '.join(self.options) or 'none'}")
        self.settings: Mapping[str, Any] = {**self.options, **options}

    def serves(self, family: Family) -> bool:
        """Whether it is a method of that family."""
        return family == self.family or family in self.families

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Why this method cannot take this model at this scheme, naming every bad layer; reads no weights."""
        return None if scheme.is_weight_only else f"`{self.name}` does not write scheme `{scheme}`"

    def quantize_layer(self, weight: torch.Tensor, scheme: Scheme, block: Block) -> QTensor:
        """Quantize one weight (N, K) float32 without looking at data. Called once per layer; must be deterministic."""
        raise NotImplementedError

    def scale_group(self, group: Group, block: Block) -> torch.Tensor | None:
        """The input scale (K,) to fold into the group's producer, or None. Called for foldable groups, before any rounding."""
        return None

    def quantize_group(self, group: Group, block: Block) -> Mapping[str, QTensor]:
        """Quantize the layers that read one input. Called once per group, in execution order."""
        schemes = block.schemes(group)
        return {name: self.quantize_layer(weight, schemes[name], block) for name, weight in group.weights.items()}

    def quantize_block(self, block: Block) -> None:
        """Quantize one block: first all input scales, then the groups in execution order. Called once per block, in order."""
        if self.scales:
            for group in block.observed():
                scale = self.scale_group(group, block) if group.foldable else None
                if scale is not None:
                    block.fold(group, scale)
        for group in block.groups():
            block.keep(group, self.quantize_group(group, block))


@dataclass(frozen=True)
class ModelJob:
    """What a method that takes a whole model is to do.

    `source` is the float model's folder, not to be written to; `out` an empty folder for whatever the method makes; `ids`
    (samples, tokens) int64 the calibration tokens, None if the method needs none; `schemes` the scheme of each layer to
    quantize, by its full name in the model as transformers builds it: every other layer stays float.
    """

    source: Path
    out: Path
    ids: torch.Tensor | None
    schemes: Mapping[str, Scheme]
    float_layers: tuple[str, ...] = ()  # the linear layers of the blocks that are not in `schemes`
    device: str = "cpu"


class WholeResult(Protocol):
    """What a whole-model method made, read one tensor at a time."""

    def layer(self, name: str) -> QTensor:
        """Layer `name` (as in `ModelJob.schemes`): its codes, scales and zeros as the method has them."""

    def tensor_names(self) -> Iterable[str]:
        """The names of all float tensors that there are, as the float model's files or transformers have them."""

    def tensor(self, name: str) -> torch.Tensor:
        """Float tensor `name`: a method may have changed it, as folding an input scale into a norm does."""


class WholeModel(Quantizer):
    """A method that takes the model as a whole, as other tools do; the core writes what it made, one block at a time.

    It does not combine with other methods, and after an interruption it begins again unless `quantize_model` had ended.
    A scale that 16 bits cannot hold is rounded to one that they can; the report says how many and how far.

        class Tool(WholeModel):
            name = "tool-gptq"

            def quantize_model(self, job):
                run_tool(job.source, job.ids, out=job.out)

            def read_result(self, out):
                return ToolFolder(out)
    """

    whole: ClassVar[bool] = True
    #: The tokens themselves, not statistics of them; empty for a method that looks at no data.
    needs = frozenset({"tokens"})

    def quantize_model(self, job: ModelJob) -> None:
        """Quantize the model, leaving in `job.out` what `read_result` reads. Called once; must be deterministic."""
        raise NotImplementedError

    def read_result(self, out: Path) -> WholeResult:
        """Open what `quantize_model` left in `out`, perhaps in another process."""
        raise NotImplementedError


class Graph(Protocol):
    """A network that is no language model: images, text classification, speech, …; as a torch program or an ONNX file.

    Tensors are called by the operation that makes them (or by the network's input), layers by their weight without
    `.weight`. Everything that rewrites it returns another graph.
    """

    #: What the file that `save` writes is called at its end.
    suffix: str
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operations that depend on the network's input, in execution order."""

    def weight(self, layer: str) -> torch.Tensor:
        """The weight of a layer, (N, …) float32: its outputs first. Not to be modified."""

    def bias(self, layer: str) -> torch.Tensor | None:
        """The bias of a layer, (N,) float32."""

    def run(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The network's outputs for one batch (input name → array, axis 0 the items)."""

    def watch(self, batch: Batch, tensors: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Run one batch and yield each of `tensors`."""

    def apply(self, op: Op, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What `op`, a convolution or a linear layer, makes of `x` with another weight (N, …) and without its bias."""

    def with_layers(self, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]) -> Graph:
        """The network with other weights and biases (None: as it is); a norm is a layer too, if it has a weight."""

    def rounded(self, quantization: Quantization) -> Graph:
        """The network with quantize and dequantize operations, as it will be stored."""

    def layers(self, bits: Mapping[str, int]) -> Mapping[str, QTensor]:
        """The codes, scales and zeros of the quantized layers of a rounded network; `bits` of each layer's codes."""

    def save(self, path: Path) -> None:
        """Write it as a file."""


@dataclass(frozen=True)
class GraphJob:
    """What a method for graphs is to do.

    `calibration()` yields batches anew each time it is called, None if the method needs no data; `drop_pct(graph)` is how much
    a rounded graph loses on them, in percent of the float graph's accuracy (of its agreement with itself where there are no
    labels). `scheme_of(layer)` is None for a layer that stays float. `labels()` yields the labels of the same batches, or
    None where there are none.
    """

    graph: Graph
    scheme: Scheme
    scheme_of: Callable[[str], Scheme | None]
    calibration: Callable[[], Iterator[Batch]]
    labels: Callable[[], Iterator[NDArray[Any]]] | None
    drop_pct: Callable[[Graph], float]
    max_drop_pct: float
    work: Path
    note: Callable[[str], None]
    progress: Callable[[int, int, str], None]  # done, of how many, what
    target: Target | None = None
    seed: int = 0


@dataclass(frozen=True)
class GraphResult:
    """What a method for graphs made: the float graph it rounded (weights may have changed), how, and what to say of which layer."""

    graph: Graph
    quantization: Quantization
    notes: Mapping[str, str] = field(default_factory=dict)


class GraphQuantizer(Quantizer):
    """A method for networks that are graphs, not stacks of decoder blocks."""

    #: Whether it takes graphs rather than the decoder blocks of language models.
    graph: ClassVar[bool] = True
    family: ClassVar[Family] = "static"
    default_scheme: ClassVar[str] = "w8a8-static"
    needs = frozenset({"items"})

    def quantize_graph(self, job: GraphJob) -> GraphResult:
        """Decide how the graph is rounded. Called once; must be deterministic."""
        raise NotImplementedError


class Exporter(Component):
    """A file format. Says which schemes it carries exactly, and refuses the rest with a reason."""

    format: ClassVar[str] = ""

    def reject(self, profile: ModelProfile, scheme: Scheme) -> str | None:
        """Why this format cannot carry this model at this scheme; never a silent change of scheme."""
        return None

    def export(self, model: QuantizedModel, out: Path, recipe: Recipe) -> Artifact:
        """Write the artifact into the empty directory `out`. Called once, after quantization."""
        raise NotImplementedError

    def read_layers(self, path: Path) -> Mapping[str, QTensor] | None:
        """The quantized layers of the artifact at `path`, read back from its files; None if only a runtime can tell.

        Called to prove that the format carries the codes, scales and zeros exactly.
        """
        return None


class Session(Protocol):
    """An opened artifact.

    It may also have, where the engine knows better than the outside: `bytes_per_token`, the bytes of weights that a new
    token reads; `bandwidth(threads)`, the bytes per second that so many threads read here; `ops_per_token`, the operations of
    the products that a prompt's token takes; `peak_ops(threads)`, the int8 operations per second that so many threads reach
    here, None if that is not known; `how_loaded`, a few words on what opening took; `conversation()`, a `Conversation`.
    """

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids (B, T) → next-token logits (B, T, V)."""

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        until_stop: bool = True,
    ) -> Iterator[int]:
        """Token ids that continue `ids`, one at a time, up to the model's stop token, which is not among them.

        Temperature 0 takes the most probable token; else one of the most probable ones that have `top_p` of the probability
        together is drawn. With `until_stop` false stop tokens are tokens like others: that is for measuring.
        """

    def close(self) -> None:
        """Give memory back."""


class GraphSession(Protocol):
    """An opened artifact of a network that is no language model."""

    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]

    def run(self, batch: Batch) -> tuple[NDArray[np.float32], ...]:
        """The outputs for one batch (input name → array, axis 0 the items)."""

    def close(self) -> None:
        """Give memory back."""


class Conversation(Protocol):
    """Tokens whose state (keys and values) a session keeps, so that a turn of a chat costs only what is new in it."""

    @property
    def length(self) -> int:
        """How many tokens are kept."""

    @property
    def capacity(self) -> int:
        """How many there is room for."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def reply(
        self, ids: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[int]:
        """Append `ids` and yield what follows, as `Session.generate` does; a yielded token may or may not be kept yet.

        :raises QhubError: when there is no room for `ids`; what is kept stays as it was.
        """


class Runtime(Component):
    """An engine that runs artifacts of certain `formats`."""

    formats: ClassVar[tuple[str, ...]] = ()
    #: Whether it rounds activations unless `OpenOptions.exact` is set: then that is how an artifact is verified.
    rounds_activations: ClassVar[bool] = False

    def reject(self, target: Target) -> str | None:
        """Why this engine does not run on a device with these facts."""
        return None

    def efficiency(self, target: Target) -> float | None:
        """Measured share of the roofline that decoding reaches there, to cap an estimate; None if not measured."""
        return None

    def open_graph(self, path: Path, options: OpenOptions = OpenOptions()) -> GraphSession:  # noqa: B008 - frozen
        """Open the artifact of a graph at `path`.

        :raises Unsupported: when the engine does not run this network, or has no kernel to choose and one is asked for.
        """
        raise NotImplementedError

    def open(self, path: Path, options: OpenOptions = OpenOptions()) -> Session:  # noqa: B008 - frozen
        """Open the artifact of a language model at `path`.

        :raises Unsupported: when the engine does not run this model, or has no kernel to choose and one is asked for.
        """
        raise NotImplementedError
