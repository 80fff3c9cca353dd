"""Texts become tokens and tokens text; what was said stays the tokens it was; a session is told only what is new."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from chat_models import CHATML, SPECIAL, byte_tokenizer, write_chat_model

from qhub.chat.dialogue import Dialogue, Language
from qhub.chat.speaker import Sampling, Speaker, shared
from qhub.chat.template import ChatTemplate, find_template
from qhub.chat.tokenizer import TextStream, Tokenizer, Until
from qhub.errors import QhubError, UsageError

BYTES = byte_tokenizer()
START, END, BEGIN, STOP = 258, 259, 256, 257


def ids_of(text):
    return BYTES.encode(text).ids


def decode(ids):
    return BYTES.decode(list(ids))


TEXTS = ("plain", "für Élise", "你好，世界", "🙂 and 👩‍👩‍👧", "mixed 你 end", "a" * 100 + "é" * 60)


@pytest.mark.parametrize("context", [(), tuple(ids_of("before é"))], ids=["alone", "going on"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_the_text(text, context):
    stream = TextStream(decode, context)
    pieces = [stream.push(token) for token in ids_of(text)]
    assert "".join(pieces) + stream.rest() == text
    assert stream.rest() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text.encode())  # a token each, so most characters take several
    assert "".join(pieces) == text


def test_half_a_character_at_the_end_is_shown_at_the_end():
    stream = TextStream(decode)
    pieces = [stream.push(token) for token in ids_of("ab你")[:-1]]
    assert (pieces, stream.rest()) == (["a", "b", "", ""], "\ufffd")


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    stream = TextStream(decode)
    broken = ids_of("你")[:1] + ids_of("x")
    assert "".join(stream.push(token) for token in broken) == "\ufffdx"


def test_a_text_begins_as_the_tokenizer_says(tmp_path):
    plain = Tokenizer(write_chat_model(tmp_path / "plain"))
    begins = Tokenizer(write_chat_model(tmp_path / "begins", begins=True))
    told = Tokenizer(write_chat_model(tmp_path / "told", add_bos_token=True))
    both = Tokenizer(write_chat_model(tmp_path / "both", begins=True, add_bos_token=True))
    found = [tokenizer.encode("hi", begin=True) for tokenizer in (plain, begins, told, both)]
    assert found == [ids_of("hi"), [BEGIN, *ids_of("hi")], [BEGIN, *ids_of("hi")], [BEGIN, *ids_of("hi")]]
    assert both.encode("hi") == ids_of("hi")
    assert begins.named_tokens() == {"bos_token": "<s>", "eos_token": "</s>"}
    assert begins.decode([BEGIN, *ids_of("hi"), END]) == "hi"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", "[1]", "holds `list` where a JSON object is expected"),
        ("tokenizer_config.json", "{", "is not JSON"),
    ],
)
def test_a_broken_tokenizer_is_a_clear_error(tmp_path, name, content, message):
    folder = write_chat_model(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(QhubError, match=message):
        Tokenizer(folder)


SAID = [{"role": "user", "content": "hi"}]


def test_a_template_gets_messages_and_the_models_tokens():
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}", {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": " hi "}]) == "<s>[user]hi"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{% for m in messages %}{% break %}{% endfor %}end", "end"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),
    ],
    ids=["tojson", "generation", "break", "strftime_now", "blocks are trimmed"],
)
def test_templates_have_what_transformers_gives_them(source, expected):
    assert ChatTemplate(source, {}).render(SAID) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "refuses this: .*unsafe"),
        ("{% set _ = messages.append(1) %}", "refuses this: .*unsafe|not safely callable"),
        ("{{ 1 + 'a' }}", "refuses this: "),
    ],
    ids=["its own refusal", "outside the sandbox", "changing its input", "a mistake in it"],
)
def test_what_a_template_must_not_do_is_an_error(source, message):
    with pytest.raises(QhubError, match=message):
        ChatTemplate(source, {}).render(SAID)


def test_a_template_that_does_not_parse_is_an_error():
    with pytest.raises(QhubError, match="the model's chat template is broken"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize(
    ("source", "end"),
    [
        (CHATML, END),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", STOP),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
    ],
    ids=["ChatML", "Llama 2", "no token", "refused"],
)
def test_the_token_after_a_reply_is_found_in_the_template(source, end):
    assert ChatTemplate(source, {}).end_of_reply({text: 256 + index for index, text in enumerate(SPECIAL)}) == end


def test_a_template_is_found_wherever_models_keep_it(tmp_path):
    assert find_template(tmp_path, {}) is None
    assert find_template(tmp_path, {"chat_template": "one"}) == "one"
    several = [{"name": "tools", "template": "two"}, {"name": "default", "template": "three"}]
    assert find_template(tmp_path, {"chat_template": several}) == "three"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "four"}))
    assert find_template(tmp_path, {}) == "four"
    (tmp_path / "chat_template.jinja").write_text("five")
    assert find_template(tmp_path, {"chat_template": "one"}) == "five"


def test_a_reply_ends_at_the_tokens_of_all_configs_and_of_the_template(tmp_path):
    folder = write_chat_model(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert Language(folder).stops == {7, 8, STOP, END}


def chatting(tmp_path, template=CHATML, **more):
    return Dialogue(Language(write_chat_model(tmp_path, template, **more)))


def test_a_turn_is_all_that_was_said_and_the_beginning_of_the_reply(tmp_path):
    dialogue = chatting(tmp_path)
    first = dialogue.ask("hi")
    assert first.ids == [START, *ids_of("user\nhi"), END, *ids_of("\n"), START, *ids_of("assistant\n")]
    dialogue.keep(first, ids_of("yes"))
    second = dialogue.ask("so")
    assert second.ids[: len(first.ids) + 3] == [*first.ids, *ids_of("yes")]
    assert BYTES.decode(second.ids[len(first.ids) + 3 :], skip_special_tokens=False) == (
        "<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"
    )


def test_asking_changes_nothing_until_the_reply_is_kept(tmp_path):
    dialogue = chatting(tmp_path)
    assert dialogue.ask("one") == dialogue.ask("one")
    assert (dialogue.messages, dialogue.ids) == ([], [])


def test_a_reply_stays_the_tokens_that_were_generated(tmp_path):
    """Half a character, which no text encodes to."""
    dialogue = chatting(tmp_path)
    turn, reply = dialogue.ask("hi"), ids_of("ab你")[:-1]
    dialogue.keep(turn, reply)
    assert dialogue.messages[-1] == {"role": "assistant", "content": "ab\ufffd"}
    following = dialogue.ask("so").ids
    assert following[: len(turn.ids) + len(reply)] == [*turn.ids, *reply]


def test_where_the_template_changes_a_reply_all_is_encoded_again(tmp_path):
    dialogue = chatting(tmp_path, CHATML.replace("message['content']", "message['content'] | trim"))
    turn = dialogue.ask("hi")
    dialogue.keep(turn, ids_of(" yes "))
    ids = dialogue.ask("so").ids
    assert ids[: len(turn.ids) + 3] == [*turn.ids, *ids_of("yes")]
    assert ids[len(turn.ids) + 3] == END


def test_a_system_text_comes_first_and_may_change(tmp_path):
    dialogue = chatting(tmp_path)
    dialogue.set_system("be kind")
    turn = dialogue.ask("hi")
    assert BYTES.decode(turn.ids, skip_special_tokens=False).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi")
    dialogue.keep(turn, ids_of("yes"))
    dialogue.set_system("be brief")
    text = BYTES.decode(dialogue.ask("so").ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")
    dialogue.reset()
    assert [message["content"] for message in dialogue.all_messages()] == ["be brief"]
    dialogue.set_system("")
    assert dialogue.all_messages() == []


def test_without_a_template_lines_and_replies_are_one_text(tmp_path):
    dialogue = chatting(tmp_path, None, begins=True)
    turn = dialogue.ask("once")
    assert turn.ids == [BEGIN, *ids_of("once")]
    dialogue.keep(turn, ids_of(" upon"))
    assert dialogue.ask("a time").ids == [BEGIN, *ids_of("once upon\na time")]
    with pytest.raises(UsageError, match="no chat template, so there is no system text"):
        dialogue.set_system("be kind")


def test_how_much_two_sequences_share():
    assert [shared([], [1]), shared([1, 2], [1, 2, 3]), shared([1, 5, 3], [1, 2, 3]), shared([4], [5])] == [0, 2, 1, 0]


class Kept:
    """A conversation that notes what it is given, and says 7 for ever."""

    capacity = 100

    def __init__(self):
        self.ids, self.given = [], []

    @property
    def length(self):
        return len(self.ids)

    def truncate(self, length):
        del self.ids[length:]

    def reply(self, ids, max_new_tokens, *, temperature, top_p, seed):
        self.given.append((list(ids), max_new_tokens, seed))
        if len(self.ids) + len(ids) > self.capacity:
            raise QhubError("no room")
        self.ids += ids
        for _ in range(max_new_tokens):
            yield 7
            self.ids.append(7)


class KeptSession:
    def __init__(self):
        self.made = Kept()

    def conversation(self):
        return self.made


SAMPLING = Sampling(temperature=0.0, top_p=1.0, seed=5, max_tokens=3)


def test_only_what_is_new_is_given_to_a_session_that_keeps():
    speaker = Speaker(KeptSession(), SAMPLING)
    kept = speaker.session.made
    assert list(speaker.reply([1, 2, 3], 50)) == [7, 7, 7]
    assert list(speaker.reply([1, 2, 3, 7, 7, 7, 4], 2)) == [7, 7]
    assert list(speaker.reply([1, 2, 9], 50)) == [7, 7, 7]
    assert list(speaker.reply([1, 2, 9], 50)) == [7, 7, 7]  # the same again: something has to be read
    assert kept.given == [([1, 2, 3], 3, 5), ([4], 2, 6), ([9], 3, 7), ([9], 3, 8)]


def test_the_room_is_the_smaller_of_what_model_and_session_have():
    speaker = Speaker(KeptSession(), SAMPLING)
    assert [speaker.room(context) for context in (None, 50, 500)] == [100, 50, 100]
    speaker.conversation = None
    assert [speaker.room(context) for context in (None, 50)] == [None, 50]


def test_a_reply_that_is_left_early_spoils_nothing():
    speaker = Speaker(KeptSession(), SAMPLING)
    reply = speaker.reply([1, 2], 50)
    assert [next(reply), next(reply)] == [7, 7]  # the second is not in what is kept yet
    reply.close()
    assert speaker.session.made.ids == [1, 2, 7]
    list(speaker.reply([1, 2, 7, 7, 3], 50))
    assert speaker.session.made.given[-1][0] == [7, 3]


def test_a_session_without_room_stays_usable():
    speaker = Speaker(KeptSession(), SAMPLING)
    list(speaker.reply([1, 2], 50))
    with pytest.raises(QhubError, match="no room"):
        list(speaker.reply([1, 2, *range(200)], 50))
    assert list(speaker.reply([1, 2, 3], 50)) == [7, 7, 7]
    assert speaker.session.made.given[-1][0] == [3]


# Stop texts.


@pytest.mark.parametrize(
    ("pieces", "shown", "ended"),
    [
        (["Hello", " wor", "ld"], "Hello world", False),
        (["Hello STOP more"], "Hello ", True),
        (["Hello S", "TO", "P more"], "Hello ", True),
        (["Hello ST", "ill"], "Hello STill", False),
        (["a\n", "\nb"], "a", True),
        (["STOP"], "", True),
    ],
    ids=["none comes", "in one piece", "in three pieces", "only its beginning", "the other one", "at once"],
)
def test_text_is_shown_up_to_the_first_stop_text(pieces, shown, ended):
    until = Until(["STOP", "\n\n", ""])
    assert "".join(until.push(piece) for piece in pieces) + until.rest() == shown
    assert until.ended == ended
    assert not ended or until.push("more") == ""
