"""The quantization flowchart as data: questions, edges and leaves; `walk` answers it, `mermaid` draws it.

A leaf names a method *family*. Quantizers say which family they serve, so a new plugin joins at its leaf without a change
here. The answers are in `answers.py`: they follow the facts of the device, and where older charts are out of date (4-bit
weights run on CPUs and Apple silicon today, int8 needs no AVX-512) a reason says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qhub.route import answers
from qhub.route.answers import Answer, Situation
from qhub.types import Family, Goals, ModelProfile, Step, Target


@dataclass(frozen=True, slots=True)
class Question:
    """A node with a choice: `edges` leads from each answer to the next node."""

    text: str
    answer: Callable[[Situation], Answer]
    edges: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where a path ends: a family, or None if nothing can be done there (`reason` then says what to do)."""

    text: str
    family: Family | None
    reason: str = ""
    weight_bits: int | None = None  # of a weight-only family


@dataclass(frozen=True, slots=True)
class Walk:
    """What the chart says: the leaf, the path to it with the leaf as its last step, and the reasons; the leaf's is the last."""

    leaf: Leaf
    path: tuple[Step, ...]
    reasons: tuple[str, ...]

    @property
    def family(self) -> Family | None:
        """The family of methods at the leaf; None: refused."""
        return self.leaf.family


START = "B"
QUESTIONS: Mapping[str, Question] = {
    "B": Question("Retraining possible?", answers.retraining, {"yes": "C1", "no": "D"}),
    "C1": Question("Does the device run such a model?", answers.runs_it, {"yes": "C", "no": "LX"}),
    "D": Question("Does the device run such a model?", answers.runs_it, {"yes": "D1", "no": "LX"}),
    "D1": Question(
        "Model type?",
        answers.model_type,
        {
            "llm": "D21",
            "vision": "D3",
            "detection": "D3",
            "nlp": "D4",
            "speech": "D4",
            "embedding": "D4",
            "generative": "D4",
            "unknown": "D42",
        },
    ),
    "D21": Question("How many requests at once?", answers.requests, {"few": "D22", "many": "LD"}),
    "D22": Question("Does the device run 4-bit weights?", answers.runs_4bit, {"yes": "D23", "8 bits": "LW8", "no": "D24"}),
    "D23": Question("Is the expected loss allowed?", answers.weights_loss, {"at 4 bits": "LW", "at 8 bits": "LW8", "no": "D24"}),
    "D24": Question("Does float16 fit?", answers.float16_fits, {"yes": "L16", "no": "LW"}),
    "D3": Question("Is the expected loss of INT8 allowed?", answers.int8_loss, {"yes": "D31", "no": "D32"}),
    "D31": Question("Fast INT8 on the device?", answers.fast_int8, {"yes": "LS", "slow": "LS", "only": "LS", "no": "D32"}),
    "D32": Question("Does float16 fit?", answers.float16_fits, {"yes": "L16", "no": "LS"}),
    "D4": Question("Is the expected loss of INT8 allowed?", answers.int8_loss, {"yes": "D41", "no": "D42"}),
    "D41": Question("Which INT8 suits model and device?", answers.suited_int8, {"dynamic": "LD", "static": "LS", "none": "D42"}),
    "D42": Question("Does float16 fit?", answers.float16_fits, {"yes": "L16", "no": "D43"}),
    "D43": Question("Which INT8 runs there?", answers.possible_int8, {"dynamic": "LD", "static": "LS"}),
}
LEAVES: Mapping[str, Leaf] = {
    "C": Leaf("QAT", "qat", "fake quantization while training, then INT8: the least loss, for production where accuracy is critical"),
    "LW": Leaf(
        "Weight-only 4-bit (GPTQ/AWQ)",
        "weight-only",
        "decoding one token at a time is bound by memory bandwidth: fewer bits, more tokens",
        weight_bits=4,
    ),
    "LW8": Leaf("Weight-only 8-bit", "weight-only", "8-bit weights halve what is read per token, and lose next to nothing", weight_bits=8),
    "LS": Leaf("Static PTQ", "static", "ranges of activations are calibrated once on representative data: the fastest INT8"),
    "LD": Leaf(
        "Dynamic PTQ", "dynamic", "ranges of activations are taken at run time, for inputs of any length; normalisation stays float"
    ),
    "L16": Leaf("Float16", "float16", "half the size, twice the speed where 16-bit arithmetic is native, about 0.1 % loss, no data needed"),
    "LX": Leaf("No such model here", None, "choose a larger device"),
}
#: What follows the leaf in every run; drawn, and walked by the run itself.
_AFTER = (
    'E["Performance validation"]', 'F{"Meets targets?"}', 'G["Deploy model"]', 'H["Debug pipeline"]',
    "E --> F", "F -->|yes| G", "F -->|no| H", "H -->|calibration issues| E", "H -->|architecture issues| B",
)  # fmt: skip


def walk(profile: ModelProfile, goals: Goals, target: Target) -> Walk:
    """Answer the questions from the start to a leaf."""
    situation = Situation(profile, goals, target)
    steps: list[Step] = []
    reasons: list[str] = []
    node = START
    while node in QUESTIONS:
        question = QUESTIONS[node]
        answer, why = question.answer(situation)
        steps.append(Step(node, question.text, answer))
        reasons += [why] if why else []
        node = question.edges[answer]
    leaf = LEAVES[node]
    steps.append(Step(node, "Method family", leaf.family or "none"))
    return Walk(leaf, tuple(steps), tuple(dict.fromkeys([*reasons, leaf.reason])))


def mermaid(path: Sequence[Step] = ()) -> str:
    """The chart as a mermaid graph, with the nodes and edges of `path` marked."""
    walked = {(step.node, step.answer) for step in path}
    lines = ["graph TD"]
    lines += [f'  {node}{{"{question.text}"}}' for node, question in QUESTIONS.items()]
    lines += [f'  {node}["{leaf.text}"]' for node, leaf in LEAVES.items()]
    marked: list[int] = []
    count = 0
    for node, question in QUESTIONS.items():
        for answer, following in question.edges.items():
            marked += [count] if (node, answer) in walked else []
            count += 1
            lines.append(f"  {node} -->|{answer}| {following}")
    lines += [f"  {node} --> E" for node, leaf in LEAVES.items() if leaf.family]
    lines += [f"  {line}" for line in _AFTER]
    if path:
        lines.append("  classDef walked fill:#FFC107,stroke:#FFA000,color:black")
        lines.append(f"  class {','.join(step.node for step in path)} walked")
    if marked:
        lines.append(f"  linkStyle {','.join(map(str, marked))} stroke:#FFA000,stroke-width:4px")
    return "\n".join(lines) + "\n"
