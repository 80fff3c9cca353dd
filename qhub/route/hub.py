"""A model of the Hugging Face hub → `ModelProfile`, from its config and the headers of its safetensors files: no weight is fetched.

The only part of a profile that uses the network, and only because the user named a hub model. Nothing is sent but the request.
"""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from qhub.errors import DamagedModelError, QhubError
from qhub.route.config import CONFIG, SUFFIXES, read_config
from qhub.types import ModelProfile, ModelSource
from qhub.weights import INDEX, SINGLE, TensorInfo, header_size, parse_header

_YES = ("1", "ON", "YES", "TRUE")
_TIMEOUT_S = 15
#: What one request may bring: the start of a safetensors file holds most headers.
_START_BYTES, _MAX_BYTES = 1 << 17, 100_000_000
#: Files that say what a model is by being there.
_TELLING = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "modules.json",
    "config_sentence_transformers.json",
)
_DIFFUSERS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, slots=True)
class _Hub:
    """A model on the hub."""

    name: str

    @property
    def command(self) -> str:
        """What downloads the model."""
        return f"hf download {self.name} --local-dir {self.name.partition('/')[2]}"

    def files(self) -> list[str]:
        """The names of its files."""
        listing = json.loads(self._get(f"api/models/{self.name}", (0, _MAX_BYTES))[0])
        return [str(entry["rfilename"]) for entry in listing["siblings"]]

    def text(self, file: str) -> bytes:
        """A small file as a whole."""
        return self._get(self._place(file), (0, _MAX_BYTES))[0]

    def header(self, file: str) -> dict[str, TensorInfo]:
        """The tensors of a safetensors file, by its header alone."""
        where, place = Path(self.name) / file, self._place(file)
        start, file_bytes = self._get(place, (0, _START_BYTES), part=True)
        header_bytes = header_size(where, start[:8], file_bytes)
        text = start[8 : 8 + header_bytes]
        if len(text) < header_bytes:
            text += self._get(place, (len(start), 8 + header_bytes), part=True)[0]
        return parse_header(where, text, file_bytes)

    def _place(self, file: str) -> str:
        return f"{self.name}/resolve/main/{quote(file)}"

    def _get(self, place: str, span: tuple[int, int], *, part: bool = False) -> tuple[bytes, int]:
        """(bytes `span` of what lies at `place`, bytes of the whole); a server that sends more than was asked for is cut short."""
        request = urllib.request.Request(f"{_endpoint()}/{place}", headers={"User-Agent": "qhub"})
        if token := _token():
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # the files' own servers must not see it
        if part:
            request.add_header("Range", f"bytes={span[0]}-{span[1] - 1}")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            total = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
            if part and not total.isdecimal():
                raise DamagedModelError(f"`{_endpoint()}` does not send parts of files", hint=f"`{self.command}`, then give the folder")
            data: bytes = answer.read(span[1] - span[0])
        return data, int(total) if part else len(data)


def profile_hub(name: str) -> ModelProfile:
    """Profile the hub's model `name`.

    :raises QhubError: when there is no network, no such model, no access to it, or it has no config.
    """
    hub = _Hub(name)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _YES:
        message = f"`{name}` is not a folder here, and `HF_HUB_OFFLINE` forbids to look it up on the hub"
        raise QhubError(message, hint=f"where there is a network: `{hub.command}`, then give the folder")
    with _explained(hub), tempfile.TemporaryDirectory(prefix="qhub-hub-") as folder:
        return replace(_profile(hub, Path(folder)), path=name, format="hub")


def _profile(hub: _Hub, folder: Path) -> ModelProfile:
    from qhub.route.profile import assemble, of_config

    files = hub.files()
    if CONFIG not in files:
        single = sorted(file for file in files if file.endswith(SUFFIXES))
        hint = f"`hf download {hub.name} {single[0]} --local-dir .`, then give the file" if single else "name another model"
        raise QhubError(f"`{hub.name}` has no {CONFIG}: it is no model that transformers or diffusers loads", hint=hint)
    (folder / CONFIG).write_bytes(hub.text(CONFIG))
    for file in sorted(set(_TELLING) & set(files)):
        (folder / file).touch()
    source, config = ModelSource(hub.name, folder, ""), read_config(folder)
    tensors = _tensors(hub, files)
    return assemble(source, config, tensors, "hub") if tensors else of_config(source, config)


def _tensors(hub: _Hub, files: list[str]) -> Mapping[str, TensorInfo]:
    """Every tensor, of all shards; none where the weights are no safetensors."""
    if INDEX in files:
        shards = sorted(set(json.loads(hub.text(INDEX))["weight_map"].values()))
        if not set(shards) <= set(files):
            raise DamagedModelError(f"the index of `{hub.name}` names files that are not there", hint="name another model")
    else:
        there = [file for file in files if file.endswith(".safetensors") and "/" not in file]
        shards = next(([file] for file in (SINGLE, _DIFFUSERS) if file in there), there)
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        found.update(hub.header(shard))
    return found


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _token() -> str | None:
    """The user's token, where huggingface_hub keeps it."""
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _YES:
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    return os.environ.get("HF_TOKEN") or (file.read_text(encoding="utf-8").strip() if file.is_file() else None)


@contextmanager
def _explained(hub: _Hub) -> Iterator[None]:
    """Turns what can go wrong into one error: no such model, no access, no network, or an answer that makes no sense."""
    there = f"where there is a network: `{hub.command}`, then give the folder"
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(hub, error.code, str(error.headers.get("X-Error-Code") or "")) from None
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error
        raise QhubError(f"`{_endpoint()}` cannot be reached to look at `{hub.name}` ({why})", hint=there) from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        message = f"the hub's answer about `{hub.name}` makes no sense ({type(error).__name__}: {error})"
        raise DamagedModelError(message, hint=f"`{hub.command}`, then give the folder") from None


def _refused(hub: _Hub, code: int, reason: str) -> QhubError:
    if reason == "GatedRepo" or code == 403:
        hint = f"ask for access at https://huggingface.co/{hub.name}, then `hf auth login`"
        return QhubError(f"`{hub.name}` is only for those who were given access", hint=hint)
    if code in (401, 404):
        message = f"`{hub.name}` is not a folder here, and the hub has no model of that name that you may see"
        return QhubError(message, hint="check the name; for a private model: `hf auth login`")
    return QhubError(f"the hub refuses to show `{hub.name}` (HTTP {code})", hint="try again later")
