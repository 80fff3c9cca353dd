"""The two streams of hidden states: saved and loaded as they were, moved through blocks, and what the float model shows."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from tiny_models import random_ids, tiny_model

from qhub.quantize.block import LayerChoice, LiveBlock
from qhub.quantize.observe import observe
from qhub.quantize.streams import Streams
from qhub.skeleton import FloatWeights, Skeleton, run_block
from qhub.types import Scheme


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 8, 64, generator=generator) for _ in range(count)]


def begun(folder, limit=1 << 20):
    folder.mkdir(exist_ok=True)
    streams = Streams(folder, limit)
    streams.begin(batches())
    return streams


def is_same(spool, tensors):
    return len(spool) == len(tensors) and all(torch.equal(*pair) for pair in zip(spool, tensors, strict=True))


@pytest.mark.parametrize("limit", [1 << 20, 8 * batches()[0].nbytes, 0], ids=["memory", "half", "disk"])
def test_what_was_saved_is_loaded_as_it_was(tmp_path, limit):
    streams = begun(tmp_path, limit)
    for batch, hidden in enumerate(streams.quantized):
        streams.quantized[batch] = hidden * 2
    assert not Streams.are_saved(tmp_path, 4)
    streams.save(4)
    streams.close()
    assert Streams.are_saved(tmp_path, 4)
    again = Streams(tmp_path, limit)
    again.load(4, [hidden.shape for hidden in batches()], torch.float32)
    assert is_same(again.float, batches())
    assert is_same(again.quantized, [hidden * 2 for hidden in batches()])
    again.forget(4)
    again.forget(4)
    assert not list(tmp_path.glob("*.hidden"))
    again.close()


@pytest.mark.parametrize("lost", ["float", "quantized"])
def test_one_stream_alone_is_not_enough(tmp_path, lost):
    streams = begun(tmp_path)
    streams.save(1)
    (tmp_path / f"{lost}-00001.hidden").unlink()
    assert not Streams.are_saved(tmp_path, 1)
    streams.close()


def test_the_streams_do_not_share_what_they_hold(tmp_path):
    streams = begun(tmp_path)
    streams.quantized[0] = torch.zeros(2, 8, 64)
    assert is_same(streams.float, batches())
    streams.close()


def test_all_together_stay_within_the_limit(tmp_path):
    streams, size = begun(tmp_path, 6 * batches()[0].nbytes), batches()[0].nbytes
    assert streams.float._memory_bytes == streams.quantized._memory_bytes == size, "a quarter each"
    place = streams.new_spool("place")
    place.append(batches()[0])
    assert place._memory_bytes == 0
    place.close()
    streams.close()


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_the_float_model_shows_inputs_and_sums(tmp_path, family):
    skeleton, ids = Skeleton(FloatWeights(tiny_model(family))), random_ids(2, 8)
    skeleton.learn_output_form(ids)
    hidden, calls = skeleton.embed(ids)
    streams = Streams(tmp_path, 1 << 20)
    streams.begin([hidden, hidden + 1])
    with skeleton.block(0) as module, ExitStack() as stack:
        shapes = observe(module, hidden[:1], calls[0])
        expected, seen = [], {}
        hooks = [
            part.register_forward_pre_hook(lambda _module, args, name=name: seen.setdefault(name, []).extend(args[:1]))
            for name, part in module.named_modules()
            if name
        ]
        for batch in (hidden, hidden + 1):
            expected.append(run_block(module, batch, calls[0]))
        for hook in hooks:
            hook.remove()
        side = streams.run_float(module, calls[0], shapes, stack)
        assert is_same(streams.float, expected)
        assert is_same(streams.quantized, [hidden, hidden + 1])
        for shape in shapes:
            if len(shape.layers) > 1:
                assert shape.layers not in side.inputs
            elif shape.addition is None:
                assert is_same(side.inputs[shape.layers], seen[shape.layers[0]])
            else:
                assert is_same(side.sums[shape.layers], seen[shape.addition.after] if shape.addition.after else expected)
        assert not side.inputs.keys() & side.sums.keys()
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not any(len(spool) for spool in side.inputs.values()), "given back when the block is done"
    streams.close()


@torch.no_grad()
def test_a_finished_block_moves_the_quantized_stream_and_tells_how_far_it_is_off(tmp_path):
    skeleton, ids = Skeleton(FloatWeights(tiny_model("llama"))), random_ids(2, 8)
    skeleton.learn_output_form(ids)
    hidden, calls = skeleton.embed(ids)
    streams = Streams(tmp_path, 1 << 20)
    streams.begin([hidden, hidden + 1])
    with skeleton.block(0) as module, ExitStack() as stack:
        assert not streams.run_float(module, calls[0], (), stack).inputs
        expected = torch.cat(list(streams.float))
        block = LiveBlock(
            index=0,
            name="block",
            dtype=torch.float32,
            module=module,
            call=calls[0],
            shapes=observe(module, hidden[:1], calls[0]),
            choice=LayerChoice(Scheme.parse("w4a16")),
            hidden=streams.quantized,
        )
        module.mlp.down_proj.weight.mul_(0.5)
        error = streams.run_quantized(block)
        found = torch.cat(list(streams.quantized))
        torch.testing.assert_close(found, torch.cat([run_block(module, batch, calls[0]) for batch in (hidden, hidden + 1)]))
    assert error == pytest.approx(float((found - expected).square().sum() / expected.square().sum()))
    assert error > 1e-3
    streams.close()
