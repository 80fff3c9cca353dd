"""`qhub chat`: talk to a model, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App
from qhub.cli.output import Output
from qhub.errors import ExitCode, QhubError, UsageError
from qhub.units import human_bytes

if TYPE_CHECKING:
    from qhub.chat.dialogue import Dialogue, Turn
    from qhub.chat.speaker import Speaker
    from qhub.interfaces import Runtime, Session

_COUNT = click.IntRange(min=1)
_SHARE = click.FloatRange(0, 1, min_open=True)
_MAX_TOKENS = 512
_COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)
_HELP = """\
/reset         forget what was said
/system TEXT   what the model is told to be; without TEXT nothing
/save FILE     write the conversation, as JSON
/exit          leave, as Ctrl-D does
Ctrl-C stops a reply."""


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--runtime", metavar="NAME", help="The engine; default: the one that serves this machine best and takes the model.")
@click.option("--system", metavar="TEXT", help="What the model is told to be.")
@click.option("--max-tokens", metavar="N", type=_COUNT, help="Longest reply; default 512, at most a quarter of the context.")
@click.option("--temperature", metavar="T", type=click.FloatRange(min=0), default=0.7, help="0: always the likeliest; default 0.7.")
@click.option(
    "--top-p", metavar="P", type=click.FloatRange(0, 1, min_open=True), default=0.95, help="Draw from the likeliest; default 0.95."
)
@click.option("--stop", "stops", metavar="TEXT", multiple=True, help="End a reply where this text comes; may be repeated.")
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, help="Decides what is drawn; default 0.")
@click.option("--threads", metavar="N", type=_COUNT, help="Default: the engine's choice.")
@click.pass_obj
def chat(
    app: App,
    /,
    artifact: Path,
    runtime: str | None,
    system: str | None,
    stops: tuple[str, ...],
    threads: int | None,
    **sampling: Any,  # noqa: ANN401 - click's values
) -> ExitCode:
    """Talk to the model in ARTIFACT. In a pipe every line is a turn, and only replies are printed."""
    from qhub.chat.dialogue import Dialogue, Language
    from qhub.chat.speaker import Sampling, Speaker
    from qhub.opening import blaming, first_that_opens, opening
    from qhub.types import OpenOptions

    found = opening(artifact, app.plugins, runtime)
    dialogue = Dialogue(Language(found.path), system)
    options = OpenOptions(threads=threads)

    def opened(engine: Runtime) -> tuple[Runtime, Session]:
        return engine, blaming(engine, lambda: engine.open(found.path, options))

    engine, session = first_that_opens(found, opened, app.output.warning)
    with contextlib.closing(session):
        longest = sampling.pop("max_tokens") or min(_MAX_TOKENS, max(1, (found.context or sys.maxsize) // 4))
        speaker = Speaker(session, Sampling(**sampling, max_tokens=longest))
        return Chat(app.output, engine, dialogue, speaker, speaker.room(found.context) or sys.maxsize, artifact, stops).run()


@dataclass
class Reply:
    """What came of a turn: the tokens, when each came, and why there are no more."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    end: str = ""

    def in_words(self) -> str:
        """How many and how fast, e.g. `128 tokens, 31.2 tokens/s, stopped`."""
        seconds = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        rate = f"{(len(self.times) - 1) / seconds:.3g} tokens/s" if seconds > 0 else ""
        count = f"{len(self.tokens)} token{'s' * (len(self.tokens) != 1)}"
        return ", ".join(part for part in (count, rate, self.end) if part)


