"""The walk: the same bytes however it was interrupted, spilled or repeated, and an artifact that computes what was measured."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, quantize, random_ids, tiny_model

from qhub import Quantizer, compensate, lower_factor, on_grid, quantize_rtn, search_grid
from qhub.errors import QhubError, Unsupported
from qhub.quantize import walk as walking
from qhub.quantize.store import QuantizedWeights
from qhub.quantize.walk import clean
from qhub.skeleton import FloatWeights, Skeleton, run_block

IDS = random_ids(8, 32)
SCHEME = "w4a16-g32-asym"


class Nearest(Quantizer):
    """Looks at no data."""

    name = "nearest"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


class Careful(Quantizer):
    """Uses everything that the walk offers: scales to fold, second moments, shortfalls; can be told to break down."""

    name = "careful"
    scales = True
    needs = frozenset({"gram", "shortfall"})

    def __init__(self, breakdown=None):
        super().__init__()
        self.breakdown = breakdown
        self.seen = []

    def scale_group(self, group, block):
        scale = group.tied(group.stats.abs_mean.clamp_min(1e-4).sqrt())
        return scale / scale.log().mean().exp()

    def quantize_group(self, group, block):
        self.seen.append((block.index, *group.weights))
        if self.breakdown is not None and self.breakdown(block.index, list(group.weights)):
            raise KeyboardInterrupt
        factor, result = lower_factor(group.stats.gram), {}
        for name, weight in group.weights.items():
            scheme = block.schemes(group)[name]
            missing = group.shortfall(name)
            target = weight if missing is None else compensate(weight, missing, factor)
            result[name] = on_grid(target, search_grid(target, scheme, block.dtype, group.stats.gram.diagonal()), scheme)
        return result


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The digests of an artifact that was written in one go, and the result."""
    out = tmp_path_factory.mktemp("uninterrupted")
    result = quantize(tiny_model("llama"), out, Careful(), SCHEME, ids=IDS)
    return digests(out / "model"), result


# The same bytes


def test_two_runs_write_the_same_bytes(tmp_path, uninterrupted):
    quantize(tiny_model("llama"), tmp_path, Careful(), SCHEME, ids=IDS)
    assert digests(tmp_path / "model") == uninterrupted[0]


MOMENTS = {
    "in the first layers": lambda index, names: True,
    "at the end of the first block": lambda index, names: "mlp.down_proj" in names,
    "at the start of the last block": lambda index, names: index == 1,
    "at the very end": lambda index, names: index == 1 and "mlp.down_proj" in names,
}


@pytest.mark.parametrize("breakdown", MOMENTS.values(), ids=MOMENTS)
def test_an_interrupted_walk_goes_on_to_the_same_bytes(tmp_path, uninterrupted, breakdown):
    broken = Careful(breakdown)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model("llama"), tmp_path, broken, SCHEME, ids=IDS)
    for leftover in ("model/model-00003-of-00003.partial", "work/float-00002.partial"):
        (tmp_path / leftover).write_bytes(b"half a file")
    resumed = Careful()
    result = quantize(tiny_model("llama"), tmp_path, resumed, SCHEME, ids=IDS)
    (tmp_path / "model/model-00003-of-00003.partial").unlink(missing_ok=True)
    assert digests(tmp_path / "model") == uninterrupted[0]
    assert result == uninterrupted[1]
    assert {entry[0] for entry in resumed.seen} == set(range(broken.seen[-1][0], 2)), "only what was not done is done"


def test_a_walk_interrupted_between_blocks_goes_on_after_the_last(tmp_path, uninterrupted):
    def stop_after_a_block(event):
        if event["event"] == "block":
            raise KeyboardInterrupt

    for blocks_done in (1, 2):
        quantizer = Careful()
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_model("llama"), tmp_path, quantizer, SCHEME, ids=IDS, listener=stop_after_a_block)
        assert {entry[0] for entry in quantizer.seen} == {blocks_done - 1}
    quantizer = Careful()
    assert quantize(tiny_model("llama"), tmp_path, quantizer, SCHEME, ids=IDS) == uninterrupted[1]
    assert quantizer.seen == []
    assert digests(tmp_path / "model") == uninterrupted[0]


