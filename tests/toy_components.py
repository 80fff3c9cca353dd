"""Components that exist only for routing: real plugins by name, family and format, which do no work."""

from __future__ import annotations

from qhub import Exporter, Quantizer, Runtime, hookimpl
from qhub.plugins import PluginInfo, Plugins


def quantizer(name: str, family: str, scheme: str, *, needs: tuple[str, ...] = (), scales: bool = False) -> Quantizer:
    """A quantizer that takes every model at every scheme of its family."""
    facts = {"name": name, "family": family, "default_scheme": scheme, "needs": frozenset(needs), "scales": scales}
    return type(name, (Quantizer,), {**facts, "reject": lambda self, profile, wanted: None})()


def finisher(name: str) -> tuple[Exporter, Runtime]:
    """A format and its engine, both called `name`; the registry says where it finishes a route."""
    return type(name, (Exporter,), {"name": name, "format": name})(), type(name, (Runtime,), {"name": name, "formats": (name,)})()


W4 = "w4a16-g128-asym"
QUANTIZERS = {
    "awq": quantizer("awq", "weight-only", W4, scales=True),
    "gptq": quantizer("gptq", "weight-only", W4, needs=("gram",)),
    "rtn": quantizer("rtn", "weight-only", W4),
    "inc": quantizer("inc", "weight-only", W4, needs=("gram",)),
    "nf4": quantizer("nf4", "weight-only", "nf4"),
    "ternary": quantizer("ternary", "weight-only", "w2a16-g64-asym", needs=("gram",)),
    "static": quantizer("static", "static", "w8a8-static"),
    "dynamic": quantizer("dynamic", "dynamic", "w8a8-dynamic"),
    "float16": quantizer("float16", "float16", "fp16"),
    "qat": quantizer("qat", "qat", "w8a8-static"),
}


def installed(names: tuple[str, ...]) -> Plugins:
    """Plugins that offer the components called `names`, as if all came from one plugin called `toys`."""
    finishers = [finisher(name) for name in names if name not in QUANTIZERS]

    class Toys:
        @hookimpl
        def qhub_quantizers(self):
            return [QUANTIZERS[name] for name in names if name in QUANTIZERS]

        @hookimpl
        def qhub_exporters(self):
            return [exporter for exporter, _ in finishers]

        @hookimpl
        def qhub_runtimes(self):
            return [runtime for _, runtime in finishers]

    plugins = Plugins.load([])
    plugins.manager.register(Toys(), name="toys")
    plugins.infos.append(PluginInfo("toys", "qhub-toys", "1.0", "toys"))
    return plugins
