"""What a device is and can do, from its facts: every one of the registry, and some that are not in it."""

from __future__ import annotations

import pytest

from qhub.route.device import computes_sixteen_bit, cuda_capability, hexagon_version, int8_of, is_server, kind_of, sixteen_bit
from qhub.route.registry import load_registry
from qhub.types import Target

TARGETS = load_registry().targets


def device(*accelerators, isa=(), os="linux", arch="x86_64", **facts):
    return Target("toy", "a toy", os, arch, isa, accelerators, **facts)


@pytest.mark.parametrize(
    ("target", "kind", "int8", "sixteen"),
    [
        ("apple-m1", "apple", "no", "fp16"),
        ("apple-m4", "apple", "yes", "fp16"),
        ("ios", "apple", "yes", "fp16"),
        ("raspberry-pi-4", "cpu", "slow", "fp16"),
        ("raspberry-pi-5", "cpu", "yes", "fp16"),
        ("jetson-orin-nano", "nvidia", "yes", "fp16"),
        ("intel-cpu-avx2", "cpu", "slow", "fp16"),
        ("intel-cpu-amx", "cpu", "yes", "bf16"),
        ("amd-cpu-zen4", "cpu", "yes", "bf16"),
        ("ai-pc", "cpu", "yes", "fp16"),
        ("ai-pc-gpu", "gpu", "yes", "fp16"),
        ("ai-pc-npu", "npu", "yes", "fp16"),
        ("ryzen-ai", "npu", "yes", "bf16"),
        ("android", "cpu", "yes", "fp16"),
        ("mobile-gpu", "mobile-gpu", "no", "fp16"),
        ("hexagon", "npu", "yes", "fp16"),
        ("tpu", "tpu", "yes", "bf16"),
        ("edge-tpu", "edge-tpu", "only", "fp16"),
        ("cortex-m4", "microcontroller", "only", "fp16"),
        ("cortex-m55", "microcontroller", "only", "fp16"),
    ],
)
def test_the_devices_of_the_registry(target, kind, int8, sixteen):
    target = TARGETS[target]
    assert (kind_of(target), int8_of(target)[0], sixteen_bit(target)) == (kind, int8, sixteen)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_every_device_has_an_answer_with_a_reason(target):
    assert len(int8_of(target)[1]) > 10


@pytest.mark.parametrize(
    ("target", "int8", "why"),
    [
        (device("cuda-6.1"), "no", "has no tensor cores for int8"),
        (device("cuda-7.5"), "yes", "tensor cores multiply int8"),
        (device("hexagon-v68"), "only", "no float16"),
        (device("hexagon-v73"), "yes", "`hexagon-v73` multiplies int8 fast"),
        (device(isa=("avx2", "avx512_vnni")), "yes", "`avx512_vnni`"),
        (device(isa=("avx512f",)), "slow", "has no VNNI"),
        (device(arch="riscv64"), "slow", "has no int8 dot product"),
    ],
    ids=["Pascal", "Turing", "Hexagon v68", "Hexagon v73", "VNNI", "AVX-512 without VNNI", "RISC-V"],
)
def test_int8_is_decided_by_facts(target, int8, why):
    level, reason = int8_of(target)
    assert level == int8
    assert why in reason


def test_versions_are_read_from_the_names():
    assert (cuda_capability(device("cuda-8.6")), cuda_capability(device("metal"))) == (8.6, None)
    assert (hexagon_version(device("hexagon-v75")), hexagon_version(device("hexagon-next")), hexagon_version(device())) == (75, None, None)


def test_sixteen_bit_arithmetic_is_a_fact_too():
    native = {name for name, target in TARGETS.items() if kind_of(target) == "cpu" and computes_sixteen_bit(target)}
    assert {"raspberry-pi-5", "intel-cpu-amx", "amd-cpu-zen4", "android"} <= native
    assert not native & {"intel-cpu-avx2", "intel-cpu-avx512-vnni", "raspberry-pi-4"}
    assert not computes_sixteen_bit(device("cuda-5.2"))


def test_servers_are_known_by_their_cores():
    assert [name for name in ("intel-cpu-amx", "intel-cpu-avx2", "raspberry-pi-5", "nvidia-ada") if is_server(TARGETS[name])] == [
        "intel-cpu-amx"
    ]


def test_a_laptop_is_its_processor_whatever_else_is_built_in():
    assert kind_of(device("gpu-intel", "npu-intel", isa=("avx2", "avx_vnni"))) == "cpu"
    assert kind_of(device("cuda-8.9", "gpu-intel", isa=("avx2",))) == "nvidia"
    assert kind_of(device("npu-intel")) == "npu"
