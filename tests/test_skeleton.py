"""A model without weights, run block by block: transformers' logits exactly, and one clear error for damaged files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, FAMILIES, logits_of, random_ids, tiny_model
from transformers import AutoModelForCausalLM

from qhub.errors import QhubError, Unsupported
from qhub.skeleton import TOKENS_AT_ONCE, FloatWeights, Skeleton, batch_size, forward_dtype, is_finite, read_tensor

RUNNABLE = [family for family in FAMILIES if family != "mixtral"]


@torch.no_grad()
def transformers_logits(folder, ids, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(ids).logits.float()


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a tiny model whose tensors or config a test changes."""

    def copy(family, *, change=None, config=None):
        folder = tmp_path / "copy"
        shutil.copytree(tiny_model(family), folder)
        if change is not None:
            save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        if config is not None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return copy


@pytest.mark.parametrize("family", RUNNABLE)
def test_block_by_block_gives_the_logits_of_transformers_exactly(family):
    folder, ids = tiny_model(family), random_ids(2, 24)
    assert torch.equal(logits_of(folder, ids), transformers_logits(folder, ids, torch.float32))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bf16_too(family):
    folder, ids = tiny_model(family, torch.bfloat16), random_ids(2, 24)
    assert torch.equal(logits_of(folder, ids), transformers_logits(folder, ids, torch.bfloat16))


def test_the_global_random_state_stays_as_it_is():
    state = torch.random.get_rng_state()
    logits_of(tiny_model("llama"), random_ids(1, 8))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_names_without_the_base_models_prefix_are_found(copy_of, family):
    """As in the GPT-2 of the hub: `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`."""
    prefix = {"gpt2": "transformer.", "llama": "model."}[family]
    folder = copy_of(family, change=lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    ids = random_ids(1, 16)
    assert torch.equal(logits_of(folder, ids), logits_of(tiny_model(family), ids))
    skeleton = Skeleton(FloatWeights(folder))
    first = skeleton.tensors_of(0)
    assert first
    assert all(skeleton.stored_name(f"{skeleton.block_names[0]}.{skeleton.inside(name, 0)}") == name for name in first)


def test_tensors_belong_to_one_block_or_to_none():
    skeleton = Skeleton(FloatWeights(tiny_model("llama")))
    assert skeleton.block_names == ("model.layers.0", "model.layers.1")
    parts = [*(skeleton.tensors_of(index) for index in range(BLOCKS)), skeleton.outer_tensors()]
    assert sorted(name for part in parts for name in part) == sorted(skeleton.files)
    assert sorted(parts[-1]) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_a_blocks_weights_are_in_memory_only_inside_its_context():
    skeleton = Skeleton(FloatWeights(tiny_model("llama")))
    with skeleton.block(1, dtype=torch.bfloat16) as module:
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert not any(parameter.is_meta for parameter in module.parameters())
    assert all(parameter.is_meta for parameter in skeleton.empty_block(1).parameters())
    with pytest.raises(ZeroDivisionError), skeleton.block(1):
        raise ZeroDivisionError
    assert all(parameter.is_meta for parameter in skeleton.empty_block(1).parameters())


def test_tied_embeddings_are_one_tensor():
    skeleton = Skeleton(FloatWeights(tiny_model("llama-tied")))
    assert "lm_head.weight" not in skeleton.files
    ids = random_ids(1, 8)
    skeleton.logits(ids, torch.zeros(1, 8, 64))
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight


LAYER = "model.layers.1.mlp.up_proj.weight"


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name, make):
    return lambda tensors: tensors | {name: make(tensors[name])}


