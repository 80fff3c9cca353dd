"""Opening a model: the pack cache, damage, forced kernels, and what a session refuses."""

import json
import os
import platform
import random
import shutil
import subprocess
import sys
import threading

import fuzz_load
import numpy as np
import pytest
from qhub_native import _native, packs
from qhub_native.load import Options, load
from qhub_native.session import NativeSession, Sampling
from qhub_native.settings import chosen

from qhub import OpenOptions, QhubError, UsageError

IDS = list(range(3, 30))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    return fuzz_load.model(made, random.Random(0))


def session(folder, **options):
    settings = {"exact": True, "forced": True, **options}
    opened = NativeSession(folder, Options(settings.pop("threads", 1), settings.pop("kernel", _native.kernel_names()[0]), **settings))
    written()
    return opened


def written():
    """Wait until packs are on disk."""
    for thread in threading.enumerate():
        if thread.name == "qhub-native-pack":
            thread.join()


def packs_of(own_caches):
    return sorted((own_caches / "qhub" / "native").glob("*.pack"))


def logits(opened):
    return opened.logits(np.array([IDS]))


# The pack cache.


def test_the_second_start_reads_what_the_first_one_packed(folder, own_caches, monkeypatch):
    first = logits(session(folder))
    assert len(packs_of(own_caches)) == 1
    monkeypatch.setattr("qhub_native.matrices.pack", None)  # packing again would fail
    assert np.array_equal(logits(session(folder)), first)


def test_exact_and_fast_packs_lie_side_by_side(folder, own_caches):
    session(folder), session(folder, exact=False)
    assert len(packs_of(own_caches)) == 2


def test_a_changed_model_is_packed_again(folder, own_caches):
    before = logits(session(folder))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4000:-2000] = bytes(2000)
    (folder / "model.safetensors").write_bytes(data)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert not np.array_equal(logits(session(folder)), before)
    assert len(packs_of(own_caches)) == 2


@pytest.mark.parametrize("at", [0, 10, 40, 100, -5], ids=["magic", "length", "digest", "header", "matrices"])
def test_a_damaged_pack_is_found_and_made_again(at, folder, own_caches):
    first = logits(session(folder))
    (path,) = packs_of(own_caches)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[at if at >= 0 else end_of_matrices(path) + at] ^= 0x40
    path.write_bytes(damaged)
    assert np.array_equal(logits(session(folder)), first)
    assert path.read_bytes() == whole


