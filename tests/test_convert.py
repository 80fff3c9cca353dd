"""`qhub convert` and `qhub eval` on models that somebody else quantized: what is said, and what is left when it fails."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch
from foreign_models import awq_weight, edit_tensors, float_model, foreign, reorder, run_model
from safetensors.torch import save_file
from tiny_models import random_ids

from qhub.cli import convert as command
from qhub.convert import convert
from qhub.errors import DamagedModelError, QhubError, Unsupported, UsageError
from qhub.events import Events
from qhub.prove.parity import compare_codes
from qhub.quantize.layouts.reader import LAYOUTS, open_packed
from qhub.quantize.store import folder_digest

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A QuantizedModel."""
    return run_model(tmp_path_factory.mktemp("source"), "w4a16-g32-asym")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_command_knows_every_layout():
    assert set(command.LAYOUT_NAMES) == set(LAYOUTS)


def test_it_says_what_was_written_and_where(source, here):
    found = convert(source, "awq", None, Events())
    assert names(here) == ["model-awq"]
    size_bytes, digest = folder_digest(here / "model-awq")
    assert found == {
        "source": str(source),
        "from": "compressed-tensors",
        "to": "awq",
        "path": "model-awq",
        "bytes": size_bytes,
        "sha256": digest,
        "layers": 14,
        "schemes": {"w4a16-g32-asym": 14},
        "codes_identical": True,
        "how": "codes, scales and zeros of every layer read back from the files",
        "warnings": [],
    }
    assert compare_codes(source, here / "model-awq", "nothing opens it") == {
        "checked": False,
        "codes_identical": True,
        "how": "nothing opens it; codes, scales and zeros read back from the file: the same",
    }


def test_the_same_model_gives_the_same_bytes(source, here):
    digests = {convert(source, "gptq", here / name, Events())["sha256"] for name in ("a", "b")}
    assert len(digests) == 1


def test_a_run_is_meant_by_its_quantized_folder(source, here):
    run = here / "run"
    run.mkdir()
    (run / "quantized").symlink_to(source)
    assert convert(run, "gptq", None, Events())["path"] == "run-gptq"


def test_a_place_that_is_taken_is_left_alone(source, here):
    (here / "out").mkdir()
    (here / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="`out` is not empty"):
        convert(source, "awq", (here / "out").relative_to(here), Events())
    with pytest.raises(UsageError, match="mine` is not empty"):
        convert(source, "awq", here / "out" / "mine", Events())
    assert names(here / "out") == ["mine"]
    (here / "empty").mkdir()
    convert(source, "awq", here / "empty", Events())
    assert "config.json" in names(here / "empty")


def test_what_a_killed_process_left_is_replaced(source, here):
    (here / "out.partial").mkdir()
    (here / "out.partial" / "model-00009-of-00009.safetensors").write_bytes(b"half")
    convert(source, "awq", here / "out", Events())
    assert names(here) == ["out"]
    assert "model-00009-of-00009.safetensors" not in names(here / "out")


class Stops:
    """Raises when the second shard has been written."""

    def __init__(self, error):
        self.error = error

    def __call__(self, event):
        if event["event"] == "block" and event["stage"].startswith("write") and event["index"] == 2:
            raise self.error


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (RuntimeError("odd"), RuntimeError),
    ],
    ids=["Ctrl-C", "full disk, as safetensors says it", "full disk", "anything"],
)
def test_whatever_stops_it_leaves_nothing(source, here, error, seen):
    with pytest.raises(seen):
        convert(source, "awq", here / "deep" / "out", Events(listener=Stops(error)))
    assert names(here) == []


def test_a_refusal_comes_before_anything_is_written(source, here):
    model = foreign(source, here / "model", "gptq_v2")
    reorder(model)
    events = []
    with pytest.raises(Unsupported, match="AWQ has no `g_idx`"):
        convert(model, "awq", here / "out", Events(listener=events.append))
    assert {event["stage"] for event in events} == {"check"}
    assert names(here) == ["model"]


