"""Tiny random models of several families with a tokenizer, written once per test session, offline.

Norms, biases and weights are random enough that every channel matters; a few input channels are large, as in real models.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qhub.events import Events, Listener
from qhub.quantize.block import LayerChoice
from qhub.quantize.store import QuantizedWeights, finish
from qhub.quantize.walk import WalkPlan, WalkResult, walk
from qhub.skeleton import FloatWeights, Skeleton, Weights, run_block
from qhub.types import Scheme

VOCABULARY = 128
HIDDEN = 64
BLOCKS = 2
CONTEXT = 128
_COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
_GATED = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": None}
_GEMMA = {**_GATED, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
_FALCON = {**_COMMON, "model_type": "falcon", "new_decoder_architecture": False, "bias": False, "alibi": False}
FAMILIES: Mapping[str, Mapping[str, object]] = {
    "llama": _GATED,
    "llama-tied": {**_GATED, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**_GATED, "sliding_window": 16},
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 16},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**_GATED, "num_key_value_heads": 4},
    "gpt2": {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": CONTEXT},
    "opt": {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": HIDDEN, "pad_token_id": 0, "dropout": 0.0},
    "gpt_neox": {**_COMMON, "intermediate_size": 128},
    "falcon": {**_FALCON, "multi_query": True, "parallel_attn": True},
    "falcon-new": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    "mixtral": {**_GATED, "num_local_experts": 4, "sliding_window": None},
}
_GPT = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": CONTEXT}
_MULTI_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
#: Families beyond those that most tests look at, each with something of its own in its blocks.
MORE: Mapping[str, Mapping[str, object]] = {
    "bloom": {"hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 4},
    "cohere": _GATED,
    "deepseek_v3": {**_GATED, **_MULTI_LATENT, "num_key_value_heads": 4},
    "diffllama": _GATED,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "num_layers": BLOCKS,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": CONTEXT,
        "window_size": 16,
    },
    "gptj": {**_GPT, "rotary_dim": 8},
    "mpt": {"d_model": HIDDEN, "n_layers": BLOCKS, "n_heads": 4, "max_seq_len": CONTEXT},
    "olmo2": _GATED,
    "openai-gpt": _GPT,
    "opt-post-norm": {**FAMILIES["opt"], "model_type": "opt", "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "phi": _GATED,
    "stablelm": _GATED,
}
_FOLDER = Path(tempfile.mkdtemp(prefix="qhub-tiny-models-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


@functools.cache
def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a random model of `family` with its tokenizer; tests must not write into it."""
    folder = _FOLDER / f"{family}-{str(dtype).removeprefix('torch.')}"
    settings = {"model_type": family, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, **{**FAMILIES, **MORE}[family]}
    config = AutoConfig.for_model(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.2 if parameter.ndim == 1 else 0.15
                parameter.add_(torch.randn(parameter.shape) * spread)
            model.get_input_embeddings().weight[:, ::11] *= 6
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, *, bos: bool = True) -> None:
    """A tokenizer whose ids are the characters' codes (ASCII only); `<s>` is 1, everything else unknown is 0."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {chr(code): code for code in range(VOCABULARY)}
    for token, code in (("<unk>", 0), ("<s>", 1), ("</s>", 2)):
        del vocabulary[chr(code)]
        vocabulary[token] = code
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>" if bos else None)
    wrapped.save_pretrained(folder)


def random_ids(samples: int = 8, seq_len: int = 32, seed: int = 0) -> torch.Tensor:
    """ids (samples, seq_len) int64."""
    return torch.randint(0, VOCABULARY, (samples, seq_len), generator=torch.Generator().manual_seed(seed))


def quantize(source: Path, out: Path, quantizer: object, scheme: str, **options: object) -> WalkResult:
    """Walk over `source` and finish the QuantizedModel in `out / "model"`; `options` are the WalkPlan's, and `listener`."""
    folder, work = out / "model", out / "work"
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    overrides = {name: None if text == "float" else Scheme.parse(text) for name, text in dict(options.pop("overrides", {})).items()}
    listener: Listener | None = options.pop("listener", None)
    ids = options.pop("ids", None)
    plan = WalkPlan(source, folder, work, quantizer, LayerChoice(Scheme.parse(scheme), overrides), ids, **options)
    result = walk(plan, Events(listener=listener))
    layers = {name: str(chosen) for name, chosen in result.schemes.items()}
    facts = {"scheme": scheme, "method": quantizer.name, "layers": layers, "transposed": result.transposed, "subclassed": result.subclassed}
    finish(folder, source, result.schemes, result.ignored, facts)
    return result


@torch.no_grad()
def logits_of(weights: Weights | Path, ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """qhub's own logits, block by block, for a float folder or any other source of weights."""
    skeleton = Skeleton(FloatWeights(weights) if isinstance(weights, Path) else weights, dtype=dtype)
    skeleton.learn_output_form(ids)
    hidden, calls = skeleton.embed(ids)
    for index in range(len(skeleton.block_names)):
        with skeleton.block(index) as module:
            hidden = run_block(module, hidden, calls[index])
    return skeleton.logits(ids, hidden)


@torch.no_grad()
def quantized_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The reference logits of a QuantizedModel: the float model's code on dequantized weights."""
    return logits_of(QuantizedWeights(folder), ids)
