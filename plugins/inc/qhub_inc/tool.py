"""Calls Intel Neural Compressor 3.10: a model folder and tokens in, codes, scales and zeros of each layer out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qhub import ModelJob, PluginError, Scheme
from qhub_inc.folder import FILE, parts_of

#: In a Llama's block: module → the layers that read what it gives.
_PRODUCERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def run(job: ModelJob, config_name: str, settings: Mapping[str, Any]) -> None:
    """Quantize the model of `job` in float32 with exactly its tokens, and save what came of it."""
    from neural_compressor.torch.quantization import convert, prepare
    from transformers import AutoModelForCausalLM

    # from_pretrained: its GPTQ asks the config where the model lies
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32).eval()
    model.config.use_cache = False
    example = torch.zeros(1, 8, dtype=torch.int64) if job.ids is None else job.ids[:1]
    model = prepare(model, configuration(job, config_name, settings), example_inputs=example)
    with torch.no_grad():
        for sample in () if job.ids is None else job.ids:
            model(input_ids=sample[None])
    save(convert(model), job)


def configuration(job: ModelJob, name: str, settings: Mapping[str, Any]) -> Any:  # noqa: ANN401 - the tool's configuration
    """One scheme for all layers, others by their name; what stays float has its own word."""
    from neural_compressor.torch import quantization

    kind = getattr(quantization, name)
    common = next(iter(job.schemes.values()))
    if name == "AWQConfig":
        settings = {**settings, "absorb_layer_dict": producers(job)}
    chosen = kind(**weights(common), **settings)
    for layer, scheme in job.schemes.items():
        if scheme != common:
            chosen.set_local(layer, kind(**weights(scheme), **settings))
    for layer in job.float_layers:
        chosen.set_local(layer, kind(dtype="fp32"))
    return chosen


def producers(job: ModelJob) -> dict[str, tuple[str, ...]]:
    """Which module of a block the scales of which layers fold into; the tool finds none by itself with transformers 5.

    :raises PluginError: when the blocks are not built as a Llama's are, or some of these layers stay float.
    """
    inside = {name.partition(".layers.")[2].partition(".")[2] for name in job.schemes}
    missing = [layer for layers in _PRODUCERS.values() for layer in layers if layer not in inside]
    missing += job.float_layers
    if missing:
        message = f"Intel Neural Compressor's AWQ needs all layers of blocks like a Llama's, and `{missing[0]}` is not quantized"
        raise PluginError(message, hint="use `--plugin awq`, which finds what to scale in any architecture")
    return dict(_PRODUCERS)


def weights(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the tool's words."""
    return {"dtype": "int", "bits": scheme.weight_bits, "group_size": scheme.group_size or -1, "use_sym": scheme.symmetric}


def save(model: nn.Module, job: ModelJob) -> None:
    """Save each quantized layer in parts, and every other tensor as it is.

    :raises PluginError: when a layer was left out, or reads its input scaled or in another order.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    inside = tuple(f"{name}." for name in job.schemes)
    for name, scheme in job.schemes.items():
        layer = model.get_submodule(name)
        if not hasattr(layer, "unpack"):
            message = f"Intel Neural Compressor made `{name}` a `{type(layer).__name__}`, which cannot be stored"
            raise PluginError(message, hint="keep such layers float: `--override 'PATTERN=float'`")
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts_of(layer.unpack(), scheme).items()}
    # a layer without a bias has been given one of zeros
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside) or (name.endswith(".bias") and bool(tensor.any()))
    }
    save_file({**tensors, **{name: tensor.clone() for name, tensor in kept.items()}}, job.out / FILE)
