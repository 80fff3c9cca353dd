"""What a block is made of, found by watching it run: who shares an input, and which channels of whom feed it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import nn

from qhub.errors import Unsupported
from qhub.quantize.observe import Addition, Closing, each_matrix, get_weight, is_matrix, observe, scaled_rows, set_weight
from qhub.skeleton import BlockCall, FloatWeights, Skeleton

SAME = list(range(64))
GROUPED = [*range(16), *range(16), *range(16, 32), *range(16, 32)]  # two value heads of 16, each read by two query heads
SECOND_HALF, LAST_THIRD = list(range(128, 256)), list(range(128, 192))
QKV, GATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")


def llama_like(*, offset=0.0, second_norm="post_attention_layernorm"):
    return {
        QKV: ("input_layernorm", SAME, offset),
        ("self_attn.o_proj",): ("self_attn.v_proj", GROUPED, 0.0),
        GATED: (second_norm, SAME, offset),
        ("mlp.down_proj",): ("mlp.up_proj", list(range(128)), 0.0),
    }


#: family → layers that share an input, in execution order → its producer, the producer's rows, what a norm adds to its gain
EXPECTED = {
    "llama": llama_like(),
    "mistral": llama_like(),
    "qwen2": llama_like(),
    "qwen3": llama_like(),
    "gemma2": llama_like(offset=1.0, second_norm="pre_feedforward_layernorm"),
    "phi3": {  # q, k, v and gate, up are one matrix each
        ("self_attn.qkv_proj",): ("input_layernorm", SAME, 0.0),
        ("self_attn.o_proj",): ("self_attn.qkv_proj", LAST_THIRD, 0.0),
        ("mlp.gate_up_proj",): ("post_attention_layernorm", SAME, 0.0),
        ("mlp.down_proj",): ("mlp.gate_up_proj", SECOND_HALF, 0.0),
    },
    "gpt2": {
        ("attn.c_attn",): ("ln_1", SAME, 0.0),
        ("attn.c_proj",): ("attn.c_attn", LAST_THIRD, 0.0),
        ("mlp.c_fc",): ("ln_2", SAME, 0.0),
        ("mlp.c_proj",): None,  # behind a GELU
    },
    "opt": {
        QKV: ("self_attn_layer_norm", SAME, 0.0),
        ("self_attn.out_proj",): ("self_attn.v_proj", SAME, 0.0),
        ("fc1",): ("final_layer_norm", SAME, 0.0),
        ("fc2",): ("fc1", list(range(128)), 0.0),  # a ReLU lets positive factors through
    },
    "gpt_neox": {
        ("attention.query_key_value",): ("input_layernorm", SAME, 0.0),
        ("attention.dense",): None,  # q, k and v lie interleaved by head
        ("mlp.dense_h_to_4h",): ("post_attention_layernorm", SAME, 0.0),
        ("mlp.dense_4h_to_h",): None,
    },
    "falcon": {  # attention and MLP read the same norm
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"): ("input_layernorm", SAME, 0.0),
        ("self_attention.dense",): None,
        ("mlp.dense_4h_to_h",): None,
    },
}
CONTAINERS = {QKV: "self_attn", GATED: "mlp", ("self_attention.query_key_value", "mlp.dense_h_to_4h"): ""}


def observed(family, index=0):
    skeleton, ids = Skeleton(FloatWeights(tiny_model(family))), random_ids(1, 24)
    skeleton.learn_output_form(ids)
    hidden, calls = skeleton.embed(ids)
    with torch.no_grad(), skeleton.block(index) as block:
        before = {name: parameter.clone() for name, parameter in block.named_parameters()}
        groups = observe(block, hidden, calls[index])
        assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters()), "the block was changed"
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    return groups


@pytest.mark.parametrize("family", EXPECTED)
def test_groups_and_producers_are_found(family):
    found = {}
    for group in observed(family):
        producer = group.producer
        found[group.layers] = None if producer is None else (producer.module, producer.rows.tolist(), producer.offset)
        assert group.container == CONTAINERS.get(group.layers, group.layers[0])
    assert list(found) == list(EXPECTED[family]), "in execution order"
    assert found == EXPECTED[family]


#: family → layers whose output is added to the residual stream → who reads that stream before (`""`: the block) and after
ADDITIONS = {
    "llama": {"self_attn.o_proj": ("", "post_attention_layernorm"), "mlp.down_proj": ("post_attention_layernorm", None)},
    "gpt2": {"attn.c_proj": ("", "ln_2"), "mlp.c_proj": ("ln_2", None)},
    "opt": {"self_attn.out_proj": ("", "final_layer_norm"), "fc2": ("final_layer_norm", None)},
    "opt-post-norm": {"self_attn.out_proj": ("", "self_attn_layer_norm")},
    "bloom": {"self_attention.dense": ("", "post_attention_layernorm"), "mlp.dense_4h_to_h": ("post_attention_layernorm", None)},
    "gemma2": {},  # a norm lies between
    "gpt_neox": {},  # attention and MLP are added together
    "falcon": {},  # the same, in place
    "gptj": {},
}


@pytest.mark.parametrize("family", ADDITIONS)
def test_additions_to_the_residual_stream_are_found(family):
    found = {group.layers[0]: group.addition for group in observed(family) if group.addition is not None}
    assert found == {layer: Addition(*readers) for layer, readers in ADDITIONS[family].items()}


#: family → layers whose output is what a child of the block returns → that child, and how many things it returns
CLOSINGS = {
    "llama": {"self_attn.o_proj": ("self_attn", 2), "mlp.down_proj": ("mlp", 0)},
    "gpt2": {"attn.c_proj": ("attn", 2), "mlp.c_proj": ("mlp", 0)},
    "opt": {"self_attn.out_proj": ("self_attn", 2)},  # the MLP's layers are the block's own
    "gemma2": {"mlp.down_proj": ("mlp", 0)},  # attention returns its weights too
    "gemma3_text": {"self_attn.o_proj": ("self_attn", 2), "mlp.down_proj": ("mlp", 0)},
    "falcon": {"self_attention.dense": ("self_attention", 2), "mlp.dense_4h_to_h": ("mlp", 0)},
    "bloom": {},  # the children add to the residual stream themselves
}


@pytest.mark.parametrize("family", CLOSINGS)
def test_layers_that_end_a_child_of_the_block_are_found(family):
    found = {group.layers[0]: group.closing for group in observed(family) if group.closing is not None}
    assert found == {layer: Closing(*child) for layer, child in CLOSINGS[family].items()}


def test_each_matrix_by_itself_needs_no_weights():
    skeleton = Skeleton(FloatWeights(tiny_model("gpt2")))
    groups = each_matrix(skeleton.empty_block(0))
    assert [(group.layers, group.inputs, group.producer) for group in groups] == [
        (("attn.c_attn",), 64, None),
        (("attn.c_proj",), 64, None),
        (("mlp.c_fc",), 64, None),
        (("mlp.c_proj",), 256, None),
    ]


def test_fused_experts_are_refused_by_name():
    skeleton = Skeleton(FloatWeights(tiny_model("mixtral")))
    with pytest.raises(Unsupported) as error:
        each_matrix(skeleton.empty_block(0))
    assert "`MixtralDecoderLayer` holds weights that are not linear layers" in error.value.message
    assert "mlp.experts.gate_up_proj [4, 256, 64]" in error.value.message
    assert "mlp.experts.down_proj [4, 64, 128]" in error.value.message
    assert "experts" in error.value.hint


class Toy(nn.Module):
    """A block of whatever modules a test gives it, called in order; attributes may be set freely."""

    def __init__(self, run, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, hidden):
        return self.run(self, hidden)


def observe_toy(run, **modules):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        block = Toy(run, **{name: make() for name, make in modules.items()})
        return observe(block, torch.randn(1, 20, 16), BlockCall((), {}))


def linear(outputs, inputs):
    return lambda: nn.Linear(inputs, outputs, bias=False)


def test_layers_that_never_run_or_run_twice_are_refused_by_name():
    with pytest.raises(Unsupported, match="`Toy` did not run each of its layers once: twice, idle"):
        observe_toy(lambda self, x: self.used(self.twice(self.twice(x))), twice=linear(16, 16), used=linear(16, 16), idle=linear(16, 16))


def test_a_producer_that_something_else_reads_too_is_still_only_a_candidate():
    """The probe looks at the consumer alone; folding verifies the whole block (tests/test_block.py)."""

    def run(self, x):
        middle = self.up(x)
        return self.down(middle) + middle

    groups = observe_toy(run, up=linear(16, 16), down=linear(16, 16))
    assert [(group.layers, group.producer and group.producer.module) for group in groups] == [(("up",), None), (("down",), "up")]


def test_a_sum_that_no_module_reads_is_no_addition():
    """What is added to must be seen where the layer's output is known: here it was made out of nothing."""
    groups = observe_toy(lambda self, x: self.down(x) + 2 * x, down=linear(16, 16))
    assert groups[0].addition is None
    groups = observe_toy(lambda self, x: self.down(x) + x, down=linear(16, 16))
    assert groups[0].addition == Addition("", None)


