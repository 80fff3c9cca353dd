"""What is opened with which engine: a run's model, the engines that work here in the registry's order, and the next where one refuses."""

from __future__ import annotations

import json

import pytest

from qhub import NoRouteError, PluginError, QhubError, Runtime, Unsupported, UsageError, hookimpl
from qhub.opening import blaming, first_that_opens, opening
from qhub.plugins import PluginInfo, Plugins
from qhub.rundir import RunDir, Settings


class Engine(Runtime):
    """An engine of that name."""

    summary, distribution = "a toy", "qhub-toy"
    formats = ("compressed-tensors",)

    def __init__(self, name, *, formats=formats, requires=(), refuses=None):
        self.name, self.formats, self.requires, self.refuses = name, formats, requires, refuses

    def reject(self, target):
        return self.refuses


def plugins_of(*engines):
    class Toys:
        @hookimpl
        def qhub_runtimes(self):
            return engines

    plugins = Plugins.load([])
    plugins.manager.register(Toys(), name="toys")
    plugins.infos.append(PluginInfo("toys", "qhub-toy", "1.0", "toys"))
    return plugins


def write_config(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}, **facts}))
    return folder


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "model", vocab_size=50, max_position_embeddings=200)


def names(found):
    return [engine.name for engine in found.runtimes]


def test_a_folder_is_opened_as_it_is(model):
    found = opening(model, plugins_of(Engine("one")), None)
    assert (found.path, found.vocabulary, found.context, names(found)) == (model, 50, 200, ["one"])


def test_what_the_config_does_not_say_is_unknown_and_a_section_of_it_may(tmp_path):
    found = opening(write_config(tmp_path), plugins_of(Engine("one")), None)
    assert (found.vocabulary, found.context) == (None, None)
    found = opening(write_config(tmp_path, text_config={"vocab_size": 9, "n_positions": 8}), plugins_of(Engine("one")), None)
    assert (found.vocabulary, found.context) == (9, 8)


def test_of_a_run_it_is_what_was_quantized(tmp_path):
    run = RunDir.create(tmp_path / "run", Settings(), "")
    with pytest.raises(QhubError, match=r"the run `.*` has not quantized its model yet"):
        opening(run.path, plugins_of(Engine("one")), None)
    write_config(run.quantized)
    assert opening(run.path, plugins_of(Engine("one")), None).path == run.quantized


def test_a_path_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        opening(tmp_path / "nowhere", plugins_of(Engine("one")), None)


def test_engines_come_in_the_registrys_order_then_by_name(model):
    found = opening(model, plugins_of(Engine("aa"), Engine("hf"), Engine("native"), Engine("bb")), None)
    assert names(found) == ["native", "hf", "aa", "bb"]


def test_engines_that_do_not_work_here_are_left_out(model):
    engines = (Engine("away", refuses="it needs wings"), Engine("lacking", requires=("no_such_module",)), Engine("works"))
    assert names(opening(model, plugins_of(*engines), None)) == ["works"]
    with pytest.raises(
        NoRouteError, match=r"no runtime works here: `away`: it needs wings; `lacking`: `no_such_module` cannot be imported"
    ):
        opening(model, plugins_of(*engines[:2]), None)


def test_engines_that_know_the_layout_are_preferred(model, tmp_path):
    engines = plugins_of(Engine("a", formats=("gguf",)), Engine("b"))
    assert names(opening(model, engines, None)) == ["b"]
    other = write_config(tmp_path / "awq", quantization_config={"quant_method": "awq"})
    assert names(opening(other, engines, None)) == ["a", "b"]


def test_a_named_engine_is_the_only_one(model):
    engines = plugins_of(Engine("native"), Engine("hf"), Engine("away", refuses="it needs wings"))
    assert names(opening(model, engines, "hf")) == ["hf"]
    with pytest.raises(UsageError, match="unknown runtime `hv`"):
        opening(model, engines, "hv")
    with pytest.raises(NoRouteError, match="`away` does not work here: it needs wings"):
        opening(model, engines, "away")


def test_the_next_engine_is_taken_where_one_refuses_the_model(model):
    found, said = opening(model, plugins_of(Engine("hf"), Engine("native"), Engine("other")), None), []

    def use(engine):
        if engine.name == "native":
            raise Unsupported("`native` does not run `bert` models")
        return engine.name

    assert first_that_opens(found, use, said.append) == "hf"
    assert said == ["`native` does not run `bert` models; taking `hf`"]


def test_the_last_refusal_is_the_answer_and_another_error_ends_it(model):
    found, said = opening(model, plugins_of(Engine("hf"), Engine("native")), None), []

    def refuse(engine):
        raise Unsupported(f"not with {engine.name}")

    with pytest.raises(Unsupported, match="not with hf"):
        first_that_opens(found, refuse, said.append)
    assert said == ["not with native; taking `hf`"]

    def fail(engine):
        raise QhubError(f"{engine.name} found it damaged")

    with pytest.raises(QhubError, match="native found it damaged"):
        first_that_opens(found, fail, said.append)


def test_what_goes_wrong_in_an_engine_is_said_to_be_its(monkeypatch):
    def crash():
        raise RuntimeError("no such accelerator")

    def refuse():
        raise Unsupported("not this")

    assert blaming(Engine("one"), lambda: 7) == 7
    with pytest.raises(PluginError, match="`one` failed: RuntimeError: no such accelerator"):
        blaming(Engine("one"), crash)
    with pytest.raises(Unsupported, match="not this"):
        blaming(Engine("one"), refuse)
    monkeypatch.setenv("QHUB_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        blaming(Engine("one"), crash)