def test_a_block_whose_shard_is_lost_is_done_again(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model("llama"), tmp_path, Careful(MOMENTS["at the start of the last block"]), SCHEME, ids=IDS)
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    quantize(tiny_model("llama"), tmp_path, Careful(), SCHEME, ids=IDS)
    assert digests(tmp_path / "model") == uninterrupted[0]


def test_spilling_to_disk_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(walking, "TOKENS_AT_ONCE", 64)  # four batches of 16 KiB
    limits = {"memory": 1 << 30, "half": 8 * 64 * 64 * 4, "disk": 0}
    for name, limit in limits.items():
        quantize(tiny_model("llama"), tmp_path / name, Careful(), SCHEME, ids=IDS, hidden_limit_bytes=limit)
    assert digests(tmp_path / "memory/model") == digests(tmp_path / "half/model") == digests(tmp_path / "disk/model")


def test_an_interrupted_walk_of_several_batches_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(walking, "TOKENS_AT_ONCE", 64)
    quantize(tiny_model("llama"), tmp_path / "whole", Careful(), SCHEME, ids=IDS)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model("llama"), tmp_path / "broken", Careful(MOMENTS["at the start of the last block"]), SCHEME, ids=IDS)
    quantize(tiny_model("llama"), tmp_path / "broken", Careful(), SCHEME, ids=IDS)
    assert digests(tmp_path / "broken/model") == digests(tmp_path / "whole/model")


def test_the_errors_do_not_depend_on_how_many_tokens_run_at_once(tmp_path, monkeypatch):
    class Plain(Careful):
        def scale_group(self, group, block):
            """Nothing: scales are chosen on the first batches."""

    errors = []
    for tokens in (64, 4096):
        monkeypatch.setattr(walking, "TOKENS_AT_ONCE", tokens)
        errors.append(quantize(tiny_model("llama"), tmp_path / str(tokens), Plain(), SCHEME, ids=IDS).errors)
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_global_state_of_torch_stays_as_it_is(tmp_path):
    before = torch.random.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    quantize(tiny_model("llama", torch.bfloat16), tmp_path, Careful(), SCHEME, ids=IDS)
    after = torch.random.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# What it writes


def final_hidden(weights, ids):
    skeleton = Skeleton(weights, dtype=torch.float32)
    skeleton.learn_output_form(ids)
    hidden, calls = skeleton.embed(ids)
    with torch.no_grad():
        for index in range(len(skeleton.block_names)):
            with skeleton.block(index) as module:
                hidden = run_block(module, hidden, calls[index])
    return hidden


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_the_artifact_computes_what_the_walk_measured(tmp_path, family):
    source = tiny_model(family)
    result = quantize(source, tmp_path, Careful(), SCHEME, ids=IDS)
    expected, found = final_hidden(FloatWeights(source), IDS), final_hidden(QuantizedWeights(tmp_path / "model"), IDS)
    error = float((found - expected).square().sum() / expected.square().sum())
    assert result.errors[-1] == pytest.approx(error, rel=1e-3)
    assert all(0 < error < 0.1 for error in result.errors)
    assert not result.notes, "nothing had to be treated differently"


def test_data_and_folds_make_it_better_than_plain_rounding(tmp_path, uninterrupted):
    result = quantize(tiny_model("llama"), tmp_path, Nearest(), SCHEME)
    plain = final_hidden(QuantizedWeights(tmp_path / "model"), IDS)
    expected = final_hidden(FloatWeights(tiny_model("llama")), IDS)
    assert uninterrupted[1].errors[-1] < 0.8 * float((plain - expected).square().sum() / expected.square().sum())
    assert result.schemes == uninterrupted[1].schemes


def test_a_method_that_needs_no_data_gets_none(tmp_path):
    """Its errors are those of the weights, and every layer is quantized by itself."""
    source = tiny_model("llama", torch.bfloat16)
    result = quantize(source, tmp_path, Nearest(), SCHEME)
    original, weights = FloatWeights(source), QuantizedWeights(tmp_path / "model")
    moved = total = 0.0
    for name, scheme in result.schemes.items():
        weight, tensor = original.read(f"{name}.weight").float(), weights.layer(name)
        expected = quantize_rtn(weight, scheme, torch.bfloat16)
        assert torch.equal(tensor.codes, expected.codes)
        assert torch.equal(tensor.scale, expected.scale)
        if ".1." in name:
            moved += float((tensor.dequantize() - weight).square().sum())
            total += float(weight.square().sum())
    assert result.errors[1] == pytest.approx(moved / total)
    assert not list((tmp_path / "work").glob("*.hidden"))


