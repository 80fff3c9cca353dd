"""`demo:llm`: the files are there, transformers loads them, the model predicts and writes Python, nothing leaked."""

import importlib.util
import math
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from qhub_demo import plugin

TRAIN = Path(__file__).parent.parent / "train"
# Measured 8.55 on these windows (they are easier than the whole text); the margin is for other versions of torch.
PERPLEXITY_BOUND = 9.5
WINDOWS, WINDOW_TOKENS = 8, 512


@pytest.fixture(scope="module")
def source():
    return next(model for model in plugin.qhub_models() if model.name == "demo:llm")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tokenizer(source):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(source.path, local_files_only=True)


@pytest.fixture(scope="module")
def model(source, torch):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def corpus():
    """train/corpus.py, which is in the repository and not in the distribution."""
    path = TRAIN / "corpus.py"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    spec = importlib.util.spec_from_file_location("qhub_demo_corpus", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parts(corpus):
    """The split of the library of the Python that runs the tests; by name, so nearly the shipped one."""
    modules = corpus.read_modules(Path(sysconfig.get_path("stdlib")))
    if len(modules) < 100:
        pytest.skip("this Python has no library sources")
    return corpus.split(modules, calibration_bytes=480_000, heldout_bytes=240_000)


# The descriptor and the files.


def test_the_plugin_offers_demo_llm_with_calibration_and_evaluation_text(source):
    assert source.name == "demo:llm"
    assert source.calibration.is_file()
    assert source.evaluation.is_file()
    assert source.calibration.read_bytes() != source.evaluation.read_bytes()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_the_model_folder_holds(source, name):
    assert (source.path / name).is_file()


def test_the_language_model_stays_below_nine_megabytes(source):
    assert sum(path.stat().st_size for path in source.path.iterdir()) < 9_000_000


def test_loading_the_plugin_imports_neither_torch_nor_transformers():
    code = "import sys, qhub_demo.plugin as p; p.qhub_models(); print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# The tokenizer.


def test_the_tokenizer_begins_with_bos_and_reproduces_any_text(tokenizer):
    text = "def f(x):\n\treturn {'ä€😀': x**2}  # done\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids[1:]) == text


def test_the_tokenizer_fits_the_model(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings


def test_the_tokenizer_joins_indentation(tokenizer):
    assert len(tokenizer("\n        return", add_special_tokens=False).input_ids) <= 2


# The model.


def test_every_projection_takes_groups_of_128(model, torch):
    linears = [m for name, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(side % 128 == 0 for linear in linears for side in linear.weight.shape)


def test_the_model_predicts_modules_it_has_not_seen(source, tokenizer, model, torch):
    text = source.evaluation.read_text(encoding="utf-8")[:40_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    chunks = ids.split(WINDOW_TOKENS - 1)[:WINDOWS]
    with torch.no_grad():
        losses = [_losses(model, chunk, torch) for chunk in chunks]
    assert math.exp(float(torch.cat(losses).mean())) < PERPLEXITY_BOUND


def _losses(model, chunk, torch):
    """Cross-entropy of each token of `chunk` (T,), read after `<s>`."""
    inputs = torch.nn.functional.pad(chunk, (1, 0), value=model.config.bos_token_id)[None]
    return torch.nn.functional.cross_entropy(model(inputs).logits[0, :-1], chunk, reduction="none")


def test_a_continuation_of_def_is_an_indented_body(tokenizer, model):
    _, *body = [line for line in _continued("def read_file(path):", tokenizer, model).splitlines() if line.strip()]
    assert len(body) >= 4
    assert all(line.startswith("    ") for line in body)
    assert re.search(r"^ +(return|raise|if|for|with|self\.)\b", "\n".join(body), re.MULTILINE)


def test_a_constructor_keeps_its_arguments(tokenizer, model):
    text = _continued("class Queue:\n    def __init__(self", tokenizer, model)
    assert re.search(r"^ {8}self\.(\w+) = \1$", text, re.MULTILINE)


def _continued(prompt, tokenizer, model):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ids = model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=model.config.eos_token_id)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


# The split: by construction no module is in two sets.


def test_no_module_is_in_two_sets(parts):
    names = [m.name for part in (parts.training, parts.calibration, parts.heldout) for m in part]
    assert len(names) == len(set(names))


def test_held_out_modules_are_not_copies_of_training_modules(parts):
    trained = {m.text for m in parts.training} | {m.text for m in parts.calibration}
    assert not trained & {m.text for m in parts.heldout}


def test_the_split_depends_on_names_only(corpus):
    modules = [corpus.Module(f"m{i}.py", "x" * 1000) for i in range(20)]
    edited = [corpus.Module(m.name, "y" * 1000) for m in modules]
    first, second = (corpus.split(each, calibration_bytes=4000, heldout_bytes=2000) for each in (modules, edited))
    assert [len(part) for part in (first.training, first.calibration, first.heldout)] == [14, 4, 2]
    assert [m.name for m in first.heldout] == [m.name for m in second.heldout]


def test_tests_tables_and_the_builders_settings_are_left_out(corpus, tmp_path):
    code = "value = 1\n" * 200
    names = ("a.py", "test/b.py", "pkg/tests/c.py", "site-packages/d.py", "_sysconfigdata_x.py", "pydoc_data/topics.py")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    (tmp_path / "table.py").write_text("decoding_table = ''\n" + code)
    (tmp_path / "short.py").write_text("value = 1\n")
    assert [m.name for m in corpus.read_modules(tmp_path)] == ["a.py"]


def test_the_shipped_texts_share_no_code_but_a_few_boilerplate_lines(source):
    held, calibration = (_runs_of_lines(path) for path in (source.evaluation, source.calibration))
    assert len(held & calibration) < 0.002 * len(held)


def _runs_of_lines(path, count=12):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {tuple(lines[i : i + count]) for i in range(len(lines) - count)}


def test_the_shipped_texts_are_those_of_the_split_where_python_is_the_same(source, corpus, parts):
    if sys.version_info[:3] != (3, 11, 7):
        pytest.skip("the shipped texts are those of Python 3.11.7")
    assert source.evaluation.read_text(encoding="utf-8") == corpus.joined(parts.heldout)
    assert source.calibration.read_text(encoding="utf-8") == corpus.joined(parts.calibration)
