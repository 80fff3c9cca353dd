"""A real network: a few steps of training on CIFAR-10 pictures bring a ResNet-20 of 4 bits closer to the float one."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from qat_networks import job_of
from qhub_qat.plan import plan_of
from qhub_qat.plugin import Qat
from qhub_qat.prepared import started
from safetensors.torch import load_file

from qhub import TorchGraph, inputs_of

ASSETS = Path(__file__).parents[3].parent / "shared" / "assets"
NETWORK, DATA = ASSETS / "resnet-cifar10" / "resnet20.py", ASSETS / "cifar10" / "cifar10_subset.npz"
pytestmark = pytest.mark.skipif(not (NETWORK.exists() and DATA.exists()), reason=f"{NETWORK} or {DATA} is not there")


@pytest.fixture(scope="module")
def resnet():
    """(the float network, its training pictures and labels, its test pictures and labels)."""
    spec = importlib.util.spec_from_file_location("resnet20", NETWORK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.resnet20()
    model.load_state_dict(load_file(NETWORK.with_suffix(".safetensors")))
    data = np.load(DATA)
    fed = {}
    for part, count in (("train", 384), ("test", 300)):
        x = (data[f"{part}_x"][:count] / 255 - np.array(module.MEAN)) / np.array(module.STD)
        fed[part] = np.ascontiguousarray(x.transpose(0, 3, 1, 2).astype(np.float32)), data[f"{part}_y"][:count].astype(np.int64)
    return TorchGraph.of(model, inputs_of({"x": fed["train"][0][:2]}), ("logits",)), fed


@pytest.fixture(autouse=True)
def one_thread():
    """On a machine that does other work threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compared(graph, result, x, y):
    """(accuracy, mean KL from the float network) of a result."""
    made, wanted = result.graph.rounded(result.quantization).run({"x": x})[0], graph.run({"x": x})[0]
    kl = torch.nn.functional.kl_div(made.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
    return float((made.argmax(1) == torch.from_numpy(y)).double().mean()), float(kl)


def test_a_few_steps_bring_four_bits_closer_to_float(resnet, tmp_path):
    graph, fed = resnet
    job, _ = job_of(graph, fed["train"], tmp_path)
    start = started(graph, plan_of(graph, job.scheme, job.scheme_of, edges=True), job.calibration()).result()
    result = Qat(epochs=2, rounds=1).quantize_graph(job)
    (accuracy, kl), (before, kl_before) = compared(graph, result, *fed["test"]), compared(graph, start, *fed["test"])
    assert kl < 0.75 * kl_before
    assert accuracy > before
