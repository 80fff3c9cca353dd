"""Every family of decoder-only models: quantized by each method through the whole pipeline, or refused by name.

`python tests/test_families.py` writes docs/families.md, which says what was found in each family's blocks.
"""

from __future__ import annotations

import re
import shutil
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from forked import needs_plugins, run
from safetensors.torch import load_file, save_file
from tiny_models import MORE, logits_of, quantize, random_ids, tiny_model
from transformers import AutoModelForCausalLM

from qhub import pipeline
from qhub.errors import ExitCode, NoRouteError, Unsupported
from qhub.events import Events
from qhub.plugins import Plugins
from qhub.prove.parity import reference_logits
from qhub.quantize.observe import LayerGroup, Producer, observe
from qhub.quantize.store import QuantizedWeights
from qhub.route.profile import profile
from qhub.skeleton import FloatWeights, Skeleton

pytestmark = needs_plugins
TABLE = Path(__file__).parent.parent / "docs" / "families.md"
#: Title → the tiny model that stands for it; Falcon has three forms.
FAMILIES = {
    "Llama": "llama",
    "Llama with tied embeddings": "llama-tied",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3_text",
    "Phi-3": "phi3",
    "GPT-NeoX": "gpt_neox",
    "GPT-2": "gpt2",
    "OPT": "opt",
    "Falcon, one key-value head": "falcon",
    "Falcon, new decoder": "falcon-new",
    "Falcon, alibi": "falcon-alibi",
}
METHODS = ("awq", "gptq", "awq+gptq")
SCHEME = "w4a16-g32-asym"
BY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
BY_METHOD = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def plugins():
    """Qhub's own, whatever else is installed."""
    names = {"awq", "gptq", "hf", "rtn"}
    return Plugins.load([point for point in metadata.entry_points(group="qhub") if point.name in names])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text as random as the models: 60 windows of 64 characters."""
    path = tmp_path_factory.mktemp("text") / "random.txt"
    path.write_text("".join(map(chr, (random_ids(60, 64) % 95 + 32).flatten().tolist())), encoding="utf-8")
    return path


@pytest.fixture
def request_for(text, tmp_path):
    """What the user asks: a model, a method, and whatever else."""

    def make(folder, method, **more):
        settings = {"scheme": SCHEME, "samples": 8, "seq_len": 64, "device": "cpu", "out": tmp_path / "out", **more}
        return pipeline.RunRequest(model=str(folder), plugins=(*method.split("+"), "hf"), calib=str(text), eval=str(text), **settings)

    return make


@torch.no_grad()
def transformers_logits(folder, ids):
    """What anyone with transformers and compressed-tensors gets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs are not ours to mend
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(ids).logits.float()


def difference(folder, reference=None):
    """The largest difference between transformers' logits and qhub's reference."""
    ids = random_ids(2, 48)
    return float((transformers_logits(folder, ids) - reference_logits(reference or folder, ids)).abs().max())


@BY_FAMILY
@BY_METHOD
def test_the_artifact_computes_what_qhub_says_and_loses_less_than_rounding(request_for, plugins, family, method):
    plan = pipeline.plan(request_for(tiny_model(family), method), plugins)
    report = pipeline.run(plan, plugins, Events())
    (artifact,) = report.artifacts
    assert difference(plan.out / artifact.path, plan.out / "quantized") <= 1e-5
    assert (artifact.parity.checked, artifact.parity.codes_identical) == (True, True)
    assert artifact.parity.max_abs_diff <= 1e-5
    assert report.quantized.kl < report.baseline.kl
    assert report.quantized.top1_agreement > report.baseline.top1_agreement
    assert not report.fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BY_FAMILY
def test_in_half_precision_both_compute_the_same_numbers(tmp_path, plugins, family, dtype):
    """Symmetric, which transformers loads another way; 0 because both run the same code on the same weights."""
    quantize(tiny_model(family, dtype), tmp_path, plugins.quantizers["rtn"], "w4a16-g32-sym")
    assert difference(tmp_path / "model") == 0


