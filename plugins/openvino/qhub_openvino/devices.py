"""OpenVINO's devices: which one serves a target, and how it is set up."""

from __future__ import annotations

from typing import Any

from qhub import OpenOptions, UsageError, cache_path, fast_cores
from qhub_openvino.vendor import ov

CPU, AUTO = "CPU", "AUTO"
_CACHE = "openvino"
_CACHED_BYTES = 256 * 1000**2  # of weights: what is kept takes up to twice that
#: float32 everywhere: nothing is rounded that the model does not round.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def device_of(core: ov.Core, options: OpenOptions) -> str:
    """The device that `--kernel` names, else the CPU.

    :raises UsageError: when there is no such device here.
    """
    if options.kernel is None:
        return CPU
    device, here = options.kernel.upper(), [*core.available_devices, AUTO]
    if device not in here:
        raise UsageError(f"OpenVINO has no device `{device}` here", hint=f"`--kernel` takes {', '.join(here)}")
    return device


def settings(device: str, options: OpenOptions, weight_bytes: int = 0) -> dict[str, Any]:
    """What a model of so many bytes is compiled with: one stream, for latency; threads are the CPU's.

    What was compiled of small models (0: none) is kept in the user's cache, so that they open faster again.
    """
    found: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if device == CPU:
        found |= {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(options.threads or fast_cores())}
        found |= _EXACT if options.exact else {}
    elif options.exact:
        found["INFERENCE_PRECISION_HINT"] = "f32"
    if 0 < weight_bytes <= _CACHED_BYTES:
        found["CACHE_DIR"] = str(cache_path(_CACHE))
    return found
