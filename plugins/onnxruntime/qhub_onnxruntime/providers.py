"""ONNX Runtime's execution providers, and which of them serve a device."""

from __future__ import annotations

from qhub import Target

#: Provider → the accelerators of a target that it serves, by prefix; the CPU's serves every target. Best first.
PROVIDERS: dict[str, tuple[str, ...]] = {
    "TensorrtExecutionProvider": ("cuda",),
    "CUDAExecutionProvider": ("cuda",),
    "QNNExecutionProvider": ("hexagon",),
    "VitisAIExecutionProvider": ("npu-xdna",),
    "CoreMLExecutionProvider": ("ane", "metal"),
    "DmlExecutionProvider": ("gpu-intel", "gpu-amd", "cuda"),
}
CPU = "CPUExecutionProvider"


def providers() -> list[str]:
    """What a language model is opened with: the CPU, the only one that this plugin was tested on."""
    return [CPU]


def serving(target: Target, available: list[str]) -> list[str]:
    """The `available` providers for `target`, best first, the CPU's last."""
    found = [name for name, prefixes in PROVIDERS.items() if name in available and _has(target, prefixes)]
    return [*found, CPU]


def _has(target: Target, prefixes: tuple[str, ...]) -> bool:
    return any(accelerator.startswith(prefixes) for accelerator in target.accelerators)
