"""Build steps that pyproject.toml cannot state: the static cell init, and the samples in the wheel.

Where no static program can be built (no C compiler, or no static C library), the wheel is pure Python and cells use
the portable executor. Every build starts from an empty tree: pip builds inside the checkout, and what an earlier
build left there would go into the wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = ROOT / "src/aether/spawner/native"
BINARY = NATIVE / "aether-init"


def can_link_statically() -> bool:
    """Whether `cc` makes static programs; some distributions pack the static C library separately."""
    if shutil.which("cc") is None or shutil.which("make") is None:
        return False
    with tempfile.TemporaryDirectory() as away:
        source = Path(away) / "empty.c"
        source.write_text("int main(void) { return 0; }\n")
        linked = subprocess.run(["cc", "-static", "-o", source.with_suffix(""), source], capture_output=True)
    return linked.returncode == 0


def build_native() -> bool:
    """Builds the init where it can be built; whether there is one now."""
    if can_link_statically():
        subprocess.run(["make", "-s", "-C", str(NATIVE)], check=True)
    return BINARY.exists()


class BuildPy(build_py):
    """Compiles the init first and copies the sample packages beside the code."""

    def run(self) -> None:
        build_native()
        if self.editable_mode:
            super().run()
            return
        target = Path(self.build_lib) / "aether"
        shutil.rmtree(target, ignore_errors=True)
        super().run()
        shutil.copytree(ROOT / "packages", target / "samples")


class Wheel(bdist_wheel):
    """Platform-specific when it carries the init, and then for every Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if build_native():
            self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        return ("py3", "none", tag[2]) if not self.root_is_pure else tag


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel})