def damaged(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[7] = torch.nan
    return tensor


DAMAGED = {
    "a missing tensor": (without(LAYER), f"has no tensor `{LAYER}`, which `LlamaForCausalLM` needs"),
    "a missing embedding": (without("model.embed_tokens.weight"), "has no tensor `model.embed_tokens.weight`"),
    "a wrong shape": (
        with_tensor(LAYER, lambda tensor: tensor[:100].clone()),
        f"tensor `{LAYER}` has shape [100, 64]; the config asks for [128, 64]",
    ),
    "NaN": (with_tensor(LAYER, damaged), f"tensor `{LAYER}` contains NaN or infinite numbers"),
    "NaN in the head": (with_tensor("lm_head.weight", damaged), "tensor `lm_head.weight` contains NaN or infinite numbers"),
    "integers": (with_tensor(LAYER, lambda tensor: tensor.to(torch.int8)), f"tensor `{LAYER}` holds integers"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights_are_one_clear_error(copy_of, change, message):
    folder = copy_of("llama", change=change)
    with pytest.raises(QhubError) as error:
        logits_of(folder, random_ids(1, 8))
    assert message in error.value.message
    assert error.value.hint


def test_a_model_that_is_quantized_already_holds_no_float_weights(copy_of):
    folder = copy_of("llama", change=lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()})
    with pytest.raises(Unsupported, match="holds no float weights"):
        Skeleton(FloatWeights(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonsense"}, "does not know the architecture `nonsense`"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "is not a causal language model"),
    ],
    ids=["an unknown type", "no language model"],
)
def test_a_config_that_does_not_do_is_one_clear_error(copy_of, config, message):
    folder = copy_of("llama", config=config)
    with pytest.raises(QhubError, match=message):
        Skeleton(FloatWeights(folder))


@pytest.mark.parametrize("text", ["", "{", "[1]"], ids=["empty", "cut off", "not an object"])
def test_a_config_that_is_no_json_object_is_one_clear_error(copy_of, text):
    folder = copy_of("llama")
    (folder / "config.json").write_text(text)
    with pytest.raises(QhubError, match="transformers cannot read"):
        Skeleton(FloatWeights(folder))


def test_a_config_that_is_missing_is_one_clear_error(copy_of):
    folder = copy_of("llama")
    (folder / "config.json").unlink()
    with pytest.raises(QhubError, match=r"transformers cannot read .*config\.json"):
        Skeleton(FloatWeights(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str)
def test_tensors_are_read_as_stored(tmp_path, dtype):
    values = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "nothing": torch.empty(0, 4, dtype=dtype),
    }
    save_file(values, tmp_path / "model.safetensors")
    weights = FloatWeights(tmp_path)
    for name, value in values.items():
        assert torch.equal(read_tensor(weights.files, name), value)
        assert weights.read(name).dtype == dtype


def test_forward_passes_of_small_models_are_float32():
    assert forward_dtype(torch.bfloat16, 512, "cpu") == torch.float32
    assert forward_dtype(torch.float32, 4096, "cuda") == torch.float32
    assert forward_dtype(torch.bfloat16, 4096, "cuda") == torch.bfloat16


@pytest.mark.parametrize(("samples", "fitting", "expected"), [(64, 8, 8), (6, 4, 3), (7, 4, 1), (10, 1, 1), (1, 100, 1)])
def test_a_batch_divides_the_samples_and_is_not_too_long(samples, fitting, expected):
    assert batch_size(samples, TOKENS_AT_ONCE // fitting) == expected
    assert batch_size(samples, TOKENS_AT_ONCE * 2) == 1
    assert batch_size(samples, 100, tokens=100 * fitting) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_numbers_that_are_not_finite_are_found(dtype):
    values = torch.full((3, 50), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(values), "even if their sum is not"
    assert is_finite(torch.empty(0, dtype=dtype))
    for bad in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        damaged = torch.ones(3, 50, dtype=dtype)
        damaged.view(-1)[60 : 60 + len(bad)] = torch.tensor(bad, dtype=dtype)
        assert not is_finite(damaged), bad


def test_what_lies_outside_the_blocks_can_be_dropped_and_comes_back():
    skeleton, ids = Skeleton(FloatWeights(tiny_model("llama-tied"))), random_ids(2, 16)
    skeleton.learn_output_form(ids)
    before, calls = skeleton.embed(ids)
    logits = skeleton.logits(ids, before)
    with skeleton.block(0) as module:
        skeleton.drop_outer()
        assert not any(parameter.is_meta for parameter in module.parameters()), "blocks stay"
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    after, again = skeleton.embed(ids)
    assert torch.equal(before, after)
    assert len(again) == len(calls)
    assert torch.equal(skeleton.logits(ids, after), logits)
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
