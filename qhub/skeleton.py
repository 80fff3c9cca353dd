"""A transformers model without weights: its code runs, its decoder blocks are filled one at a time.

What an architecture looks like is asked of transformers (the config, the module list of decoder blocks), and what each
block is called with is recorded by letting the model call stand-ins. No architecture is named here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qhub.errors import DamagedModelError, QhubError, Unsupported
from qhub.weights import WeightFiles

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

TOKENS_AT_ONCE = 2048  # tokens per forward pass


def read_tensor(files: WeightFiles, name: str) -> torch.Tensor:
    """Tensor `name` on the CPU in its stored dtype; the memory belongs to the caller."""
    info = files[name]
    tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    if info.bytes:
        files.read_into(name, tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor


@dataclass(frozen=True)
class BlockCall:
    """What a decoder block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Weights(Protocol):
    """Where a skeleton's weights come from: float files, or a quantized folder that dequantizes as it reads."""

    folder: Path

    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def model_dtype(self) -> torch.dtype: ...
    def read(self, name: str) -> torch.Tensor: ...


class FloatWeights:
    """The tensors of a float model folder as torch tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = WeightFiles.open(folder)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def model_dtype(self) -> torch.dtype:
        """The dtype that most of the matrices are stored in."""
        return stored_dtype(self.files)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` as stored."""
        return read_tensor(self.files, name)