def test_channels_that_mix_have_no_producer():
    groups = observe_toy(lambda self, x: self.down(self.up(x).cumsum(-1)), up=linear(16, 16), down=linear(16, 16))
    assert groups[1].producer is None


def test_channels_that_are_permuted_and_repeated_are_followed():
    order = torch.tensor([3, 1, 1, 0, 2, 3, 0, 2])
    groups = observe_toy(lambda self, x: self.down(self.up(x)[..., order]), up=linear(4, 16), down=linear(16, 8))
    assert groups[1].producer.module == "up"
    assert torch.equal(groups[1].producer.rows, order)


def test_a_norm_without_a_gain_is_no_producer():
    groups = observe_toy(
        lambda self, x: self.down(self.norm(x)), norm=lambda: nn.LayerNorm(16, elementwise_affine=False), down=linear(4, 16)
    )
    assert groups[0].producer is None


def test_equal_copies_of_an_input_are_not_a_shared_input():
    groups = observe_toy(lambda self, x: self.a(x.clone()) + self.b(x.clone()), a=linear(16, 16), b=linear(16, 16))
    assert [group.layers for group in groups] == [("a",), ("b",)]


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: conv1d(4, 6)], ids=["Linear", "Conv1D"])
def test_weights_are_n_by_k_whichever_way_they_are_stored(make):
    module = make().to(torch.bfloat16)
    assert is_matrix(module)
    weight = torch.randn(4, 6)
    set_weight(module, weight)
    assert torch.equal(get_weight(module), weight.bfloat16())
    values = torch.randn(3, 6).bfloat16()
    bias = module.bias
    torch.testing.assert_close(module(values), values @ weight.bfloat16().t() + bias, rtol=2e-2, atol=2e-2)
    with scaled_rows(module, torch.tensor([1, 3]), torch.tensor([2.0, 0.5])):
        assert torch.equal(get_weight(module)[1], weight[1].bfloat16() * 2)
        assert torch.equal(get_weight(module)[0], weight[0].bfloat16())
    assert torch.equal(get_weight(module), weight.bfloat16())
    assert module.bias is bias


def conv1d(outputs, inputs):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)
