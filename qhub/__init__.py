"""qhub: quantize once, deploy anywhere.

The public API, loaded lazily: importing `qhub` imports neither torch nor a vendor SDK. A plugin imports from here (its
tests also from `qhub.testing`) and from nothing deeper.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "qhub.hookspecs": ("hookimpl",),
    "qhub.quiet": ("quiet_libraries",),
    "qhub.errors": ("ExitCode", "NoRouteError", "PluginError", "QhubError", "Unsupported", "UsageError"),
    "qhub.interfaces": (
        "Block", "Component", "Conversation", "Exporter", "Graph", "GraphJob", "GraphQuantizer", "GraphResult", "GraphSession", "Group",
        "ModelJob", "Quantizer", "Runtime", "Session", "Statistics", "WholeModel", "WholeResult",
    ),
    "qhub.types": (
        "Artifact", "Estimates", "Fact", "Goals", "LayerShape", "ModelProfile", "ModelSource", "OpenOptions", "QuantizedModel", "Recipe",
        "Route", "Scheme", "Target",
    ),
    "qhub.decoders.config": ("DecoderConfig", "decoder_config"),
    "qhub.decoders.files": ("DecoderFiles", "misfit", "open_decoder", "read_json"),
    "qhub.decoders.packed": ("PackedLayer",),
    "qhub.decoders.session": ("DecoderSession",),
    "qhub.decoders.tensors": ("MappedTensors",),
    "qhub.graph.onnx_graph": ("OnnxGraph",),
    "qhub.graph.onnx_lower": ("OnnxOptions", "write_onnx"),
    "qhub.graph.onnx_passes": ("ONNXRUNTIME", "OPENVINO", "TENSORRT", "OnnxStyle"),
    "qhub.graph.onnx_stored": ("read_onnx_layers",),
    "qhub.graph.placement": ("place",),
    "qhub.graph.sources": ("inputs_of",),
    "qhub.graph.store": ("graph_facts", "write_graph", "is_graph"),
    "qhub.graph.torch_graph": ("TorchGraph",),
    "qhub.graph.values": ("ActivationGrid", "Batch", "GraphInput", "Op", "Point", "Quantization", "fitting_array"),
    "qhub.quantize.block": ("LayerChoice",),
    "qhub.quantize.pack": ("pack", "unpack"),
    "qhub.quantize.qtensor": ("QTensor", "round_scale", "dequantize", "encode"),
    "qhub.quantize.grid": (
        "Grid", "better_rows", "fit_scales", "minmax_grid", "on_grid", "pick_rows", "quantize_rtn", "range_grid", "search_grid",
    ),
    "qhub.quantize.linalg": ("compensate", "lower_factor", "output_loss", "product", "solve", "turned"),
    "qhub.quantize.store": ("QuantizedWeights", "folder_digest", "read_layer"),
    "qhub.quantize.layouts.writer": ("write_layout",),
    "qhub.route.host": ("cpu_model", "fast_cores"),
    "qhub.route.usercache": ("cache_path", "read_cache", "write_cache"),
    "qhub.weights": ("TensorInfo", "WeightFiles"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME_OF)]

if TYPE_CHECKING:
    from qhub.decoders.config import DecoderConfig, decoder_config
    from qhub.decoders.files import DecoderFiles, misfit, open_decoder, read_json
    from qhub.decoders.packed import PackedLayer
    from qhub.decoders.session import DecoderSession
    from qhub.decoders.tensors import MappedTensors
    from qhub.errors import ExitCode, NoRouteError, PluginError, QhubError, Unsupported, UsageError
    from qhub.graph.onnx_graph import OnnxGraph
    from qhub.graph.onnx_lower import OnnxOptions, write_onnx
    from qhub.graph.onnx_passes import ONNXRUNTIME, OPENVINO, TENSORRT, OnnxStyle
    from qhub.graph.onnx_stored import read_onnx_layers
    from qhub.graph.placement import place
    from qhub.graph.sources import inputs_of
    from qhub.graph.store import graph_facts, is_graph, write_graph
    from qhub.graph.torch_graph import TorchGraph
    from qhub.graph.values import ActivationGrid, Batch, GraphInput, Op, Point, Quantization, fitting_array
    from qhub.hookspecs import hookimpl
    from qhub.interfaces import (
        Block,
        Component,
        Conversation,
        Exporter,
        Graph,
        GraphJob,
        GraphQuantizer,
        GraphResult,
        GraphSession,
        Group,
        ModelJob,
        Quantizer,
        Runtime,
        Session,
        Statistics,
        WholeModel,
        WholeResult,
    )
    from qhub.quantize.block import LayerChoice
    from qhub.quantize.grid import Grid, better_rows, fit_scales, minmax_grid, on_grid, pick_rows, quantize_rtn, range_grid, search_grid
    from qhub.quantize.layouts.writer import write_layout
    from qhub.quantize.linalg import compensate, lower_factor, output_loss, product, solve, turned
    from qhub.quantize.pack import pack, unpack
    from qhub.quantize.qtensor import QTensor, dequantize, encode, round_scale
    from qhub.quantize.store import QuantizedWeights, folder_digest, read_layer
    from qhub.quiet import quiet_libraries
    from qhub.route.host import cpu_model, fast_cores
    from qhub.route.usercache import cache_path, read_cache, write_cache
    from qhub.types import (
        Artifact,
        Estimates,
        Fact,
        Goals,
        LayerShape,
        ModelProfile,
        ModelSource,
        OpenOptions,
        QuantizedModel,
        Recipe,
        Route,
        Scheme,
        Target,
    )
    from qhub.weights import TensorInfo, WeightFiles


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    home = _HOME_OF.get(name)
    if home is None:
        message = f"module `qhub` has no attribute `{name}`"
        raise AttributeError(message)
    return getattr(importlib.import_module(home), name)
