"""Shapes that follow from a config alone: equal to what transformers builds, and to the published totals of known models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qhub.route.profile import architecture_of
from qhub.route.shapes import tensors_of

CONFIGS = Path(__file__).parent / "configs"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def derived(config):
    return tensors_of(config, architecture_of(config), Path("model"))


def parameters(tensors):
    return sum(math.prod(info.shape) for name, info in tensors.items() if not name.endswith(STATISTICS))


def known(name):
    return json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8"))


GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
LLAMA = known("llama-3-8b")
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000}
UNET = known("stable-diffusion-1.5-unet")
LINEAR = {"use_linear_projection": True, "layers_per_block": 2}
XL = {
    **UNET, **LINEAR, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 2816, "addition_time_embed_dim": 256,
}  # fmt: skip


# Parameters of well-known models, as published or as counted in their checkpoints; statistics of batch norms do not count.
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(LLAMA, 8_030_261_248, id="Llama-3-8B"),
        pytest.param(MISTRAL, 7_241_732_096, id="Mistral-7B"),
        pytest.param(
            {**MISTRAL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8},
            46_702_792_704,
            id="Mixtral-8x7B",
        ),
        pytest.param({**GPT2, "vocab_size": 50257}, 124_439_808, id="GPT-2"),
        pytest.param(known("bert-base-uncased") | {"architectures": ["BertModel"]}, 109_482_240, id="BERT-base without a head"),
        pytest.param(known("bert-base-uncased") | {"architectures": ["BertForPreTraining"]}, 110_106_428, id="BERT-base as trained"),
        pytest.param(known("all-minilm-l6-v2"), 22_713_216, id="all-MiniLM-L6-v2"),
        pytest.param(known("bge-base-en-v1.5"), 109_482_240, id="bge-base-en-v1.5"),
        pytest.param(known("resnet-50"), 25_557_032, id="ResNet-50"),
        pytest.param({"architecture": "resnet50", "num_classes": 1000}, 25_557_032, id="ResNet-50 of timm"),
        pytest.param({"architecture": "resnet18", "num_classes": 1000}, 11_689_512, id="ResNet-18 of timm"),
        pytest.param(known("whisper-base"), 72_593_920, id="Whisper base"),
        pytest.param(UNET, 859_520_964, id="Stable Diffusion 1.5"),
        pytest.param(
            {**UNET, **LINEAR, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}, 865_910_724, id="Stable Diffusion 2.1"
        ),
        pytest.param(XL, 2_567_463_684, id="Stable Diffusion XL"),
    ],
)
def test_a_known_model_has_its_published_number_of_parameters(config, expected):
    assert parameters(derived(config)) == expected


def test_the_statistics_of_batch_norms_are_stored_beside_the_parameters():
    tensors = derived(known("resnet-50"))
    assert sum(math.prod(info.shape) for info in tensors.values()) == 25_610_205
    assert {info.dtype for name, info in tensors.items() if name.endswith("num_batches_tracked")} == {"I64"}


COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}
GATED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": None}
BERT = {**COMMON, "intermediate_size": 48, "type_vocab_size": 2}
DISTILBERT = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
WHISPER = {
    "vocab_size": 96, "d_model": 32, "num_mel_bins": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_source_positions": 30, "max_target_positions": 20,
    "pad_token_id": 0,
}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [16, 32, 64], "depths": [1, 2, 1]}
FALCON = {**COMMON, "bias": False, "alibi": False}
TINY = {
    # Decoders of the Llama family, with and without what tells them apart.
    "llama": ("llama", "LlamaForCausalLM", GATED),
    "llama with biases": ("llama", "LlamaForCausalLM", {**GATED, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama tied": ("llama", "LlamaForCausalLM", {**GATED, "tie_word_embeddings": True}),
    "llama without a head": ("llama", "LlamaModel", GATED),
    "llama as a classifier": ("llama", "LlamaForSequenceClassification", {**GATED, "num_labels": 3}),
    "mistral": ("mistral", "MistralForCausalLM", {**GATED, "head_dim": 16}),
    "mixtral": ("mixtral", "MixtralForCausalLM", {**GATED, "num_local_experts": 4}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", GATED),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {**GATED, "head_dim": 16}),
    "gemma": ("gemma", "GemmaForCausalLM", {**GATED, "head_dim": 16}),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", {**GATED, "head_dim": 16}),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", {**GATED, "head_dim": 16}),
    "phi3": ("phi3", "Phi3ForCausalLM", GATED),
    # Other decoders.
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", {**COMMON, "intermediate_size": 48}),
    "opt": ("opt", "OPTForCausalLM", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt projected": ("opt", "OPTForCausalLM", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "falcon": ("falcon", "FalconForCausalLM", {**FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon new": ("falcon", "FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon old": (
        "falcon",
        "FalconForCausalLM",
        {**FALCON, "bias": True, "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False},
    ),
    # Encoders, each with every head that is derived.
    "bert": ("bert", "BertModel", BERT),
    "bert pre-training": ("bert", "BertForPreTraining", BERT),
    "bert masked": ("bert", "BertForMaskedLM", BERT),
    "bert classifier": ("bert", "BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert tokens": ("bert", "BertForTokenClassification", BERT),
    "bert questions": ("bert", "BertForQuestionAnswering", BERT),
    "roberta": ("roberta", "RobertaModel", BERT),
    "roberta masked": ("roberta", "RobertaForMaskedLM", BERT),
    "roberta classifier": ("roberta", "RobertaForSequenceClassification", BERT),
    "xlm-roberta tokens": ("xlm-roberta", "XLMRobertaForTokenClassification", BERT),
    "mpnet": ("mpnet", "MPNetModel", BERT),
    "mpnet masked": ("mpnet", "MPNetForMaskedLM", BERT),
    "distilbert": ("distilbert", "DistilBertModel", DISTILBERT),
    "distilbert masked": ("distilbert", "DistilBertForMaskedLM", DISTILBERT),
    "distilbert classifier": ("distilbert", "DistilBertForSequenceClassification", DISTILBERT),
    # Encoder-decoders.
    "t5": ("t5", "T5ForConditionalGeneration", {**T5, "tie_word_embeddings": True}),
    "t5 gated": ("t5", "T5Model", {**T5, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 1}),
    "t5 encoder": ("t5", "T5EncoderModel", T5),
    "whisper": ("whisper", "WhisperForConditionalGeneration", WHISPER),
    # Images.
    "vit": ("vit", "ViTForImageClassification", {**VIT, "num_labels": 5}),
    "vit without a head": ("vit", "ViTModel", VIT),
    "resnet bottleneck": ("resnet", "ResNetForImageClassification", {**STAGES, "embedding_size": 8, "num_labels": 5}),
    "resnet basic": ("resnet", "ResNetModel", {**STAGES, "embedding_size": 16, "layer_type": "basic"}),
    "convnext": ("convnext", "ConvNextForImageClassification", {**STAGES, "num_stages": 3, "num_labels": 5}),
}


@pytest.mark.parametrize("case", TINY, ids=str)
def test_shapes_are_those_that_transformers_builds(case):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model_type, architecture, settings = TINY[case]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    found = derived({**settings, "model_type": model_type, "architectures": [architecture]})
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert parameters(found) == expected
    if "experts" not in "".join(model.state_dict()):  # transformers fuses experts when it loads them
        ours = sorted(info.shape for name, info in found.items())
        tied = {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}
        statistics = [tuple(buffer.shape) for name, buffer in model.named_buffers() if name.endswith(STATISTICS)]
        assert ours == sorted([*tied.values(), *statistics])
