"""Chat templates: Jinja programs that come with a model, run in a sandbox, with what transformers gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qhub.chat.tokenizer import read_object
from qhub.errors import QhubError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_MARKER = "the-reply-ends-here"


class ChatTemplate:
    """Turns messages (`role`, `content`) into the text that the model was trained on; `tokens` are its special tokens by name."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError

        self._tokens = tokens
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise QhubError(f"the model's chat template is broken: {error}", hint="get the tokenizer's files again") from None

    def render(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """The text of `messages`; with `reply` up to where the model's next reply begins.

        :raises QhubError: when the template refuses them.
        """
        from jinja2 import TemplateError

        try:
            given = {"messages": list(messages), "add_generation_prompt": reply, "tools": None, "documents": None}
            return self._template.render(**given, **self._tokens)
        except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            hint = "some models take no system text: leave out `--system`, `/system` without a text removes it"
            raise QhubError(f"the model's chat template refuses this: {error}", hint=hint) from None

    def end_of_reply(self, special: Mapping[str, int]) -> int | None:
        """The token that the template puts after a reply; `special` are the special tokens' ids by their text."""
        said = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": _MARKER})
        try:
            after = self.render(said, reply=False).rpartition(_MARKER)[2].lstrip()
        except QhubError:
            return None
        starts = [text for text in special if text and after.startswith(text)]
        return special[max(starts, key=len)] if starts else None


def find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The source of the chat template of a model folder whose tokenizer_config.json is `config`; None if it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    found = config.get("chat_template") or read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several with names
        named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: see `_compile_jinja_template` in transformers' chat_template_utils.py."""
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise QhubError("this model's chat template needs the package `jinja2`", hint="pip install 'qhub-core[chat]'") from None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _generation() -> Any:  # noqa: ANN401 - a class of Jinja extensions
    """`{% generation %}…{% endgeneration %}` marks replies for training; here it is what it encloses."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:  # noqa: ANN401 - Jinja's parser and nodes
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:  # noqa: ANN401 - whatever a template has
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
