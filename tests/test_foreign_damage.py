"""Models of others that contradict themselves, or do what is not read here: one clear error each, before a weight is read."""

from __future__ import annotations

import json

import pytest
import torch
from foreign_models import edit_section, edit_tensors, foreign, run_model

from qhub.errors import DamagedModelError, QhubError, Unsupported
from qhub.quantize.layouts.reader import open_packed, open_weights

Q = "model.layers.0.self_attn.q_proj"
GROUPS = {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model in each layout, as somebody else left it."""
    folder = tmp_path_factory.mktemp("models")
    source = run_model(folder, "w4a16-g32-asym")
    return {layout: foreign(source, folder / layout, layout) for layout in ("awq", "gptq", "gptq_v2", "compressed-tensors")}


@pytest.fixture
def model(models, tmp_path):
    """A copy of one to break."""

    def copy(layout):
        import shutil

        return shutil.copytree(models[layout], tmp_path / "model")

    return copy


def without(name):
    return lambda tensors: tensors.pop(f"{Q}.{name}")


def with_tensor(name, tensor):
    return lambda tensors: tensors.update({f"{Q}.{name}": tensor})


def cut(name, rows):
    return lambda tensors: tensors.update({f"{Q}.{name}": tensors[f"{Q}.{name}"][:rows].clone()})


def needs(name, found, wanted):
    return f"tensor `{Q}.{name}` is {found}; its layer needs {wanted}"


# What the tensors of a layer say of each other.
@pytest.mark.parametrize(
    ("layout", "change", "why"),
    [
        ("awq", without("qzeros"), f"it has no tensor `{Q}.qzeros`"),
        ("awq", without("scales"), f"it has no tensor `{Q}.scales`"),
        ("awq", cut("scales", 1), needs("scales", "F16 [1, 64]", "F16 or BF16 or F32 [2, 64]")),
        ("awq", cut("qweight", 32), needs("qzeros", "I32 [2, 8]", "I32 [1, 8]")),
        ("awq", with_tensor("qweight", torch.zeros(64, 8, dtype=torch.int64)), needs("qweight", "I64 [64, 8]", "I32 [64, 8]")),
        ("awq", with_tensor("qweight", torch.zeros(64, dtype=torch.int32)), f"layer `{Q}` in groups of 32 has `qweight` [64]"),
        ("gptq", without("qzeros"), f"it has no tensor `{Q}.qzeros`"),
        ("gptq", cut("qweight", 4), needs("qzeros", "I32 [2, 8]", "I32 [1, 8]")),
        ("gptq", cut("g_idx", 63), needs("g_idx", "I32 [63]", "I32 or I64 [64]")),
        ("gptq_v2", cut("qzeros", 1), needs("qzeros", "I32 [1, 8]", "I32 [2, 8]")),
        ("compressed-tensors", without("weight_zero_point"), f"it has no tensor `{Q}.weight_zero_point`"),
        ("compressed-tensors", without("weight_shape"), f"it has no tensor `{Q}.weight_shape`"),
        (
            "compressed-tensors",
            with_tensor("weight_shape", torch.tensor([64, 128])),
            needs("weight_packed", "I32 [64, 8]", "I32 [64, 16]"),
        ),
        ("compressed-tensors", with_tensor("weight_shape", torch.tensor([-1, 64])), f"layer `{Q}` has 4 bits and the shape [-1, 64]"),
        ("compressed-tensors", cut("weight_scale", 32), needs("weight_scale", "F32 [32, 2]", "F16 or BF16 or F32 [64, 2]")),
        ("compressed-tensors", cut("weight_zero_point", 4), needs("weight_zero_point", "I32 [4, 2]", "I32 [8, 2]")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_of_a_layer_that_contradict_each_other_are_named(model, layout, change, why):
    folder = model(layout)
    edit_tensors(folder, change)
    with pytest.raises(DamagedModelError) as error:
        open_packed(folder)
    assert error.value.message == f"`{folder}` is damaged: {why}"
    assert error.value.exit_code == 1


# What the config says of the tensors.
@pytest.mark.parametrize(
    ("layout", "changes", "why"),
    [
        ("gptq", {"bits": 8}, "tensor `model.layers.0.mlp.down_proj.qzeros` is I32 [4, 8]; its layer needs I32 [2, 16]"),
        ("gptq", {"bits": "four"}, "`bits` of its quantization_config is `four`, which is no integer"),
        ("gptq", {"group_size": 0}, "layer `model.layers.0.mlp.down_proj` of 4 bits in groups of 0 has `qweight` [16, 64]"),
        ("gptq", {"dynamic": ["x"]}, "`dynamic` of its quantization_config is no object"),
        ("gptq", {"dynamic": {"+:(": {}}}, "`(` in `dynamic` of its quantization_config is no regular expression"),
        ("awq", {"group_size": 48}, "groups of 48 do not divide the 128 inputs of layer `model.layers.0.mlp.down_proj`"),
        ("awq", {"group_size": None, "q_group_size": True}, "`group_size` of its quantization_config is `True`, which is no integer"),
        ("compressed-tensors", {"config_groups": {}}, "no group of its `config_groups` means layer `model.layers.0.mlp.down_proj`"),
        (
            "compressed-tensors",
            {"config_groups": {"a": {**GROUPS["group_0"], "targets": ["other.layer"]}}},
            "no group of its `config_groups` means layer `model.layers.0.mlp.down_proj`",
        ),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_named(model, layout, changes, why):
    folder = model(layout)
    edit_section(folder, **changes)
    with pytest.raises(DamagedModelError) as error:
        open_packed(folder)
    assert error.value.message == f"`{folder}` is damaged: {why}"


def test_an_order_of_columns_without_its_tensor_is_an_error(model):
    folder = model("gptq")
    edit_tensors(folder, without("g_idx"))
    assert open_packed(folder).layer(Q).groups is None, "without an order they are consecutive"
    edit_section(folder, desc_act=True)
    with pytest.raises(DamagedModelError, match=f"but layer `{Q}` has no `g_idx`"):
        open_packed(folder)


@pytest.mark.parametrize("group", [2, -1])
def test_a_group_that_does_not_exist_is_an_error_and_no_crash(model, group):
    folder = model("gptq")
    edit_tensors(folder, lambda tensors: tensors[f"{Q}.g_idx"].fill_(group))
    with pytest.raises(DamagedModelError, match=f"`g_idx` of layer `{Q}` names group {group} of 2"):
        open_packed(folder).layer(Q)


# What is whole, but stored in a way that is not read.
@pytest.mark.parametrize(
    ("layout", "changes", "why"),
    [
        ("awq", {"version": "gemv"}, "it is stored in version `gemv` of AWQ; read is `gemm`"),
        ("awq", {"bits": 8}, "its layers have 8 bits; AWQ's GEMM version has 4"),
        ("gptq", {"bits": 5}, "its layer `model.layers.0.mlp.down_proj` has 5 bits; GPTQ files are read at 2, 3, 4, 8"),
        ("gptq", {"pack_dtype": "int16"}, "its codes are packed into `int16`; read are those in `int32`"),
        ("awq", {"quant_method": "compressed-tensors"}, "its config says `compressed-tensors`, but it has no `.weight_packed` tensors"),
        (
            "compressed-tensors",
            {"config_groups": {"a": {**GROUPS["group_0"], "format": "int-quantized"}}},
            "its weights are stored as `int-quantized`; read are those stored as `pack-quantized`",
        ),
        (
            "compressed-tensors",
            {"config_groups": {"a": {**GROUPS["group_0"], "input_activations": {"num_bits": 8}}}},
            "it also rounds activations (`input_activations`), which is not done here",
        ),
        (
            "compressed-tensors",
            {"config_groups": {"a": {**GROUPS["group_0"], "weights": {"num_bits": 4, "strategy": "tensor_group"}}}},
            "the scales of layer `model.layers.0.mlp.down_proj` are placed by strategy `tensor_group`",
        ),
        (
            "compressed-tensors",
            {"config_groups": {"a": {**GROUPS["group_0"], "weights": {"num_bits": 4, "type": "float"}}}},
            "the weights of layer `model.layers.0.mlp.down_proj` are no integers",
        ),
        (
            "compressed-tensors",
            {"transform_config": {"a": 1}},
            "its `transform_config` turns activations as it runs, which is not done here",
        ),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason(model, layout, changes, why):
    folder = model(layout)
    edit_section(folder, **changes)
    with pytest.raises(Unsupported) as error:
        open_packed(folder)
    assert error.value.message == f"`{folder}` cannot be read: {why}"
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("layout", "changes", "how"),
    [("awq", {"quant_method": "hqq"}, "`hqq`"), ("gptq", {"checkpoint_format": "marlin"}, "`gptq` in format `marlin`")],
)
def test_other_methods_are_named(model, layout, changes, how):
    folder = model(layout)
    edit_section(folder, **changes)
    with pytest.raises(Unsupported) as error:
        open_weights(folder)
    assert error.value.message == f"`{folder}` is quantized by {how}, which is not read here"
    assert error.value.hint == "read are compressed-tensors, awq, gptq, gptq_v2"


@pytest.mark.parametrize(("text", "why"), [("{", "is not JSON"), ("[]", "is no JSON object")])
def test_a_config_that_is_none_is_an_error(model, text, why):
    folder = model("awq")
    (folder / "config.json").write_text(text)
    with pytest.raises(DamagedModelError, match=why):
        open_weights(folder)


def test_a_truncated_file_is_an_error(model):
    folder = model("gptq")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(QhubError, match="truncated"):
        open_packed(folder)


def test_qhubs_own_word_on_a_layer_is_only_taken_for_a_layer_that_is_there(model):
    folder = model("awq")
    known = {"format_version": 1, "layers": {Q: "w4a16-g32-sym"}}
    (folder / "qhub.json").write_text(json.dumps(known))
    assert str(open_packed(folder).layers[Q].scheme) == "w4a16-g32-sym"
    assert str(open_packed(folder).layers["model.layers.0.mlp.down_proj"].scheme) == "w4a16-g32-asym"
