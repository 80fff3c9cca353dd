"""Layouts of others: byte for byte by formulas of their own, every cell there and back, and what cannot be carried."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from foreign_models import (
    awq_weight,
    edit_section,
    edit_tensors,
    float_model,
    foreign,
    gptq_weight,
    reorder,
    run_model,
    stream,
)
from safetensors.torch import load_file, save_file
from test_store import transformers_logits
from tiny_models import logits_of, quantized_logits, random_ids, tiny_model

from qhub.errors import Unsupported, UsageError
from qhub.quantize.layouts.awq import pack_awq, unpack_awq
from qhub.quantize.layouts.base import LayerFacts, ModelFacts, StoredLayer, in_order
from qhub.quantize.layouts.reader import LAYOUTS, PackedWeights, open_packed, open_weights
from qhub.quantize.layouts.writer import write_layout
from qhub.quantize.store import QuantizedWeights
from qhub.skeleton import FloatWeights
from qhub.types import Scheme

IDS = random_ids(2, 32)
GPTQS = pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
LAYER = "model.layers.0.mlp.down_proj"


def signed(word):
    return word - 2**32 if word >= 2**31 else word


def some_layer(bits, *, rows=32, columns=64, group_size=16, symmetric=False):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (rows, columns // group_size)
    zero = torch.randint(1, 2**bits, shape, generator=generator).float() if not symmetric else torch.full(shape, 2.0 ** (bits - 1))
    return StoredLayer(codes, torch.rand(shape, generator=generator).half().float(), zero, Scheme(bits, 16, group_size, symmetric))


def model_of(**layers):
    facts = {name: LayerFacts(layer.scheme, *layer.codes.shape) for name, layer in layers.items()}
    return ModelFacts(facts, torch.float16)


def written(layout, layer):
    return LAYOUTS[layout].tensors("x", layer, model_of(x=layer))


# Bytes: hand-made words, then whole layers by the arithmetic of one big number per row.
def test_awq_has_its_outputs_in_the_order_of_its_kernel():
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    words = pack_awq(codes)
    assert words.tolist() == [[0x75316420, signed(0xFDB9ECA8)]]
    assert torch.equal(unpack_awq(words), codes)


def test_gptq_packs_inputs_downwards_and_zeros_along_the_outputs():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [15, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8).repeat(4, 1)
    zero = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [15.0]])
    layer = StoredLayer(codes, torch.full((8, 1), 0.5), zero, Scheme(4, 16, 8, symmetric=False))
    one, two = written("gptq", layer), written("gptq_v2", layer)
    assert one["x.qweight"].tolist() == [[signed(0x87654321), signed(0xF000000F)] * 4]
    assert one["x.qzeros"].tolist() == [[signed(0xE6543210)]]
    assert two["x.qzeros"].tolist() == [[signed(0xF7654321)]]
    assert (one["x.g_idx"].tolist(), one["x.scales"].tolist()) == ([0] * 8, [[0.5] * 8])


@pytest.mark.parametrize(("layout", "word"), [("gptq", 0x77777777), ("gptq_v2", 0x88888888), ("awq", 0x88888888)])
def test_symmetric_zeros_are_the_middle_everywhere(layout, word):
    assert set(written(layout, some_layer(4, symmetric=True))["x.qzeros"].flatten().tolist()) == {signed(word)}


@GPTQS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_are_a_dense_stream_at_every_number_of_bits(version, bits):
    layer = some_layer(bits)
    tensors = written("gptq" if version == 1 else "gptq_v2", layer)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "x.qweight": (torch.int32, (64 * bits // 32, 32)),
        "x.qzeros": (torch.int32, (4, 32 * bits // 32)),
        "x.scales": (torch.float16, (4, 32)),
        "x.g_idx": (torch.int32, (64,)),
    }
    for n in (0, 1, 31):
        assert stream(tensors["x.qweight"][:, n].tolist(), bits, 64) == layer.codes[n].tolist()
    stored = [stream(row.tolist(), bits, 32) for row in tensors["x.qzeros"]]
    assert torch.equal(torch.tensor(stored).t() + (version == 1), layer.zero.long())
    assert torch.equal(torch.from_numpy(gptq_weight(tensors, "x", bits, version=version)), layer.dequantize())


def test_awq_layers_are_what_autoawq_reads():
    layer = some_layer(4, rows=24)
    tensors = written("awq", layer)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert shapes == {"x.qweight": (torch.int32, (64, 3)), "x.qzeros": (torch.int32, (4, 3)), "x.scales": (torch.float16, (4, 24))}
    assert torch.equal(torch.from_numpy(awq_weight(tensors, "x")), layer.dequantize())


# The cells of docs/formats.md: what a run made, in every layout and back.
CELLS = {
    "symmetric": ("w4a16-g32-sym", {}),
    "asymmetric": ("w4a16-g32-asym", {}),
    "per output": ("w4a16", {}),
    "asymmetric per output": ("w4a16-channel-asym", {}),
    "3 bits": ("w3a16-g32-asym", {}),
    "8 bits": ("w8a16-g64-sym", {}),
    "2 bits": ("w2a16-g16-asym", {}),
    "some layers float": ("w4a16-g64-asym", {"down_proj": "float", "v_proj": "float"}),
    "mixed": ("w4a16-g64-sym", {"down_proj": "w8a16-g32-sym", "v_proj": "w3a16-g16-sym", "o_proj": "float"}),
    "mixed asymmetric": ("w4a16-g64-asym", {"down_proj": "w8a16-g32-asym", "q_proj": "w4a16-channel-asym", "up_proj": "w8a16"}),
}
CARRIED = [
    *((cell, layout) for cell in CELLS for layout in ("gptq", "gptq_v2")),
    *((cell, "awq") for cell in ("symmetric", "asymmetric", "per output", "asymmetric per output", "some layers float")),
]


@pytest.mark.parametrize(("cell", "layout"), CARRIED, ids=lambda value: value)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_carried_there_and_back_is_the_same_files(tmp_path, cell, layout, dtype):
    scheme, overrides = CELLS[cell]
    source, there, back = run_model(tmp_path, scheme, dtype=dtype, **overrides), tmp_path / "there", tmp_path / "back"
    there.mkdir(), back.mkdir()
    write_layout(source, there, layout)
    own, other = QuantizedWeights(source), open_packed(there)
    assert {name: facts.scheme for name, facts in other.layers.items()} == own.schemes
    for name in own.schemes:
        one, two = own.layer(name), other.layer(name)
        assert all(torch.equal(*pair) for pair in ((one.codes, two.codes), (one.scale, two.scale), (one.zero, two.zero)))
    assert sorted(other) == sorted(own)
    assert all(torch.equal(other.read(name), own.read(name)) for name in own)
    write_layout(there, back, "compressed-tensors")
    assert {path.name for path in back.iterdir()} == {path.name for path in source.iterdir()}
    assert [path.name for path in back.iterdir() if path.read_bytes() != (source / path.name).read_bytes()] == []


@pytest.mark.parametrize(
    ("one", "two"), [("awq", "gptq"), ("gptq", "gptq_v2"), ("gptq_v2", "awq"), ("gptq_v2", "gptq"), ("awq", "gptq_v2")]
)
def test_layouts_of_others_lead_to_each_other(tmp_path, one, two):
    first = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "one", one)
    (tmp_path / "two").mkdir()
    written = write_layout(first, tmp_path / "two", two)
    there, back = open_packed(first), open_packed(tmp_path / "two")
    assert (written.layers, written.was, written.schemes, written.warnings) == (14, one, {"w4a16-g32-asym": 14}, ())
    assert all(there.layer(name).equals(back.layer(name)) for name in there.layers)


@pytest.mark.parametrize(("version", "target"), [(1, "gptq_v2"), (2, "gptq")], ids=["v1 to v2", "v2 to v1"])
def test_an_order_of_columns_is_carried_where_a_layout_has_one(tmp_path, version, target):
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "gptq" if version == 1 else "gptq_v2")
    reorder(source)
    there = open_packed(source)
    (tmp_path / "out").mkdir()
    write_layout(source, tmp_path / "out", target)
    back = open_packed(tmp_path / "out")
    for name in there.layers:
        assert there.layer(name).groups is not None
        assert there.layer(name).equals(back.layer(name))
    expected = logits_of(float_model(source, tmp_path / "float", lambda t, n: gptq_weight(t, n, 4, version=version)), IDS)
    assert torch.equal(logits_of(back, IDS), expected)


def test_groups_that_only_lie_in_another_order_are_put_back(tmp_path):
    """Whole groups moved, as GPTQModel's group-aware ordering could leave them: AWQ carries that."""
    layer = some_layer(4)
    moved = torch.tensor([2, 0, 3, 1])
    groups = moved.repeat_interleave(16)
    found = in_order(StoredLayer(layer.codes, layer.scale, layer.zero, layer.scheme, groups), 16)
    assert found.groups is None
    assert torch.equal(found.dequantize(), StoredLayer(layer.codes, layer.scale, layer.zero, layer.scheme, groups).dequantize())


