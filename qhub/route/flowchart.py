"""The quantization flowchart as data: questions, edges and leaves; `walk` answers it, `mermaid` draws it.

A leaf names a method *family*. Quantizers say which family they serve, so a new plugin joins at its leaf without a change
here. Where older charts are out of date (4-bit weights run on CPUs and Apple silicon today) the answer follows the facts
of the device, and a reason says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qhub.types import Family, Goals, ModelProfile, Step, Target

#: An answer and why it is the answer ("" if the question says it all).
Answer = tuple[str, str]

#: Instruction sets and accelerators with a fast int8 dot product.
FAST_INT8 = ("avx_vnni", "avx512_vnni", "amx_int8", "dotprod", "i8mm", "ane", "cuda-7.2", "cuda-7.5", "cuda-8", "cuda-9", "cuda-1")


@dataclass(frozen=True, slots=True)
class Situation:
    """What a question is answered from."""

    profile: ModelProfile
    goals: Goals
    target: Target


@dataclass(frozen=True, slots=True)
class Question:
    """A node with a choice: `edges` leads from each answer to the next node."""

    text: str
    answer: Callable[[Situation], Answer]
    edges: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where a path ends: a family, or None if nothing can be done there (`text` then says why)."""

    text: str
    family: Family | None
    reason: str = ""


def _retraining(situation: Situation) -> Answer:
    if situation.goals.retrain:
        return "yes", "retraining is possible, which loses the least accuracy"
    return "no", "no retraining: post-training quantization"


def _model_type(situation: Situation) -> Answer:
    profile = situation.profile
    if profile.task == "unknown":
        return "unknown", f"what `{profile.architecture}` is for is unknown: only float16 is safe"
    return profile.task, f"`{profile.architecture}` is a model of type `{profile.task}`"


def _runs_4bit(situation: Situation) -> Answer:
    target = situation.target
    if target.os == "none":
        return "no", f"`{target.name}` has no operating system and no room for a language model"
    capability = _cuda_capability(target)
    if capability is not None:
        if capability < 7.5:
            return "no", f"4-bit GPU kernels need compute capability 7.5; `{target.name}` has `{capability}`"
        return "yes", f"GPU kernels for 4-bit weights need compute capability 7.5; `{target.name}` has `{capability}`"
    if "metal" in target.accelerators:
        return "yes", "older charts say no 4-bit on Apple silicon: MLX and llama.cpp run it on the GPU today"
    if target.arch == "x86_64":
        return "yes", "older charts say no 4-bit on CPUs: int4 kernels run on every CPU with AVX2 today"
    return "yes", "int4 kernels run on every 64-bit Arm CPU with NEON"


def _fast_int8(situation: Situation) -> Answer:
    target = situation.target
    have = [name for name in (*target.accelerators, *target.isa) if name.startswith(FAST_INT8)]
    if have:
        return "yes", f"`{have[0]}` multiplies int8 fast"
    if target.os == "none":
        return "yes", "microcontrollers run full int8 only"
    return "no", f"`{target.name}` has no int8 dot product: int8 saves memory, and little time"


def _size_matters(situation: Situation) -> Answer:
    goals, profile, target = situation.goals, situation.profile, situation.target
    float16_bytes = profile.parameters * 2
    limits = (goals.max_size_bytes, goals.max_memory_bytes, target.usable_memory_bytes)
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and float16_bytes > limit:
        return "no", f"float16 needs {float16_bytes / 1e6:.0f} MB where {limit / 1e6:.0f} MB are allowed"
    return "yes", "this type of model is sensitive, and float16 fits"


START = "B"
QUESTIONS: Mapping[str, Question] = {
    "B": Question("Retraining possible?", _retraining, {"yes": "C", "no": "D1"}),
    "D1": Question(
        "Model type?",
        _model_type,
        {
            "llm": "D2",
            "vision": "D3",
            "detection": "D3",
            "nlp": "D4",
            "speech": "D4",
            "embedding": "D5",
            "generative": "D5",
            "unknown": "L16",
        },
    ),
    "D2": Question("Does the device run 4-bit weights?", _runs_4bit, {"yes": "LW", "no": "LX"}),
    "D3": Question("Fast INT8 on the device?", _fast_int8, {"yes": "LS", "no": "LS"}),
    "D4": Question("Fast INT8 on the device?", _fast_int8, {"yes": "LD", "no": "LD"}),
    "D5": Question("Does float16 fit?", _size_matters, {"yes": "L16", "no": "LD"}),
}
LEAVES: Mapping[str, Leaf] = {
    "C": Leaf("QAT", "qat"),
    "LW": Leaf(
        "Weight-only 4-bit (GPTQ/AWQ)", "weight-only", "decoding one token at a time is bound by memory bandwidth: fewer bits, more tokens"
    ),
    "LS": Leaf("Static PTQ", "static", "fixed input size: ranges of activations are calibrated once"),
    "LD": Leaf("Dynamic PTQ", "dynamic", "variable input length: ranges of activations are taken at run time"),
    "L16": Leaf("Float16", "float16"),
    "LX": Leaf("No language model here", None, "choose a larger device"),
}
#: What follows the leaf in every run; drawn, and walked by the run itself.
_AFTER = (
    'E["Performance validation"]', 'F{"Meets targets?"}', 'G["Deploy model"]', 'H["Debug pipeline"]',
    "E --> F", "F -->|yes| G", "F -->|no| H", "H -->|calibration issues| E", "H -->|architecture issues| B",
)  # fmt: skip


def walk(profile: ModelProfile, goals: Goals, target: Target) -> tuple[Family | None, tuple[Step, ...], tuple[str, ...]]:
    """Answer the questions from the start to a leaf.

    Returns the leaf's family (None: refused), the path walked with the leaf as its last step, and the reasons; the last
    reason is the leaf's.
    """
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
    return leaf.family, tuple(steps), tuple([*reasons, leaf.reason] if leaf.reason else reasons)


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


def _cuda_capability(target: Target) -> float | None:
    found = [float(name.removeprefix("cuda-")) for name in target.accelerators if name.startswith("cuda-")]
    return max(found, default=None)
