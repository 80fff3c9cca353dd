"""`qhub chat` and `qhub bench` with the engines that are installed, on a tiny model that was quantized."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_models import CHATML, byte_tokenizer
from tiny_models import quantize, tiny_model

from qhub import OpenOptions, QhubError, Quantizer, quantize_rtn
from qhub.chat.dialogue import Language
from qhub.chat.speaker import Sampling, Speaker
from qhub.chat.template import ChatTemplate
from qhub.plugins import Plugins

ROOT = Path(__file__).parent.parent


def missing(engine):
    """Why an engine's tests cannot run; None if they can."""
    if engine not in Plugins.load().runtimes:
        return f"qhub-{engine} is not installed"
    if engine == "native" and importlib.util.find_spec("qhub_native._native") is None:
        return "qhub-native is not built"
    return None


LLAMA_3 = (
    "{{ bos_token }}{% if tools is not none %}Tools!{% endif %}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\n"
    "{% for message in messages %}\n    {% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}\n"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}{{ messages | tojson }}"
)


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, GEMMA, MISTRAL], ids=["ChatML", "Llama 3", "Gemma", "Mistral"])
@pytest.mark.parametrize("reply", [True, False], ids=["asking", "told"])
def test_templates_give_what_transformers_gives(template, reply):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>")
    messages = [{"role": "user", "content": " hi <é> "}, {"role": "assistant", "content": "yes\n"}, {"role": "user", "content": "so"}]
    expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=reply)
    assert ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, reply=reply) == expected


ENGINES = [pytest.param(name, marks=pytest.mark.skipif(bool(why := missing(name)), reason=str(why))) for name in ("hf", "native")]
NATIVE = pytest.mark.skipif(bool(missing("native")), reason=str(missing("native")))


class Nearest(Quantizer):
    """Round to nearest."""

    name = "nearest"

    def quantize_layer(self, weight, scheme, block):
        return quantize_rtn(weight, scheme, block.dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with a context of 128 tokens, all of whose tokens are letters."""
    folder = tmp_path_factory.mktemp("chat")
    quantize(tiny_model("llama"), folder, Nearest(), "w4a16-g32-asym")
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()
    byte_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    return folder / "model"


@pytest.fixture
def run(tmp_path):
    """`run(engine, *arguments)`: a command with that engine's plugin alone."""

    def call(engine, *arguments, text="", command=("-m", "qhub")):
        env = {**os.environ, "QHUB_PLUGINS": engine, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, *command, *map(str, arguments)]
        return subprocess.run(words, env=env, cwd=tmp_path, input=text, capture_output=True, check=False, encoding="utf-8")

    return call


def opened(engine, model, **options):
    return Plugins.load().runtimes[engine].open(model, OpenOptions(threads=1, **options))


GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0, max_tokens=20)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reply_in_a_pipe_is_what_the_engine_generates(engine, model, run):
    ran = run(engine, "chat", model, "--temperature", 0, "--max-tokens", 12, text="hello\n")
    assert (ran.returncode, ran.stderr) == (0, "the model has no chat template: it continues the text\n")
    session, language = opened(engine, model), Language(model)
    prompt = language.tokenizer.encode("hello", begin=True)
    tokens = list(session.generate(prompt, 12))
    session.close()
    assert ran.stdout == language.tokenizer.decode(tokens) + "\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_longer_than_the_context_leaves_the_session_usable(engine, model, run):
    ran = run(engine, "chat", model, "--max-tokens", 4, text=f"{'x' * 200}\nhi\n")
    assert ran.returncode == 1
    assert "error: `200` tokens do not fit the model's context of 128\n\nhint: say it in fewer words\n" in ran.stderr
    assert ran.stdout.strip()
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_until_stop_false_goes_on_past_stop_tokens(engine, model, tmp_path):
    """What the model says sixth is made its end token."""
    session = opened(engine, model)
    said = list(session.generate([5, 6, 7], 10, until_stop=False))
    session.close()
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in ("config.json", "generation_config.json"):
        changed = json.loads((model / name).read_text()) | {"eos_token_id": said[5]}
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(json.dumps(changed))
    session = opened(engine, tmp_path)
    assert list(session.generate([5, 6, 7], 10, until_stop=False)) == said
    assert list(session.generate([5, 6, 7], 10)) == said[: said.index(said[5])]
    session.close()


@NATIVE
def test_what_is_kept_between_turns_gives_the_same_replies_as_reading_all_again(model):
    session = opened("native", model, exact=True)
    keeping, reading = Speaker(session, GREEDY), Speaker(session, GREEDY)
    reading.conversation = None
    ids = [5, 6, 7]
    for added in ([8], [9, 10], [11]):
        ids += added
        replies = [list(speaker.reply(ids, 100)) for speaker in (keeping, reading)]
        assert replies[0] == replies[1]
        ids += replies[0][:7]  # as if it had been stopped there
    assert keeping.conversation.length <= len(ids) + 20
    session.close()


