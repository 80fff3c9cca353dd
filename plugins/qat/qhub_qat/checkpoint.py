"""What a finished epoch leaves on the disk, in one file that is complete or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

FILE = "checkpoint.safetensors"  # a run that has one can be resumed


def write(work: Path, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write beside and rename; `facts` are JSON values."""
    work.mkdir(parents=True, exist_ok=True)
    beside = work / f"{FILE}.part"
    beside.write_bytes(save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, {"facts": json.dumps(facts)}))
    beside.replace(work / FILE)


def read(work: Path, key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """(facts, tensors) of the last finished epoch; None where there is none, or it is of other work than `key` says."""
    path = work / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            if facts.get("key") != key:
                return None
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception:  # noqa: BLE001 - what a damaged file raises is not defined; the work is done again
        return None
