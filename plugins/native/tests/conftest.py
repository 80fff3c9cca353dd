"""The user's caches are not touched by tests."""

import pytest


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("QHUB_NATIVE_CACHE", raising=False)
    monkeypatch.delenv("QHUB_NATIVE_ISA", raising=False)
    return folder
