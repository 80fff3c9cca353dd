"""Shapes of decoder language models: the Llama family, GPT-2, GPT-NeoX, OPT, Falcon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qhub.route.shapes.parts import Config, NotDerivable, Shapes, embedding, is_base, linear, matrices, norm, norms


@dataclass(frozen=True, slots=True)
class Family:
    """What tells the members of the Llama family apart; defaults are those of the family's own config class."""

    tied: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None
    bias_flag: str | None = "attention_bias"  # None: the biases are what `qkv_bias` says
    qkv_bias: bool = False
    out_bias: bool = True  # whether the flag also means the output projection
    mlp_bias_flag: str | None = None
    query_norms: bool = False
    feedforward_norms: bool = False
    fused: bool = False
    experts: bool = False


LLAMA_LIKE: dict[str, Family] = {
    "llama": Family(mlp_bias_flag="mlp_bias"),
    "mistral": Family(bias_flag=None, kv_heads=8),
    "mixtral": Family(bias_flag=None, kv_heads=8, experts=True),
    "qwen2": Family(bias_flag=None, qkv_bias=True, out_bias=False, kv_heads=32),
    "qwen3": Family(head_dim=128, kv_heads=32, query_norms=True),
    "gemma": Family(tied=True, head_dim=256, kv_heads=16),
    "gemma2": Family(tied=True, head_dim=256, kv_heads=4, feedforward_norms=True),
    "gemma3_text": Family(tied=True, head_dim=256, kv_heads=4, feedforward_norms=True, query_norms=True),
    "phi3": Family(bias_flag=None, fused=True),
}


@dataclass(frozen=True, slots=True)
class _Attention:
    """Widths of one attention: the stream's, and of queries, and of keys or values."""

    hidden: int
    queries: int
    keys: int
    head_dim: int


def llama_like(config: Config) -> Shapes:
    """A decoder of the Llama family."""
    family = LLAMA_LIKE[config.text("model_type")]
    model, head = _parts(config, "model")
    hidden = config.size("hidden_size")
    attention = _attention(config, family, hidden)
    yield from embedding(f"{model}embed_tokens", config.size("vocab_size"), hidden)
    for index in config.blocks("num_hidden_layers"):
        block = f"{model}layers.{index}"
        yield from _self_attention(f"{block}.self_attn", config, family, attention)
        yield from _feedforward(block, config, family, hidden)
        yield from norms(block, ("input_layernorm", "post_attention_layernorm"), hidden, bias=False)
        if family.feedforward_norms:
            yield from norms(block, ("pre_feedforward_layernorm", "post_feedforward_layernorm"), hidden, bias=False)
    yield from norm(f"{model}norm", hidden, bias=False)
    yield from _head(config, head, ("lm_head", hidden), tied=family.tied)


def _attention(config: Config, family: Family, hidden: int) -> _Attention:
    heads = config.size("num_attention_heads")
    head_dim = config.head_dim(hidden, heads, family.head_dim)
    keys = config.size("num_key_value_heads", family.kv_heads or heads)
    return _Attention(hidden, heads * head_dim, keys * head_dim, head_dim)


def _self_attention(prefix: str, config: Config, family: Family, widths: _Attention) -> Shapes:
    bias = family.qkv_bias if family.bias_flag is None else config.flag(family.bias_flag, default=False)
    if family.fused:
        yield from linear(f"{prefix}.qkv_proj", widths.queries + 2 * widths.keys, widths.hidden, bias=bias)
    else:
        yield from linear(f"{prefix}.q_proj", widths.queries, widths.hidden, bias=bias)
        yield from matrices(prefix, ("k_proj", "v_proj"), (widths.keys, widths.hidden), bias=bias)
    yield from linear(f"{prefix}.o_proj", widths.hidden, widths.queries, bias=bias and family.out_bias)
    if family.query_norms:
        yield from norms(prefix, ("q_norm", "k_norm"), widths.head_dim, bias=False)


