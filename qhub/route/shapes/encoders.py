"""Shapes of text encoders (BERT, RoBERTa, DistilBERT, MPNet) and of encoder-decoders (T5, Whisper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qhub.route.shapes.parts import Config, NotDerivable, Shapes, conv, embedding, is_base, linear, matrices, norm, norms

#: What the class name ends in → (with a pooler, head).
_BERT_HEADS: Mapping[str, tuple[bool, str]] = {
    "ForPreTraining": (True, "pretraining"),
    "ForMaskedLM": (False, "masked"),
    "ForSequenceClassification": (True, "classes"),
    "ForTokenClassification": (False, "classes"),
    "ForQuestionAnswering": (False, "span"),
}


def bert(config: Config) -> Shapes:
    """BERT."""
    pooler, head = _head_of(config)
    model = "bert." if head else ""
    hidden = config.size("hidden_size")
    yield from _bert_body(model, config, token_types=True)
    if pooler:
        yield from linear(f"{model}pooler.dense", hidden, hidden)
    if head in ("masked", "pretraining"):
        yield "cls.predictions.bias", (config.size("vocab_size"),)
        yield from linear("cls.predictions.transform.dense", hidden, hidden)
        yield from norm("cls.predictions.transform.LayerNorm", hidden)
        _only_tied(config)
    if head == "pretraining":
        yield from linear("cls.seq_relationship", 2, hidden)
    yield from _task_head(config, head)


def roberta(config: Config) -> Shapes:
    """RoBERTa and XLM-RoBERTa."""
    pooler, head = _head_of(config)
    model, hidden = "roberta." if head else "", config.size("hidden_size")
    yield from _bert_body(model, config, token_types=True)
    if pooler and not head:
        yield from linear(f"{model}pooler.dense", hidden, hidden)
    yield from _roberta_head(config, head, hidden)


def mpnet(config: Config) -> Shapes:
    """MPNet, whose attention names differ from BERT's and which has one table of relative positions."""
    pooler, head = _head_of(config)
    model, hidden = "mpnet." if head else "", config.size("hidden_size")
    for name, shape in _bert_body(model, config, token_types=False):
        for bert_name, own in (("self.query", "attn.q"), ("self.key", "attn.k"), ("self.value", "attn.v")):
            name = name.replace(f"attention.{bert_name}", f"attention.{own}")
        name = name.replace("attention.output.dense", "attention.attn.o").replace("attention.output.LayerNorm", "attention.LayerNorm")
        yield name, shape
    buckets = config.size("relative_attention_num_buckets", 32)
    yield from embedding(f"{model}encoder.relative_attention_bias", buckets, config.size("num_attention_heads"))
    if pooler and not head:
        yield from linear(f"{model}pooler.dense", hidden, hidden)
    yield from _roberta_head(config, head, hidden)


def _bert_body(model: str, config: Config, *, token_types: bool) -> Shapes:
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    if config.flag("is_decoder", default=False) or config.flag("add_cross_attention", default=False):
        raise NotDerivable("add_cross_attention")
    yield from embedding(f"{model}embeddings.word_embeddings", config.size("vocab_size"), hidden)
    yield from embedding(f"{model}embeddings.position_embeddings", config.size("max_position_embeddings"), hidden)
    if token_types:
        yield from embedding(f"{model}embeddings.token_type_embeddings", config.size("type_vocab_size"), hidden)
    yield from norm(f"{model}embeddings.LayerNorm", hidden)
    for index in config.blocks("num_hidden_layers"):
        block = f"{model}encoder.layer.{index}"
        yield from matrices(f"{block}.attention", ("self.query", "self.key", "self.value", "output.dense"), (hidden, hidden))
        yield from norms(block, ("attention.output.LayerNorm", "output.LayerNorm"), hidden)
        yield from linear(f"{block}.intermediate.dense", inner, hidden)
        yield from linear(f"{block}.output.dense", hidden, inner)


def distilbert(config: Config) -> Shapes:
    """DistilBERT."""
    _, head = _head_of(config)
    model = "distilbert." if head else ""
    hidden, inner = config.size("dim"), config.size("hidden_dim")
    yield from embedding(f"{model}embeddings.word_embeddings", config.size("vocab_size"), hidden)
    yield from embedding(f"{model}embeddings.position_embeddings", config.size("max_position_embeddings"), hidden)
    yield from norm(f"{model}embeddings.LayerNorm", hidden)
    for index in config.blocks("n_layers"):
        block = f"{model}transformer.layer.{index}"
        yield from matrices(f"{block}.attention", ("q_lin", "k_lin", "v_lin", "out_lin"), (hidden, hidden))
        yield from norms(block, ("sa_layer_norm", "output_layer_norm"), hidden)
        yield from linear(f"{block}.ffn.lin1", inner, hidden)
        yield from linear(f"{block}.ffn.lin2", hidden, inner)
    if head == "masked":
        yield from linear("vocab_transform", hidden, hidden)
        yield from norm("vocab_layer_norm", hidden)
        yield "vocab_projector.bias", (config.size("vocab_size"),)
        _only_tied(config)
    if config.text("architecture").endswith("ForSequenceClassification"):
        yield from linear("pre_classifier", hidden, hidden)
    yield from _task_head(config, head, hidden)


def _head_of(config: Config) -> tuple[bool, str]:
    architecture = config.text("architecture")
    if is_base(architecture):
        return True, ""
    for ending, found in _BERT_HEADS.items():
        if architecture.endswith(ending):
            return found
    raise NotDerivable(architecture)


