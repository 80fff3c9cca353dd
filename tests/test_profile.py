"""A model folder → `ModelProfile`: from names, shapes and the config alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from qhub.errors import QhubError, UsageError
from qhub.plugins import Plugins
from qhub.route.profile import profile, resolve
from qhub.types import ModelSource

PLUGINS = Plugins.load([])
ASSETS = Path(__file__).parent.parent.parent / "shared" / "assets"
CONFIGS = Path(__file__).parent / "configs"


def kinds(found):
    return dict(Counter(layer.kind for layer in found.layers))


def shape_of(found, name):
    return next(layer.shape for layer in found.layers if layer.name == name)


def test_a_llama_is_profiled(llama):
    folder = llama(hidden=64, ffn=128, blocks=2, vocab=256)
    found = profile(str(folder), PLUGINS)
    per_block = 64 * 64 * 2 + 32 * 64 * 2 + 128 * 64 * 3 + 2 * 64
    assert found.source == "llama"
    assert found.path == str(folder)
    assert (found.task, found.architecture, found.dtype) == ("llm", "LlamaForCausalLM", "bf16")
    assert found.parameters == 2 * per_block + 256 * 64 + 64
    assert found.weight_bytes == 2 * found.parameters
    assert (found.blocks, found.hidden_size, found.vocabulary, found.context_length) == (2, 64, 256, 2048)
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 2 * 16  # K and V, 2 bytes, 2 blocks, 2 heads of 16
    assert found.has_tokenizer
    assert found.tied_embeddings
    assert found.quantization is None
    assert kinds(found) == {"embedding": 1, "linear": 14, "norm": 5}
    assert len(found.linears()) == 14
    assert shape_of(found, "model.layers.1.mlp.down_proj.weight") == (64, 128)
    assert {layer.block for layer in found.linears()} == {0, 1}


def test_a_head_of_its_own_counts_and_a_stored_tied_one_does_not(llama, model_folder):
    untied = profile(str(llama(tied=False)), PLUGINS)
    assert kinds(untied)["head"] == 1
    assert not untied.tied_embeddings
    shapes = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4), "model.layers.0.mlp.up.weight": (4, 4)}
    config = {"architectures": ["XForCausalLM"], "tie_word_embeddings": True}
    assert profile(str(model_folder(config, shapes)), PLUGINS).parameters == 8 * 4 + 4 * 4


def test_without_a_word_in_the_config_a_missing_head_means_tied(model_folder):
    shapes = {"wte.weight": (8, 4), "h.0.mlp.up.weight": (4, 4)}
    assert profile(str(model_folder({"architectures": ["GPT2LMHeadModel"]}, shapes)), PLUGINS).tied_embeddings


def test_matrices_stored_transposed_as_in_gpt2_are_turned(model_folder):
    shapes = {
        "wte.weight": (100, 8), "wpe.weight": (32, 8),
        "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,), "h.0.attn.bias": ("U8", (1, 1, 32, 32)),
        "h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,),
        "h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,),
        "h.0.ln_1.weight": (8,), "h.0.ln_1.bias": (8,),
    }  # fmt: skip
    config = {"architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 100}
    found = profile(str(model_folder(config, shapes)), PLUGINS)
    assert [layer.shape for layer in found.linears()] == [(24, 8), (8, 8), (8, 32)]
    assert kinds(found) == {"embedding": 2, "linear": 3, "norm": 2, "other": 3}
    assert (found.context_length, found.kv_bytes_per_token) == (32, 2 * 2 * 1 * 2 * 4)
    assert found.parameters == sum((100 * 8, 32 * 8, 8 * 24 + 24, 8 * 8 + 8, 32 * 8 + 8, 16))


def test_experts_are_told_from_their_router(model_folder):
    shapes = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4), "model.layers.0.mlp.gate.weight": (4, 4)}
    shapes |= {"model.layers.0.mlp.shared_expert_gate.weight": (1, 4), "model.layers.0.mlp.shared_expert.up_proj.weight": (8, 4)}
    shapes |= {f"model.layers.0.mlp.experts.{index}.up_proj.weight": (8, 4) for index in range(4)}
    shapes |= {"model.layers.0.self_attn.o_proj.weight": (4, 4)}
    config = {"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    found = profile(str(model_folder(config, shapes)), PLUGINS)
    assert kinds(found) == {"embedding": 1, "head": 1, "expert": 5, "other": 2, "linear": 1}
    assert (found.experts, found.experts_per_token, found.blocks) == (4, 2, 1)


def test_fused_experts_are_experts(model_folder):
    shapes = {"embed_tokens.weight": (8, 4), "layers.0.mlp.experts.gate_up_proj": (4, 16, 4), "layers.0.attn.o.weight": (4, 4)}
    assert kinds(profile(str(model_folder({"architectures": ["AForCausalLM"]}, shapes)), PLUGINS))["expert"] == 1


def test_a_network_of_convolutions(model_folder):
    shapes = {
        "resnet.embedder.conv.weight": ("F32", (16, 3, 7, 7)), "resnet.encoder.0.conv.weight": ("F32", (16, 16, 3, 3)),
        "resnet.encoder.0.bn1.weight": ("F32", (16,)), "resnet.encoder.0.bn1.num_batches_tracked": ("I64", ()),
        "classifier.1.weight": ("F32", (10, 16)), "fc.weight": ("F32", (10, 16)),
    }  # fmt: skip
    found = profile(str(model_folder({"architectures": ["ResNetForImageClassification"]}, shapes)), PLUGINS)
    assert (found.task, found.dtype, found.kv_bytes_per_token) == ("vision", "fp32", None)
    assert kinds(found) == {"conv": 2, "norm": 1, "head": 2}


# The architecture says what a model is for; what it does not say is unknown.
@pytest.mark.parametrize(
    ("config", "files", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, (), "llm"),
        ({"architectures": ["GPT2LMHeadModel"]}, (), "llm"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}, (), "llm"),
        ({"architectures": ["BertForSequenceClassification"]}, (), "nlp"),
        ({"architectures": ["T5ForConditionalGeneration"]}, (), "nlp"),
        ({"architectures": ["BertModel"]}, ("modules.json",), "embedding"),
        ({"architectures": ["ResNetForImageClassification"]}, (), "vision"),
        ({"architectures": ["ViTModel"]}, (), "vision"),
        ({"architecture": "resnet50", "num_classes": 1000}, (), "vision"),
        ({"architectures": ["DetrForObjectDetection"]}, (), "detection"),
        ({"architectures": ["WhisperForConditionalGeneration"]}, (), "speech"),
        ({"architectures": ["Wav2Vec2ForCTC"]}, (), "speech"),
        ({"_class_name": "UNet2DConditionModel"}, (), "generative"),
        ({"architectures": ["MyOwnNetwork"]}, (), "unknown"),
        ({}, (), "unknown"),
    ],
    ids=str,
)
def test_the_task_follows_from_the_architecture(model_folder, config, files, task):
    assert profile(str(model_folder(config, {"a.weight": (2, 2)}, files=files)), PLUGINS).task == task


# Bytes that a token adds to the cache, for the shapes of known models (16 bits).
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}, 131072),
        ({"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2304, "head_dim": 256}, 106496),
        ({"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True}, 8192),
        ({"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 128, "hidden_size": 7168}, 70272),
        ({"num_hidden_layers": 24}, None),
    ],
    ids=["Llama-3-8B", "Gemma-2-2B", "Falcon-7B", "DeepSeek-V3", "no attention"],
)
def test_the_cache_per_token(model_folder, config, expected):
    config = {"architectures": ["XForCausalLM"], **config}
    shapes = {"w.weight": (2, 2)}
    assert profile(str(model_folder(config, shapes)), PLUGINS).kv_bytes_per_token == expected


PACKED = "model.layers.0.q"
EMBEDDING = {"model.embed_tokens.weight": (8, 4)}


# Already quantized: the method is recognised and the shape is the one before packing.
@pytest.mark.parametrize(
    ("method", "section", "shapes"),
    [
        (
            "compressed-tensors",
            {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}},
            {".weight_packed": (128, 32), ".weight_scale": (128, 8), ".weight_zero_point": (16, 8), ".weight_shape": (2,)},
        ),
        (
            "compressed-tensors",
            {"config_groups": {"group_0": {"weights": {"num_bits": 3, "group_size": 64}}}},
            {".weight_packed": (128, 26), ".weight_scale": (128, 4), ".weight_shape": (2,)},
        ),
        ("awq", {"bits": 4, "group_size": 32}, {".qweight": (256, 16), ".qzeros": (8, 16), ".scales": (8, 128)}),
        ("gptq", {"bits": 4, "group_size": 32}, {".qweight": (32, 128), ".qzeros": (8, 16), ".scales": (8, 128), ".g_idx": (256,)}),
    ],
    ids=["compressed-tensors", "compressed-tensors 3 bit", "awq", "gptq"],
)
def test_a_quantized_model_is_recognised(model_folder, method, section, shapes):
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": method, **section}}
    folder = model_folder(config, EMBEDDING | {PACKED + name: ("I32", shape) for name, shape in shapes.items()})
    found = profile(str(folder), PLUGINS)
    assert found.quantization == method
    assert [(layer.name, layer.shape) for layer in found.linears()] == [(f"{PACKED}.weight", (128, 256))]
    assert found.parameters == 128 * 256 + 8 * 4


def test_bitsandbytes_is_recognised(model_folder):
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    shapes = {"model.layers.0.q.weight": ("U8", (512, 1)), "model.layers.0.q.weight.absmax": ("F32", (16,))}
    found = profile(str(model_folder(config, EMBEDDING | shapes)), PLUGINS)
    assert found.quantization == "bitsandbytes"
    assert len(found.layers) == 2


# Folders that are no model, each with one error that says what is wrong.
def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(QhubError, match="is not a model folder: it has no config"):
        profile(str(tmp_path), PLUGINS)


def test_a_folder_of_parts_names_them(tmp_path, model_folder):
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    (tmp_path / "pipe" / "unet" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(QhubError) as caught:
        profile(str(tmp_path / "pipe"), PLUGINS)
    assert caught.value.hint == "it has parts; give one of them: unet"


def test_a_folder_of_a_model_file_names_it(tmp_path):
    (tmp_path / "model.q4_0.gguf").touch()
    with pytest.raises(QhubError, match="is not a model folder") as caught:
        profile(str(tmp_path), PLUGINS)
    assert caught.value.hint == "give one of its files: model.q4_0.gguf"


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "holds `list`"), ("[" * 100_000, "is not JSON")])
def test_a_config_that_is_no_json_object(model_folder, text, message):
    with pytest.raises(QhubError, match=message):
        profile(str(model_folder(text, {"a.weight": (2, 2)})), PLUGINS)


def test_a_file_where_a_folder_is_meant_names_the_folder(llama):
    folder = llama()
    with pytest.raises(UsageError, match="is a file; a model is a folder") as caught:
        profile(str(folder / "model.safetensors"), PLUGINS)
    assert caught.value.hint == f"give its folder: `{folder}`"


def test_a_pickle_is_refused_with_the_way_to_convert_it(model_folder):
    folder = model_folder({"architectures": ["LlamaForCausalLM"]}, {}, files=("pytorch_model.bin",))
    with pytest.raises(QhubError, match="is a pickle") as caught:
        profile(str(folder), PLUGINS)
    assert "save_pretrained" in caught.value.hint


def test_a_missing_shard_is_named(llama):
    folder = llama()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(QhubError, match=r"model-00002-of-00002\.safetensors` does not exist"):
        profile(str(folder), PLUGINS)


def test_a_truncated_shard_is_refused(llama):
    folder = llama()
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(QhubError, match="truncated"):
        profile(str(folder), PLUGINS)


def test_a_header_that_lies_about_its_size_is_refused(llama):
    folder = llama()
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))
    with pytest.raises(QhubError, match="its header claims"):
        profile(str(folder), PLUGINS)


# A config that belongs to other weights.
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 32000}, r"says vocabulary and width `\(32000, 64\)`, but `model.embed_tokens.weight` has shape `\(256, 64\)`"),
        ({"hidden_size": 128}, r"says vocabulary and width `\(256, 128\)`"),
        ({"num_hidden_layers": 3}, "says `3` blocks, but block `2` has no weights"),
        ({"num_hidden_layers": 1 << 60}, f"says `{1 << 60}` blocks, but block `2` has no weights"),
    ],
    ids=["vocabulary", "width", "blocks", "more blocks than there are numbers in memory"],
)
def test_a_config_that_contradicts_the_weights_is_refused(llama, config, message):
    with pytest.raises(QhubError, match=message):
        profile(str(rewritten(llama(), config)), PLUGINS)


def rewritten(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return folder


# What a user may write for MODEL.
def test_a_name_that_a_plugin_brings_is_resolved(llama):
    plugins = Plugins.load([])
    folder = llama()
    source = ModelSource(name="demo:llm", path=folder, summary="a toy", calibration=folder / "c.txt")
    plugins.__dict__["models"] = {"demo:llm": source}
    assert resolve("demo:llm", plugins) == source
    assert profile("demo:llm", plugins).source == "demo:llm"
    assert profile(source, PLUGINS) == profile("demo:llm", plugins)
    with pytest.raises(UsageError) as caught:
        resolve("demo:lm", plugins)
    assert caught.value.hint == "did you mean `demo:llm`? known: demo:llm (a plugin may bring it: `pip install qhub-demo`)"


@pytest.mark.parametrize(
    ("source", "kind", "message", "hint"),
    [
        ("demo:llm", UsageError, "unknown model `demo:llm`", "`pip install qhub-demo` may bring it"),
        ("nothing", UsageError, "unknown model `nothing`", "a model is a folder with config.json and *.safetensors"),
        ("./nothing", UsageError, "`./nothing` does not exist", "give a model folder, or a name such as `demo:llm`"),
        ("a/b/c", UsageError, "`a/b/c` does not exist", "give a model folder, or a name such as `demo:llm`"),
        ("org/name-1.1B", QhubError, "has to be downloaded first", "`hf download org/name-1.1B --local-dir name-1.1B`"),
    ],
)
def test_what_is_no_model_says_what_to_do(monkeypatch, tmp_path, source, kind, message, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        resolve(source, PLUGINS)
    assert type(caught.value) is kind
    assert message in caught.value.message
    assert caught.value.hint == hint


def test_a_folder_of_1_billion_parameters_takes_less_than_50_milliseconds(llama):
    folder = llama(hidden=2048, ffn=5632, blocks=22, vocab=32000, tied=False)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        found = profile(str(folder), PLUGINS)
        times.append(time.perf_counter() - started)
    assert found.parameters > 1.1e9
    assert min(times) < 0.05


@pytest.mark.parametrize(("name", "parameters"), [("py-llama-6m", 5_770_496), ("stories260k-hf", 260_032)])
def test_real_models(name, parameters):
    if not (ASSETS / name).exists():
        pytest.skip(f"{ASSETS / name} is not here")
    found = profile(str(ASSETS / name), PLUGINS)
    assert (found.task, found.parameters, found.tied_embeddings) == ("llm", parameters, True)


# Configs without weights: shapes follow from the config where its family is known, and are unknown where it is not.
@pytest.mark.parametrize(
    ("name", "task", "parameters", "dtype", "linears"),
    [
        ("llama-3-8b", "llm", 8_030_261_248, "bf16", 224),
        ("bert-base-uncased", "nlp", 109_514_298, "fp32", 72),
        ("all-minilm-l6-v2", "embedding", 22_713_216, "fp32", 36),
        ("bge-base-en-v1.5", "embedding", 109_482_240, "fp32", 72),
        ("whisper-base", "speech", 72_593_920, "fp32", 96),
        ("resnet-50", "vision", 25_557_032, "fp32", 0),
        ("stable-diffusion-1.5-unet", "generative", 859_520_964, "fp32", 182),
    ],
)
def test_a_config_without_weights_is_profiled(name, task, parameters, dtype, linears):
    found = profile(str(CONFIGS / name), PLUGINS)
    assert (found.format, found.complete) == ("config", True)
    assert (found.task, found.parameters, found.dtype, len(found.linears())) == (task, parameters, dtype, linears)


def test_a_config_says_the_same_as_its_weights(llama):
    folder = llama(model_type="llama", tie_word_embeddings=True, torch_dtype="bfloat16")
    with_weights = profile(str(folder), PLUGINS)
    (folder / "model.safetensors").unlink()
    without = profile(str(folder), PLUGINS)
    shapes = {layer.name: layer.shape for layer in with_weights.layers}
    assert {layer.name: layer.shape for layer in without.layers if "post_attention" not in layer.name or layer.name in shapes} == shapes
    assert (without.weight_bytes, without.kv_bytes_per_token) == (with_weights.weight_bytes, with_weights.kv_bytes_per_token)


def test_what_does_not_follow_from_a_config_is_unknown(model_folder):
    config = {"architectures": ["NewForCausalLM"], "model_type": "new", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    found = profile(str(model_folder(config, {})), PLUGINS)
    assert (found.format, found.complete, found.layers, found.parameters) == ("config", False, (), 0)
    assert (found.task, found.dtype, found.blocks, found.kv_bytes_per_token) == ("llm", "unknown", 4, 2 * 2 * 4 * 64)


def test_how_much_a_quantized_model_weighs_does_not_follow_from_its_config(tmp_path):
    config = json.loads((CONFIGS / "llama-3-8b" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = profile(str(tmp_path), PLUGINS)
    assert (found.quantization, found.complete, found.weight_bytes, found.dtype) == ("awq", False, 0, "unknown")
    assert found.parameters == 8_030_261_248


def test_a_run_needs_weights(model_folder):
    folder = model_folder({"architectures": ["LlamaForCausalLM"]}, {})
    with pytest.raises(QhubError, match="has no safetensors files"):
        profile(ModelSource("m", folder, ""), PLUGINS)


def test_layers_of_heads_and_embeddings_are_told_by_the_module_not_its_parents(model_folder):
    shapes = {
        "shared.weight": (9, 4), "time_embedding.linear_1.weight": (4, 4), "bert.embeddings.word_embeddings.weight": (9, 4),
        "classifier.0.weight": (4, 4), "encoder.embeddings.3.fc1.weight": (4, 4),
    }  # fmt: skip
    found = profile(str(model_folder({"architectures": ["X"]}, shapes)), PLUGINS)
    assert {layer.name.removesuffix(".weight"): layer.kind for layer in found.layers} == {
        "shared": "embedding", "time_embedding.linear_1": "other", "bert.embeddings.word_embeddings": "embedding",
        "classifier.0": "head", "encoder.embeddings.3.fc1": "linear",
    }  # fmt: skip


# More ways in which a model may already be quantized.
@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}, "gptq_v2"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": None}, None),
    ],
    ids=str,
)
def test_the_method_that_quantized_a_model_is_recognised(model_folder, config, quantization):
    folder = model_folder({"architectures": ["X"], **config}, {"a.weight": (2, 2)})
    assert profile(str(folder), PLUGINS).quantization == quantization


def test_shapes_of_mlx_are_those_before_packing(model_folder):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "quantization": {"group_size": 64, "bits": 4, f"{PACKED}": {"bits": 8, "group_size": 64}},
    }
    shapes = {
        f"{PACKED}.weight": ("I32", (128, 64)), f"{PACKED}.scales": (128, 4), f"{PACKED}.biases": (128, 4),
        "model.embed_tokens.weight": ("I32", (50, 32)), "model.embed_tokens.scales": (50, 4), "model.embed_tokens.biases": (50, 4),
    }  # fmt: skip
    folder = model_folder(config, shapes)
    header = (folder / "model.safetensors").read_bytes().replace(b'"I32"', b'"U32"')
    (folder / "model.safetensors").write_bytes(header)
    found = profile(str(folder), PLUGINS)
    assert {layer.name: (layer.kind, layer.shape, layer.bytes) for layer in found.layers} == {
        "model.embed_tokens.weight": ("embedding", (50, 256), 50 * 32 * 4 + 2 * 50 * 4 * 2),
        f"{PACKED}.weight": ("linear", (128, 256), 128 * 64 * 4 + 2 * 128 * 4 * 2),
    }


def test_shapes_of_bitsandbytes_are_those_of_the_config(model_folder):
    config = json.loads((CONFIGS / "llama-3-8b" / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    name = "model.layers.0.mlp.up_proj.weight"
    shapes = {name: ("U8", (128 * 32, 1)), f"{name}.absmax": ("F32", (128,)), f"{name}.quant_map": ("F32", (16,))}
    found = profile(str(model_folder(config, shapes)), PLUGINS)
    assert [(layer.name, layer.shape, layer.bytes) for layer in found.layers] == [(name, (128, 64), 128 * 32 + 4 * 128 + 4 * 16)]
    config["model_type"] = "unheard of"
    assert profile(str(model_folder(config, shapes, name="other")), PLUGINS).parameters == 128 * 64