@pytest.mark.parametrize("family", MORE)
def test_other_families_need_nothing_of_their_own(tmp_path, plugins, family):
    """Blocks that return lists, attention in two subtractions or through a bottleneck, one key for all heads, norms at the end."""
    source, ids = tiny_model(family), random_ids(2, 48)
    assert torch.equal(logits_of(source, ids), transformers_logits(source, ids))
    quantize(source, tmp_path, plugins.quantizers["gptq"], SCHEME, ids=random_ids(4, 48))
    assert difference(tmp_path / "model") <= 1e-5


# Matrices that transformers only reads as it loads them: one scheme for all, or float.
@pytest.mark.parametrize(("family", "layer", "kind"), [("gpt2", "c_fc", "Conv1D"), ("falcon", "dense_4h_to_h", "FalconLinear")])
def test_several_schemes_are_refused_where_transformers_could_not_tell_them_apart(request_for, plugins, tmp_path, family, layer, kind):
    plan = pipeline.plan(request_for(tiny_model(family), "rtn", overrides=(f"{layer}=w8a16-g32-sym",)), plugins)
    with pytest.raises(Unsupported, match=f"`{kind}` layers such as `.*` only where all layers have one scheme") as error:
        pipeline.run(plan, plugins, Events())
    assert "--override" in error.value.hint
    assert not (tmp_path / "out").exists()
    again = pipeline.plan(request_for(tiny_model(family), "rtn", overrides=(f"{layer}=float",)), plugins)
    report = pipeline.run(again, plugins, Events())
    assert report.artifacts[0].parity.max_abs_diff <= 1e-5


@pytest.mark.parametrize(
    ("family", "scheme", "overrides"),
    [("llama", SCHEME, {"down_proj": "w8a16", "o_proj": "w3a16-g16-asym"}), ("gpt2", SCHEME, {}), ("gpt2", "w8a16", {})],
    ids=["mixed", "GPT-2", "GPT-2 by channel"],
)
def test_the_shapes_of_an_artifact_are_told_from_its_headers(tmp_path, plugins, family, scheme, overrides):
    quantize(tiny_model(family), tmp_path, plugins.quantizers["rtn"], scheme, overrides=overrides)
    found, source = (profile(str(folder), plugins) for folder in (tmp_path / "model", tiny_model(family)))
    assert found.parameters == source.parameters
    assert [(layer.name, layer.shape) for layer in found.layers] == [(layer.name, layer.shape) for layer in source.layers]


def head_beside(embedding):
    return lambda tensors: {**tensors, "lm_head.weight": tensors[embedding].clone()}


def as_on_the_hub(tensors):
    """GPT-2's files: no prefix, and the causal mask beside the weights."""
    mask = torch.ones(128, 128).tril().reshape(1, 1, 128, 128)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return {**bare, **{f"h.{index}.attn.bias": mask.clone() for index in range(2)}}


FILES = {
    "tied embeddings stored twice": ("llama-tied", head_beside("model.embed_tokens.weight")),
    "GPT-2 with its head": ("gpt2", head_beside("transformer.wte.weight")),
    "GPT-2 as on the hub": ("gpt2", as_on_the_hub),
}


@pytest.mark.parametrize(("family", "change"), FILES.values(), ids=FILES)
def test_the_same_weights_under_other_names_give_the_same_artifact(tmp_path, plugins, family, change):
    source = tmp_path / "source"
    shutil.copytree(tiny_model(family), source)
    save_file(change(load_file(source / "model.safetensors")), source / "model.safetensors", metadata={"format": "pt"})
    for folder, out in ((source, tmp_path / "changed"), (tiny_model(family), tmp_path / "plain")):
        quantize(folder, out, plugins.quantizers["awq"], SCHEME, ids=random_ids(4, 48))
    assert difference(tmp_path / "changed" / "model") <= 1e-5
    changed, plain = (QuantizedWeights(tmp_path / name / "model") for name in ("changed", "plain"))
    assert changed.schemes == plain.schemes
    assert all(torch.equal(changed.layer(name).codes, plain.layer(name).codes) for name in plain.schemes)


