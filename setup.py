"""Builds the optional native extension; every other fact about the package stands in pyproject.toml.

All of ``csrc/cpu/**/*.cpp`` becomes one library, ``fusedformer/_native.abi3.so``, on torch's stable ABI: one build
serves every torch from 2.11 and every Python from 3.10. Where torch or a working C++20 compiler is missing the package
installs without it, and one line says why. A source that a working compiler rejects is an error.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from glob import glob
from typing import Any

from setuptools import setup

# torch takes seconds to import, and metadata and sdist have no use for it.
BUILD_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
STANDARD = "-std=c++20"
PROBE = "#include <torch/csrc/stable/library.h>\n"


def compiler_failure(include_dirs: list[str]) -> str | None:
    """Why the C++ compiler cannot build a library on torch's headers; None when it can."""
    compiler = os.environ.setdefault("CXX", "c++")  # torch compiles with it; set, setuptools links with it too
    includes = [f"-I{path}" for path in include_dirs]
    output = ["-shared", "-fPIC", "-x", "c++", "-", "-o", os.devnull]
    command = [*shlex.split(compiler), STANDARD, STABLE_ABI, *includes, *output]
    try:
        probe = subprocess.run(command, input=PROBE, text=True, capture_output=True)
    except OSError as error:
        return f"the C++ compiler {compiler!r} does not run: {error.strerror}"
    if probe.returncode != 0:
        errors = [line for line in probe.stderr.splitlines() if "error" in line] or [f"exit status {probe.returncode}"]
        return f"the C++ compiler {compiler!r} fails on torch's headers: {errors[0]}"
    return None


def native_extension() -> dict[str, Any]:
    """The arguments of ``setup`` that build the extension; none when there is nothing to build, or to build it with."""
    sources = sorted(glob("csrc/cpu/**/*.cpp", recursive=True))
    if not sources or BUILD_COMMANDS.isdisjoint(sys.argv):
        return {}
    if importlib.util.find_spec("torch") is None:
        return without(
            "torch is not installed where the build runs (pip install --no-build-isolation builds with yours)"
        )
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    failure = compiler_failure(include_paths())
    if failure is not None:
        return without(failure)
    extension = CppExtension(
        "fusedformer._native",
        sources,
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        extra_compile_args=["-O3", STANDARD, STABLE_ABI],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def without(reason: str) -> dict[str, Any]:
    print(f"fusedformer: no native extension: {reason}", file=sys.stderr)
    return {}


setup(**native_extension())
