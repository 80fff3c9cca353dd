"""`qhub bench`: how fast an artifact runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qhub.cli import App
from qhub.errors import UsageError
from qhub.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from qhub.interfaces import Runtime
    from qhub.opening import Opening

_PROMPTS = (128, 512)
_BATCHES = (1, 32)
Cells = Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]]
_COUNT = click.IntRange(min=1)


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for; empty `threads`: 1 and all cores, empty `prompts`: 128 and 512."""

    threads: tuple[int, ...]
    prompts: tuple[int, ...]
    generate: int
    exact: bool
    kernel: str | None
    rounds: int
    seed: int
    batches: tuple[int, ...]
    floating: Path | None


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--runtime", metavar="NAME", help="The engine; default: the one that serves this machine best and takes the model.")
@click.option("--threads", metavar="N", type=_COUNT, multiple=True, help="May be repeated; default: 1, and all physical cores.")
@click.option("--prompt", "prompts", metavar="TOKENS", type=_COUNT, multiple=True, help="May be repeated; default: 128 and 512.")
@click.option("--generate", metavar="TOKENS", type=_COUNT, default=128, help="Tokens to generate; default 128.")
@click.option("--batch", "batches", metavar="N", type=_COUNT, multiple=True, help="Items at once, of a network; default: 1 and 32.")
@click.option(
    "--float", "floating", metavar="DIR", type=click.Path(exists=True, path_type=Path), help="A float artifact to measure in turn with it."
)
@click.option("--exact", is_flag=True, help="Compute in float32 where the engine has the choice.")
@click.option("--kernel", metavar="K", help="Force this kernel of the engine; an error if it does not run here.")
@click.option("--rounds", metavar="N", type=_COUNT, default=3, help="How often each is measured; default 3.")
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, help="Which random tokens are used; default 0.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def bench(app: App, /, artifact: Path, runtime: str | None, *, as_json: bool, **wishes: Any) -> None:  # noqa: ANN401 - click's values
    """Measure ARTIFACT on this machine: loading, prompts, generation, memory, energy."""
    from qhub.opening import first_that_opens, opening
    from qhub.route.host import detect

    found = opening(artifact, app.plugins, runtime)
    asked = Wishes(**wishes)
    measured = _measured_network if found.network else _measured
    runs = first_that_opens(found, lambda engine: measured(app, found, engine, asked), app.output.warning)
    if as_json:
        app.output.json({"artifact": str(artifact), "host": detect().summary, "runs": runs})
    else:
        columns, rows = _table(runs, _network_cells if found.network else _cells)
        app.output.table(columns, rows, title=str(artifact), right=columns[1:])


def _measured(app: App, found: Opening, engine: Runtime, wishes: Wishes) -> list[dict[str, Any]]:
    """One set of figures for each number of threads; a fresh process each."""
    from qhub.events import Events
    from qhub.prove.bench import Job, measure_apart
    from qhub.route.host import fast_cores
    from qhub.types import OpenOptions

    if found.vocabulary is None:
        raise UsageError(f"`{found.path}` is no language model: its config names no vocabulary", hint="`qhub inspect` says what it is")
    prompts, generate = _fitting(app, found.context, wishes)
    runs = []
    for threads in wishes.threads or dict.fromkeys((1, fast_cores())):
        options = OpenOptions(threads, wishes.exact, wishes.kernel)
        job = Job(str(found.path), engine.name, options, prompts, generate, wishes.rounds, found.vocabulary, wishes.seed)
        runs.append(measure_apart(job, Events(listener=partial(_tell, app, threads))))
    return runs


def _measured_network(app: App, found: Opening, engine: Runtime, wishes: Wishes) -> list[dict[str, Any]]:
    """One set of figures for each number of threads; a fresh process each. Texts are as long as the first `--prompt`, sounds a second."""
    from qhub.events import Events
    from qhub.prove.bench import measure_apart
    from qhub.prove.bench_network import NetworkJob
    from qhub.route.host import fast_cores
    from qhub.types import OpenOptions

    runs = []
    for threads in wishes.threads or dict.fromkeys((1, fast_cores())):
        job = NetworkJob(
            str(found.path),
            engine.name,
            OpenOptions(threads, wishes.exact, wishes.kernel),
            wishes.batches or _BATCHES,
            (wishes.prompts or _PROMPTS)[0],
            wishes.rounds,
            vocabulary=found.vocabulary or 100,
            float_path=None if wishes.floating is None else str(wishes.floating),
            seed=wishes.seed,
        )
        runs.append(measure_apart(job, Events(listener=partial(_tell, app, threads))))
    return runs


