"""A block being quantized: statistics of what its layers really read, folds that leave the output alone or are undone."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch
from tiny_models import random_ids, tiny_model

from qhub import quantize_rtn
from qhub.quantize.block import OBSERVED_BATCHES, SAMPLE_BATCHES, LayerChoice, LiveBlock
from qhub.quantize.observe import observe
from qhub.quantize.streams import Streams
from qhub.skeleton import FloatWeights, Skeleton
from qhub.types import Scheme

QKV, GATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
ALL = frozenset({"gram", "shortfall", "abs_mean"})


@pytest.fixture
def live(tmp_path):
    """Block 0 of a tiny model in float32, fed with three batches of two samples.

    With `moved`, the quantized model's hidden states differ from the float model's, and `float_side` knows the latter.
    """

    @contextmanager
    def open_block(family="llama", dtype=torch.float32, *, overrides=(), wanted=ALL, moved=None, replays=False):
        skeleton = Skeleton(FloatWeights(tiny_model(family, dtype)), dtype=torch.float32)
        ids = random_ids(6, 24)
        skeleton.learn_output_form(ids)
        probe, probe_calls = skeleton.embed(ids[:1])
        streams = Streams(tmp_path, 1 << 24)
        embedded = [skeleton.embed(ids[start : start + 2]) for start in range(0, 6, 2)]
        streams.begin(hidden for hidden, _ in embedded)
        call = embedded[0][1][0]
        with torch.no_grad(), skeleton.block(0) as module, ExitStack() as stack:
            shapes = observe(module, probe, probe_calls[0])
            block = LiveBlock(
                index=0,
                name=skeleton.block_names[0],
                dtype=dtype,
                module=module,
                call=call,
                shapes=shapes,
                choice=LayerChoice(Scheme.parse("w4a16-g32-asym"), dict(overrides)),
                hidden=streams.quantized,
                wanted=wanted,
                probe=(probe, probe_calls[0]),
                new_spool=streams.new_spool if replays else None,
            )
            if moved is not None:
                block.float_side = streams.run_float(module, call, shapes, stack)
                for batch, hidden in enumerate(streams.quantized):
                    streams.quantized[batch] = hidden + moved * hidden.roll(1, -1)
            yield block
            block.replay.end()

    return open_block


def outputs(block):
    return torch.cat([block.run(batch, hidden) for batch, hidden in enumerate(block.hidden)])


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


def test_observed_statistics_are_those_of_the_float_block_on_the_first_batches(live):
    with live() as block:
        for group in block.observed():
            expected = inputs_of(block, group.shape.layers[0])[: OBSERVED_BATCHES * 2 * 24]
            assert group.stats.tokens == len(expected)
            torch.testing.assert_close(group.stats.gram, expected.t() @ expected / len(expected), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(group.stats.abs_mean, expected.abs().mean(0), rtol=1e-4, atol=1e-5)
            assert [group.shortfall(name) for name in group.weights] == [None] * len(group.weights)


def test_observed_magnitudes_need_not_be_asked_for(live):
    with live(wanted=frozenset({"gram"})) as block:
        assert all(group.stats.abs_mean is not None for group in block.observed())
        assert all(group.stats.abs_mean is None for group in block.groups())


def test_observing_leaves_no_hooks_and_gives_the_samples_back(live):
    with live() as block:
        assert len(list(block.observed())) == 4
        assert not block._captured
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.module.modules())


def test_later_groups_see_the_groups_before_them_quantized(live):
    with live() as block:
        before = inputs_of(block, "mlp.down_proj")
        for group in block.groups():
            now = inputs_of(block, group.shape.layers[0])
            torch.testing.assert_close(group.stats.gram, now.t() @ now / len(now), rtol=1e-4, atol=1e-4)
            block.keep(group, rounded(block, group))
        assert float((now - before).abs().max()) > 1e-3
        assert block.results.keys() == {*QKV, *GATED, "self_attn.o_proj", "mlp.down_proj"}


#: family → layer → who reads the stream that its output is added to before (`""`: the block) and after (None: nobody)
ADDED = {
    "llama": {"self_attn.o_proj": ("", "post_attention_layernorm"), "mlp.down_proj": ("post_attention_layernorm", None)},
    "opt": {"self_attn.out_proj": ("", "final_layer_norm"), "fc2": ("final_layer_norm", None)},
    "gpt2": {"attn.c_proj": ("", "ln_2"), "mlp.c_proj": ("ln_2", None)},
    "gemma2": {},
}


def stream_at(block, reader):
    """The residual stream where `reader` reads it, (tokens, H)."""
    if reader:
        return inputs_of(block, reader)
    found = torch.cat(list(block.hidden)) if reader == "" else outputs(block)
    return found.reshape(-1, found.shape[-1])


@pytest.mark.parametrize("replays", [False, True], ids=["run again", "replayed"])
@pytest.mark.parametrize("family", ADDED)
def test_the_shortfall_is_what_a_layer_and_its_stream_give_less_than_in_the_float_model(live, family, replays):
    """Mean of (y_float − y) xᵀ, y with the residual stream where the layer's output is added to it."""
    with live(family) as block:
        layers = [name for shape in block.shapes for name in shape.layers]
        float_inputs = {name: inputs_of(block, name) for name in layers}
        float_sums = {name: stream_at(block, after) for name, (_, after) in ADDED[family].items()}
    with live(family, moved=0.1, replays=replays) as block:
        for group in block.groups():
            if len(group.weights) > 1:  # they read the stream, whose losses the layers that add to it make up for
                assert not any(group.shortfall(name) is not None for name in group.weights)
            for name, weight in group.weights.items() if len(group.weights) == 1 else ():
                now = inputs_of(block, name)
                if name in ADDED[family]:
                    bias = getattr(block.module.get_submodule(name), "bias", None)
                    given = stream_at(block, ADDED[family][name][0]) + now @ weight.t() + (0 if bias is None else bias)
                    missing = float_sums[name] - given
                else:
                    missing = (float_inputs[name] - now) @ weight.t()
                expected = missing.t() @ now / len(now)
                assert float(expected.abs().max()) > 1e-2
                torch.testing.assert_close(group.shortfall(name), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
            block.keep(group, rounded(block, group))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_nothing_is_missing_in_the_float_model(live, family):
    with live(family, moved=0.0) as block:
        for group in block.groups():
            for name, weight in group.weights.items() if len(group.weights) == 1 else ():
                assert float(group.shortfall(name).abs().max()) < 1e-4 * float((weight @ group.stats.gram).abs().max()), name


def test_without_the_float_side_no_shortfall_is_known(live):
    with live() as block:
        for group in block.groups():
            assert [group.shortfall(name) for name in group.weights] == [None] * len(group.weights)


def test_the_shortfall_is_collected_only_when_asked_for(live):
    with live(moved=0.1, wanted=frozenset({"gram"})) as block:
        for group in block.groups():
            assert group.stats.gram is not None
            assert [group.shortfall(name) for name in group.weights] == [None] * len(group.weights)


def test_statistics_are_given_back_as_soon_as_the_next_group_comes(live):
    with live() as block:
        passed = []
        for group in block.groups():
            assert all(before.stats.gram is None for before in passed)
            assert group.stats.gram is not None
            passed.append(group)


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
        stored = block.floats.current("input_layernorm.weight", torch.empty(64, dtype=torch.bfloat16))
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored.float(), norm.weight)