@NATIVE
def test_what_is_kept_is_the_state_that_reading_all_gives(model):
    """After a reply that was stopped half way the logits of what follows are those of a fresh session."""
    session = opened("native", model, exact=True)
    conversation = session.conversation()
    replies = conversation.reply([5, 6, 7, 8], 20)
    said = [next(replies) for _ in range(5)]
    replies.close()
    assert conversation.length == 8  # the last one has been said, not read
    ids = [5, 6, 7, 8, *said[:4]]
    expected = session.logits(np.array([[*ids, 3]]))[0, -1]
    assert np.allclose(session.feed(conversation._sequence, [3]), expected, atol=1e-4)
    session.close()


@NATIVE
def test_a_long_line_is_read_in_parts_with_the_same_reply(model):
    session = opened("native", model, exact=True)
    for count in (1, 7, 8, 9, 16, 61):
        ids = [(7 * index) % 100 for index in range(count)]
        conversation = session.conversation()
        conversation.at_once = 8
        assert list(conversation.reply(ids, 5)) == list(session.generate(ids, 5))
    with pytest.raises(QhubError, match="`129` more tokens do not fit: 0 of 128 are taken"):
        list(session.conversation().reply([1] * 129, 5))
    session.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_bench_measures_it(engine, model, run):
    ran = run(engine, "bench", model, "--threads", 1, "--prompt", 16, "--generate", 8, "--rounds", 1, "--json")
    assert ran.returncode == 0, ran.stderr
    (figures,) = json.loads(ran.stdout)["runs"]
    assert figures["runtime"] == engine
    assert figures["prompt"][0]["tokens_per_s"] > 0
    assert figures["generate_tokens_per_s"] > 0
    assert figures["peak_rss_bytes"] < (2e9 if engine == "hf" else 300e6)


@NATIVE
def test_native_says_how_it_loaded_and_what_memory_gives(model, run):
    runs = []
    for _ in range(2):
        ran = run("native", "bench", model, "--threads", 1, "--prompt", 16, "--generate", 8, "--rounds", 1, "--json")
        runs += json.loads(ran.stdout)["runs"]
    assert [figures["how_loaded"] for figures in runs] == ["packed", "read from the pack cache"]
    assert all(figures["bandwidth_share"] > 0 for figures in runs)
    assert all(figures["compute_share"] is None or 0 < figures["compute_share"] < 1 for figures in runs)


@NATIVE
def test_bytes_per_token_are_those_of_every_matrix_once(model):
    quantized, exact = opened("native", model), opened("native", model, exact=True)
    config = json.loads((model / "config.json").read_text())
    head = config["vocab_size"] * config["hidden_size"] * 4
    assert exact.bytes_per_token == exact.loaded.packed_bytes + head  # float32, as it is stored
    assert quantized.bytes_per_token == quantized.loaded.packed_bytes
    assert quantized.bandwidth(1) > 1e8


@NATIVE
def test_operations_per_token_are_two_for_each_weight_of_the_blocks(model):
    session = opened("native", model)
    config = json.loads((model / "config.json").read_text())
    head = config["vocab_size"] * config["hidden_size"]
    weights = sum(key.inputs * key.outputs * len(alike) for key, alike in session.loaded.selector.linears.items())
    assert session.ops_per_token in (2 * weights, 2 * (weights - head))
    assert session.peak_ops(1) is None or session.peak_ops(1) > 1e8
    assert opened("native", model, exact=True).peak_ops(1) is None


@NATIVE
def test_a_forced_kernel_is_used_or_refused(model, run):
    ran = run("native", "bench", model, "--threads", 1, "--prompt", 8, "--generate", 2, "--rounds", 1, "--kernel", "scalar", "--json")
    assert json.loads(ran.stdout)["runs"][0]["kernel"] == "scalar"
    ran = run("native", "bench", model, "--threads", 1, "--kernel", "none-such")
    assert ran.returncode == 2
    assert "error: kernel `none-such` does not run here\n\nhint: these do: " in ran.stderr


@NATIVE
@pytest.mark.parametrize("command", ["chat", "bench"])
def test_with_native_nothing_imports_torch(command, model, run):
    code = "import sys; from qhub.cli import main; code = main(sys.argv[1:]); assert code == 0; heavy = {'torch', 'transformers'}; "
    code += "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    more = ("--threads", 1, "--prompt", 8, "--generate", 2, "--rounds", 1) if command == "bench" else ("--max-tokens", 4)
    ran = run("native", command, model, *more, text="hi\n", command=("-c", code))
    assert ran.returncode == 0, ran.stderr


@NATIVE
def test_a_folder_that_qhub_did_not_make_is_taken_by_the_next_engine(model, run, tmp_path):
    reason = missing("hf")
    if reason:
        pytest.skip(reason)
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        if file.name != "qhub.json":
            (other / file.name).symlink_to(file)
    ran = run("hf,native", "chat", other, "--temperature", 0, "--max-tokens", 2, text="hi\n")
    assert ran.returncode == 0, ran.stderr
    assert f"warning: `{other}` is not a model that qhub quantized: it has no qhub.json; taking `hf`\n" in ran.stderr