# What cannot be carried is refused with the reason, before anything is written.
def refused(source, out, layout):
    out.mkdir()
    with pytest.raises(Unsupported) as error:
        write_layout(source, out, layout)
    assert list(out.iterdir()) == []
    return error.value.message.removeprefix(f"`{layout}` cannot carry `{source}`: ")


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("scheme", "overrides", "layout", "reason"),
    [
        ("w8a16-g32-asym", {}, "awq", f"AWQ has 4 bits; layer `{LAYER}` has 8"),
        ("w4a16-g64-asym", {"down_proj": "w4a16-g32-asym"}, "awq", "AWQ has one group size; these layers have 32, 64 (-1: per output)"),
        ("w4a16-g64-asym", {"down_proj": "w8a16"}, "awq", f"AWQ has 4 bits; layer `{LAYER}` has 8"),
        ("w5a16-g64-asym", {}, "gptq", f"GPTQ files have 2, 3, 4, 8 bits; layer `{LAYER}` has 5"),
        ("w6a16-g64-sym", {}, "gptq_v2", f"GPTQ files have 2, 3, 4, 8 bits; layer `{LAYER}` has 6"),
    ],
)
def test_a_scheme_that_a_layout_does_not_have_is_refused(tmp_path, scheme, overrides, layout, reason):
    assert refused(run_model(tmp_path, scheme, **overrides), tmp_path / "out", layout) == reason


