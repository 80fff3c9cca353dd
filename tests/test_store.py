"""The QuantizedModel on disk: read back bit for bit, and loaded by transformers with the public compressed-tensors."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from tiny_models import logits_of, quantize, quantized_logits, random_ids, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qhub import Quantizer, quantize_rtn
from qhub.errors import QhubError
from qhub.quantize.grid import search_grid
from qhub.quantize.qtensor import QTensor, encode
from qhub.quantize.store import METADATA, QuantizedWeights, folder_digest, layer_tensors, open_model, quantization_config, write_shard
from qhub.skeleton import FloatWeights
from qhub.types import Scheme
from qhub.weights import INDEX, WeightFiles


class Nearest(Quantizer):
    """Round to nearest on a searched range; keeps what it made for the test to compare with."""

    name = "nearest"

    def __init__(self):
        super().__init__()
        self.made = {}

    def quantize_layer(self, weight, scheme, block):
        grid = search_grid(weight, scheme, block.dtype, torch.ones(weight.shape[1]))
        return QTensor(
            encode(weight, grid.scale, grid.zero, scheme.weight_bits), grid.scale, grid.zero, scheme.weight_bits, scheme.symmetric
        )

    def quantize_group(self, group, block):
        result = super().quantize_group(group, block)
        self.made.update({f"{block.name}.{name}": tensor for name, tensor in result.items()})
        return result


def same(one, other):
    parts = ((one.codes, other.codes), (one.scale, other.scale), (one.zero, other.zero))
    return all(torch.equal(left, right) and left.dtype == right.dtype for left, right in parts) and one.bits == other.bits


MIXED = {"down_proj": "w8a16-g32-sym", "*.0.self_attn.v_proj": "float", "*.1.self_attn.*_proj": "w3a16-g16-sym", "o_proj": "w8a16"}
CASES = {
    "4 bits asymmetric": ("w4a16-g32-asym", {}),
    "4 bits symmetric": ("w4a16-g64-sym", {}),
    "3 bits asymmetric": ("w3a16-g16-asym", {}),
    "8 bits symmetric per channel": ("w8a16", {}),
    "8 bits asymmetric": ("w8a16-g64-asym", {}),
    "4 bits asymmetric per channel": ("w4a16-channel-asym", {}),
    "2 bits symmetric": ("w2a16-g16-sym", {}),
    "mixed bits, one layer float": ("w4a16-g64-sym", MIXED),
    "mixed bits, groups and symmetries": ("w4a16-g64-asym", MIXED | {"q_proj": "w4a16-g32-asym", "up_proj": "w8a16-channel-asym"}),
    "4 bits asymmetric, some layers float": ("w4a16-g64-asym", {"down_proj": "float", "*.0.mlp.up_proj": "float"}),
}
BY_CASE = pytest.mark.parametrize(("scheme", "overrides"), CASES.values(), ids=CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["g16-sym", "g16-asym", "channel-sym", "channel-asym"])
@pytest.mark.parametrize("stored", [{}, {"plain_zeros": True}, {"transposed": True}], ids=["as usual", "plain zeros", "transposed"])
def test_a_layer_reads_back_bit_for_bit(tmp_path, bits, kind, stored):
    scheme, weight = Scheme.parse(f"w{bits}a16-{kind}"), torch.randn(37, 48, generator=torch.Generator().manual_seed(bits))
    tensor = quantize_rtn(weight, scheme, torch.bfloat16)
    write_shard(tmp_path / "model.safetensors", layer_tensors("a.b", tensor, torch.bfloat16, **stored))
    transposed = ["a.b"] if "transposed" in stored else []
    (tmp_path / METADATA).write_text(json.dumps({"format_version": 1, "layers": {"a.b": str(scheme)}, "transposed": transposed}))
    assert same(QuantizedWeights(tmp_path).layer("a.b"), tensor)


@pytest.mark.parametrize("case", ["mixed bits, one layer float", "mixed bits, groups and symmetries"])
@DTYPES
def test_all_layers_of_a_model_read_back_bit_for_bit(tmp_path, case, dtype):
    scheme, overrides = CASES[case]
    quantizer, source = Nearest(), tiny_model("llama", dtype)
    result = quantize(source, tmp_path, quantizer, scheme, overrides=overrides)
    weights = QuantizedWeights(tmp_path / "model")
    assert weights.schemes == result.schemes
    assert weights.schemes.keys() == quantizer.made.keys()
    assert all(same(weights.layer(name), tensor) for name, tensor in quantizer.made.items())
    original = FloatWeights(source)
    assert sorted(weights) == sorted(original)
    assert weights.model_dtype() == dtype
    for name in original:
        expected = quantizer.made.get(name.removesuffix(".weight"))
        assert torch.equal(weights.read(name), original.read(name) if expected is None else expected.dequantize(dtype)), name


@torch.no_grad()
def transformers_logits(folder, ids, dtype):
    pytest.importorskip("compressed_tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs are not ours to mend
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(ids).logits.float()


@BY_CASE
def test_transformers_computes_our_reference_logits(tmp_path, scheme, overrides):
    source, ids = tiny_model("llama"), random_ids(2, 32)
    quantize(source, tmp_path, Nearest(), scheme, overrides=overrides)
    ours = quantized_logits(tmp_path / "model", ids)
    assert float((transformers_logits(tmp_path / "model", ids, torch.float32) - ours).abs().max()) <= 1e-5
    assert float((logits_of(source, ids) - ours).abs().max()) > 1e-3, "quantizing changes the logits"


@pytest.mark.parametrize(
    ("scheme", "overrides"), [CASES["4 bits asymmetric"], CASES["mixed bits, one layer float"]], ids=["one scheme", "mixed"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_logits_are_the_same_numbers(tmp_path, scheme, overrides, dtype):
    """The bound is 0: both round each dequantized weight once to the model's dtype and run the same code."""
    ids = random_ids(2, 32)
    quantize(tiny_model("llama", dtype), tmp_path, Nearest(), scheme, overrides=overrides)
    assert torch.equal(transformers_logits(tmp_path / "model", ids, dtype), quantized_logits(tmp_path / "model", ids))