def _feedforward(block: str, config: Config, family: Family, hidden: int) -> Shapes:
    inner = config.size("intermediate_size")
    bias = family.mlp_bias_flag is not None and config.flag(family.mlp_bias_flag, default=False)
    if family.experts:
        experts = config.blocks("num_local_experts")
        yield from linear(f"{block}.block_sparse_moe.gate", len(experts), hidden, bias=False)
        for expert in experts:
            yield from _gated(f"{block}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"), (inner, hidden), bias=False)
    elif family.fused:
        yield from linear(f"{block}.mlp.gate_up_proj", 2 * inner, hidden, bias=False)
        yield from linear(f"{block}.mlp.down_proj", hidden, inner, bias=False)
    else:
        yield from _gated(f"{block}.mlp", ("gate_proj", "up_proj", "down_proj"), (inner, hidden), bias=bias)


def _gated(prefix: str, names: tuple[str, str, str], shape: tuple[int, int], *, bias: bool) -> Shapes:
    yield from matrices(prefix, names[:2], shape, bias=bias)
    yield from linear(f"{prefix}.{names[2]}", shape[1], shape[0], bias=bias)


def gpt2(config: Config) -> Shapes:
    """GPT-2, whose matrices are stored (K, N)."""
    model, head = _parts(config, "transformer")
    hidden = config.size("n_embd")
    inner = config.size("n_inner", 4 * hidden)
    if config.flag("add_cross_attention", default=False):
        raise NotDerivable("add_cross_attention")
    yield from embedding(f"{model}wte", config.size("vocab_size"), hidden)
    yield from embedding(f"{model}wpe", config.size("n_positions"), hidden)
    for index in config.blocks("n_layer"):
        block = f"{model}h.{index}"
        yield from norms(block, ("ln_1", "ln_2"), hidden)
        sizes = {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, inner),
            "mlp.c_proj": (inner, hidden),
        }
        for name, shape in sizes.items():
            yield f"{block}.{name}.weight", shape
            yield f"{block}.{name}.bias", shape[1:]
    yield from norm(f"{model}ln_f", hidden)
    yield from _head(config, head, ("lm_head", hidden), tied=True)


def gpt_neox(config: Config) -> Shapes:
    """GPT-NeoX and Pythia."""
    model, head = _parts(config, "gpt_neox")
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    bias = config.flag("attention_bias", default=True)
    yield from embedding(f"{model}embed_in", config.size("vocab_size"), hidden)
    for index in config.blocks("num_hidden_layers"):
        block = f"{model}layers.{index}"
        yield from norms(block, ("input_layernorm", "post_attention_layernorm"), hidden)
        yield from linear(f"{block}.attention.query_key_value", 3 * hidden, hidden, bias=bias)
        yield from linear(f"{block}.attention.dense", hidden, hidden, bias=bias)
        yield from linear(f"{block}.mlp.dense_h_to_4h", inner, hidden)
        yield from linear(f"{block}.mlp.dense_4h_to_h", hidden, inner)
    yield from norm(f"{model}final_layer_norm", hidden)
    yield from _head(config, head, ("embed_out", hidden), tied=False)