class Skeleton:
    """An empty causal language model and the files its weights come from.

    `dtype` is what forward passes compute in, `model_dtype` what the files hold.
    """

    def __init__(self, weights: Weights, *, dtype: torch.dtype | None = None, device: str = "cpu", trust_remote_code: bool = False) -> None:
        self.folder = folder = weights.folder
        self.files = weights
        self.device = torch.device(device)
        self.config = model_config(folder, trust_remote_code=trust_remote_code)
        self.model_dtype = weights.model_dtype()
        self.dtype = dtype or self.model_dtype
        self.model = _empty_model(self.config, self.dtype, trust_remote_code=trust_remote_code)
        self.blocks_name, self._blocks = _decoder_blocks(self.model)
        self.block_names = tuple(f"{self.blocks_name}.{index}" for index in range(len(self._blocks)))
        self._prefix = getattr(self.model, "base_model_prefix", "")
        self._renamed = _renamed(self.model, weights)
        self._returns_tuple = False
        self._outer_loaded: set[bool] = set()

    def stored_name(self, name: str) -> str:
        """The name in the files of parameter `name` (with or without the base model's prefix, or as transformers renames it).

        :raises QhubError: when the files do not hold it.
        """
        for candidate in (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}."), self._renamed.get(name)):
            if candidate in self.files:
                return str(candidate)
        message = f"`{self.folder}` has no tensor `{name}`, which `{type(self.model).__name__}` needs"
        raise DamagedModelError(message, hint="check that config.json belongs to these weights")

    def tensors_of(self, index: int) -> list[str]:
        """Names in the files of all tensors of block `index`."""
        name = self.block_names[index]
        prefixes = tuple(f"{prefix}." for prefix in {name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")})
        return [stored for stored in self.files if stored.startswith(prefixes)]

    def inside(self, stored: str, index: int) -> str:
        """The name within block `index` of the stored tensor `stored`."""
        return stored.removeprefix(f"{self._prefix}.").removeprefix(f"{self.block_names[index].removeprefix(f'{self._prefix}.')}.")

    def check_blocks(self) -> None:
        """Compare the blocks' parameters with the headers of a float model's files, before a weight is read.

        :raises DamagedModelError: when a tensor is missing or has another shape than the config asks for.
        """
        if isinstance(self.files, FloatWeights):
            for index, prefix in enumerate(self.block_names):
                for name, parameter in self.empty_block(index).named_parameters():
                    stored = self.stored_name(f"{prefix}.{name}")
                    _check_shape(stored, self.files.files[stored].shape, parameter.shape)

    def empty_block(self, index: int) -> nn.Module:
        """Block `index` without weights."""
        return self._blocks[index]

    def outer_tensors(self) -> list[str]:
        """Names in the files of everything that belongs to no block (embeddings, final norm, head)."""
        inside = {name for index in range(len(self.block_names)) for name in self.tensors_of(index)}
        return [name for name in self.files if name not in inside]

    @contextmanager
    def block(self, index: int, *, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """Block `index` with its weights in memory (`dtype`, else the forward dtype); they go when the context ends."""
        module = self._blocks[index]
        try:
            self._fill(module, self.block_names[index], dtype or self.dtype)
            yield module
        finally:
            _drop(module)

    def _fill(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:
        for owner_name, owner in module.named_modules():
            for key, parameter in list(owner.named_parameters(recurse=False)):
                full = ".".join(part for part in (name, owner_name, key) if part)
                self._set(owner, key, parameter, self.stored_name(full), dtype)

    def _set(self, owner: nn.Module, key: str, parameter: nn.Parameter, stored: str, dtype: torch.dtype) -> None:
        tensor = self.files.read(stored)
        _check_shape(stored, tensor.shape, parameter.shape)
        if not tensor.is_floating_point():
            raise Unsupported(f"tensor `{stored}` holds integers", hint="this model is already quantized: start from the float model")
        tensor = tensor.to(device=self.device, dtype=dtype)
        if not is_finite(tensor):
            message = f"tensor `{stored}` contains NaN or infinite numbers"
            raise DamagedModelError(message, hint="the file is damaged or the training diverged: get the weights again")
        owner._parameters[key] = nn.Parameter(tensor, requires_grad=False)

    def _load_outer(self, *, head: bool) -> None:
        """Load what lies outside the blocks, once: the base model's part, or the head's; it stays."""
        if head in self._outer_loaded:
            return
        output, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        tied = output is not None and bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))
        base = set(self.model.base_model.modules())
        for name, owner in self.model.named_modules():
            if name.startswith(f"{self.blocks_name}.") or (owner in base) == head:
                continue
            for key, parameter in list(owner.named_parameters(recurse=False)):
                if not (tied and owner is output and key == "weight"):
                    self._set(owner, key, parameter, self.stored_name(f"{name}.{key}"), self.dtype)
        if head and tied:
            output.weight = embedding.weight
        self._outer_loaded.add(head)

    def drop_outer(self) -> None:
        """Give back the memory of what lies outside the blocks; it is read again when it is needed."""
        outside = [module for name, module in self.model.named_modules() if not name.startswith(f"{self.blocks_name}.")]
        for module in outside:
            _drop_own(module)
        self._outer_loaded.clear()

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[BlockCall]]:
        """ids (B, T) → the hidden states that enter block 0, (B, T, H), and how each block is called."""
        self._load_outer(head=False)
        stand_ins = [_StandIn(block, returns_tuple=self._returns_tuple) for block in self._blocks]
        with self._replaced(stand_ins):
            self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
        return stand_ins[0].hidden, [BlockCall(stand_in.args, stand_in.kwargs) for stand_in in stand_ins]

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head on the hidden states after the last block: (B, T, H) → (B, T, V) float32."""
        self._load_outer(head=False)
        self._load_outer(head=True)
        stand_ins = [_StandIn(block, returns_tuple=self._returns_tuple, output=hidden) for block in self._blocks]
        with self._replaced(stand_ins):
            output = self.model(input_ids=ids.to(self.device), use_cache=False)
        result: torch.Tensor = output.logits.float()
        return result

    @torch.no_grad()
    def learn_output_form(self, ids: torch.Tensor) -> None:
        """Find out whether this architecture's blocks return a tuple, by running block 0 once on `ids` (1, T)."""
        self._load_outer(head=False)
        first = _StandIn(self._blocks[0], returns_tuple=False, stops=True)
        with self._replaced([first]), suppress(Enough):
            self.model.base_model(input_ids=ids[:1, :8].to(self.device), use_cache=False)
        with self.block(0) as module:
            self._returns_tuple = isinstance(module(first.hidden, *first.args, **first.kwargs), (tuple, list))

    @contextmanager
    def _replaced(self, stand_ins: list[_StandIn]) -> Iterator[None]:
        for index, stand_in in enumerate(stand_ins):
            self._blocks[index] = stand_in
        try:
            yield
        finally:
            for index, stand_in in enumerate(stand_ins):
                self._blocks[index] = stand_in.block


class Enough(Exception):
    """Stops a forward pass once what was waited for has been seen."""


class _StandIn(nn.Module):
    """Stands where a block stood: records how it is called and passes hidden states on, or stops there."""

    def __init__(self, block: nn.Module, *, returns_tuple: bool, output: torch.Tensor | None = None, stops: bool = False) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: its weights stay out of this module
        self.returns_tuple = returns_tuple
        self.output = output
        self.stops = stops
        self.hidden = torch.empty(0)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the model asks of its block
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:  # noqa: ANN401
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        if self.stops:
            raise Enough
        output = hidden_states if self.output is None else self.output
        return (output,) if self.returns_tuple else output


def run_block(module: nn.Module, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """One block's forward pass: (B, T, H) → (B, T, H)."""
    return hidden_of(module(hidden, *call.args, **call.kwargs))


def hidden_of(output: Any) -> torch.Tensor:  # noqa: ANN401 - what a module returns
    """The hidden states in what a block or a part of it returns: the first of several outputs."""
    result: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return result


def forward_dtype(model_dtype: torch.dtype, hidden_size: int, device: str) -> torch.dtype:
    """What forward passes compute in: bf16 where the processor multiplies it natively and the model is large, else float32.

    Below a hidden size of 1024 float32 costs little and keeps statistics exact.
    """
    if model_dtype == torch.float32 or hidden_size < 1024:
        return torch.float32
    if device != "cpu":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; a finite sum proves it at a fraction of the time."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def batch_size(samples: int, seq_len: int, tokens: int = TOKENS_AT_ONCE) -> int:
    """Samples per forward pass: the largest divisor of `samples` that keeps a batch within `tokens` tokens."""
    fitting = max(1, tokens // seq_len)
    return max(size for size in range(1, fitting + 1) if samples % size == 0)


def _check_shape(stored: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        message = f"tensor `{stored}` has shape {list(found)}; the config asks for {list(wanted)}"
        raise DamagedModelError(message, hint="check that config.json belongs to these weights")


def _drop(module: nn.Module) -> None:
    for owner in module.modules():
        _drop_own(owner)


def _drop_own(owner: nn.Module) -> None:
    for key, parameter in list(owner._parameters.items()):
        if parameter is not None:
            owner._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def model_config(folder: Path, *, trust_remote_code: bool) -> Any:  # noqa: ANN401 - a transformers config
    """The config of a model folder as transformers reads it.

    :raises Unsupported: when the installed transformers does not know the architecture.
    :raises QhubError: when the file is broken, or the model needs code of its own and that is not allowed.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))  # says more clearly than transformers what is wrong with the file
        kind, own_code = said.get("model_type"), "auto_map" in said
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedModelError(f"transformers cannot read `{path}`: {error}", hint="download it again") from None
    if kind not in CONFIG_MAPPING and not own_code:
        message = f"this version of transformers does not know the architecture `{kind}` of `{folder}`"
        raise Unsupported(message, hint="`pip install -U transformers` may bring it")
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        message = f"`{folder}` needs Python code of its own to run, which may do anything"
        raise QhubError(message, hint="read it; if you trust it, run again with `--trust-remote-code`")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - what transformers raises for odd values is not defined
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedModelError(f"transformers cannot read `{path}`: {first}", hint="check config.json, or get it again") from None


def _empty_model(config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:  # noqa: ANN401 - a transformers model
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        if "Unrecognized configuration class" in str(error):
            message = f"`{architecture}` is not a causal language model that transformers knows"
            raise Unsupported(message, hint="weight quantizers take decoder-only language models") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"transformers cannot build `{architecture}` from config.json: {reason}"
        raise DamagedModelError(message, hint="check config.json, or get it again") from error
    return model.eval()


def _renamed(model: Any, names: Iterable[str]) -> dict[str, str]:  # noqa: ANN401 - a transformers model
    """Parameter → its name in the files, where transformers renames as it loads (GPT-NeoX: `lm_head` is stored as `embed_out`)."""
    try:
        from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping
    except ImportError:  # an older transformers
        return {}
    found = {}
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    for stored in names:
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        if name != stored:
            found[name] = stored
    return found


def _decoder_blocks(model: Any) -> tuple[str, nn.ModuleList]:  # noqa: ANN401 - a transformers model
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    message = f"found no list of `{count}` decoder blocks in `{type(model).__name__}`"
    raise Unsupported(message, hint="weight quantizers take decoder-only language models")


def stored_dtype(files: WeightFiles) -> torch.dtype:
    """The float dtype that holds most of a model's matrices.

    :raises Unsupported: when the model holds no float matrices.
    """
    sizes: dict[str, int] = {}
    for info in files.values():
        if len(info.shape) == 2:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.bytes
    floats = {dtype: size for dtype, size in sizes.items() if dtype in ("F16", "BF16", "F32")}
    if not floats:
        raise Unsupported("the model holds no float weights", hint="start from the float model")
    return TORCH_DTYPES[max(floats, key=lambda dtype: floats[dtype])]
