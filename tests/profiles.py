"""Profiles of well-known models, with the shapes of their layers: what routes and estimates are tested with, without files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from qhub.types import LayerShape, ModelProfile

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Decoder:
    """The numbers of a decoder: N and K of its matrices follow from them."""

    hidden: int
    ffn: int
    blocks: int
    vocab: int
    kv: int = 0  # width of keys and values; 0: as wide as the model
    gated: bool = True
    tied: bool = False
    experts: int = 0
    per_token: int = 0
    context: int = 8192


def matrix(name, kind, shape, dtype="bf16", block=None):
    return LayerShape(name, kind, shape, dtype, BYTES[dtype] * prod(shape), block)


def decoder(name: str, facts: Decoder, dtype: str = "bf16") -> ModelProfile:
    """A language model."""
    hidden, kv = facts.hidden, facts.kv or facts.hidden
    layers = [matrix("embed_tokens.weight", "embedding", (facts.vocab, hidden), dtype)]
    if not facts.tied:
        layers.append(matrix("lm_head.weight", "head", (facts.vocab, hidden), dtype))
    for block in range(facts.blocks):
        shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        mlp = {"up": (facts.ffn, hidden), "down": (hidden, facts.ffn), **({"gate": (facts.ffn, hidden)} if facts.gated else {})}
        layers += [matrix(f"layers.{block}.{key}.weight", "linear", shape, dtype, block) for key, shape in shapes.items()]
        for expert in range(facts.experts or 1):
            prefix, kind = (f"experts.{expert}.", "expert") if facts.experts else ("", "linear")
            layers += [matrix(f"layers.{block}.{prefix}{key}.weight", kind, shape, dtype, block) for key, shape in mlp.items()]
    profile = _profile(name, "llm", "LlamaForCausalLM", layers, dtype)
    return replace(
        profile, blocks=facts.blocks, hidden_size=hidden, kv_bytes_per_token=4 * facts.blocks * kv, context_length=facts.context,
        has_tokenizer=True, tied_embeddings=facts.tied, experts=facts.experts or None, experts_per_token=facts.per_token or None,
    )  # fmt: skip


def encoder(name: str, task: str, architecture: str, size: tuple[int, int, int, int]) -> ModelProfile:
    """A BERT of (hidden, ffn, blocks, vocabulary)."""
    hidden, ffn, blocks, vocab = size
    layers = [matrix("embeddings.word_embeddings.weight", "embedding", (vocab, hidden), "fp32")]
    layers.append(matrix("embeddings.position_embeddings.weight", "embedding", (512, hidden), "fp32"))
    for block in range(blocks):
        shapes = dict.fromkeys(("query", "key", "value", "output"), (hidden, hidden)) | {"up": (ffn, hidden), "down": (hidden, ffn)}
        layers += [matrix(f"encoder.layer.{block}.{key}.weight", "linear", shape, "fp32", block) for key, shape in shapes.items()]
    return replace(_profile(name, task, architecture, layers, "fp32"), blocks=blocks, hidden_size=hidden, context_length=512)


def convolutional(name: str, task: str, architecture: str, parameters: int, dense: int = 0) -> ModelProfile:
    """A network of convolutions with `parameters` weights, of which `dense` are in linear layers."""
    layers = [matrix("backbone.conv.weight", "conv", ((parameters - dense) // 9, 1, 3, 3), "fp32", 0)]
    if dense:
        layers.append(matrix("blocks.0.attention.weight", "linear", (dense // 64, 64), "fp32", 0))
    return replace(_profile(name, task, architecture, layers, "fp32"), parameters=parameters)


def whisper() -> ModelProfile:
    """Whisper base: hidden 512, 6 + 6 blocks."""
    layers = [matrix("model.decoder.embed_tokens.weight", "embedding", (51865, 512), "fp32")]
    layers += [matrix(f"model.encoder.conv{index}.weight", "conv", (512, width, 3), "fp32") for index, width in ((1, 80), (2, 512))]
    for part, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        for block in range(6):
            base = f"model.{part}.layers.{block}"
            layers += [
                matrix(f"{base}.{kind}.{key}_proj.weight", "linear", (512, 512), "fp32", block) for kind in attentions for key in "qkvo"
            ]
            layers += [
                matrix(f"{base}.fc{index}.weight", "linear", shape, "fp32", block) for index, shape in ((1, (2048, 512)), (2, (512, 2048)))
            ]
    return _profile("whisper-base", "speech", "WhisperForConditionalGeneration", layers, "fp32")


def _profile(name, task, architecture, layers, dtype):
    parameters = sum(prod(layer.shape) for layer in layers)
    return ModelProfile(name, name, task, architecture, parameters, dtype, sum(layer.bytes for layer in layers), tuple(layers))


LLAMA_3_8B = decoder("llama-3-8b", Decoder(4096, 14336, 32, 128256, kv=1024))
RESNET_50 = convolutional("resnet-50", "vision", "ResNetForImageClassification", 25_557_032)
BERT_BASE = encoder("bert-base", "nlp", "BertForSequenceClassification", (768, 3072, 12, 30522))
WHISPER_BASE = whisper()
MINILM = encoder("all-minilm-l6-v2", "embedding", "BertModel", (384, 1536, 6, 30522))
SD_UNET = convolutional("stable-diffusion-unet", "generative", "UNet2DConditionModel", 859_520_964, dense=320_000_000)
SIX = (LLAMA_3_8B, RESNET_50, BERT_BASE, WHISPER_BASE, MINILM, SD_UNET)

MODELS = {profile.source: profile for profile in SIX} | {
    profile.source: profile
    for profile in (
        decoder("llama-3.2-1b", Decoder(2048, 8192, 16, 128256, kv=512, tied=True)),
        decoder("llama-3-70b", Decoder(8192, 28672, 80, 128256, kv=1024)),
        decoder("llama-2-7b", Decoder(4096, 11008, 32, 32000, context=4096)),
        decoder("qwen3-30b-a3b", Decoder(2048, 768, 48, 151936, kv=512, experts=128, per_token=8)),
        decoder("demo-llm", Decoder(256, 768, 6, 4096)),
        convolutional("yolo", "detection", "YolosForObjectDetection", 6_500_000),
        convolutional("mobilenet", "vision", "MobileNetV2ForImageClassification", 3_500_000),
        convolutional("keyword-spotting", "speech", "AudioClassification", 80_000),
        convolutional("visual-wake-words", "vision", "MobileNetV1ForImageClassification", 210_000),
        ModelProfile("mystery", "mystery", "unknown", "MysteryNet", 10_000_000, "fp32", 40_000_000),
    )
}
