"""`qhub chat` in a pipe and in a terminal, with an engine that answers what it heard."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("pty")

from chat_models import ENGINES, write_chat_model
from conftest import Ran
from terminal import CTRL_C, CTRL_D, Terminal

#: Tokens around a line: `<|im_start|>user\n` LINE `<|im_end|>\n<|im_start|>assistant\n`.
AROUND = 19


@pytest.fixture
def env(toy_plugin):
    return toy_plugin("echo", ENGINES) | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def chat(tmp_path, env):
    """`chat(text, *options)`: what comes out when `text` goes in through a pipe."""

    def run(text, *options, engine="echo", stdin=None):
        command = [sys.executable, "-m", "qhub", "chat", "model", "--runtime", engine, *map(str, options)]
        given = text.encode() if isinstance(text, str) else text
        ran = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, input=given, capture_output=True, check=False)
        return Ran(ran.returncode, ran.stdout.decode(), ran.stderr.decode())

    write_chat_model(tmp_path / "model")
    return run


@pytest.mark.parametrize("text", ["hi\n", "hi", "\n  \nhi\n\n"], ids=["a line", "without its end", "among empty ones"])
def test_in_a_pipe_there_is_only_the_reply(chat, text):
    assert chat(text) == Ran(0, f"{AROUND + 2} tokens: hi für 你\n", "")


def test_nothing_in_nothing_out(chat):
    assert chat("") == Ran(0, "", "")


@pytest.mark.parametrize("engine", ["echo", "keeps"])
def test_every_line_is_a_turn_of_one_conversation(chat, engine):
    ran = chat("hi\nso\n", engine=engine)
    first, second = ran.out.splitlines()
    assert first == f"{AROUND + 2} tokens: hi für 你"
    everything = AROUND + 2 + len(first.encode()) + 2 + AROUND + 2
    assert second == f"{everything if engine == 'echo' else 2 + AROUND + 2} tokens: so für 你"
    assert (ran.code, ran.err) == (0, "")


def test_the_default_engine_is_the_first_that_works(tmp_path, env, chat):
    command = [sys.executable, "-m", "qhub", "chat", "model"]
    ran = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, input="hi\n", capture_output=True, check=False, encoding="utf-8")
    assert ran.stdout == "21 tokens: hi für 你\n"


def test_a_reset_forgets_what_was_said_but_not_the_system_text(chat):
    system = len("<system\nbe kind>\n")
    out = chat("hi\n/reset\nhi\n", "--system", "be kind").out
    assert out == f"{system + AROUND + 2} tokens: hi für 你\n" * 2


def test_the_system_text_can_be_changed_and_removed(chat):
    given = [line.split()[0] for line in chat("/system be kind\nhi\n/reset\n/system\nhi\n").out.splitlines()]
    assert given == [str(AROUND + 2 + len("<system\nbe kind>\n")), str(AROUND + 2)]


def test_a_longest_reply_is_kept_to(chat):
    assert chat("hi\n", "--max-tokens", 5).out == "21 to\n"
    assert chat("long\n").out == "23 tokens: long für 你" + "a" * (100 - len("23 tokens: long für 你".encode())) + "\n"  # a quarter of 400


def test_a_reply_ends_where_the_context_does(chat):
    ran = chat("long\n", "--max-tokens", 1000)
    assert len(ran.out.encode()) == 400 - AROUND - len("long") + 1
    assert (ran.code, ran.err) == (0, "")


def test_a_line_that_is_too_long_is_one_error_and_the_next_is_answered(chat):
    ran = chat(f"{'x' * 400}\nhi\n")
    message = f"error: `{400 + AROUND}` tokens do not fit the model's context of 400\n\nhint: say it in fewer words\n"
    assert ran == Ran(1, "21 tokens: hi für 你\n", message)


@pytest.mark.parametrize("engine", ["echo", "keeps"])
def test_a_conversation_that_is_full_can_be_reset(chat, engine):
    ran = chat(f"{'x' * 150}\n{'y' * 150}\n/reset\nhi\n", "--max-tokens", 150, engine=engine)
    given = 21 if engine == "echo" else 21 - len("<user\n")  # with which every turn begins
    assert (ran.code, ran.out.splitlines()[-1]) == (1, f"{given} tokens: hi für 你")
    assert "tokens do not fit the model's context of 400\n\nhint: say it in fewer words, or `/reset` to begin anew\n" in ran.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("crash", "error: `echo` failed: RuntimeError: out of luck\n"),
        ("refuse", "error: no more of this\n\nhint: say something else\n"),
        ("/rest", "error: unknown command `/rest`\n\nhint: `/help` lists them\n"),
        ("/save", "error: `/save` needs the name of a file\n\nhint: /save chat.json\n"),
        ("/save model", "error: `model` exists\n\nhint: give another name\n"),
        ("/save nowhere/chat.json", "error: `nowhere/chat.json` cannot be written: no such file or directory\n"),
    ],
)
def test_what_fails_is_as_if_it_had_not_been_said(chat, line, message):
    ran = chat(f"{line}\nhi\n")
    assert (ran.code, ran.out.splitlines()[-1]) == (1, "21 tokens: hi für 你")
    assert ran.err.startswith(message)
    assert "Traceback" not in ran.err


def test_a_path_is_no_command(chat):
    assert chat("/usr/bin\n").out == "27 tokens: /usr/bin für 你\n"


def test_after_exit_nothing_is_read(chat):
    assert chat("hi\n/exit\nhi\n").out == "21 tokens: hi für 你\n"


def test_bytes_that_are_no_text_are_no_reason_to_fail(chat):
    assert chat(b"h\xffi\n").out.endswith("tokens: h\ufffdi für 你\n")


def test_saved_messages_can_be_read(chat, tmp_path):
    ran = chat("hi\n/save chat.json\nso\n/save chat.json\n", "--system", "be kind")
    assert (ran.code, ran.err) == (0, "saved 2 messages in chat.json\nsaved 4 messages in chat.json\n")
    document = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert (document["model"], document["runtime"]) == ("model", "echo")
    assert [message["role"] for message in document["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert document["messages"][1]["content"] == "hi"
    assert document["messages"][2]["content"].endswith(" tokens: hi für 你")


def test_help_is_no_data(chat):
    ran = chat("/help\n")
    assert ran.out == ""
    assert all(command in ran.err for command in ("/reset", "/system TEXT", "/save FILE", "/exit", "Ctrl-C"))


def test_a_model_without_a_template_continues_the_text_and_says_so_once(chat, tmp_path):
    write_chat_model(tmp_path / "model", None)
    ran = chat("once\nagain\n")
    assert (ran.code, ran.err) == (0, "the model has no chat template: it continues the text\n")
    assert chat("once\n", "--system", "be kind").err.startswith("error: the model has no chat template, so there is no system text\n")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--temperature", "-1"), 2, "error: invalid value for `--temperature`"),
        (("--top-p", "0"), 2, "error: invalid value for `--top-p`"),
        (("--runtime", "ecko"), 2, "error: unknown runtime `ecko`\n\nhint: did you mean `echo`?"),
    ],
)
def test_wrong_options_are_refused(chat, options, code, message):
    ran = chat("hi\n", *options)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(message)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path, env, chat):
    command = f"yes long | '{sys.executable}' -m qhub chat model --runtime echo | head -c 5"
    ran = subprocess.run(command, shell=True, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, check=False)
    assert (ran.stdout, ran.stderr) == (b"23 to", b"")


@pytest.fixture
def terminal(tmp_path, env):
    """`qhub chat` in a terminal, greeted."""
    write_chat_model(tmp_path / "model")
    with Terminal(["chat", "model", "--runtime", "echo", "--max-tokens", 300], tmp_path, env) as opened:
        greeting = opened.wait_for("> ")
        assert greeting == "model on `echo`, context of 400 tokens; `/help` shows the commands, Ctrl-D leaves\n> "
        yield opened


def test_in_a_terminal_a_status_line_follows_each_reply(terminal):
    terminal.type("hi\r")
    assert "21 tokens: hi für 你\n[" in terminal.wait_for("> ")
    terminal.type("so\r")
    status = terminal.wait_for("> ").splitlines()[-2]
    assert status.startswith("[")
    assert "tokens/s; " in status
    assert " of 400 tokens in context; " in status
    assert status.endswith("MB]")
    terminal.type(CTRL_D)
    assert terminal.end() == (0, "\n")


def test_ctrl_c_stops_a_reply_and_the_session_goes_on(terminal):
    terminal.type("long\r")
    terminal.wait_for("für 你aaa")
    terminal.type(CTRL_C)
    assert ", stopped; " in terminal.wait_for("> ")
    terminal.type("/reset\r")
    terminal.wait_for("> ")
    terminal.type("hi\r")
    assert "21 tokens: hi für 你\n" in terminal.wait_for("> ")
    assert terminal.insist(CTRL_C, "> ").endswith("\nCtrl-D or `/exit` leaves\n> ")
    terminal.type("/exit\r")
    assert terminal.end()[0] == 0


def test_an_error_in_a_terminal_is_no_exit_code(terminal):
    terminal.type("crash\r")
    assert "error: `echo` failed: RuntimeError: out of luck\n" in terminal.wait_for("> ")
    terminal.type("hi\r")
    assert "21 tokens: hi für 你\n" in terminal.wait_for("> ")
    terminal.type(CTRL_D)
    assert terminal.end()[0] == 0


def test_help_starts_fast_and_nothing_of_the_chat_is_imported(qhub):
    heavy = "{'torch', 'tokenizers', 'jinja2', 'numpy', 'qhub.chat.dialogue', 'qhub.prove.bench', 'qhub.opening'}"
    code = f"import sys; from qhub.cli import main; main(sys.argv[1:]); assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    for command in ("chat", "bench"):
        ran = qhub(command, "--help", command=("-c", code))
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"Usage: qhub {command} [OPTIONS] ARTIFACT\n")