def test_matrices_that_do_not_fill_words_are_refused():
    model = model_of(a=some_layer(4, rows=36))
    assert LAYOUTS["awq"].refuse(model) == "AWQ packs 8 outputs into a word and needs whole groups; layer `a` is 36 × 64"
    assert LAYOUTS["gptq"].refuse(model) == "GPTQ needs multiples of 32 inputs and outputs; layer `a` is 36 × 64"
    assert LAYOUTS["compressed-tensors"].refuse(model) is None


def test_an_order_of_columns_cannot_go_where_a_layout_has_none(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "gptq_v2")
    reorder(source)
    why = f"and the columns of 14 layers (`{LAYER}`, …) are ordered by activation (`desc_act`)"
    assert refused(source, tmp_path / "awq", "awq") == f"AWQ has no `g_idx`: groups of consecutive inputs only, {why}"
    expected = f"compressed-tensors has no `g_idx` since 0.20, {why}"
    assert refused(source, tmp_path / "ct", "compressed-tensors") == expected


def test_an_order_of_columns_that_llm_compressor_left_is_read(tmp_path):
    """Before compressed-tensors 0.20; the float model's code is the judge."""
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "compressed-tensors")
    before = {name: open_packed(source).layer(name) for name in open_packed(source).layers}
    groups = {name: torch.randperm(layer.codes.shape[1]) % layer.scale.shape[1] for name, layer in before.items()}
    edit_tensors(source, lambda tensors: tensors.update({f"{name}.weight_g_idx": groups[name].int() for name in before}))
    for name, layer in before.items():
        found = open_packed(source).layer(name)
        expected = (layer.codes.float() - layer.zero[:, groups[name]]) * layer.scale[:, groups[name]]
        assert torch.equal(found.dequantize(), expected)
        assert torch.equal(open_weights(source).read(f"{name}.weight"), expected)


