"""Builds the optional native extension; every other fact about the package stands in pyproject.toml.

All of ``csrc/cpu/**/*.cpp`` becomes one library, ``fusedformer/_native.abi3.so``, on torch's stable ABI: one build
serves every torch from 2.11 and every Python from 3.10. Where torch or a C++20 compiler that knows the instruction sets
is missing, or fails, the package installs without it; one line says why, and ``python -m fusedformer`` repeats it.
``FUSEDFORMER_EMULATED=1`` adds the level that runs the AMX kernels in plain code, for tests on any machine.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.errors import CompileError, LinkError

# torch takes seconds to import, and metadata and sdist have no use for it.
BUILD_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
STANDARD = "-std=c++20"
# Scores are compared and masked by infinities, so that no flag may assume them away. What Python was compiled with
# asks for debug information, which doubles the time. The warnings are about GCC 12's headers and
# about calls that are all inlined.
FLAGS = [
    "-O3",
    "-g0",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
]
EMULATED = ["-DFUSEDFORMER_EMULATED"] if os.environ.get("FUSEDFORMER_EMULATED") == "1" else []
PROBE = """
#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#pragma GCC target("avx512f,amx-tile,amx-bf16")
void zero() { _tile_zero(0); }
"""
PACKAGE = Path("src/fusedformer")
ABSENT = "_native_absent.txt"  # says why, to kernels/common/native.py


def platform_refusal() -> str | None:
    """Why the kernels are not for this machine; None when they are."""
    machine = platform.machine()
    if sys.platform == "linux" and machine == "x86_64":
        return None
    return f"its kernels are for Linux on x86-64, this is {sys.platform} on {machine}"


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
        return f"the C++ compiler {compiler!r} fails on a first trial: {errors[0]}"
    return None


def native_extension() -> dict[str, Any]:
    """The arguments of ``setup`` that build the extension; none when there is nothing to build, or to build it with."""
    sources = sorted(glob("csrc/cpu/**/*.cpp", recursive=True))
    if not sources or BUILD_COMMANDS.isdisjoint(sys.argv):
        return {}
    refusal = platform_refusal()
    if refusal is not None:
        return without(refusal)
    if importlib.util.find_spec("torch") is None:
        return without(
            "torch is not installed where the build runs (pip install --no-build-isolation builds with yours)"
        )
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    failure = compiler_failure(include_paths())
    if failure is not None:
        return without(failure)

    class BuildOptional(BuildExtension):
        def build_extension(self, extension: Any) -> None:
            (PACKAGE / ABSENT).unlink(missing_ok=True)
            try:
                super().build_extension(extension)
            except (CompileError, LinkError, RuntimeError) as error:  # ninja's failures are RuntimeErrors
                reason = f"the C++ compiler {os.environ['CXX']!r} fails, see its messages above: {error}"
                without(reason.splitlines()[0], Path(self.build_lib, "fusedformer"))

    extension = CppExtension(
        "fusedformer._native",
        sources,
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        extra_compile_args=[*FLAGS, STANDARD, STABLE_ABI, *EMULATED],
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOptional},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def without(reason: str, built: Path = PACKAGE) -> dict[str, Any]:
    """Says so now, and in the package: in its sources, and where they have been copied to be packed."""
    print(f"fusedformer: no native extension: {reason}", file=sys.stderr)
    for folder in (PACKAGE, built):
        if folder.is_dir():
            (folder / ABSENT).write_text(f"{reason}\n")
    return {}


setup(**native_extension())
