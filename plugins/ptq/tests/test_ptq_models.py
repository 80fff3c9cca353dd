"""`ptq` on trained networks: the accuracy that is left."""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ptq_networks import graph_of, job_for
from qhub_ptq.plugin import Ptq

from qhub import GraphInput

ASSETS = Path(__file__).parent.parent.parent.parent.parent / "shared" / "assets"
LONGEST = 64


def needs(path):
    if not path.exists():
        pytest.skip(f"`{path.name}` is not here")
    return path


class Task:
    """A network with items and labels to calibrate on and others to test on; accuracies in percent."""

    def __init__(self, graph, calibration, test):
        self.graph, self.calibration, self.test = graph, calibration, test
        self.accuracy = self.accuracy_of(graph)

    def accuracy_of(self, graph):
        found = [graph.run(batch)[0].argmax(1).numpy() == labels for batch, labels in self.test]
        return 100 * float(np.concatenate(found).mean())

    def accuracy_with(self, scheme, **options):
        job = job_for(self.graph, [batch for batch, _ in self.calibration], scheme, drop_pct=lambda rounded: 0.0)
        result = Ptq(**options).quantize_graph(job)
        return self.accuracy_of(result.graph.rounded(result.quantization))


@pytest.fixture(scope="module")
def images():
    """ResNet-20 on CIFAR-10."""
    from safetensors.torch import load_file

    source = needs(ASSETS / "resnet-cifar10" / "resnet20.py")
    data = np.load(needs(ASSETS / "cifar10" / "cifar10_subset.npz"))
    spec = importlib.util.spec_from_file_location("resnet20", source)
    definition = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(definition)
    model = definition.resnet20()
    model.load_state_dict(load_file(source.with_suffix(".safetensors")))

    def batches(part, count):
        shown = (data[f"{part}_x"][:count].astype("float32") / 255 - np.float32(definition.MEAN)) / np.float32(definition.STD)
        shown = np.ascontiguousarray(shown.transpose(0, 3, 1, 2).astype("float32"))
        return [({"x": shown[at : at + 64]}, data[f"{part}_y"][at : min(at + 64, count)]) for at in range(0, count, 64)]

    graph = graph_of(model, (GraphInput("x", (-1, 3, 32, 32), "float32"),))
    return Task(graph, batches("train", 128), batches("test", 1000))


@pytest.mark.parametrize(("scheme", "lost"), [("w8a8-static", 0.3), ("w4a8-static", 1.5), ("w4a4-static", 15)], ids=str)
def test_resnet20_keeps_its_accuracy(images, scheme, lost):
    assert images.accuracy == pytest.approx(91.5)
    assert images.accuracy_with(scheme, equalize="off") >= images.accuracy - lost


class Classifier(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).logits


@pytest.fixture(scope="module")
def sentences():
    """A BERT on SST-2."""
    folder = needs(ASSETS / "selftrained-sst2-bert")
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def batches(part, count):
        text = needs(ASSETS / "sst2" / f"{part}.tsv").read_text(encoding="utf-8")
        lines = [line.split("\t") for line in text.strip().split("\n")]
        items = sorted(((tokenizer.encode(text).ids[:LONGEST], int(label)) for text, label in lines[:count]), key=lambda item: len(item[0]))
        return [padded(items[at : at + 64]) for at in range(0, len(items), 64)]

    names = (GraphInput("ids", (-1, -1), "int64"), GraphInput("mask", (-1, -1), "int64"))
    return Task(graph_of(Classifier(model.eval()), names), batches("train", 256), batches("test", None))


def padded(items):
    ids = np.zeros((len(items), max(len(tokens) for tokens, _ in items)), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, (tokens, _) in enumerate(items):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return {"ids": ids, "mask": mask}, np.array([label for _, label in items])


@pytest.mark.parametrize(("scheme", "lost"), [("w8a8-dynamic", 0.3), ("w4a8-dynamic", 0.5), ("w8a8-static", 0.5)], ids=str)
def test_bert_keeps_its_accuracy(sentences, scheme, lost):
    assert sentences.accuracy == pytest.approx(78.7, abs=0.05)
    assert sentences.accuracy_with(scheme) >= sentences.accuracy - lost