def end_of_matrices(path):
    """Where the last matrix ends: behind it the file is filled up to a page."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    start = -(-(48 + length) // 4096) * 4096
    entries = json.loads(data[48 : 48 + length])["entries"].values()
    return start + max(entry["offset"] + packs.Entry(**entry).shape.packed_bytes for entry in entries)


def test_a_pack_cut_short_is_made_again(folder, own_caches):
    first = logits(session(folder))
    (path,) = packs_of(own_caches)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert np.array_equal(logits(session(folder)), first)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_stops_nobody(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QHUB_NATIVE_CACHE", str(tmp_path / "file" / "cache"))
    assert np.isfinite(logits(session(folder))).all()


def test_a_pack_that_fails_half_way_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    opened = load(folder, Options(1, "scalar", cache=False))
    pack = opened.owners[0]
    monkeypatch.setattr(packs.Pack, "matrix", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        packs.write_pack(tmp_path / "cache" / "x.pack", "key", pack)
    assert list((tmp_path / "cache").iterdir()) == []


# Kernels.


def test_forcing_a_kernel_forces_it(folder, monkeypatch):
    assert [chosen(OpenOptions(kernel=name)).kernel for name in _native.kernel_names()] == _native.kernel_names()
    monkeypatch.setenv("QHUB_NATIVE_ISA", "scalar")
    assert chosen(OpenOptions()) == Options(chosen(OpenOptions()).threads, "scalar", forced=True)
    assert chosen(OpenOptions(kernel=_native.kernel_names()[0])).kernel == _native.kernel_names()[0]


def test_kernels_that_sum_in_another_order_give_other_last_bits(folder):
    """Were a forced kernel not the one that runs, all would give the same bits."""
    found = {name: logits(session(folder, kernel=name)).tobytes() for name in ("scalar", _native.kernel_names()[0])}
    if len(found) == 1:
        pytest.skip("only the scalar kernel runs here")
    assert len(set(found.values())) == 2


@pytest.mark.parametrize("by", ["option", "environment"])
def test_forcing_a_kernel_that_does_not_run_here_lists_those_that_do(by, monkeypatch):
    if by == "environment":
        monkeypatch.setenv("QHUB_NATIVE_ISA", "pdp11")
    with pytest.raises(UsageError, match="kernel `pdp11` does not run here") as caught:
        chosen(OpenOptions(kernel="pdp11" if by == "option" else None))
    assert caught.value.hint == f"these do: {', '.join(_native.kernel_names())}"


# The selector.


def test_the_selector_remembers_what_it_measured(folder, own_caches, monkeypatch):
    opened = session(folder, exact=False, forced=False)
    opened.feed(opened.sequence(8), [1])
    remembered = json.loads((own_caches / "qhub" / "native-kernels.json").read_text())
    ((place, entries),) = remembered.items()
    assert place.endswith("1 threads")
    assert {name.split()[1] for name in entries} == {"m1"}
    assert {name.split()[0] for name in entries} >= {"32x64-w4-g32-asym", "32x128-w4-g32-asym", "64x32-w4-g32-asym"}
    monkeypatch.setattr("qhub_native.selector.time_plan", None)  # measuring again would fail
    again = session(folder, exact=False, forced=False)
    again.feed(again.sequence(8), [1])


@pytest.mark.parametrize("text", ["[]", "{", '{"x": 1}'])
def test_a_spoilt_memory_of_the_selector_is_measured_anew(text, folder, own_caches):
    (own_caches / "qhub").mkdir(parents=True, exist_ok=True)
    (own_caches / "qhub" / "native-kernels.json").write_text(text)
    opened = session(folder, exact=False, forced=False)
    assert np.isfinite(opened.feed(opened.sequence(8), [1])).all()


# What a session refuses, and that it stays usable.


def test_a_prompt_longer_than_the_context_is_refused_and_the_session_goes_on(folder):
    opened = session(folder)
    with pytest.raises(QhubError, match=r"`65` tokens do not fit the model's context of 64"):
        opened.logits(np.ones((1, 65), dtype=np.int64))
    conversation = opened.sequence()
    opened.feed(conversation, IDS)
    with pytest.raises(QhubError, match="`60` more tokens do not fit: 27 of 64 are taken") as caught:
        opened.feed(conversation, [1] * 60)
    assert "/reset" in caught.value.hint
    assert conversation.length == 27
    assert np.isfinite(opened.feed(conversation, [1])).all()


@pytest.mark.parametrize(("ids", "words"), [([], "no tokens"), ([1, 40], "not in the vocabulary of 40"), ([-1], "not in the vocabulary")])
def test_tokens_that_are_none_are_refused(ids, words, folder):
    opened = session(folder)
    with pytest.raises(QhubError, match=words):
        opened.feed(opened.sequence(), ids)


def test_generation_ends_with_the_context_or_the_number_of_tokens(folder):
    opened = session(folder)
    opened.stops = ()
    assert len(list(opened.generate(IDS, 5))) == 5
    assert len(list(opened.generate(IDS, 100))) == 64 - len(IDS) + 1


def test_generation_stops_at_a_stop_token(folder):
    opened = session(folder)
    opened.stops = ()
    tokens = list(opened.generate(IDS, 20))
    opened.stops = (tokens[3],)
    assert list(opened.generate(IDS, 20)) == tokens[: tokens.index(tokens[3])]


def test_greedy_generation_takes_the_most_probable_token_of_the_logits(folder):
    opened = session(folder)
    opened.stops = ()
    tokens = list(opened.generate(IDS, 8))
    whole = opened.logits(np.array([IDS + tokens]))[0]
    assert tokens == whole[len(IDS) - 1 : -1].argmax(1).tolist()


def test_the_same_seed_draws_the_same_tokens_another_seed_others(folder):
    opened = session(folder)
    opened.stops = ()
    drawn = [list(opened.generate(IDS, 20, sampling=Sampling(temperature=3.0, seed=seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_embeddings_are_what_the_head_reads(folder):
    opened = session(folder)
    hidden = opened.embed(IDS)
    assert hidden.shape == (len(IDS), 32)
    head = np.asarray(opened.loaded.owners[1].floats("lm_head.weight"))
    np.testing.assert_allclose(hidden @ head.T, logits(opened)[0], rtol=1e-4, atol=1e-4)


# Sampling.


def draw(values, count=2000, **settings):
    chosen_by, random_numbers = Sampling(**settings).native(), _native.Random(7)
    seen = np.array(settings.pop("seen", []), dtype=np.int32)
    row = np.log(np.asarray(values, dtype=np.float32))
    return np.bincount([_native.sample(row, seen, chosen_by, random_numbers) for _ in range(count)], minlength=len(values)) / count


def test_draws_follow_the_probabilities():
    np.testing.assert_allclose(draw([0.5, 0.3, 0.2], temperature=1.0), [0.5, 0.3, 0.2], atol=0.04)


def test_temperature_flattens_and_sharpens():
    np.testing.assert_allclose(draw([0.8, 0.2], temperature=2.0), [2 / 3, 1 / 3], atol=0.04)
    assert draw([0.5, 0.3, 0.2])[0] == 1


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"top_k": 2}, [0.625, 0.375, 0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0]),
        ({"top_p": 0.4}, [1, 0, 0]),
        ({"min_p": 0.5}, [0.625, 0.375, 0]),
    ],
    ids=["top-k", "top-p", "top-p of one", "min-p"],
)
def test_unlikely_tokens_are_left_out(settings, left):
    np.testing.assert_allclose(draw([0.5, 0.3, 0.2], temperature=1.0, **settings), left, atol=0.04)


def test_the_repetition_penalty_holds_for_seen_tokens_only():
    settings = Sampling(repetition_penalty=2.0).native()
    row = np.array([3.0, 2.0, -1.0, -1.5], dtype=np.float32)
    assert _native.sample(row, np.array([0], dtype=np.int32), settings, _native.Random(0)) == 1
    assert _native.sample(-row, np.array([2], dtype=np.int32), settings, _native.Random(0)) == 3
    assert row.tolist() == [3.0, 2.0, -1.0, -1.5]


# Damage, and the wheel's promise.


def test_no_damage_to_a_model_crashes_the_loader(own_caches, monkeypatch):
    monkeypatch.setenv("QHUB_NATIVE_CACHE", str(own_caches / "fuzz"))
    answers = fuzz_load.fuzz(5, seed=1)
    written()
    assert sum(answers.values()) > 20
    assert answers["ran"] < sum(answers.values())


def test_a_file_whose_numbers_are_not_aligned_gives_the_same_logits(folder):
    before = logits(session(folder))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    assert np.array_equal(logits(session(folder)), before)


def test_a_folder_that_is_no_model_is_one_clear_error(tmp_path):
    with pytest.raises(QhubError, match=r"has no qhub\.json") as caught:
        session(tmp_path)
    assert "qhub run" in caught.value.hint


def test_the_runtime_imports_neither_torch_nor_transformers(folder):
    code = (
        "import sys; from pathlib import Path; from qhub_native.session import NativeSession; from qhub_native.load import Options;"
        f"s = NativeSession(Path({str(folder)!r}), Options(1, 'scalar')); s.feed(s.sequence(4), [1]);"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


_WITHOUT_NUMPY = """
import mmap
from array import array
from qhub_native import _native

rows = lambda values, *shape: memoryview(values).cast("B").cast(values.typecode, shape)
shape = _native.Shape(16, 64, group=32, bits=4, symmetric=True)
part = _native.Part(rows(array("B", range(256)) * 2, 16, 32), rows(array("f", [0.5] * 32), 16, 2), None, bits=4, every=32)
memory, pool = mmap.mmap(-1, shape.packed_bytes), _native.Pool(2)
exponent = _native.pack(pool, shape, [part], memory)
seconds = _native.time_plan([_native.Linear.quantized(memory, shape, exponent)], pool, 3, "scalar", 8, 0, 0.0)
print(_native.kernel_names(), len(seconds) >= 3 and min(seconds) > 0)
"""


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs the Debian package qemu-user")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")
def test_a_processor_without_avx_runs_the_scalar_kernel():
    """Were anything outside the kernels compiled for AVX, this processor of 2008 would stop at it (numpy's own wheel does)."""
    command = ["qemu-x86_64", "-cpu", "Nehalem", sys.executable, "-c", _WITHOUT_NUMPY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "['scalar'] True\n", done.stderr
