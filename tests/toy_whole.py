"""A plugin whose method takes a whole model, in environments of its own that cost nothing: made offline from this interpreter.

What the toy does is told by the variable TOY: nothing (it works) · hang · die · fail · leave · eat · print. `TOY_PIDS` names a file
for the ids of its process and of one that it starts.
"""

from __future__ import annotations

import sys
import venv
from pathlib import Path

from qhub.isolation.environments import Environment, environment
from qhub.isolation.install import record

ROOT = Path(__file__).parent.parent
SOURCE = '''
"""The toy's module."""
import os, signal, subprocess, sys, time
from pathlib import Path
from qhub import WholeModel, QTensor, Scheme, hookimpl, quantize_rtn

class Result:
    """What the toy left: tensors by name."""
    def __init__(self, out):
        from safetensors.torch import load_file
        self.tensors = load_file(out / "made.safetensors")
    def tensor_names(self):
        return [name for name in self.tensors if not name.startswith("made/")]
    def tensor(self, name):
        return self.tensors[name]
    def layer(self, name):
        codes, scale, zero, facts = (self.tensors[f"made/{name}/{part}"] for part in ("codes", "scale", "zero", "facts"))
        return QTensor(codes, scale, zero, int(facts[0]), bool(facts[1]))

class Toy(WholeModel):
    """Rounds to nearest, all at once."""
    name = "toy-whole"
    summary = "rounds to nearest, all at once"
    distribution = "qhub-toy"
    options = {"bias": 0}
    def reject(self, profile, scheme):
        if profile.architecture == "ToyForCausalLM":
            return "`toy-whole` does not take `ToyForCausalLM`"
        return super().reject(profile, scheme)
    def quantize_model(self, job):
        import torch
        from safetensors.torch import load_file, save_file
        mood = os.environ.get("TOY", "")
        if mood in ("hang", "die"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(os.environ["TOY_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
        if mood == "hang":
            time.sleep(600)
        if mood == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if mood == "fail":
            raise ValueError("the toy is broken")
        if mood == "leave":
            os.write(2, b"Fatal: the toy left")
            os._exit(7)
        if mood == "eat":
            held = [bytearray(os.urandom(1 << 20) * 64) for _ in range(64) if not time.sleep(0.05)]
        if mood == "print":
            os.write(1, b"a line that is no event\\n")
        floats = load_file(job.source / "model.safetensors")
        made = {name: floats.pop(f"{name}.weight") for name in job.schemes}
        out = {name: tensor.contiguous().clone() for name, tensor in floats.items()}
        assert job.ids is not None and job.ids.dtype == torch.int64
        for name, scheme in job.schemes.items():
            q = quantize_rtn(made[name].float(), scheme, made[name].dtype)
            facts = torch.tensor([q.bits, int(q.symmetric)])
            parts = {"codes": q.codes, "scale": q.scale, "zero": q.zero, "facts": facts}
            out |= {f"made/{name}/{part}": tensor.contiguous() for part, tensor in parts.items()}
        save_file(out, job.out / "made.safetensors")
    def read_result(self, out):
        return Result(out)

@hookimpl
def qhub_quantizers():
    return [Toy()]
'''


def write_toy(folder: Path) -> Path:
    """The toy's module and metadata in `folder`, as an installer leaves them."""
    metadata = folder / "qhub_toy-1.5.dist-info"
    metadata.mkdir(parents=True)
    (folder / "qhub_toy.py").write_text(SOURCE, encoding="utf-8")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: qhub-toy\nVersion: 1.5\nRequires-Dist: numpy\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[qhub]\ntoy = qhub_toy\n", encoding="utf-8")
    return folder


def make_environment() -> Environment:
    """The environment `toy` under the present data directory: a virtual environment that sees this one's packages, and the toy."""
    made = environment("toy")
    venv.create(made.folder, with_pip=False, symlinks=True)
    packages = next(made.folder.glob("lib/python*/site-packages"))
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "here.pth").write_text("\n".join([str(ROOT), *paths]) + "\n", encoding="utf-8")
    write_toy(packages)
    record(made, ("qhub-toy", f"-e {ROOT}"))
    return made


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(path: Path) -> list[int]:
    """The process ids that the toy wrote down."""
    return [int(text) for text in path.read_text().split()] if path.exists() else []
