"""A hub model is profiled from its config and headers alone: against a server of our own that counts the bytes it sends."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qhub.errors import DamagedModelError, QhubError
from qhub.plugins import Plugins
from qhub.route.profile import profile

PLUGINS = Plugins.load([])
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def safetensors(shapes, *, padding=0, holes=True):
    """The bytes of a safetensors file of bfloat16 weights; `padding` makes its header longer."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode() + b" " * padding
    return len(text).to_bytes(8, "little") + text + bytes(offset if holes else 0)


class Hub:
    """Serves files of one model as the hub does; `sent` counts the bytes of what it answered."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.sent = 0
        self.seen: list[dict[str, str]] = []
        self.refuse: tuple[int, str] | None = None
        self.ranges = True

    def answer(self, path, headers):
        """(status, headers, body) for a request."""
        self.seen.append(dict(headers))
        if self.refuse is not None:
            return self.refuse[0], {"X-Error-Code": self.refuse[1]}, b"{}"
        if path == "/api/models/org/model":
            return 200, {}, json.dumps({"siblings": [{"rfilename": name} for name in self.files]}).encode()
        content = self.files.get(path.removeprefix("/org/model/resolve/main/"))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        wanted = headers.get("Range")
        if wanted is None or not self.ranges:
            return 200, {}, content
        begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
        return 206, {"Content-Range": f"bytes {begin}-{min(end, len(content) - 1)}/{len(content)}"}, content[begin : end + 1]


@pytest.fixture
def hub(monkeypatch):
    """A hub that lives as long as the test, and that qhub is told to ask."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = state.answer(self.path, self.headers)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)
            state.sent += len(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def llama_shapes(blocks=range(2)):
    shapes = {"model.embed_tokens.weight": (256, 64), "lm_head.weight": (256, 64), "model.norm.weight": (64,)} if 0 in blocks else {}
    for index in blocks:
        shapes |= {f"model.layers.{index}.self_attn.{name}_proj.weight": (32 if name in "kv" else 64, 64) for name in "qkvo"}
        shapes |= {f"model.layers.{index}.mlp.{name}_proj.weight": (128, 64) for name in ("gate", "up")}
        shapes[f"model.layers.{index}.mlp.down_proj.weight"] = (64, 128)
    return shapes


def test_a_model_of_one_file_is_profiled_from_its_header(hub):
    hub.files = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": safetensors(llama_shapes()), "tokenizer.json": b"x"}
    found = profile("org/model", PLUGINS)
    assert (found.source, found.path, found.format, found.complete) == ("org/model", "org/model", "hub", True)
    assert (found.task, found.dtype, found.blocks, found.has_tokenizer) == ("llm", "bf16", 2, True)
    assert found.parameters == sum(math.prod(shape) for shape in llama_shapes().values())
    assert found.weight_bytes == 2 * found.parameters
    assert all("Authorization" not in headers for headers in hub.seen)


def test_weights_are_not_fetched_and_long_headers_are(hub):
    big = llama_shapes() | {"model.layers.1.big.weight": (1 << 11, 1 << 12)}
    hub.files = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": safetensors(big, padding=200_000)}
    assert profile("org/model", PLUGINS).weight_bytes > 16 << 20
    assert hub.sent < 400_000


def test_a_sharded_model_is_one_model(hub):
    weight_map = {name: f"model-0000{index + 1}-of-00002.safetensors" for index in (0, 1) for name in llama_shapes([index])}
    shards = {f"model-0000{index + 1}-of-00002.safetensors": safetensors(llama_shapes([index])) for index in (0, 1)}
    index = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    hub.files = {"config.json": json.dumps(LLAMA).encode(), **shards, **index}
    assert profile("org/model", PLUGINS).parameters == sum(math.prod(shape) for shape in llama_shapes().values())
    del hub.files["model-00002-of-00002.safetensors"]
    with pytest.raises(DamagedModelError, match="names files that are not there"):
        profile("org/model", PLUGINS)


def test_a_model_without_safetensors_is_profiled_from_its_config(hub):
    hub.files = {"config.json": json.dumps(LLAMA).encode(), "pytorch_model.bin": b""}
    found = profile("org/model", PLUGINS)
    assert (found.format, found.parameters) == ("hub", sum(math.prod(shape) for shape in llama_shapes().values()) + 4 * 64)


def test_a_token_is_sent_to_the_hub_where_there_is_one(hub, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.files = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": safetensors(llama_shapes())}
    profile("org/model", PLUGINS)
    assert {headers["Authorization"] for headers in hub.seen} == {"Bearer hf_test"}


# One error each, with what to do.
@pytest.mark.parametrize(
    ("refuse", "message", "hint"),
    [
        ((401, "RepoNotFound"), "the hub has no model of that name that you may see", "check the name"),
        ((404, ""), "the hub has no model of that name that you may see", "check the name"),
        ((401, "GatedRepo"), "is only for those who were given access", "`hf auth login`"),
        ((500, ""), r"the hub refuses to show `org/model` \(HTTP 500\)", "try again later"),
    ],
    ids=["unknown", "gone", "gated", "out of order"],
)
def test_what_the_hub_refuses_is_said_in_words(hub, refuse, message, hint):
    hub.refuse = refuse
    with pytest.raises(QhubError, match=message) as caught:
        profile("org/model", PLUGINS)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.gguf": b""}, "`org/model` has no config.json"),
        ({"config.json": b"{"}, "is not JSON"),
        ({"config.json": b"{}", "model.safetensors": b"\0" * 4}, "is not a valid safetensors file"),
        ({"config.json": b"{}", "model.safetensors": b"\xff" * 400}, "its header claims"),
        ({"config.json": b"{}", "model.safetensors": safetensors({"a": (9, 9)}, holes=False)}, r"\(truncated\?\)"),
        ({"config.json": b"{}", "model.safetensors": b"", "model.safetensors.index.json": b"[]"}, "makes no sense"),
    ],
    ids=["no config", "no JSON", "too short", "absurd header", "truncated", "odd index"],
)
def test_damaged_models_of_the_hub_are_named(hub, files, message):
    hub.files = files
    with pytest.raises(QhubError, match=message) as caught:
        profile("org/model", PLUGINS)
    assert caught.value.hint


def test_a_server_that_sends_whole_files_is_not_listened_to(hub):
    hub.files, hub.ranges = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": safetensors(llama_shapes())}, False
    with pytest.raises(DamagedModelError, match="does not send parts of files"):
        profile("org/model", PLUGINS)


def test_no_network_is_one_clear_error(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(QhubError, match="cannot be reached to look at `org/model`") as caught:
        profile("org/model", PLUGINS)
    assert caught.value.hint == "where there is a network: `hf download org/model --local-dir model`, then give the folder"


def test_the_network_is_left_alone_when_it_is_forbidden(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QhubError, match="`HF_HUB_OFFLINE` forbids to look it up"):
        profile("org/model", PLUGINS)
    assert hub.seen == []


def test_a_folder_of_that_name_is_no_hub_model(hub, monkeypatch, tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert profile("org/model", PLUGINS).format == "config"
    assert hub.seen == []