def test_overrides_keep_layers_in_float_or_give_them_another_scheme(tmp_path):
    source = tiny_model("llama")
    overrides = {"down_proj": "float", "*.1.self_attn.*": "w8a16-g16-asym", "model.layers.0.self_attn.k_proj": "float"}
    result = quantize(source, tmp_path, Careful(), SCHEME, ids=IDS, overrides=overrides)
    assert len(result.schemes) == 11
    assert {name for name, scheme in result.schemes.items() if scheme.weight_bits == 8} == {
        f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"
    }
    assert sorted(result.ignored) == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
    ]
    weights, original = QuantizedWeights(tmp_path / "model"), FloatWeights(source)
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights.read(down), original.read(down)), "nothing was folded into it"
    key = "model.layers.0.self_attn.k_proj.weight"
    ratio = weights.read(key) / original.read(key)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-5), "it reads the scaled input too"


def test_everything_outside_the_blocks_is_written_as_it_was(tmp_path):
    source = tiny_model("llama-tied", torch.bfloat16)
    result = quantize(source, tmp_path, Nearest(), SCHEME)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model" / "model-00001-of-00003.safetensors")
    assert after.keys() == {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert result.ignored == ["lm_head"]


def test_progress_is_told_block_by_block(tmp_path):
    events = []
    result = quantize(tiny_model("llama"), tmp_path, Nearest(), SCHEME, listener=events.append)
    told = [
        (event["stage"], event["index"], event["count"], event["name"], event["error"]) for event in events if event["event"] == "block"
    ]
    assert told == [("quantize", index + 1, 2, f"model.layers.{index}", result.errors[index]) for index in range(2)]


def test_cleaning_removes_only_what_resuming_needs(tmp_path):
    work = tmp_path / "work"
    quantize(tiny_model("llama"), tmp_path, Careful(), SCHEME, ids=IDS)
    (work / "evaluation.json").write_text("{}")
    clean(work)
    assert [path.name for path in work.iterdir()] == ["evaluation.json"]


# What it refuses


def test_a_group_size_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(Unsupported) as error:
        quantize(tiny_model("llama"), tmp_path, Careful(), "w4a16-g128-asym", ids=IDS)
    assert error.value.exit_code == 3
    for index in range(2):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
            assert f"`model.layers.{index}.{name}` (64 inputs, w4a16-g128-asym)" in error.value.message
    assert "down_proj" not in error.value.message, "128 inputs can be divided"
    assert "--override" in error.value.hint
    assert not list((tmp_path / "model").iterdir())


def test_only_the_layers_to_be_quantized_must_divide(tmp_path):
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up")]
    result = quantize(tiny_model("llama"), tmp_path, Careful(), "w4a16-g128-asym", ids=IDS, overrides=dict.fromkeys(names, "float"))
    assert list(result.schemes) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("quantizer", [Nearest(), Careful()], ids=["without data", "with data"])
def test_fused_experts_are_refused_before_anything_is_written(tmp_path, quantizer):
    with pytest.raises(Unsupported, match=r"holds weights that are not linear layers: .*mlp\.experts\.gate_up_proj"):
        quantize(tiny_model("mixtral"), tmp_path, quantizer, SCHEME, ids=IDS if quantizer.needs else None)
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize("quantizer", [Nearest(), Careful()], ids=["without data", "with data"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_one_clear_error(tmp_path, quantizer, name):
    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = torch.inf
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QhubError, match=f"tensor `{name}` contains NaN or infinite numbers"):
        quantize(source, tmp_path, quantizer, SCHEME, ids=IDS if quantizer.needs else None)


def test_too_much_memory_stops_the_walk_which_can_go_on_with_more(tmp_path, uninterrupted):
    with pytest.raises(QhubError, match=r"GB went over the bound of 0\.00 GB after block 1") as error:
        quantize(tiny_model("llama"), tmp_path, Careful(), SCHEME, ids=IDS, max_memory_bytes=1)
    assert "--resume" in error.value.hint
    quantizer = Careful()
    quantize(tiny_model("llama"), tmp_path, quantizer, SCHEME, ids=IDS)
    assert {entry[0] for entry in quantizer.seen} == {1}
    assert digests(tmp_path / "model") == uninterrupted[0]
