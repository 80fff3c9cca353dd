"""Profile × targets × goals × what is installed → ranked routes; the plugins here are toys, but real ones."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from profiles import LLAMA_3_8B, MODELS, SIX
from toy_components import installed as toys

from qhub import Exporter, NoRouteError, PluginError, Quantizer, Runtime, Scheme, UsageError, hookimpl
from qhub.plugins import PluginInfo, Plugins
from qhub.route.answers import fused_experts
from qhub.route.estimate import weight_bytes
from qhub.route.recommend import recommend
from qhub.route.registry import load_registry
from qhub.types import Fact, Goals, LayerShape, ModelProfile, Target

TARGETS = load_registry().targets
HOST = Target(
    "host", "this machine", "linux", "x86_64", ("avx2",), usable_memory_bytes=16 << 30, bandwidth_bytes_per_s=Fact(50e9, "measured")
)


class Nearest(Quantizer):
    """No data needed."""

    name = "nearest"
    summary = "toy: round to nearest"


class Scaling(Quantizer):
    """Brings scales."""

    name = "scaling"
    summary = "toy: activation-aware"
    scales = True


class Second(Quantizer):
    """Wants the Gram matrix, and groups that divide every layer."""

    name = "second"
    summary = "toy: second order"
    needs = frozenset({"gram"})

    def reject(self, profile, scheme):
        bad = [layer.name for layer in profile.linears() if scheme.group_size and layer.shape[-1] % scheme.group_size]
        return f"group size `{scheme.group_size}` does not divide K of `{bad[0]}`" if bad else super().reject(profile, scheme)


class Folder(Exporter):
    """As qhub-hf: the registry says where it finishes a route."""

    name = "hf"
    summary = "toy: folder"
    format = "compressed-tensors"


class FolderRuntime(Runtime):
    """Runs wherever Python runs."""

    name = "hf"
    summary = "toy: transformers"
    formats = ("compressed-tensors",)


class Apple(Exporter):
    """Carries groups of 32 only."""

    name = "apple"
    summary = "toy: a format for Apple silicon"
    format = "apple"

    def reject(self, profile, scheme):
        return None if scheme.group_size == 32 else f"`apple` carries groups of 32, not `{scheme}`"


class AppleRuntime(Runtime):
    """Needs Metal; measured its speed."""

    name = "apple"
    summary = "toy: an engine for Apple silicon"
    formats = ("apple",)

    def reject(self, target):
        return None if "metal" in target.accelerators else f"`{target.name}` has no Metal"

    def efficiency(self, target):
        return 0.8


class Static(Quantizer):
    """Serves the leaf of vision models."""

    name = "static"
    summary = "toy: static int8"
    family = "static"
    default_scheme = "w8a8-static"

    def reject(self, profile, scheme):
        return None


class OnlyStatic(Exporter):
    """Carries graphs."""

    name = "graph"
    summary = "toy: graphs"
    format = "graph"


def installed(*components):
    """Plugins that offer `components`, as if each kind came from one plugin called `toys`."""

    class Toys:
        @hookimpl
        def qhub_quantizers(self):
            return [component for component in components if isinstance(component, Quantizer)]

        @hookimpl
        def qhub_exporters(self):
            return [component for component in components if isinstance(component, Exporter)]

        @hookimpl
        def qhub_runtimes(self):
            return [component for component in components if isinstance(component, Runtime)]

    plugins = Plugins.load([])
    plugins.manager.register(Toys(), name="toys")
    plugins.infos.append(PluginInfo("toys", "qhub-toys", "1.0", "toys"))
    return plugins


ALL = installed(Nearest(), Scaling(), Second(), Folder(), FolderRuntime())


def llm(hidden=4096, ffn=14336, blocks=32, vocab=128256, **facts):
    """The profile of a Llama; the default is Llama-3-8B."""
    names = {"q": (hidden, hidden), "k": (hidden // 4, hidden), "v": (hidden // 4, hidden), "o": (hidden, hidden)}
    names |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    layers = [
        LayerShape(f"layers.{block}.{name}.weight", "linear", shape, "bf16", 2 * shape[0] * shape[1], block)
        for block in range(blocks)
        for name, shape in names.items()
    ]
    layers += [LayerShape(f"{kind}.weight", kind, (vocab, hidden), "bf16", 2 * vocab * hidden) for kind in ("embedding", "head")]
    parameters = sum(layer.bytes for layer in layers) // 2
    profile = ModelProfile("m", "m", "llm", "LlamaForCausalLM", parameters, "bf16", 2 * parameters, tuple(layers), blocks)
    return replace(profile, kv_bytes_per_token=blocks * hidden, context_length=8192, **facts)


SMALL = llm(hidden=256, ffn=768, blocks=6, vocab=4096)
RESNET = ModelProfile(
    "r", "r", "vision", "ResNetForImageClassification", 9408, "fp32", 37632, (LayerShape("c", "conv", (64, 3, 7, 7), "fp32", 37632),)
)


def first(profile=SMALL, target=HOST, plugins=ALL, goals=None, **more):
    return recommend(profile, [target], goals or Goals(), plugins, **more).routes[0]


def methods_of(found):
    return [route.method for route in found.routes]


def test_methods_that_use_data_come_first_and_data_free_ones_last():
    found = recommend(SMALL, [HOST], Goals(), ALL)
    assert methods_of(found) == ["scaling", "second", "nearest"]
    assert "`scaling` uses calibration text, which keeps more accuracy than rounding alone" in found.routes[0].reasons
    assert "`nearest` needs no data" in found.routes[2].reasons
    assert [route.estimates.accuracy_drop_pct for route in found.routes] == [1.0, 1.0, 2.0]


def test_a_complete_route_says_all():
    route = first()
    assert (route.target, route.method, route.family, route.quantizer) == ("host", "scaling", "weight-only", "scaling")
    assert (route.exporter, route.runtime, route.missing, route.warnings, route.fits) == ("hf", "hf", (), (), True)
    assert [step.answer for step in route.path] == ["no", "yes", "llm", "few", "yes", "at 4 bits", "weight-only"]


# The group size follows the model: small ones lose much to large groups, and it has to divide K.
@pytest.mark.parametrize(
    ("profile", "quantizer", "scheme"),
    [
        (llm(), "scaling", "w4a16-g128-asym"),
        (SMALL, "scaling", "w4a16-g32-asym"),
        (llm(hidden=4160, ffn=14400), "scaling", "w4a16-g64-asym"),
        (llm(hidden=272, ffn=816, blocks=2), "scaling", "w4a16-g16-asym"),
        (llm(hidden=64, ffn=172, blocks=2), "scaling", "w4a16-g32-asym"),
        (llm(hidden=64, ffn=172, blocks=2), "second", "w4a16"),
    ],
    ids=["8 B", "small", "64 divides", "16 divides", "most layers divide", "a quantizer that wants all: per channel"],
)
def test_the_group_size_suits_the_model(profile, quantizer, scheme):
    assert first(profile, TARGETS["intel-cpu-amx"], wanted=[quantizer]).scheme == scheme


def test_layers_that_stay_float_are_named():
    (warning,) = first(llm(hidden=64, ffn=172, blocks=2)).warnings
    assert warning == "groups of 32 do not divide K = 172 of 2 layers such as `layers.0.down.weight`: they stay float"


def test_a_forced_scheme_is_kept_or_the_route_is_refused():
    assert first(scheme=Scheme.parse("w3-g64")).scheme == "w3a16-g64-asym"
    odd = llm(hidden=64, ffn=172, blocks=2)
    with pytest.raises(NoRouteError, match=r"group size `128` does not divide K of `layers\.0\.q\.weight`"):
        first(odd, wanted=["second"], scheme=Scheme.parse("w4-g128"))
    with pytest.raises(NoRouteError, match="`nearest` does not write scheme `w8a8-static`"):
        first(wanted=["nearest"], scheme=Scheme.parse("w8a8-static"))


# --plugin constrains the route to what the plugin offers.
@pytest.mark.parametrize(
    ("wanted", "method"),
    [
        (["nearest"], "nearest"),
        (["scaling", "second"], "scaling+second"),
        (["second", "scaling"], "scaling+second"),
        (["scaling", "nearest", "hf"], "scaling+nearest"),
        (["hf"], "scaling"),
    ],
    ids="+".join,
)
def test_wanted_plugins_make_the_method(wanted, method):
    found = recommend(SMALL, [HOST], Goals(), ALL, wanted=wanted)
    assert found.routes[0].method == method
    assert found.routes[0].quantizer == method.rpartition("+")[2]
    assert len(found.routes) == (3 if wanted == ["hf"] else 1)


def test_the_plugin_itself_can_be_named():
    toys = installed(Nearest(), Folder(), FolderRuntime())
    assert first(plugins=toys, wanted=["toys"]).method == "nearest"


def test_two_rounding_quantizers_do_not_work_together():
    with pytest.raises(UsageError, match="quantizers `nearest`, `second` do not work together") as caught:
        first(wanted=["nearest", "second"])
    assert caught.value.hint == "keep one: `--plugin nearest`"


def test_three_quantizers_are_too_many():
    class Other(Scaling):
        name = "other"

    with pytest.raises(UsageError, match="cannot combine `scaling`, `other`, `nearest`"):
        first(plugins=installed(Scaling(), Other(), Nearest()), wanted=["scaling", "other", "nearest"])


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("scalling", "unknown plugin `scalling`", "did you mean `scaling`?"),
        ("acme", "unknown plugin `acme`", "`pip install qhub-acme`"),
        ("awq", "plugin `awq` is not installed", "`pip install qhub-awq`"),
        ("mlx", "plugin `mlx` is planned and not published yet", "`qhub plugins` lists the installed ones"),
        ("llmcompressor", "plugin `llmcompressor` is not installed", "`qhub plugins install llmcompressor --isolated`"),
        ("autoawq", "`autoawq` is archived: `awq` takes its place", "`--plugin awq`"),
    ],
)
def test_an_unknown_plugin_says_what_to_do(name, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        first(wanted=[name])
    assert hint in caught.value.hint


def test_a_broken_plugin_that_is_wanted_is_its_own_fault():
    plugins = installed(Nearest())
    plugins.infos.append(PluginInfo("bad", "qhub-bad", "1.0", "bad", "ImportError: no sdk"))
    with pytest.raises(PluginError, match="plugin `bad` of `qhub-bad` cannot be used: ImportError: no sdk"):
        first(plugins=plugins, wanted=["bad"])


# Where nothing installed runs the result on the target, the route still stands.
def test_a_target_that_nothing_installed_finishes_ends_with_the_quantized_model():
    route = first(target=TARGETS["apple-m1"])
    assert (route.method, route.exporter, route.runtime, route.fits) == ("scaling", "hf", None, True)
    assert route.missing == ("qhub-mlx", "qhub-gguf")
    assert route.warnings == (
        "nothing installed runs this on `apple-m1`: the run ends with the QuantizedModel; "
        "`qhub-mlx` or `qhub-gguf` (planned, not published yet) would finish it",
    )


def test_without_any_exporter_the_route_ends_with_the_quantized_model_too():
    route = first(plugins=installed(Nearest()))
    assert (route.exporter, route.runtime) == (None, None)
    assert set(route.missing) == {"qhub-hf", "qhub-openvino", "qhub-gguf", "qhub-native", "qhub-onnxruntime"}
    assert "`qhub-hf` or `" in route.warnings[0]
    assert "(planned, not published yet) would finish it" in route.warnings[0]


def test_a_format_that_is_asked_for_and_that_nothing_runs_ends_with_its_artifact():
    route = first(plugins=installed(Nearest(), Folder(), FolderRuntime(), Apple()), scheme=Scheme.parse("w4a16-g32-asym"), wanted=["apple"])
    assert (route.exporter, route.runtime, route.missing) == ("apple", None, ())
    assert route.warnings == ("nothing installed runs `apple` on `host`: the run ends with that artifact, and does not open it",)


def test_an_exporter_that_is_asked_for_runs_where_it_can():
    route = first(target=TARGETS["apple-m1"], wanted=["hf"])
    assert (route.exporter, route.runtime, route.missing) == ("hf", "hf", ())


def test_an_engine_for_the_target_is_preferred_and_decides_the_scheme():
    plugins = installed(Scaling(), Folder(), FolderRuntime(), Apple(), AppleRuntime())
    found = recommend(llm(), [TARGETS["apple-m1"], HOST], Goals(), plugins)
    assert [(route.target, route.exporter, route.scheme) for route in found.routes] == [
        ("apple-m1", "apple", "w4a16-g32-asym"),
        ("host", "hf", "w4a16-g128-asym"),
    ]
    assert "0.8 (measured by `apple`)" in found.routes[0].estimates.basis
    assert (found.rejected[0].route, found.rejected[0].reason) == ("host: apple → apple", "`host` has no Metal")


def test_a_wanted_engine_that_does_not_run_there_is_no_route():
    plugins = installed(Scaling(), Folder(), FolderRuntime(), Apple(), AppleRuntime())
    with pytest.raises(NoRouteError, match="`host` has no Metal"):
        first(plugins=plugins, wanted=["apple"])


def test_a_module_that_is_missing_here_is_said_and_ranks_last():
    class Heavy(Scaling):
        name = "a-heavy"
        requires = ("no_such_sdk",)
        distribution = "qhub-heavy"

    found = recommend(SMALL, [HOST], Goals(), installed(Heavy(), Nearest(), Folder(), FolderRuntime()))
    assert [(route.method, route.missing) for route in found.routes] == [("nearest", ()), ("a-heavy", ("qhub-heavy",))]


def test_a_plugin_that_fails_when_asked_has_refused():
    class Failing(Quantizer):
        name = "failing"

        def reject(self, profile, scheme):
            raise ZeroDivisionError("oops")

    found = recommend(SMALL, [HOST], Goals(), installed(Failing(), Nearest(), Folder(), FolderRuntime()))
    assert methods_of(found) == ["nearest"]
    assert "its plugin failed: ZeroDivisionError: oops" in {item.reason for item in found.rejected}


# Goals and memory change what is chosen.
def test_a_tight_drop_puts_8_bits_first():
    assert first(goals=Goals(max_drop_pct=0.3)).scheme == "w8a16"
    assert first(goals=Goals(max_drop_pct=1.0)).scheme == "w4a16-g32-asym"


def test_fewer_bits_are_taken_where_4_do_not_fit():
    size = weight_bytes(SMALL, Scheme.parse("w4-g32"))
    route = first(goals=Goals(max_size_bytes=size - 1))
    assert (route.scheme, route.fits) == ("w3a16-g32-asym", True)
    found = recommend(SMALL, [HOST], Goals(max_size_bytes=size - 1), ALL)
    assert ("host: scaling → hf → hf (w4a16-g32-asym)", "a smaller scheme fits") in [(item.route, item.reason) for item in found.rejected]


def test_a_model_that_is_too_large_does_not_fit_and_the_largest_that_would_is_said():
    route = first(llm(hidden=8192, ffn=28672, blocks=80), TARGETS["raspberry-pi-5"])
    assert not route.fits
    assert route.scheme == "w3a16-g128-asym"
    assert any("where the memory of `raspberry-pi-5` allows 7.52 GB" in text for text in route.warnings)
    assert any("a model of up to about" in text for text in route.warnings)


@pytest.mark.parametrize(
    ("goals", "fits"),
    [
        (Goals(max_memory_bytes=100 << 20), False),
        (Goals(max_memory_bytes=2 << 30), True),
        (Goals(max_latency_ms=0.01), False),
        (Goals(max_latency_ms=100), True),
        (Goals(max_size_bytes=10**9), True),
    ],
    ids=str,
)
def test_goals_decide_whether_a_route_fits(goals, fits):
    assert first(goals=goals).fits == fits


# transformers decides how experts are held, unless a model's own code does; shared experts are linear layers like others.
@pytest.mark.parametrize(
    ("name", "own_code", "refused"),
    [("experts.0.up", False, True), ("experts.0.up", True, False), ("shared_expert.up", False, False)],
    ids=["routed experts", "by its own code", "shared experts only"],
)
def test_a_mixture_is_refused_where_transformers_fuses_its_experts(name, own_code, refused):
    layer = LayerShape(f"model.layers.0.mlp.{name}.weight", "expert", (64, 128), "bf16", 2 * 64 * 128, 0)
    model = replace(LLAMA_3_8B, layers=(*LLAMA_3_8B.layers, layer), own_code=own_code)
    assert (fused_experts(model) is not None) == refused


def test_what_is_already_quantized_is_refused():
    with pytest.raises(NoRouteError, match=r"`m` is already quantized \(`awq`\)") as caught:
        first(replace(SMALL, quantization="awq"))
    assert caught.value.hint == "start from the float model; `qhub inspect m` says what this one is"


# Families: installed plugins join at their leaf; where none is installed, the registry says what would.
def test_a_plugin_joins_at_the_leaf_of_its_family():
    route = first(RESNET, plugins=installed(Static(), Nearest(), OnlyStatic()))
    assert (route.method, route.family, route.scheme) == ("static", "static", "w8a8-static")


def test_a_family_that_nobody_serves_says_what_to_install():
    route = first(RESNET, TARGETS["apple-m4"])
    assert (route.method, route.scheme, route.family, route.exporter) == ("ptq", "w8a8-static", "static", None)
    assert route.missing == ("qhub-ptq", "qhub-coreml", "qhub-onnxruntime")
    assert route.warnings[0] == "no installed plugin serves `static`: `qhub-ptq` would"


def test_without_plugins_the_route_says_what_to_install():
    found = recommend(SMALL, [HOST], Goals(), Plugins.load([]))
    assert methods_of(found)[:3] == ["awq", "gptq", "rtn"]
    assert found.routes[0].missing[0] == "qhub-awq"
    assert found.routes[0].scheme == "w4a16-g32-asym"


def test_retraining_leads_to_qat_and_without_it_installed_to_the_other_branch():
    found = recommend(SMALL, [HOST], Goals(retrain=True), ALL)
    assert methods_of(found) == ["scaling", "second", "nearest", "qat"]
    assert found.routes[0].warnings == ("no installed plugin serves `qat`: this is the branch without retraining",)
    assert found.routes[-1].missing[0] == "qhub-qat"


def test_a_wanted_quantizer_of_another_family_is_taken_with_a_warning():
    route = first(RESNET, wanted=["nearest"])
    assert (route.method, route.family) == ("nearest", "weight-only")
    assert route.warnings[0] == "the chart leads to `static`; `nearest` was asked for"


def test_a_language_model_on_a_microcontroller_is_no_route():
    chip = Target("cortex-m4", "a microcontroller", "none", "armv7m", usable_memory_bytes=256 << 10)
    with pytest.raises(NoRouteError, match="`cortex-m4` has no operating system"):
        first(target=chip)
    found = recommend(SMALL, [chip, HOST], Goals(), ALL)
    assert {route.target for route in found.routes} == {"host"}


def test_routes_are_grouped_by_target_in_the_order_asked():
    found = recommend(SMALL, list(TARGETS.values()), Goals(), ALL)
    order = list(dict.fromkeys(route.target for route in found.routes))
    without = [item.route.partition(":")[0] for item in found.rejected if item.route.endswith(": none")]
    assert set(without) == {"edge-tpu", "cortex-m4", "cortex-m7", "cortex-m55"}
    assert order == [name for name in TARGETS if name not in without]
    assert len(found.routes) == 3 * len(order)


# Alternatives: where another precision comes close, it is a route too, behind the chart's.
@pytest.mark.parametrize(
    ("model", "target", "goals", "schemes"),
    [
        ("resnet-50", "intel-cpu-avx2", Goals(), ["w8a8-static", "fp16"]),
        ("resnet-50", "intel-cpu-avx2", Goals(max_drop_pct=0.5), ["fp16", "w8a8-static"]),
        ("resnet-50", "apple-m1", Goals(max_size_bytes=30_000_000), ["w8a8-static", "fp16"]),
        ("resnet-50", "cortex-m55", Goals(), ["w8a8-static"]),
        ("all-minilm-l6-v2", "intel-cpu-avx2", Goals(), ["fp16", "w8a8-dynamic"]),
        ("all-minilm-l6-v2", "intel-cpu-avx2", Goals(max_drop_pct=3.0), ["w8a8-dynamic", "fp16"]),
        ("bert-base", "intel-cpu-avx2", Goals(max_latency_ms=60), ["w8a8-dynamic", "fp16"]),
        ("stable-diffusion-unet", "nvidia-ada", Goals(), ["fp16", "w8a8-static"]),
        ("mystery", "nvidia-ada", Goals(), ["fp16"]),
    ],
    ids=lambda value: str(value) if not isinstance(value, Goals) else None,
)
def test_goals_order_the_alternatives(model, target, goals, schemes):
    found = recommend(MODELS[model], [TARGETS[target]], goals, Plugins.load([]))
    assert [route.scheme for route in found.routes] == schemes
    if len(schemes) > 1:
        assert any(text.startswith("the chart leads to") for route in found.routes for text in route.warnings)


def test_a_route_that_is_too_slow_for_the_goal_comes_last_and_says_so():
    found = recommend(MODELS["bert-base"], [TARGETS["intel-cpu-avx2"]], Goals(max_latency_ms=54.5), Plugins.load([]))
    assert [(route.scheme, route.fits) for route in found.routes] == [("w8a8-dynamic", True), ("fp16", True)]
    found = recommend(MODELS["bert-base"], [TARGETS["intel-cpu-avx2"]], Goals(max_latency_ms=1), Plugins.load([]))
    assert not any(route.fits for route in found.routes)
    assert any("ms per item where --max-latency allows 1 ms" in text for text in found.routes[0].warnings)


def test_what_is_installed_comes_before_what_the_chart_prefers():
    found = recommend(MODELS["resnet-50"], [TARGETS["intel-cpu-avx2"]], Goals(), toys(("float16", "onnxruntime")))
    assert [(route.method, route.scheme) for route in found.routes] == [("float16", "fp16"), ("ptq", "w8a8-static")]


def test_a_float16_method_writes_what_the_device_computes():
    for target, scheme in (("nvidia-ada", "fp16"), ("tpu", "bf16"), ("intel-cpu-amx", "bf16")):
        found = recommend(MODELS["stable-diffusion-unet"], [TARGETS[target]], Goals(), toys(("float16", "onnxruntime")))
        assert found.routes[0].scheme == scheme


def test_a_scheme_of_another_family_is_taken_with_a_warning():
    found = recommend(MODELS["resnet-50"], [TARGETS["apple-m1"]], Goals(), Plugins.load([]), scheme=Scheme.parse("w8a8-static"))
    (route,) = found.routes
    assert (route.family, route.scheme) == ("static", "w8a8-static")
    assert route.warnings[0] == "the chart leads to `float16`; scheme `w8a8-static` was asked for"


def test_engines_come_in_the_order_of_the_registry():
    found = recommend(MODELS["llama-3-8b"], [TARGETS["intel-cpu-amx"]], Goals(), toys(("awq", "hf", "gguf", "openvino")))
    best = [entry.name for entry in load_registry().finishers(TARGETS["intel-cpu-amx"], "llm")]
    assert [route.runtime for route in found.routes] == [name for name in best if name in ("hf", "gguf", "openvino")]


def test_a_device_without_3_bit_kernels_is_not_asked_for_them():
    route = first(llm(), TARGETS["hexagon"], toys(("awq", "onnxruntime")))
    assert (route.scheme, route.fits) == ("w4a16-g128-sym", False)


# Where the model comes from: what has to happen before a run.
@pytest.mark.parametrize(
    ("form", "warning"),
    [
        ("config", "only the config is here: `qhub run` needs the weights too"),
        ("hub", "the weights are not here: `hf download m` before `qhub run`"),
        (
            "tflite",
            "`qhub run` starts from a Hugging Face folder, a .pt2 or an .onnx file; "
            "`qhub-tflite` (planned, not published yet) would read tflite",
        ),
    ],
)
def test_a_model_that_cannot_be_run_yet_says_so(form, warning):
    assert warning in first(replace(SMALL, format=form)).warnings


def test_a_model_of_which_little_is_known_still_has_a_route():
    unknown = ModelProfile("m", "m", "vision", "X", 0, "unknown", 0, format="tflite", complete=False)
    route = first(unknown, TARGETS["raspberry-pi-5"])
    assert (route.scheme, route.fits, route.estimates.weight_bytes) == ("w8a8-static", True, None)
    assert "size, memory and speed: unknown" in route.estimates.basis


# All devices at once, for six well-known models.
@pytest.mark.parametrize("model", SIX, ids=lambda model: model.source)
def test_all_devices_take_less_than_300_ms(model):
    plugins, registry = toys(("awq", "gptq", "rtn", "hf")), load_registry()
    times = []
    for _ in range(3):
        started = time.process_time()
        recommend(model, list(registry.targets.values()), Goals(), plugins, registry=registry)
        times.append(time.process_time() - started)
    assert min(times) < 0.3
