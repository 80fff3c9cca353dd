"""A block being quantized: statistics of what its layers really read, folds that leave the output alone or are undone."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import random_ids, tiny_model

from qhub import quantize_rtn
from qhub.quantize.block import SAMPLE_BATCHES, LayerChoice, LiveBlock
from qhub.quantize.observe import observe
from qhub.skeleton import FloatWeights, Skeleton, run_block
from qhub.spool import Spool
from qhub.types import Scheme

QKV, GATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
BOTH = frozenset({"gram", "drift"})


@pytest.fixture
def live(tmp_path):
    """Block 0 of a tiny model in float32, fed with three batches of two samples."""

    @contextmanager
    def open_block(family="llama", dtype=torch.float32, *, overrides=(), wanted=BOTH):
        skeleton = Skeleton(FloatWeights(tiny_model(family, dtype)), dtype=torch.float32)
        ids = random_ids(6, 24)
        skeleton.learn_output_form(ids)
        probe, probe_calls = skeleton.embed(ids[:1])
        stream = Spool(tmp_path / "hidden.spool", 1 << 20)
        for start in range(0, 6, 2):
            hidden, calls = skeleton.embed(ids[start : start + 2])
            stream.append(hidden)
        with torch.no_grad(), skeleton.block(0) as module:
            yield LiveBlock(
                index=0,
                name=skeleton.block_names[0],
                dtype=dtype,
                module=module,
                call=calls[0],
                shapes=observe(module, probe, probe_calls[0]),
                choice=LayerChoice(Scheme.parse("w4a16-g32-asym"), dict(overrides)),
                hidden=stream,
                wanted=wanted,
                probe=(probe, probe_calls[0]),
            )

    return open_block


def outputs(block):
    return torch.cat([run_block(block.module, hidden, block.call) for hidden in block.hidden])


def inputs_of(block, layer):
    """What `layer` reads over all batches, (tokens, K)."""
    seen = []
    hook = block.module.get_submodule(layer).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    outputs(block)
    hook.remove()
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in seen])


def group_of(block, layer):
    return next(group for group in block._groups if layer in group.shape.layers)


def parameters(block):
    return {name: parameter.clone() for name, parameter in block.module.named_parameters()}


def a_scale(count, seed=0, spread=3.0):
    return torch.exp2((torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 0.5) * 2 * spread)


def rounded(block, group):
    return {name: quantize_rtn(weight, block.schemes(group)[name], block.dtype) for name, weight in group.weights.items()}


# Who is quantized how


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "w4a16-g32-asym"),
        ({"v_proj": None}, None),
        ({"*.self_attn.*": Scheme.parse("w8a16")}, "w8a16"),
        ({"self_attn.v_proj": None, "*.0.*": Scheme.parse("w3-g16-sym")}, "w3a16-g16-sym"),
        ({"*.0.*": Scheme.parse("w3-g16-sym"), "v_proj": None}, None),
        ({"proj": None, "*.1.*": None, "v_proj.weight": None}, "w4a16-g32-asym"),
    ],
    ids=["no override", "the end of a name", "a pattern", "the last one wins", "also this way round", "nothing matches"],
)
def test_overrides_choose_a_layers_scheme(overrides, expected):
    chosen = LayerChoice(Scheme.parse("w4a16-g32-asym"), overrides).of("model.layers.0.self_attn.v_proj")
    assert (None if chosen is None else str(chosen)) == expected


def test_groups_offer_the_layers_that_are_to_be_quantized(live):
    with live(overrides={"k_proj": None, "down_proj": None, "q_proj": Scheme.parse("w8a16")}) as block:
        names = [tuple(group.weights) for group in block.groups()]
        assert names == [("self_attn.q_proj", "self_attn.v_proj"), ("self_attn.o_proj",), GATED]
        group = group_of(block, "self_attn.q_proj")
        assert {name: str(scheme) for name, scheme in block.schemes(group).items()} == {
            "self_attn.q_proj": "w8a16",
            "self_attn.v_proj": "w4a16-g32-asym",
        }
        stored = FloatWeights(tiny_model("llama")).read("model.layers.0.self_attn.v_proj.weight")
        assert torch.equal(group.weights["self_attn.v_proj"], stored)


# Statistics


def test_observed_statistics_are_those_of_the_float_block(live):
    with live() as block:
        for group in block.observed():
            expected = inputs_of(block, group.shape.layers[0])
            assert group.stats.tokens == len(expected) == 6 * 24
            torch.testing.assert_close(group.stats.gram, expected.t() @ expected / len(expected), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(group.stats.abs_mean, expected.abs().mean(0), rtol=1e-4, atol=1e-5)
            assert group.stats.drift is None


def test_later_groups_see_the_groups_before_them_quantized(live):
    with live() as block:
        before = inputs_of(block, "mlp.down_proj")
        for group in block.groups():
            now = inputs_of(block, group.shape.layers[0])
            torch.testing.assert_close(group.stats.gram, now.t() @ now / len(now), rtol=1e-4, atol=1e-4)
            block.keep(group, rounded(block, group))
        assert float((now - before).abs().max()) > 1e-3
        assert block.results.keys() == {*QKV, *GATED, "self_attn.o_proj", "mlp.down_proj"}


def test_drift_is_how_far_the_input_moved_from_the_float_models(live, tmp_path):
    with live() as block:
        float_inputs = inputs_of(block, "mlp.down_proj")
        spool = Spool(tmp_path / "inputs.spool", 0)
        for piece in float_inputs.reshape(3, 2, 24, -1):
            spool.append(piece)
        block.float_inputs = {("mlp.down_proj",): spool}
        for group in block.groups():
            if group.shape.layers == ("mlp.down_proj",):
                now = inputs_of(block, "mlp.down_proj")
                expected = (float_inputs - now).t() @ now / len(now)
                torch.testing.assert_close(group.stats.drift, expected, rtol=1e-4, atol=1e-5)
                assert float(group.stats.drift.abs().max()) > 1e-4
            else:
                assert group.stats.drift is None
            block.keep(group, rounded(block, group))


@pytest.mark.parametrize(("layer", "reader"), [("self_attn.o_proj", ""), ("mlp.down_proj", "post_attention_layernorm")])
def test_residual_is_what_the_stream_has_lost_before_the_layer_adds_to_it(live, tmp_path, layer, reader):
    with live() as block:
        stream = torch.cat(list(block.hidden)) if reader == "" else inputs_of(block, reader).reshape(6, 24, 64)
        expected_stream = stream + 0.1 * stream.roll(1, -1)
        spool = Spool(tmp_path / "residual.spool", 0)
        for piece in expected_stream.reshape(3, 2, 24, 64):
            spool.append(piece)
        block.float_residuals = {(layer,): spool}
        for group in block.groups():
            if group.shape.layers != (layer,):
                assert group.stats.residual is None
                continue
            now, lost = inputs_of(block, layer), (expected_stream - stream).reshape(-1, 64)
            torch.testing.assert_close(group.stats.residual, lost.t() @ now / len(now), rtol=1e-4, atol=1e-5)


def test_without_wanted_statistics_the_block_is_not_run(live):
    with live(wanted=frozenset()) as block:
        block.module.forward = None
        assert [group.stats.tokens for group in block.groups()] == [0, 0, 0, 0]


# Judging by the output


@pytest.mark.parametrize("layers", [QKV, GATED], ids=["attention", "MLP"])
def test_output_error_is_the_change_of_the_containing_modules_output(live, layers):
    with live() as block:
        for group in block.observed():
            if group.shape.layers != layers:
                continue
            kept = parameters(block)
            assert group.output_error(group.weights) == 0
            changed = {name: tensor.dequantize() for name, tensor in rounded(block, group).items()}
            error = group.output_error(changed)
            assert all(torch.equal(parameter, kept[name]) for name, parameter in block.module.named_parameters())
    with live() as block:
        container = block.module.get_submodule(layers[0].partition(".")[0])
        seen = []
        container.register_forward_hook(lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output))
        outputs(block)
        for name, weight in changed.items():
            block.module.get_submodule(name).weight.copy_(weight)
        outputs(block)
        judged = min(3, SAMPLE_BATCHES)
        expected = (torch.cat(seen[:judged]) - torch.cat(seen[3 : 3 + judged])).square().mean()
        assert error == pytest.approx(float(expected), rel=1e-3)


# Folding

FOLDS = {
    "a norm": ("llama", "self_attn.q_proj"),
    "the second norm": ("llama", "mlp.up_proj"),
    "values with grouped queries": ("llama", "self_attn.o_proj"),
    "the gated product": ("llama", "mlp.down_proj"),
    "values with a bias": ("qwen2", "self_attn.o_proj"),
    "a layer norm with a bias": ("opt", "self_attn.q_proj"),
    "a ReLU between": ("opt", "fc2"),
    "a norm of 1 + weight": ("gemma2", "mlp.gate_proj"),
    "the last third, transposed": ("gpt2", "attn.c_proj"),
    "the second half": ("phi3", "mlp.down_proj"),
    "a norm that attention and MLP read": ("falcon", "mlp.dense_h_to_4h"),
}


@pytest.mark.parametrize(("family", "layer"), FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fold_leaves_the_blocks_output_unchanged(live, family, layer, dtype):
    with live(family, dtype) as block:
        group = group_of(block, layer)
        before, weights, inputs = outputs(block), dict(group.weights), inputs_of(block, layer)
        scale = group.tied(a_scale(group.shape.inputs))
        assert block.fold(group, scale)
        bias_is_rounded = dtype == torch.bfloat16 and family in ("opt", "qwen2", "gpt2", "falcon")
        assert float((outputs(block) - before).norm() / before.norm()) < (3e-3 if bias_is_rounded else 1e-6)
        assert not block.notes
        folded = group.input_scale
        nearest = 2**-8 if group.shape.producer.offset == 0 else 0.05  # 1 + weight near 0 has few bits in bf16
        torch.testing.assert_close(folded, scale, rtol=nearest if dtype == torch.bfloat16 else 1e-5, atol=0)
        assert all(torch.equal(weight, weights[name] * folded) for name, weight in group.weights.items())
        torch.testing.assert_close(inputs_of(block, layer), inputs / folded, rtol=1e-2 if bias_is_rounded else 1e-4, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_norm_in_bf16_holds_the_folded_gain_exactly(live, family):
    """The scale moves to the nearest one that does, so the artifact computes what was measured."""
    with live(family, torch.bfloat16) as block:
        group = group_of(block, "self_attn.q_proj")
        norm = block.module.input_layernorm
        offset = group.shape.producer.offset
        gain = norm.weight.clone() + offset
        assert block.fold(group, a_scale(64))
        assert torch.equal(norm.weight, norm.weight.bfloat16().float())
        torch.testing.assert_close((norm.weight + offset) * group.input_scale, gain, rtol=1e-6, atol=0)
        stored = block.current("input_layernorm.weight", torch.empty(64, dtype=torch.bfloat16))
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored.float(), norm.weight)


def test_statistics_follow_a_fold(live):
    with live() as block:
        for group in block.observed():
            if group.shape.layers == QKV:
                assert block.fold(group, a_scale(64))
                now = inputs_of(block, "self_attn.k_proj")
                torch.testing.assert_close(group.stats.gram, now.t() @ now / len(now), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(group.stats.abs_mean, now.abs().mean(0), rtol=1e-3, atol=1e-4)


def test_the_float_models_inputs_are_scaled_as_well_so_that_a_fold_is_no_drift(live, tmp_path):
    with live() as block:
        spool = Spool(tmp_path / "inputs.spool", 0)
        for piece in inputs_of(block, "self_attn.q_proj").reshape(3, 2, 24, -1):
            spool.append(piece)
        block.float_inputs = {QKV: spool}
        group = group_of(block, "self_attn.q_proj")
        assert block.fold(group, a_scale(64, seed=1))
        assert block.fold(group, a_scale(64, seed=2))
        first = next(block.groups())
        assert float(first.stats.drift.abs().max()) < 1e-5
        torch.testing.assert_close(first.input_scale, a_scale(64, seed=1) * a_scale(64, seed=2), rtol=1e-5, atol=0)


def test_a_fold_that_would_change_the_output_is_undone_to_the_bit(live):
    """One value channel feeds two query heads: scales that differ there cannot be folded."""
    with live() as block:
        group = group_of(block, "self_attn.o_proj")
        kept, before = parameters(block), outputs(block)
        assert not block.fold(group, a_scale(64))
        assert all(torch.equal(parameter, kept[name]) for name, parameter in block.module.named_parameters())
        assert torch.equal(outputs(block), before)
        assert (block.folded, block.changed, group.input_scale) == ({}, set(), None)
        assert block.notes == {"self_attn.o_proj": "input scale not folded: the block's output would change"}


def test_an_undone_fold_keeps_the_folds_before_it(live):
    with live() as block:
        assert block.fold(group_of(block, "self_attn.q_proj"), a_scale(64))
        kept, folded, changed = parameters(block), dict(block.folded), set(block.changed)
        assert not block.fold(group_of(block, "self_attn.o_proj"), a_scale(64, seed=1))
        assert all(torch.equal(parameter, kept[name]) for name, parameter in block.module.named_parameters())
        assert block.folded.keys() == folded.keys() == set(QKV)
        assert block.changed == changed == {"input_layernorm.weight"}


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf], ids=str)
def test_an_impossible_scale_is_not_folded(live, value):
    with live() as block:
        group, kept = group_of(block, "self_attn.q_proj"), parameters(block)
        scale = a_scale(64)
        scale[5] = value
        assert not block.fold(group, scale)
        assert all(torch.equal(parameter, kept[name]) for name, parameter in block.module.named_parameters())


def test_a_group_without_a_producer_is_not_foldable(live):
    with live("gpt2") as block:
        group = group_of(block, "mlp.c_proj")
        assert not group.foldable
        assert not block.fold(group, a_scale(256))


def test_scales_are_tied_where_one_channel_feeds_several(live):
    with live() as block:
        values = a_scale(64)
        tied = group_of(block, "self_attn.o_proj").tied(values)
        heads, expected = tied.reshape(2, 2, 16), values.reshape(2, 2, 16).log().mean(1).exp()
        torch.testing.assert_close(heads[:, 0], expected)
        assert torch.equal(heads[:, 0], heads[:, 1])
        assert torch.equal(group_of(block, "self_attn.q_proj").tied(values), values)


# What ends up in the artifact


def test_float_tensors_are_stored_as_they_were_unless_a_fold_changed_them(live):
    with live(overrides={"down_proj": None, "up_proj": None}) as block:
        files = FloatWeights(tiny_model("llama"))
        stored = {name: files.read(f"model.layers.0.{name}.weight") for name in ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")}
        group = group_of(block, "mlp.gate_proj")
        assert block.fold(group, a_scale(64)), "up_proj stays float, but reads the scaled input too"
        assert torch.equal(block.current("mlp.up_proj.weight", stored["mlp.up_proj"]), stored["mlp.up_proj"] * group.input_scale)
        assert block.current("mlp.down_proj.weight", stored["mlp.down_proj"]) is stored["mlp.down_proj"]
        gain = files.read("model.layers.0.post_attention_layernorm.weight")
        torch.testing.assert_close(block.current("post_attention_layernorm.weight", gain), gain / group.input_scale)
        untouched = files.read("model.layers.0.input_layernorm.weight")
        assert block.current("input_layernorm.weight", untouched) is untouched


def test_a_square_transposed_matrix_is_stored_the_way_round_that_it_was(live):
    with live("gpt2") as block:
        stored = FloatWeights(tiny_model("gpt2")).read("transformer.h.0.attn.c_proj.weight")
        group = group_of(block, "attn.c_proj")
        assert block.fold(group, a_scale(64))
        assert torch.equal(block.current("attn.c_proj.weight", stored), stored * group.input_scale.unsqueeze(1))


def test_kept_weights_are_in_the_module(live):
    with live() as block:
        group = group_of(block, "mlp.up_proj")
        assert block.fold(group, a_scale(64))
        result = rounded(block, group)
        block.keep(group, result)
        for name, tensor in result.items():
            assert torch.equal(block.module.get_submodule(name).weight, tensor.dequantize())
            assert block.results[name] is tensor
        assert not block.folded
        block.note(group, "told")
        assert block.notes == dict.fromkeys(GATED, "told")
