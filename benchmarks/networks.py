"""INT8 networks: ours, onnxruntime.quantization's and NNCF's, and the float ones, in the same engines, calls in turn.

    python benchmarks/networks.py --work DIR [--only resnet50] [--rounds 15] [--assets ../shared/assets]

One JSON line per network, engine, threads and batch: milliseconds (medians), and how much faster ours is than the best peer. ResNet-50's
and BERT-base's shapes have random weights; with assets ResNet-20 and an SST-2 BERT are measured too, with accuracies. Needs the plugins
ptq, onnxruntime and openvino, and `pip install nncf`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qhub import OpenOptions, pipeline
from qhub.events import Events
from qhub.feeding import Feed, feed
from qhub.networks import export_float, float_graph
from qhub.pipeline import RunRequest
from qhub.plugins import Plugins
from qhub.prove.bench_network import NetworkJob, inputs_for
from qhub.rundir import RunDir

PICTURES = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
THREADS, BATCHES = (1, 2), (1, 32)


@dataclass(frozen=True)
class Network:
    """What `qhub run` is asked for, and how long its texts are while it is timed. `labels`: accuracies mean something."""

    name: str
    request: dict[str, Any]
    length: int = 1
    labels: bool = False
    dynamic: bool = False


def networks(work: Path, assets: Path) -> Iterator[Network]:
    """Everything that is measured."""
    random = np.random.default_rng(0)
    yield _resnet50(work, random)
    yield from (_bert(work, random, scheme) for scheme in ("w8a8-dynamic", "w8a8-static"))
    if assets.is_dir():
        yield from _trained(work, assets)


def _resnet50(work: Path, random: np.random.Generator) -> Network:
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = work / "resnet50"
    if not folder.exists():
        torch.manual_seed(0)
        ResNetForImageClassification(ResNetConfig(num_labels=100)).eval().save_pretrained(folder)
        (folder / "preprocess.json").write_text(json.dumps({**PICTURES, "size": [224, 224]}))
        np.savez(folder / "calibration.npz", x=random.integers(0, 256, (32, 224, 224, 3), dtype=np.uint8))
        shutil.copy(folder / "calibration.npz", folder / "heldout.npz")
    return Network("resnet50-shape", {"model": str(folder), "scheme": "w8a8-static"})


def _bert(work: Path, random: np.random.Generator, scheme: str) -> Network:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification

    folder = work / "bert-base"
    if not folder.exists():
        BertForSequenceClassification(BertConfig(num_labels=2)).eval().save_pretrained(folder)
        words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(1000))]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.enable_padding()
        tokenizer.save(str(folder / "tokenizer.json"))
        texts = [" ".join(f"w{word}" for word in random.integers(0, 1000, 128)) for _ in range(32)]
        for name in ("calibration.jsonl", "heldout.jsonl"):
            (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Network(f"bert-base-shape {scheme}", {"model": str(folder), "scheme": scheme}, 128, dynamic="dynamic" in scheme)


def _trained(work: Path, assets: Path) -> Iterator[Network]:
    preprocess = work / "resnet20.json"
    preprocess.write_text(json.dumps({**PICTURES, "layout": "nchw"}))
    data = assets / "cifar10" / "cifar10_subset.npz"
    resnet = {
        "model": "resnet20:resnet20",
        "weights": assets / "resnet-cifar10" / "resnet20.safetensors",
        "preprocess": preprocess,
        "calib": f"{data}#train",
        "eval": f"{data}#test",
        "scheme": "w8a8-static",
    }
    yield Network("resnet20", resnet, labels=True)
    texts = {"calib": str(assets / "sst2" / "train.tsv"), "eval": str(assets / "sst2" / "test.tsv")}
    for scheme in ("w8a8-dynamic", "w8a8-static"):
        request = {"model": str(assets / "selftrained-sst2-bert"), "scheme": scheme, **texts}
        yield Network(f"sst2-bert {scheme}", request, 32, labels=True, dynamic="dynamic" in scheme)


class Measured:
    """One network in one engine: ours, the peer's and the float artifact, each in a folder that the engine opens."""

    def __init__(self, network: Network, engine: str, work: Path, plugins: Plugins) -> None:
        self.network, self.engine, self.plugins = network, engine, plugins
        self.folder = work / f"{network.name.replace(' ', '-')}-{engine}"
        self.recipe, self.run = self._ours()
        self.paths = {"qhub": next((self.run.artifacts).iterdir()), "float": self._float()}
        self.paths["peer"] = self._peer()

    def _ours(self) -> tuple[Any, RunDir]:
        out = self.folder / "run"
        if not (out / "report.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            request = RunRequest(**self.network.request, plugins=("ptq", self.engine), out=out, max_drop_pct=100.0)
            pipeline.run(pipeline.plan(request, self.plugins), self.plugins, Events())
        return pipeline.read_recipe(out / "recipe.yaml"), RunDir.open(out)

    def _float(self) -> Path:
        exporter = self.plugins.exporters[self.engine]
        floating = self.folder / "float"
        if not floating.exists():
            export_float(float_graph(self.run, self.recipe, self._feed()), self.recipe, exporter, floating)
        return floating / exporter.format

    def _feed(self) -> Feed:
        return feed(self.recipe, self.recipe.calibration)

    def _peer(self) -> Path:
        out = self.folder / "peer"
        if not out.exists():
            partial = self.folder / "peer.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self.paths["float"], partial)
            batches = [dict(batch) for batch in self._feed().into(self._session("float", 1).inputs).batches(1)][:128]
            PEERS[self.engine](partial, batches, self.network)
            partial.rename(out)
        return out

    def _session(self, kind: str, threads: int) -> Any:  # noqa: ANN401 - a GraphSession
        return self.plugins.runtimes[self.engine].open_graph(self.paths[kind], OpenOptions(threads=threads))

    def rows(self, rounds: int) -> Iterator[dict[str, Any]]:
        """Medians over rounds in which each is called in turn."""
        for threads in THREADS:
            sessions = {kind: self._session(kind, threads) for kind in self.paths}
            for size in BATCHES:
                times = self._times(sessions, size, rounds)
                ours = times["qhub"]
                yield {
                    "network": self.network.name, "engine": self.engine, "threads": threads, "batch": size,
                    **{f"{kind}_ms": round(value, 4) for kind, value in times.items()},
                    "over_float": round(times["float"] / ours, 2), "over_peer": round(times["peer"] / ours, 2),
                }  # fmt: skip
            for session in sessions.values():
                session.close()

    def _times(self, sessions: dict[str, Any], size: int, rounds: int) -> dict[str, float]:
        job = NetworkJob("", self.engine, OpenOptions(), (size,), self.network.length, rounds)
        batch = inputs_for(sessions["qhub"].inputs, job, size)
        found: dict[str, list[float]] = {kind: [] for kind in sessions}
        calls = max(1, int(0.03 / max(min(_call(session, batch) for session in sessions.values() for _ in range(3)), 1e-6)))
        for _ in range(rounds):
            for kind, session in sessions.items():
                found[kind].append(statistics.median(_call(session, batch) for _ in range(min(calls, 50))))
        return {kind: 1e3 * statistics.median(values) for kind, values in found.items()}

    def accuracies(self) -> dict[str, float]:
        """Share of right answers of each in the engine."""
        found = feed(self.recipe, self.recipe.evaluation)
        right: dict[str, float] = {}
        for kind in self.paths:
            session = self._session(kind, 1)
            into = found.into(session.inputs)
            hits = [(session.run(batch)[0].argmax(-1) == wanted) for batch, wanted in zip(into.batches(), into.labels(), strict=True)]
            right[kind] = float(np.concatenate(hits).mean())
            session.close()
        return right


def _call(session: Any, batch: Any) -> float:  # noqa: ANN401 - a GraphSession
    started = time.perf_counter()
    session.run(batch)
    return time.perf_counter() - started


def _onnxruntime(folder: Path, batches: list[dict[str, Any]], network: Network) -> None:
    """onnxruntime.quantization's own INT8, with its defaults for the CPU."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static, shape_inference

    class Reader(CalibrationDataReader):  # type: ignore[misc] # has no types
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    source, ready = folder / "model.onnx", folder / "ready.onnx"
    shape_inference.quant_pre_process(source, ready, skip_symbolic_shape=True)
    source.unlink()
    if network.dynamic:
        quantize_dynamic(ready, source, weight_type=QuantType.QInt8, per_channel=True)
    else:
        options = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, source, Reader(), quant_format=QuantFormat.QDQ, **options)
    ready.unlink()


def _openvino(folder: Path, batches: list[dict[str, Any]], network: Network) -> None:
    """NNCF's own INT8: its defaults, for transformers its transformer mode; dynamic: its INT8 weight compression."""
    import nncf
    import openvino

    path = next(folder.glob("*.xml"))
    model = openvino.Core().read_model(path)
    if network.dynamic:
        made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        kind = nncf.ModelType.TRANSFORMER if network.length > 1 else None
        made = nncf.quantize(model, nncf.Dataset(batches), model_type=kind, subset_size=len(batches))
    written = path.with_name("made.xml")
    openvino.save_model(made, written, compress_to_fp16=False)
    for suffix in (".xml", ".bin"):
        written.with_suffix(suffix).replace(path.with_suffix(suffix))


PEERS: dict[str, Callable[[Path, list[dict[str, Any]], Network], None]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def main() -> None:
    """Measure what was asked for, a JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument("--engine", choices=sorted(PEERS), action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    arguments = parser.parse_args()
    plugins, assets = Plugins.load(), arguments.assets.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for network in networks(arguments.work.resolve(), assets):
        if arguments.only not in network.name:
            continue
        for engine in arguments.engine or PEERS:
            measured = Measured(network, engine, arguments.work.resolve(), plugins)
            for row in measured.rows(arguments.rounds):
                print(json.dumps(row), flush=True)
            if network.labels:
                print(json.dumps({"network": network.name, "engine": engine, "accuracy": measured.accuracies()}), flush=True)


if __name__ == "__main__":
    main()