def test_statistics_follow_a_fold(live):
    with live() as block:
        for group in block.observed():
            if group.shape.layers == QKV:
                assert block.fold(group, a_scale(64))
                now = inputs_of(block, "self_attn.k_proj")[: group.stats.tokens]
                torch.testing.assert_close(group.stats.gram, now.t() @ now / len(now), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(group.stats.abs_mean, now.abs().mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_fold_is_no_shortfall(live, layer):
    """Neither where the layer's own float inputs are kept nor where its output is added to the stream."""
    with live(moved=0.0) as block:
        group = group_of(block, layer)
        width = group.shape.inputs
        scales = [group.tied(a_scale(width, seed=seed, spread=1.0)) for seed in (1, 2)]
        assert all(block.fold(group, scale) for scale in scales)
        for each in block.groups():
            for name, weight in each.weights.items() if len(each.weights) == 1 else ():
                assert float(each.shortfall(name).abs().max()) < 1e-4 * float((weight @ each.stats.gram).abs().max()), name
        torch.testing.assert_close(group.input_scale, scales[0] * scales[1], rtol=1e-5, atol=0)


def test_a_fold_that_would_change_the_output_is_undone_to_the_bit(live):
    """One value channel feeds two query heads: scales that differ there cannot be folded."""
    with live() as block:
        group = group_of(block, "self_attn.o_proj")
        kept, before = parameters(block), outputs(block)
        assert not block.fold(group, a_scale(64))
        assert all(torch.equal(parameter, kept[name]) for name, parameter in block.module.named_parameters())
        assert torch.equal(outputs(block), before)
        assert (block.floats.weights, block.floats.changed, group.input_scale) == ({}, set(), None)
        assert block.notes == {"self_attn.o_proj": "input scale not folded: the block's output would change"}


def test_an_undone_fold_keeps_the_folds_before_it(live):
    with live() as block:
        assert block.fold(group_of(block, "self_attn.q_proj"), a_scale(64))
        kept, folded, changed = parameters(block), dict(block.floats.weights), set(block.floats.changed)
        assert not block.fold(group_of(block, "self_attn.o_proj"), a_scale(64, seed=1))
        assert all(torch.equal(parameter, kept[name]) for name, parameter in block.module.named_parameters())
        assert block.floats.weights.keys() == folded.keys() == set(QKV)
        assert block.floats.changed == changed == {"input_layernorm.weight"}


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
        assert torch.equal(block.floats.current("mlp.up_proj.weight", stored["mlp.up_proj"]), stored["mlp.up_proj"] * group.input_scale)
        assert block.floats.current("mlp.down_proj.weight", stored["mlp.down_proj"]) is stored["mlp.down_proj"]
        gain = files.read("model.layers.0.post_attention_layernorm.weight")
        torch.testing.assert_close(block.floats.current("post_attention_layernorm.weight", gain), gain / group.input_scale)
        untouched = files.read("model.layers.0.input_layernorm.weight")
        assert block.floats.current("input_layernorm.weight", untouched) is untouched


def test_a_square_transposed_matrix_is_stored_the_way_round_that_it_was(live):
    with live("gpt2") as block:
        stored = FloatWeights(tiny_model("gpt2")).read("transformer.h.0.attn.c_proj.weight")
        group = group_of(block, "attn.c_proj")
        assert block.fold(group, a_scale(64))
        assert torch.equal(block.floats.current("attn.c_proj.weight", stored), stored * group.input_scale.unsqueeze(1))


def test_kept_weights_are_in_the_module(live):
    with live() as block:
        group = group_of(block, "mlp.up_proj")
        assert block.fold(group, a_scale(64))
        result = rounded(block, group)
        block.keep(group, result)
        for name, tensor in result.items():
            assert torch.equal(block.module.get_submodule(name).weight, tensor.dequantize())
            assert block.results[name] is tensor
        assert not block.floats.weights
        block.note(group, "told")
        assert block.notes == dict.fromkeys(GATED, "told")


# Replaying what is finished

CHILDREN = {"llama": {"self_attn", "mlp"}, "gpt2": {"attn", "mlp"}, "gemma2": {"mlp"}, "opt": {"self_attn"}}


def quantized(block):
    """Statistics of all groups while the block is quantized, and what it puts out then, twice."""
    seen = {}
    for group in block.groups():
        shortfalls = {name: group.shortfall(name) for name in group.weights}
        seen.update({(name, "gram"): group.stats.gram.clone() for name in group.weights})
        seen.update({(name, "shortfall"): value for name, value in shortfalls.items() if value is not None})
        seen[group.shape.layers[0], "tokens"] = torch.tensor(group.stats.tokens)
        block.keep(group, rounded(block, group))
    return seen | {"outputs": outputs(block), "once more": outputs(block)}


@pytest.mark.parametrize("family", CHILDREN)
def test_replaying_finished_children_changes_nothing(live, family):
    with live(family, moved=0.1) as block:
        expected = quantized(block)
        assert not block.replay._inputs
    with live(family, moved=0.1, replays=True) as block:
        found = quantized(block)
        assert block.replay._inputs.keys() == CHILDREN[family]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=str(key))
        block.replay.end()
        torch.testing.assert_close(outputs(block), found["outputs"], rtol=1e-4, atol=1e-5)


def test_replaying_spares_the_runs_of_a_finished_child(live):
    counts = []
    for replays in (False, True):
        with live(replays=replays) as block:
            calls = []
            block.module.self_attn.k_proj.register_forward_pre_hook(lambda _module, _args, calls=calls: calls.append(1))
            for group in block.groups():
                block.keep(group, rounded(block, group))
            outputs(block)
            counts.append(len(calls))
    assert counts == [4 * 3, 3], "it runs with o_proj and every later group, or with o_proj alone"


def test_a_layer_inside_a_finished_child_can_still_be_replaced(live):
    with live(replays=True) as block:
        for group in block.groups():
            if group.shape.layers == GATED:
                break
            block.keep(group, rounded(block, group))
        assert block.replay._inputs.keys() == {"self_attn"}
        before = outputs(block)
        group = group_of(block, "self_attn.v_proj")
        block.keep(group, {name: quantize_rtn(-weight, block.schemes(group)[name], block.dtype) for name, weight in group.weights.items()})
        assert not block.replay._inputs
        assert "forward" not in block.module.self_attn.__dict__
        after = outputs(block)
        assert float((after - before).abs().max()) > 1e-2
        block.replay.end()
        assert torch.equal(outputs(block), after)