def _roberta_head(config: Config, head: str, hidden: int) -> Shapes:
    if head == "pretraining":
        raise NotDerivable(config.text("architecture"))
    if head == "masked":
        yield "lm_head.bias", (config.size("vocab_size"),)
        yield from linear("lm_head.dense", hidden, hidden)
        yield from norm("lm_head.layer_norm", hidden)
        _only_tied(config)
    elif config.text("architecture").endswith("ForSequenceClassification"):
        yield from linear("classifier.dense", hidden, hidden)
        yield from linear("classifier.out_proj", config.labels(), hidden)
    else:
        yield from _task_head(config, head)


def _task_head(config: Config, head: str, width: int | None = None) -> Shapes:
    hidden = width if width is not None else config.size("hidden_size")
    if head == "classes":
        yield from linear("classifier", config.labels(), hidden)
    elif head == "span":
        yield from linear("qa_outputs", config.labels(), hidden)


def _only_tied(config: Config) -> None:
    if not config.flag("tie_word_embeddings", default=True):
        raise NotDerivable("tie_word_embeddings")


def t5(config: Config) -> Shapes:
    """T5: an encoder and a decoder, gated or not."""
    architecture = config.text("architecture")
    if architecture not in ("T5Model", "T5ForConditionalGeneration", "T5EncoderModel"):
        raise NotDerivable(architecture)
    hidden, vocabulary = config.size("d_model"), config.size("vocab_size")
    yield from embedding("shared", vocabulary, hidden)
    for index in config.blocks("num_layers"):
        yield from _t5_block(f"encoder.block.{index}", config, attentions=("SelfAttention",), first=index == 0)
    yield from norm("encoder.final_layer_norm", hidden, bias=False)
    if architecture == "T5EncoderModel":
        return
    deeper = "num_layers" if config.values.get("num_decoder_layers") is None else "num_decoder_layers"
    for index in config.blocks(deeper):
        yield from _t5_block(f"decoder.block.{index}", config, attentions=("SelfAttention", "EncDecAttention"), first=index == 0)
    yield from norm("decoder.final_layer_norm", hidden, bias=False)
    if architecture == "T5ForConditionalGeneration" and not config.flag("tie_word_embeddings", default=True):
        yield from linear("lm_head", vocabulary, hidden, bias=False)


def _t5_block(block: str, config: Config, *, attentions: tuple[str, ...], first: bool) -> Shapes:
    hidden, inner = config.size("d_model"), config.size("d_ff")
    heads = config.size("num_heads")
    queries = heads * config.size("d_kv")
    for place, name in enumerate(attentions):
        attention = f"{block}.layer.{place}.{name}"
        yield from matrices(attention, ("q", "k", "v"), (queries, hidden), bias=False)
        yield from linear(f"{attention}.o", hidden, queries, bias=False)
        if first and place == 0:
            yield from embedding(f"{attention}.relative_attention_bias", config.size("relative_attention_num_buckets", 32), heads)
        yield from norm(f"{block}.layer.{place}.layer_norm", hidden, bias=False)
    last = f"{block}.layer.{len(attentions)}"
    gated = config.text("feed_forward_proj", "relu").startswith("gated-")
    yield from matrices(f"{last}.DenseReluDense", ("wi_0", "wi_1") if gated else ("wi",), (inner, hidden), bias=False)
    yield from linear(f"{last}.DenseReluDense.wo", hidden, inner, bias=False)
    yield from norm(f"{last}.layer_norm", hidden, bias=False)


def whisper(config: Config) -> Shapes:
    """Whisper; the head is tied to the decoder's embedding."""
    architecture = config.text("architecture")
    if architecture not in ("WhisperModel", "WhisperForConditionalGeneration"):
        raise NotDerivable(architecture)
    _only_tied(config)
    model = "" if architecture == "WhisperModel" else "model."
    hidden = config.size("d_model")
    yield from conv(f"{model}encoder.conv1", (hidden, config.size("num_mel_bins"), 3))
    yield from conv(f"{model}encoder.conv2", (hidden, hidden, 3))
    yield from embedding(f"{model}encoder.embed_positions", config.size("max_source_positions"), hidden)
    for index in config.blocks("encoder_layers"):
        yield from _whisper_block(f"{model}encoder.layers.{index}", hidden, config.size("encoder_ffn_dim"), ("self_attn",))
    yield from norm(f"{model}encoder.layer_norm", hidden)
    yield from embedding(f"{model}decoder.embed_tokens", config.size("vocab_size"), hidden)
    yield from embedding(f"{model}decoder.embed_positions", config.size("max_target_positions"), hidden)
    for index in config.blocks("decoder_layers"):
        block = f"{model}decoder.layers.{index}"
        yield from _whisper_block(block, hidden, config.size("decoder_ffn_dim"), ("self_attn", "encoder_attn"))
    yield from norm(f"{model}decoder.layer_norm", hidden)


def _whisper_block(block: str, hidden: int, inner: int, attentions: tuple[str, ...]) -> Shapes:
    for attention in attentions:
        yield from linear(f"{block}.{attention}.k_proj", hidden, hidden, bias=False)
        yield from matrices(f"{block}.{attention}", ("v_proj", "q_proj", "out_proj"), (hidden, hidden))
        yield from norm(f"{block}.{attention}_layer_norm", hidden)
    yield from linear(f"{block}.fc1", inner, hidden)
    yield from linear(f"{block}.fc2", hidden, inner)
    yield from norm(f"{block}.final_layer_norm", hidden)


ENCODERS: dict[str, Callable[[Config], Shapes]] = {
    "bert": bert, "roberta": roberta, "xlm-roberta": roberta, "camembert": roberta, "mpnet": mpnet, "distilbert": distilbert,
    "t5": t5, "whisper": whisper,
}  # fmt: skip