@dataclass
class Chat:
    """Reads lines, prints replies. `room` is the model's context in tokens; a reply ends where one of `stops` comes."""

    output: Output
    engine: Runtime
    dialogue: Dialogue
    speaker: Speaker
    room: int
    artifact: Path
    stops: tuple[str, ...] = ()
    failed: bool = False
    saved: set[Path] = field(default_factory=set)

    @property
    def terminal(self) -> bool:
        """Whether somebody types."""
        return sys.stdin.isatty()

    def run(self) -> ExitCode:
        """Until the end of the input; in a pipe it failed if a line could not be answered."""
        self._greet()
        for line in self._lines():
            command = _COMMAND.fullmatch(line.strip())
            if command and command[1] == "/exit":
                break
            try:
                if command:
                    self._obey(command[1], (command[2] or "").strip())
                elif line.strip():
                    self._answer(line)
            except QhubError as error:
                self.output.error(error.message, error.hint)
                self.failed = True
        return ExitCode.FAILED if self.failed and not self.terminal else ExitCode.OK

    def _greet(self) -> None:
        if self.terminal:
            context = "" if self.room == sys.maxsize else f", context of {self.room} tokens"
            self.output.text(f"{self.artifact} on `{self.engine.name}`{context}; `/help` shows the commands, Ctrl-D leaves")
        if self.dialogue.language.template is None:
            self.output.text("the model has no chat template: it continues the text")

    def _lines(self) -> Iterator[str]:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` line editing
        while True:
            try:
                line = self._line()
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                self.output.text("\nCtrl-D or `/exit` leaves")
                continue
            if line is None:
                return
            yield line

    def _line(self) -> str | None:
        """The next line without its end; None at the end of the input."""
        if self.terminal and sys.stdout.isatty():
            try:
                return input("> ")
            except EOFError:
                self.output.stream("\n")
                return None
        if self.terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    def _answer(self, line: str) -> None:
        """Print the reply to `line`. A line that fails is as if it had not been said."""
        turn = self.dialogue.ask(line)
        room = self.room - len(turn.ids)
        if room < 1:
            hint = "say it in fewer words, or `/reset` to begin anew" if self.dialogue.messages else "say it in fewer words"
            raise QhubError(f"`{len(turn.ids)}` tokens do not fit the model's context of {self.room}", hint=hint)
        reply = self._reply(turn, room)
        if reply.tokens or not reply.end:
            self.dialogue.keep(turn, reply.tokens)
        if self.terminal and sys.stderr.isatty():
            self.output.text(f"[{reply.in_words()}; {self._used()}]")

    def _reply(self, turn: Turn, room: int) -> Reply:
        from qhub.chat.tokenizer import Until

        reply, stream, until = Reply(), self.dialogue.stream(turn), Until(self.stops)
        longest = self.speaker.sampling.max_tokens
        try:
            with contextlib.closing(self._tokens(turn, room)) as tokens:
                for token in tokens:
                    if token in self.dialogue.language.stops:
                        return reply
                    reply.tokens.append(token)
                    reply.times.append(time.perf_counter())
                    self.output.stream(until.push(stream.push(token)))
                    if until.ended:
                        return reply
            if len(reply.tokens) >= min(room, longest):
                reply.end = "cut off by `--max-tokens`" if longest < room else "cut off: the context is full"
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            reply.end = "stopped"
        finally:
            self.output.stream(until.push(stream.rest()) + until.rest() + "\n")
        return reply

    def _tokens(self, turn: Turn, room: int) -> Generator[int, None, None]:
        from qhub.errors import failure_of

        try:
            yield from self.speaker.reply(turn.ids, room)
        except (QhubError, OSError, MemoryError):
            raise
        except Exception as error:
            raise failure_of(self.engine.name, error) from error

    def _used(self) -> str:
        from qhub.events import rss_bytes

        of = "" if self.room == sys.maxsize else f" of {self.room}"
        return f"{len(self.dialogue.ids)}{of} tokens in context; {human_bytes(rss_bytes())}"

    def _obey(self, command: str, text: str) -> None:
        """Carry out a `/command`.

        :raises UsageError: when there is no such command, or it lacks something.
        """
        if command == "/reset":
            self.dialogue.reset()
        elif command == "/system":
            self.dialogue.set_system(text)
        elif command == "/save":
            self._save(text)
        elif command == "/help":
            self.output.text(_HELP)
        else:
            raise UsageError(f"unknown command `{command}`", hint="`/help` lists them")

    def _save(self, name: str) -> None:
        """Write the messages; a file that this chat did not write stays as it is."""
        path = Path(name).expanduser()
        if not name:
            raise UsageError("`/save` needs the name of a file", hint="/save chat.json")
        if path.exists() and path.resolve() not in self.saved:
            raise UsageError(f"`{name}` exists", hint="give another name")
        document = {"model": str(self.artifact), "runtime": self.engine.name, "messages": self.dialogue.all_messages()}
        beside = path.with_name(f".{path.name}.part")
        try:
            beside.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            raise QhubError(f"`{name}` cannot be written: {(error.strerror or str(error)).lower()}", hint="give another name") from None
        self.saved.add(path.resolve())
        self.output.text(f"saved {len(self.dialogue.messages)} messages in {name}")