@BY_METHOD
def test_a_mixture_with_fused_experts_is_refused_by_name_before_work_begins(request_for, plugins, tmp_path, method):
    with pytest.raises(NoRouteError, match=r"experts such as `.*block_sparse_moe\.experts\.0\.w1\.weight` as fused tensors") as error:
        pipeline.plan(request_for(tiny_model("mixtral"), method), plugins)
    assert error.value.exit_code == ExitCode.NO_ROUTE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["recommend", "run"])
def test_a_mixture_with_fused_experts_is_the_same_error_of_recommend_and_run(tmp_path, text, command):
    here = tmp_path / "here"
    here.mkdir()
    model = tiny_model("mixtral")
    options = ["--plugin", "awq", "--scheme", SCHEME, "--calib", text, "--eval", text, "--out", "out"] if command == "run" else []
    ran = run([command, model, *options], here)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == (
        f"error: no route from `{model.name}` to `host`: none: qhub quantizes linear layers, and transformers holds experts such as "
        "`model.layers.0.block_sparse_moe.experts.0.w1.weight` as fused tensors\n\n"
        f"hint: `qhub recommend {model} --explain` shows every rejected route; `qhub plugins` what is installed\n"
    )
    assert list(here.iterdir()) == []


@torch.no_grad()
def groups_of(family: str) -> tuple[LayerGroup, ...]:
    """What is found in the first block."""
    skeleton, ids = Skeleton(FloatWeights(tiny_model(family))), random_ids(1, 24)
    skeleton.learn_output_form(ids)
    hidden, calls = skeleton.embed(ids)
    with skeleton.block(0) as block:
        return observe(block, hidden, calls[0])


def described(producer: Producer | None) -> str:
    """Where an input scale goes, in words."""
    if producer is None:
        return "–"
    rows = producer.rows
    first, last, readers = int(rows.min()), int(rows.max()), int(rows.bincount().max())
    if producer.offset:
        return f"`{producer.module}`, whose gain is {producer.offset:.0f} + weight"
    if readers > 1:
        return f"`{producer.module}`, each row for {readers} inputs"
    return f"`{producer.module}`" if first == 0 else f"`{producer.module}`, rows {first} to {last}"


def rows_of(family: str) -> tuple[tuple[str, str], ...]:
    """(layers, producer) of each group."""
    return tuple((" ".join(f"`{name}`" for name in group.layers), described(group.producer)) for group in groups_of(family))


def table() -> str:
    """docs/families.md."""
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for title, family in FAMILIES.items():
        alike.setdefault(rows_of(family), []).append(title)
    lines = [
        "# Families of language models",
        "",
        "What qhub finds in a decoder block by watching it run (`qhub/quantize/observe.py`): the layers that read one tensor, and",
        "the module into which a scale of that input can be folded. It knows none of these names; tiny random models of each family",
        "gave this table, `python tests/test_families.py` writes it again, and a test compares it.",
        "Each is quantized by `awq`, `gptq` and `awq+gptq`, and loads in transformers with the logits of qhub's own reference.",
        "",
        "| family | layers that read one input | an input scale goes into |",
        "|---|---|---|",
    ]
    for rows, titles in alike.items():
        for number, (layers, producer) in enumerate(rows):
            lines.append(f"| {'; '.join(titles) if number == 0 else ''} | {layers} | {producer} |")
    return "\n".join([*lines, "", *_NOTES, ""])


_NOTES = (
    "`–`: nothing linear leads there (an activation, or heads interleaved in one matrix), so the input keeps its scale.",
    "",
    "Further families that the tests run: " + ", ".join(f"`{family}`" for family in MORE) + ".",
    "",
    "- Refused by name, with exit code 3, before work begins: mixtures of experts that transformers holds as fused tensors (Mixtral).",
    "- Linear layers of a class of their own (GPT-2, Falcon): one scheme for all layers, or float for some; more are refused by name.",
    "- GPT-2's matrices are stored transposed, with scales by block, which is how transformers can load them. vLLM knows scales by",
    "  group and by channel only, so it does not take them; nor a model that mixes an asymmetric scheme with others, stored likewise.",
)


def test_the_table_in_the_documentation_is_true():
    assert TABLE.read_text(encoding="utf-8") == table(), "`python tests/test_families.py` writes it"
    assert not re.search(r"\| –.*\| –", table())


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
