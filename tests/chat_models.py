"""What tests of chats share: a byte tokenizer, a chat template, and a toy engine that answers with what it heard."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(*, begins: bool = False) -> Tokenizer:
    """Every byte is a token; with `begins` a text begins with `<s>`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


def write_chat_model(folder: Path, template: str | None = CHATML, *, context: int = 400, begins: bool = False, **config: object) -> Path:
    """A folder that the toy engines open: config, tokenizer and chat template; its end token is `</s>`."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"vocab_size": 260, "max_position_embeddings": context, "eos_token_id": 257}
    (folder / "config.json").write_text(json.dumps({**facts, "quantization_config": {"quant_method": "compressed-tensors"}}))
    byte_tokenizer(begins=begins).save(str(folder / "tokenizer.json"))
    says = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **({"chat_template": template} if template else {}), **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(says))
    return folder


ENGINES = '''
import time
from tokenizers import Tokenizer
from qhub import QhubError, Runtime, hookimpl

class Session:
    """Answers a line with how many tokens it was given and the line; `long` goes on for ever, `crash` and `refuse` fail."""

    def __init__(self, path):
        self.tokens = Tokenizer.from_file(str(path / "tokenizer.json"))

    def answer(self, ids, given):
        heard = self.tokens.decode(list(ids), skip_special_tokens=False)
        said = heard.rpartition("user\\n")[2].partition("<|im_end|>")[0]
        if said == "crash":
            raise RuntimeError("out of luck")
        if said == "refuse":
            raise QhubError("no more of this", hint="say something else")
        yield from self.tokens.encode(f"{given} tokens: {said} für 你", add_special_tokens=False).ids
        while said == "long":
            time.sleep(0.01)
            yield self.tokens.encode("a", add_special_tokens=False).ids[0]
        yield self.tokens.token_to_id("<|im_end|>")

    def generate(self, ids, max_new_tokens, *, temperature=0.0, top_p=1.0, seed=0, until_stop=True):
        for count, token in zip(range(max_new_tokens), self.answer(ids, len(ids))):
            yield token

    def close(self):
        pass

class Conversation:
    """It keeps all that was said, and knows how much it was given anew."""

    capacity = 400

    def __init__(self, session):
        self.session, self.ids = session, []

    @property
    def length(self):
        return len(self.ids)

    def truncate(self, length):
        del self.ids[length:]

    def reply(self, ids, max_new_tokens, *, temperature=0.0, top_p=1.0, seed=0):
        self.ids += ids
        for count, token in zip(range(max_new_tokens), self.session.answer(self.ids, len(ids))):
            yield token
            self.ids.append(token)

class Keeping(Session):
    def conversation(self):
        return Conversation(self)

class Echo(Runtime):
    name = "echo"
    summary = "says what it heard"
    distribution = "qhub-echo"
    formats = ("compressed-tensors",)

    def open(self, path, options):
        return Session(path)

class Keeps(Echo):
    name = "keeps"

    def open(self, path, options):
        return Keeping(path)

@hookimpl
def qhub_runtimes():
    return [Echo(), Keeps()]
'''
