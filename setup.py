"""Packages the kernels' sources, and compiles them ahead of time when COMEBA_BUILD=1 (else on first use).

Everything else is in pyproject.toml. torch is imported only for a build ahead of time:
``COMEBA_BUILD=1 pip install --no-build-isolation .``
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


class BuildKernels(build_ext):
    """The same recipe as the compile on first use, into the package."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"  # the loader opens it by its path

    def build_extension(self, ext):
        build = load_build()
        emulated = os.environ.get("COMEBA_EMULATE", "0") == "1"
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            archs = build.asked_archs() or tuple(build.AHEAD_OF_TIME_ARCHS.split(";"))
            recipe = build.recipe(emulated, archs, portable=True)
            with tempfile.TemporaryDirectory() as folder:
                log = Path(tempfile.mkdtemp(prefix="comeba_ext_build-")) / "log.txt"  # this user's alone, and kept
                build.compile_library(recipe, Path(folder), out, log)
        except build.BuildFailure as failure:
            raise SystemExit(f"comeba_ext: cannot compile ahead of time: {failure}") from None
        facts = {"torch": recipe.torch, "archs": recipe.archs, "emulated": emulated}
        out.with_suffix(".json").write_text(json.dumps(facts))

    def get_outputs(self):
        return [name for path in super().get_outputs() for name in (path, str(Path(path).with_suffix(".json")))]


def load_build():
    """comeba_ext/kernels/build.py by its path: the package itself need not be importable."""
    spec = importlib.util.spec_from_file_location("comeba_build", HERE / "comeba_ext" / "kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ahead_of_time = os.environ.get("COMEBA_BUILD", "0") not in ("", "0")
setup(
    packages=[*find_packages(include=["comeba_ext*"]), "comeba_ext.csrc", "comeba_ext.csrc.emulation"],
    package_dir={"comeba_ext.csrc": "csrc", "comeba_ext.csrc.emulation": "csrc/emulation"},
    package_data={"comeba_ext.csrc": ["*.cpp", "*.cu", "*.cuh", "*.h"], "comeba_ext.csrc.emulation": ["*.h"]},
    exclude_package_data={"comeba_ext.csrc": ["tests/*", ".clang-format"]},
    ext_modules=[Extension("comeba_ext._kernels", sources=[])] if ahead_of_time else [],
    cmdclass={"build_ext": BuildKernels},
)