def test_a_file_that_comes_back_changed_is_an_error(source, here, monkeypatch):
    """The disk is made to lie: every shard of codes loses a bit between writing and reading."""
    from qhub.quantize.layouts import writer

    write = writer.write_shard

    def lying(path, tensors):
        write(path, {name: tensor ^ 1 if name.endswith("qweight") else tensor for name, tensor in tensors.items()})

    monkeypatch.setattr(writer, "write_shard", lying)
    with pytest.raises(DamagedModelError, match=r"was read back from `.*` changed"):
        convert(source, "awq", here / "out", Events())
    assert names(here) == []


def test_one_block_at_a_time_is_in_memory(source, here):
    """As many files as blocks, and one for the rest; the events say so while it happens."""
    events = []
    convert(source, "gptq", here / "out", Events(listener=events.append))
    assert [event["count"] for event in events if event.get("stage") == "write gptq"] == [3, 3, 3]


def test_float_models_and_other_folders_are_refused(here):
    with pytest.raises(QhubError, match=r"is not a model folder: it has no config\.json"):
        convert(here, "awq", None, Events())
    (here / "config.json").write_text("{}")
    save_file({"a.weight": torch.zeros(2, 2)}, here / "model.safetensors")
    with pytest.raises(QhubError, match="is a float model"):
        convert(here, "awq", here / "out", Events())


# The command itself, in a process of its own.
def test_json_is_one_document_and_progress_goes_elsewhere(qhub, source, tmp_path):
    model = foreign(source, tmp_path / "theirs", "gptq_v2")
    ran = qhub("convert", model, "--to", "awq", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert (found["from"], found["to"], found["path"], found["codes_identical"]) == ("gptq_v2", "awq", "theirs-awq", True)
    assert "write awq  block 3/3" in ran.err
    again = qhub("convert", model, "--to", "awq")
    assert again == (2, "", "error: `theirs-awq` is not empty\n\nhint: give another directory: `--out DIR`\n")


def test_damage_is_exit_code_1_and_what_a_layout_lacks_is_3(qhub, source, tmp_path):
    model = foreign(source, tmp_path / "theirs", "gptq_v2")
    edit_tensors(model, lambda tensors: tensors[f"{LAYER}.qzeros"].zero_())
    ran = qhub("convert", model, "--to", "gptq")
    assert (ran.code, ran.out) == (3, "")
    message = (
        f"`gptq` cannot carry `{model}`: GPTQ v1 stores zero − 1 and so has no zero of 0, which there is in layer `{LAYER}` (`gptq_v2` has)"
    )
    assert ran.err.endswith(f"error: {message}\n\nhint: try another layout: compressed-tensors, awq\n")
    edit_tensors(model, lambda tensors: tensors.pop(f"{LAYER}.qzeros"))
    for arguments in (("convert", model, "--to", "awq"), ("eval", model, "--data", model / "tokenizer.json")):
        ran = qhub(*arguments)
        assert (ran.code, ran.out) == (1, "")
        assert f"error: `{model}` is damaged: it has no tensor `{LAYER}.qzeros`\n" in ran.err
        assert "Traceback" not in ran.err


def test_eval_measures_what_the_files_stand_for(qhub, source, tmp_path):
    """The same figures as the float model that the packed one stands for, written by formulas of the test's own."""
    model = foreign(source, tmp_path / "theirs", "awq")
    restored = float_model(model, tmp_path / "float", awq_weight)
    for path in model.glob("tokenizer*"):
        (restored / path.name).write_bytes(path.read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + code % 90) for code in random_ids(1, 2000)[0].tolist()), encoding="utf-8")
    found = []
    for folder in (model, restored):
        ran = qhub("eval", folder, "--data", text, "--json")
        assert ran.code == 0, ran.err
        found.append(json.loads(ran.out))
    assert found[0]["perplexity"] == found[1]["perplexity"]
    assert {**found[0], "model": None} == {**found[1], "model": None}
    assert np.isfinite(found[0]["perplexity"])
    assert open_packed(model).layout.name == "awq"