def opt(config: Config) -> Shapes:
    """OPT, with two more positions than it says."""
    model, head = _parts(config, "model")
    hidden, inner = config.size("hidden_size"), config.size("ffn_dim")
    outer = config.size("word_embed_proj_dim", hidden)
    bias, first = config.flag("enable_bias", default=True), config.flag("do_layer_norm_before", default=True)
    if not config.flag("layer_norm_elementwise_affine", default=True):
        raise NotDerivable("layer_norm_elementwise_affine")
    yield from embedding(f"{model}decoder.embed_tokens", config.size("vocab_size"), outer)
    yield from embedding(f"{model}decoder.embed_positions", config.size("max_position_embeddings") + 2, hidden)
    if outer != hidden:
        yield from linear(f"{model}decoder.project_out", outer, hidden, bias=False)
        yield from linear(f"{model}decoder.project_in", hidden, outer, bias=False)
    if first and not config.flag("_remove_final_layer_norm", default=False):
        yield from norm(f"{model}decoder.final_layer_norm", hidden)
    for index in config.blocks("num_hidden_layers"):
        block = f"{model}decoder.layers.{index}"
        yield from matrices(f"{block}.self_attn", ("k_proj", "v_proj", "q_proj", "out_proj"), (hidden, hidden), bias=bias)
        yield from norms(block, ("self_attn_layer_norm", "final_layer_norm"), hidden)
        yield from linear(f"{block}.fc1", inner, hidden, bias=bias)
        yield from linear(f"{block}.fc2", hidden, inner, bias=bias)
    yield from _head(config, head, ("lm_head", outer), tied=True)


def falcon(config: Config) -> Shapes:
    """Falcon, of its old and its new kind of block."""
    model, head = _parts(config, "transformer")
    hidden = config.size("hidden_size")
    inner, bias = config.size("ffn_hidden_size", 4 * hidden), config.flag("bias", default=False)
    fused = _falcon_qkv(config, hidden)
    names = _falcon_norms(config)
    yield from embedding(f"{model}word_embeddings", config.size("vocab_size"), hidden)
    for index in config.blocks("num_hidden_layers"):
        block = f"{model}h.{index}"
        yield from linear(f"{block}.self_attention.query_key_value", fused, hidden, bias=bias)
        yield from linear(f"{block}.self_attention.dense", hidden, hidden, bias=bias)
        yield from linear(f"{block}.mlp.dense_h_to_4h", inner, hidden, bias=bias)
        yield from linear(f"{block}.mlp.dense_4h_to_h", hidden, inner, bias=bias)
        yield from norms(block, names, hidden)
    yield from norm(f"{model}ln_f", hidden)
    yield from _head(config, head, ("lm_head", hidden), tied=True)


def _falcon_qkv(config: Config, hidden: int) -> int:
    heads = config.size("num_attention_heads")
    head_dim = config.head_dim(hidden, heads)
    if config.flag("new_decoder_architecture", default=False):
        return (heads + 2 * config.size("num_kv_heads", heads)) * head_dim
    return hidden + 2 * head_dim if config.flag("multi_query", default=True) else 3 * hidden


def _falcon_norms(config: Config) -> tuple[str, ...]:
    if config.flag("new_decoder_architecture", default=False):
        return ("input_layernorm",) if config.size("num_ln_in_parallel_attn", 2) == 1 else ("ln_attn", "ln_mlp")
    parallel = config.flag("parallel_attn", default=True)
    return ("input_layernorm",) if parallel else ("input_layernorm", "post_attention_layernorm")


def _parts(config: Config, base: str) -> tuple[str, str]:
    """(prefix of the model's names, which head it has): by the name of the class."""
    architecture = config.text("architecture")
    for ending, head in (("ForCausalLM", "lm"), ("LMHeadModel", "lm"), ("ForSequenceClassification", "score")):
        if architecture.endswith(ending):
            return f"{base}.", head
    if is_base(architecture):
        return "", ""
    raise NotDerivable(architecture)


def _head(config: Config, head: str, own: tuple[str, int], *, tied: bool) -> Shapes:
    """The head that `_parts` found; `own` is the name and the input width of the one that predicts tokens."""
    name, width = own
    if head == "lm" and not config.flag("tie_word_embeddings", default=tied):
        yield from linear(name, config.size("vocab_size"), width, bias=False)
    elif head == "score":
        yield from linear("score", config.labels(), width, bias=False)


DECODERS: dict[str, Callable[[Config], Shapes]] = {
    **dict.fromkeys(LLAMA_LIKE, llama_like), "gpt2": gpt2, "gpt_neox": gpt_neox, "opt": opt, "falcon": falcon,
}  # fmt: skip