def test_gpt2_whose_files_hold_matrices_the_other_way_round_is_read_back(tmp_path):
    """Its attention output is square, so no shape tells: `transposed` in qhub.json does."""
    quantizer, source, ids = Nearest(), tiny_model("gpt2"), random_ids(2, 32)
    quantize(source, tmp_path, quantizer, "w8a16-g32-asym")
    weights, original = QuantizedWeights(tmp_path / "model"), FloatWeights(source)
    for layer, tensor in quantizer.made.items():
        assert torch.equal(weights.read(f"{layer}.weight"), tensor.dequantize().t())
        assert float((weights.read(f"{layer}.weight") - original.read(f"{layer}.weight")).abs().max()) < 0.02
    assert float((quantized_logits(tmp_path / "model", ids) - logits_of(source, ids)).abs().max()) < 0.3


def config_of(folder):
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    return quantization, [group["weights"] for group in quantization["config_groups"].values()]


def test_asymmetric_layers_of_several_schemes_have_plain_zero_points(tmp_path):
    """transformers 5 takes packed ones of all layers for the first scheme's; from blocks of scales it reads each as it is."""
    overrides = {"down_proj": "w8a16-g64-asym", "o_proj": "w3a16-channel-asym", "up_proj": "w8a16"}
    quantize(tiny_model("llama"), tmp_path, Nearest(), "w4a16-g64-asym", overrides=overrides)
    files = WeightFiles.open(tmp_path / "model")
    zeros = {name: (info.dtype, info.shape) for name, info in files.items() if name.endswith("weight_zero_point")}
    assert {dtype for dtype, _ in zeros.values()} == {"I8"}
    assert zeros["model.layers.0.mlp.down_proj.weight_zero_point"][1] == (64, 2)
    quantization, weights = config_of(tmp_path / "model")
    assert "dequantize" not in quantization
    found = [(one["num_bits"], one["strategy"], one["block_structure"]) for one in weights]
    assert found == [(3, "block", [1, 64]), (4, "block", [1, 64]), (8, "channel", None), (8, "block", [1, 64])]


