"""Float networks from folders and functions: which class opens them, and what they take and give."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from qhub.errors import QhubError, Unsupported
from qhub.graph.sources import Source, inputs_of, open_graph

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = {"input_ids": np.array([[2, 5, 7, 3], [2, 6, 3, 0]]), "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]])}


def bert(folder, kind, **settings):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        **settings,
    )
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("BertForSequenceClassification", (2, 3)), ("BertForTokenClassification", (2, 4, 3)), ("BertForMaskedLM", (2, 4, 20))],
)
def test_a_classifier_gives_its_logits(tmp_path, kind, shape):
    model = bert(tmp_path, kind, num_labels=3)
    graph = open_graph(Source(tmp_path), IDS)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(ids) for name, ids in IDS.items()}).logits
    found = graph.run(IDS)[0]
    assert tuple(found.shape) == shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    longer = {name: np.pad(ids, ((0, 1), (0, 3)), constant_values=1) for name, ids in IDS.items()}
    assert graph.run(longer)[0].shape[:1] == (3,), "any batch and any length"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_model_gives_vectors_of_length_1(tmp_path, pooling):
    model = bert(tmp_path, "BertModel")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": pooling == "cls"}))
    graph = open_graph(Source(tmp_path), IDS)
    with torch.no_grad():
        hidden = model(**{name: torch.from_numpy(ids) for name, ids in IDS.items()}).last_hidden_state
    expected = hidden[1, 0] if pooling == "cls" else hidden[1, :3].mean(0)
    found = graph.run(IDS)[0]
    assert graph.outputs == ("sentence_embedding",)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(found[1], torch.nn.functional.normalize(expected, dim=0), rtol=1e-4, atol=1e-5)


def test_a_head_that_gives_something_else_is_refused_by_name(tmp_path):
    bert(tmp_path, "BertForQuestionAnswering")
    with pytest.raises(Unsupported, match="what a `BertForQuestionAnswering` gives is not known here"):
        open_graph(Source(tmp_path), IDS)


def test_a_folder_that_transformers_does_not_open_is_one_error(tmp_path):
    bert(tmp_path, "BertForSequenceClassification")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(QhubError, match="transformers does not open"):
        open_graph(Source(tmp_path), IDS)


def test_inputs_vary_in_their_batch_and_texts_in_their_length():
    sample = {"pixel_values": np.zeros((2, 3, 8, 8), np.float32), "input_ids": np.zeros((2, 5), np.int64)}
    assert [(item.name, item.shape, item.dtype) for item in inputs_of(sample)] == [
        ("pixel_values", (-1, 3, 8, 8), "float32"),
        ("input_ids", (-1, -1), "int64"),
    ]