def _tell(app: App, threads: int, event: dict[str, Any]) -> None:
    app.output.progress({**event, "name": f"{_threads(threads)}: {event['name']}"} if event["event"] == "stage" else event)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _fitting(app: App, context: int | None, wishes: Wishes) -> tuple[tuple[int, ...], int]:
    """The prompts and the number of new tokens that the model's context has room for; what is left out is said.

    :raises UsageError: when a prompt that was asked for is too long, or nothing fits.
    """
    room = context if context is not None else max((*wishes.prompts, *_PROMPTS, wishes.generate + 1))
    prompts, generate = wishes.prompts or _PROMPTS, min(wishes.generate, room - 1)  # beside the token that it starts from
    too_long = [count for count in prompts if count > room]
    if generate < 1 or (wishes.prompts and too_long):
        what = f"a prompt of `{too_long[0]}` tokens" if too_long else "generation"
        raise UsageError(f"{what} does not fit the model's context of {room}", hint=f"try `--prompt {max(1, room // 2)}`")
    if too_long:
        app.output.text(f"no prompt of {' and '.join(map(str, too_long))} tokens: the model's context is {room}")
    if generate < wishes.generate:
        app.output.text(f"{generate} tokens are generated, not {wishes.generate}: the model's context is {room}")
    return tuple(count for count in prompts if count <= room), generate


def _table(runs: Sequence[Mapping[str, Any]], cells: Cells) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = tuple(_threads(run["threads"]) for run in runs)
    rows = zip(*(list(cells(run)) for run in runs), strict=True)
    return (runs[0]["runtime"], *columns), [(row[0][0], *(text for _, text in row)) for row in rows]


def _cells(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    how = f" ({run['how_loaded']})" if run["how_loaded"] else ""
    yield "load", human_seconds(run["load_s"]) + how if run["load_s"] >= 1 else f"{run['load_s'] * 1e3:.0f} ms{how}"
    for prompt in run["prompt"]:
        yield f"prompt of {prompt['tokens']}, tokens/s", _rate(prompt)
    yield f"generate {run['generate']['tokens']}, tokens/s", _rate(run["generate"])
    for name, value in run["latency_ms"].items():
        yield f"ms per token, {name}", f"{value:.3g}"
    yield "peak memory", human_bytes(run["peak_rss_bytes"])
    yield "share of the memory bandwidth", _or_not(run["bandwidth_share"], lambda share: f"{100 * share:.0f} %")
    yield "share of the int8 peak", _or_not(run["compute_share"], lambda share: f"{100 * share:.0f} %")
    yield "joules per token", _or_not(run["energy_j"], lambda energy: f"{energy:.3g}")


def _network_cells(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "load", f"{run['load_s'] * 1e3:.0f} ms"
    floats = (run["float"] or {}).get("batches") or [None] * len(run["batches"])
    for row, other in zip(run["batches"], floats, strict=True):
        latency = row["latency_ms"]
        yield f"batch of {row['batch']}, ms p50 (p90, p99)", f"{latency['p50']:.3g} ({latency['p90']:.3g}, {latency['p99']:.3g})"
        yield f"batch of {row['batch']}, items/s", f"{row['items_per_s']:,.4g}"
        if other is not None:
            before = other["latency_ms"]["p50"]
            yield f"batch of {row['batch']}, float ms p50", f"{before:.3g} ({before / latency['p50']:.2f} ×)"
    yield "peak memory", human_bytes(run["peak_rss_bytes"])
    yield "joules per item", _or_not(run["energy_j"], lambda energy: f"{energy:.3g}")


def _rate(figures: Mapping[str, float]) -> str:
    return f"{figures['tokens_per_s']:.4g} ({figures['min']:.4g} – {figures['max']:.4g})"


def _or_not(value: float | None, worded: Any) -> str:  # noqa: ANN401 - a function of a number
    return "not measured" if value is None else str(worded(value))
