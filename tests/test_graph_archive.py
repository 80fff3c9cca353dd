"""A `.pt2` archive that could run code is not opened."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from qhub.errors import DamagedModelError, QhubError
from qhub.graph.archive import refuse_code
from qhub.graph.sources import Source, open_graph
from qhub.graph.torch_graph import TorchGraph
from qhub.graph.values import GraphInput


class Harm:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "small.pt2"
    TorchGraph.of(nn.Linear(4, 2), (GraphInput("input", (-1, 4), "float32"),), ("logits",)).save(path)
    return path


def changed(saved: Path, out: Path, replaced: dict[str, bytes]) -> Path:
    """The archive with the members whose names end so replaced, or added where none does."""
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        for name in names:
            ending = next((ending for ending in replaced if name.endswith(ending)), None)
            target.writestr(name, source.read(name) if ending is None else replaced[ending])
        for ending, data in replaced.items():
            if not any(name.endswith(ending) for name in names):
                target.writestr(f"{names[0].partition('/')[0]}/{ending}", data)
    return out


def test_a_program_of_tensors_is_opened(saved):
    refuse_code(saved)
    graph = open_graph(Source(saved), {})
    assert [op.kind for op in graph.ops] == ["linear"]


def harmful(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Harm(mark), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "member", ["data/sample_inputs/model.pt", "data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/model/a.so"]
)
def test_an_archive_that_could_run_code_is_refused_and_runs_none(saved, tmp_path, member):
    mark = tmp_path / "harm"
    data = harmful(mark) if member.endswith(".pt") else pickle.dumps(Harm(mark))
    bad = changed(saved, tmp_path / "bad.pt2", {member: data})
    with pytest.raises(QhubError, match="can run code when it is loaded"):
        open_graph(Source(bad), {})
    assert not mark.exists()


def test_weights_that_ask_to_be_unpickled_are_refused(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        name = next(name for name in archive.namelist() if name.endswith("weights_config.json"))
        config = archive.read(name).replace(b'"use_pickle": false', b'"use_pickle": true')
    with pytest.raises(QhubError, match="can run code"):
        open_graph(Source(changed(saved, tmp_path / "bad.pt2", {"weights_config.json": config})), {})


def test_a_truncated_archive_is_damaged(saved, tmp_path):
    (tmp_path / "cut.pt2").write_bytes(saved.read_bytes()[:500])
    with pytest.raises(DamagedModelError, match="cannot be opened"):
        open_graph(Source(tmp_path / "cut.pt2"), {})