@pytest.mark.parametrize(("scheme", "strategy", "block"), [("w4a16-g32-asym", "block", [32, 1]), ("w8a16", "tensor", None)])
def test_matrices_the_other_way_round_are_stored_as_the_float_files_hold_them(tmp_path, scheme, strategy, block):
    quantize(tiny_model("gpt2"), tmp_path, Nearest(), scheme)
    stored, name = QuantizedWeights(tmp_path / "model"), "transformer.h.0.attn.c_attn"
    tensor = stored.layer(name)
    assert tensor.codes.shape == (192, 64)
    assert stored.files[f"{name}.weight_packed"].shape == (64, 192 * tensor.bits // 32)
    assert stored.files[f"{name}.weight_scale"].shape == tuple(reversed(tensor.scale.shape))
    quantization, (weights,) = config_of(tmp_path / "model")
    assert (quantization["dequantize"], quantization["config_groups"]["group_0"]["targets"]) == (True, ["Conv1D"])
    assert (weights["strategy"], weights["block_structure"]) == (strategy, block)
    ids = random_ids(2, 32)
    assert torch.equal(transformers_logits(tmp_path / "model", ids, torch.float32), quantized_logits(tmp_path / "model", ids))


@pytest.fixture
def artifact(tmp_path):
    quantize(tiny_model("llama"), tmp_path, Nearest(), "w4a16-g64-asym", overrides={"down_proj": "float"})
    return tmp_path / "model"


def test_the_folder_is_complete(artifact):
    names = {path.name for path in artifact.iterdir()}
    shards = {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    assert names == shards | {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, METADATA}
    files = WeightFiles.open(artifact)
    index = json.loads((artifact / INDEX).read_text())
    assert index["weight_map"] == {name: info.file.name for name, info in files.items()}
    assert index["metadata"]["total_size"] == sum(info.bytes for info in files.values())
    assert AutoTokenizer.from_pretrained(artifact)("ab")["input_ids"] == [97, 98]
    model = open_model(artifact)
    assert (model.path, model.kind, model.scheme, model.method) == (artifact, "weights", "w4a16-g64-asym", "nearest")


def test_the_config_says_what_is_quantized_and_what_is_not(artifact):
    config = json.loads((artifact / "config.json").read_text())
    original = json.loads((tiny_model("llama") / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == original
    assert quantization["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert [group["targets"] for group in quantization["config_groups"].values()] == [["Linear"]]
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"], weights["strategy"]) == (4, 64, False, "group")


def test_layers_of_several_schemes_are_named_one_by_one():
    schemes = {name: Scheme.parse(text) for name, text in {"a": "w4-g32-asym", "b": "w8a16", "c": "w4-g32-asym"}.items()}
    groups = quantization_config(schemes, [])["config_groups"]
    assert [(group["targets"], group["weights"]["num_bits"]) for group in groups.values()] == [(["a", "c"], 4), (["b"], 8)]


def test_bytes_are_counted_by_class(artifact):
    sizes = QuantizedWeights(artifact).bytes_by_class()
    weights = 2 * (64 * 64 * 2 + 2 * 32 * 64 + 2 * 128 * 64)  # q, o · k, v · gate, up
    outputs = 2 * (64 * 2 + 2 * 32 + 2 * 128)
    assert sizes["codes"] == weights // 2
    assert sizes["scales_and_zeros"] == outputs * 4 + outputs // 2 + 2 * 6 * 16  # float32 scales, 4-bit zeros, shapes
    assert sizes["embedding_and_head"] + sizes["other_float"] == 4 * (2 * 128 * 64 + 2 * 64 * 128 + 5 * 64)
    assert sum(sizes.values()) == sum(info.bytes for info in WeightFiles.open(artifact).values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, f"is not a model that qhub quantized: it has no {METADATA}"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 99}', "has format version `99`, this qhub reads 1"),
    ],
    ids=["missing", "cut off", "no object", "from the future"],
)
def test_metadata_that_does_not_do_is_one_clear_error(artifact, text, message):
    (artifact / METADATA).unlink()
    if text is not None:
        (artifact / METADATA).write_text(text)
    with pytest.raises(QhubError) as error:
        QuantizedWeights(artifact)
    assert message in error.value.message
    assert error.value.hint


def test_the_digest_of_a_folder_is_over_names_and_bytes(tmp_path):
    def digest(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return folder_digest(folder)

    assert digest(a="1", b__c="23") == digest(b__c="23", a="1")
    assert digest(a="1", b__c="23")[0] == 3
    assert len({digest(a="1", b="2"), digest(a="2", b="1"), digest(a="12"), digest(b="1", c="2")}) == 4


def test_writing_a_shard_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "model-00001-of-00001.safetensors"
    write_shard(path, {"a": torch.ones(3)})
    with pytest.raises(AttributeError):
        write_shard(path, {"a": "no tensor"})
    assert torch.equal(FloatWeights(tmp_path).read("a"), torch.ones(3))