def test_a_zero_of_0_cannot_go_to_gptq_v1_and_goes_everywhere_else(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "gptq_v2")
    edit_tensors(source, lambda tensors: tensors[f"{LAYER}.qzeros"].zero_())
    expected = f"GPTQ v1 stores zero − 1 and so has no zero of 0, which there is in layer `{LAYER}` (`gptq_v2` has)"
    assert refused(source, tmp_path / "v1", "gptq") == expected
    for layout in ("awq", "compressed-tensors"):
        (tmp_path / layout).mkdir()
        write_layout(source, tmp_path / layout, layout)
        assert open_packed(tmp_path / layout).layer(LAYER).equals(open_packed(source).layer(LAYER))


def test_scales_that_fp16_does_not_hold_are_refused(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "compressed-tensors")
    edit_tensors(source, lambda tensors: tensors[f"{LAYER}.weight_scale"].add_(1e-6))
    for layout in ("awq", "gptq", "gptq_v2"):
        assert refused(source, tmp_path / layout, layout).endswith(f"stores scales in fp16, which would round those of layer `{LAYER}`")


def test_a_model_that_says_symmetric_and_is_not_is_refused(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-sym"), tmp_path / "a", "gptq_v2")
    edit_tensors(source, lambda tensors: tensors[f"{LAYER}.qzeros"].fill_(0x11111111))
    assert refused(source, tmp_path / "out", "awq") == f"its config says symmetric, but the zeros of layer `{LAYER}` are others"


def test_what_is_stored_so_already_and_what_does_not_exist_is_wrong_usage(tmp_path):
    source = run_model(tmp_path, "w4a16-g32-sym")
    with pytest.raises(UsageError, match="already is stored as `compressed-tensors`"):
        write_layout(source, tmp_path, "compressed-tensors")
    with pytest.raises(UsageError, match="unknown layout `ggml`"):
        write_layout(source, tmp_path, "ggml")


def test_fp16_scales_of_a_bf16_model_stay_what_they_are_with_a_warning(tmp_path):
    """GPTQModel's usual output: bf16 model, fp16 scales."""
    source = foreign(run_model(tmp_path, "w4a16-g32-asym", dtype=torch.bfloat16), tmp_path / "a", "gptq_v2")
    edit_tensors(source, lambda tensors: tensors[f"{LAYER}.scales"].mul_(1.0009765625))
    (tmp_path / "out").mkdir()
    written = write_layout(source, tmp_path / "out", "compressed-tensors")
    assert written.warnings == (
        f"the scales of layer `{LAYER}` are no numbers of the model's bf16; readers that cast them to it round them",
    )
    assert open_packed(tmp_path / "out").layer(LAYER).equals(open_packed(source).layer(LAYER))
    assert open_packed(tmp_path / "out").files[f"{LAYER}.weight_scale"].dtype == "F16"


# Configs: what the readers of each layout look for.
def section_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_the_config_of_gptq_is_complete_and_in_both_places(tmp_path):
    source = run_model(tmp_path, "w4a16-g64-asym", down_proj="w8a16-g32-sym", v_proj="float")
    (tmp_path / "out").mkdir()
    write_layout(source, tmp_path / "out", "gptq")
    section = section_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == section
    said = {key: section[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "lm_head")}
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
    assert said == {**expected, "checkpoint_format": "gptq", "lm_head": False}
    dynamic = section["dynamic"]
    assert dynamic[r"+:^model\.layers\.1\.mlp\.down_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert dynamic[r"-:^model\.layers\.0\.self_attn\.v_proj$"] == {}
    assert len(dynamic) == 4


def test_the_config_of_awq_names_what_stays_float(tmp_path):
    source = run_model(tmp_path, "w4a16-g64-sym", v_proj="float")
    (tmp_path / "out").mkdir()
    write_layout(source, tmp_path / "out", "awq")
    section = section_of(tmp_path / "out")
    assert (section["bits"], section["group_size"], section["zero_point"], section["version"]) == (4, 64, True, "gemm")
    assert section["modules_to_not_convert"] == ["lm_head", *(f"model.layers.{index}.self_attn.v_proj" for index in (0, 1))]
    assert len(section["dynamic"]) == 2


def test_everything_else_of_the_folder_comes_along(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "awq")
    (source / "modeling_own.py").write_text("# their code")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "out").mkdir()
    write_layout(source, tmp_path / "out", "compressed-tensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_own.py", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    assert {**config, "quantization_config": None} == {**before, "quantization_config": None}
    assert not (tmp_path / "out" / "qhub.json").exists(), "qhub did not quantize it"


def test_the_same_model_gives_the_same_bytes_however_it_is_split(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "awq")
    split = tmp_path / "split"
    shutil.copytree(source, split)
    tensors = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{index % 3}.safetensors"  # parts of one layer in different files
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, split / file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = []
    for folder in (source, split):
        out = tmp_path / f"{folder.name}-out"
        out.mkdir()
        write_layout(folder, out, "gptq")
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert found[0] == found[1]
    assert sorted(name for name in found[0] if name.endswith(".safetensors")) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


# Reading: the float model's code on the weights that the files stand for.
@GPTQS
@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "desc_act"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_models_compute_what_their_files_say(tmp_path, version, ordered, bits):
    source = foreign(run_model(tmp_path, f"w{bits}a16-g32-asym"), tmp_path / "a", "gptq" if version == 1 else "gptq_v2")
    if not ordered:
        reorder(source)
    expected = float_model(source, tmp_path / "float", lambda tensors, name: gptq_weight(tensors, name, bits, version=version))
    weights = open_weights(source)
    assert isinstance(weights, PackedWeights)
    assert sorted(weights) == sorted(FloatWeights(expected))
    assert torch.equal(logits_of(weights, IDS), logits_of(expected, IDS))


def test_awq_models_compute_what_their_files_say(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-asym", family="llama-tied"), tmp_path / "a", "awq")
    assert torch.equal(logits_of(open_weights(source), IDS), logits_of(float_model(source, tmp_path / "float", awq_weight), IDS))


@pytest.mark.parametrize("cell", ["symmetric", "asymmetric", "per output", "3 bits", "mixed", "mixed asymmetric"])
def test_compressed_tensors_of_others_compute_what_transformers_does(tmp_path, cell):
    scheme, overrides = CELLS[cell]
    source = foreign(run_model(tmp_path, scheme, **overrides), tmp_path / "a", "compressed-tensors")
    assert isinstance(open_weights(source), PackedWeights)
    assert torch.equal(logits_of(open_weights(source), IDS), transformers_logits(source, IDS, torch.float32))


def test_zero_points_that_are_not_packed_are_read_too(tmp_path):
    """As compressed-tensors wrote them before it packed them."""
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "compressed-tensors")
    before = {name: open_packed(source).layer(name) for name in open_packed(source).layers}

    def unpack_zeros(tensors):
        for name, layer in before.items():
            tensors[f"{name}.weight_zero_point"] = (layer.zero - 8).to(torch.int8)

    edit_tensors(source, unpack_zeros)
    assert all(open_packed(source).layer(name).equals(layer) for name, layer in before.items())


def test_a_group_of_the_config_means_layers_by_name_pattern_or_class(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-sym", down_proj="w8a16-g64-sym"), tmp_path / "a", "compressed-tensors")
    expected = {name: facts.scheme for name, facts in open_packed(source).layers.items()}
    groups = section_of(source)["config_groups"]
    four, eight = sorted(groups.values(), key=lambda group: group["weights"]["num_bits"])
    edit_section(source, config_groups={"a": {**four, "targets": ["Linear"]}, "b": {**eight, "targets": ["re:.*down_proj$"]}})
    assert {name: facts.scheme for name, facts in open_packed(source).layers.items()} == expected


def test_patterns_of_gptq_change_the_scheme_of_layers(tmp_path):
    source = foreign(run_model(tmp_path, "w4a16-g32-asym", down_proj="w8a16-g64-asym"), tmp_path / "a", "gptq_v2")
    expected = {name: facts.scheme for name, facts in open_packed(source).layers.items()}
    edit_section(source, dynamic={"-:.*nothing": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 64}, ".*": {"bits": 4}})
    assert {name: facts.scheme for name, facts in open_packed(source).layers.items()} == expected


def test_zeros_of_0_that_gptqmodel_borrowed_for_in_v1_are_read_as_it_reads_them(tmp_path):
    """It takes 0x11111111 from whole words and adds it again, so a borrow comes back."""
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "gptq_v2")
    edit_tensors(source, lambda tensors: tensors[f"{LAYER}.qzeros"][:, 0].fill_(0x30201000))
    expected = open_packed(source).layer(LAYER)
    edit_tensors(source, lambda tensors: [tensors[name].sub_(0x11111111) for name in tensors if name.endswith(".qzeros")])
    edit_section(source, checkpoint_format="gptq", format="gptq")
    assert open_packed(source).layer(LAYER).equals(expected)
    assert expected.zero[:8, 0].tolist() == [0, 0, 0, 1, 0, 2, 0, 3]


def test_settings_in_a_file_of_their_own_are_found(tmp_path):
    """Before config.json had a place for them, AutoGPTQ wrote quantize_config.json."""
    source = foreign(run_model(tmp_path, "w4a16-g32-asym"), tmp_path / "a", "gptq")
    expected = open_packed(source).layer(LAYER)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    (source / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": False, "desc_act": False}))
    assert open_packed(source).layer(LAYER).equals(expected)


# GPT-2, whose float files hold (K, N).
@pytest.mark.parametrize("layout", ["awq", "gptq", "gptq_v2"])
@pytest.mark.parametrize("owner", ["qhub", "somebody else"])
def test_matrices_the_other_way_round_are_carried_and_read(tmp_path, layout, owner):
    source = run_model(tmp_path, "w4a16-g32-sym", family="gpt2")
    there = tmp_path / "there"
    if owner == "qhub":
        there.mkdir()
        write_layout(source, there, layout)
    else:
        foreign(source, there, layout)
    weights = open_weights(there)
    assert weights.layers["transformer.h.0.attn.c_attn"].rows == 192
    assert torch.equal(logits_of(weights, IDS), quantized_logits(source, IDS))
    (tmp_path / "back").mkdir()
    write_layout(there, tmp_path / "back", "compressed-tensors")
    assert torch.equal(logits_of(open_weights(tmp_path / "back"), IDS), quantized_logits(source, IDS))
    if owner == "qhub":
        assert all((tmp_path / "back" / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())


def test_a_float_model_is_opened_as_one(tmp_path):
    assert isinstance(open_weights(tiny_model("llama")), FloatWeights)
