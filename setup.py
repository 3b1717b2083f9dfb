"""Build steps that pyproject.toml cannot state: the static cell init, and the samples in the wheel.

Without a C compiler the wheel is pure Python and cells use the portable executor.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = ROOT / "src/aether/spawner/native"
BINARY = NATIVE / "aether-init"


def build_native() -> bool:
    """Builds the init; False when there is no compiler."""
    if shutil.which("cc") is None or shutil.which("make") is None:
        return BINARY.exists()
    subprocess.run(["make", "-s", "-C", str(NATIVE)], check=True)
    return True


class BuildPy(build_py):
    """Compiles the init first and copies the sample packages beside the code."""

    def run(self) -> None:
        built = build_native()
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "aether"
        if built:
            shutil.copy2(BINARY, target / "spawner/native/aether-init")
        shutil.copytree(ROOT / "packages", target / "samples", dirs_exist_ok=True)


class Wheel(bdist_wheel):
    """Platform-specific when it carries the init."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if build_native():
            self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        return ("py3", "none", tag[2]) if not self.root_is_pure else tag


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel})
