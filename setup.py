"""Puts `registry.yaml`, which stays at the top of the repository, into the package of a wheel."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

REGISTRY = "registry.yaml"


class BuildWithRegistry(build_py):
    """`build_py`, and `registry.yaml` beside the modules; an editable install reads it where it is."""

    def run(self) -> None:
        """Build the modules, then copy the registry."""
        super().run()
        if not self.editable_mode:
            self.copy_file(REGISTRY, self._registry_in_package())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files that a wheel holds."""
        return [*super().get_outputs(include_bytecode), self._registry_in_package()]

    def get_source_files(self) -> list[str]:
        """The files that a source distribution needs."""
        return [*super().get_source_files(), REGISTRY]

    def _registry_in_package(self) -> str:
        return str(Path(self.build_lib) / "qhub" / REGISTRY)


setup(cmdclass={"build_py": BuildWithRegistry})
