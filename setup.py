"""Builds the optional extensions; every other fact about the package stands in pyproject.toml.

All of ``csrc/cpu/**/*.cpp`` becomes one library, ``fusedformer/_native.abi3.so``, all of ``csrc/cuda/*.cu`` another,
``_native_cuda.abi3.so``, on torch's stable ABI: one build serves every torch from 2.11 and every Python from 3.10.
Where torch or a compiler is missing, or fails, the package installs without; one line says why, and
``python -m fusedformer`` repeats it.

Environment:
    FUSEDFORMER_CUDA: 1 builds the CUDA kernels for a torch without CUDA too, 0 never does.
    FUSEDFORMER_EMULATED: 1 adds what tests other machines' kernels on any: levels that run AMX and AVX512-BF16 in plain
        code, and ``_native_emulated.abi3.so``, the CUDA kernels over an emulation of the GPU.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
IS_EMULATED = os.environ.get("FUSEDFORMER_EMULATED") == "1"
EMULATED = ["-DFUSEDFORMER_EMULATED"]
NVCC_FLAGS = ["-O3", STANDARD, "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
# What a file of CUDA kernels is compiled for: Hopper's own instructions, or what every GPU since Ampere has.
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]
AMPERE_AND_LATER = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
AMPERE_AND_LATER.append("-gencode=arch=compute_90,code=compute_90")
ARCHITECTURES = {"attention_decode.cu": AMPERE_AND_LATER}
PROBE = """
#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#pragma GCC target("avx512f,amx-tile,amx-bf16")
void zero() { _tile_zero(0); }
"""
PACKAGE = Path("src/fusedformer")
CPU, CUDA, ON_HOST = "_native", "_native_cuda", "_native_emulated"
SAID = {CPU: "native extension", CUDA: "CUDA extension", ON_HOST: "emulation of the CUDA extension"}


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


def cuda_refusal() -> str | None:
    """Why no CUDA kernels are built; None when they are."""
    import torch

    asked = os.environ.get("FUSEDFORMER_CUDA")
    if asked == "0":
        return "FUSEDFORMER_CUDA=0 asks for none"
    if torch.version.cuda is None and asked != "1":
        return "torch is built without CUDA"
    if cuda_home() is None:
        return "nvcc and its headers are not beside the one on the path, in CUDA_HOME or in /usr/local/cuda"
    return None


def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit, one that has compiler and headers."""
    found = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), found and Path(found).resolve().parent.parent, "/usr/local/cuda"]
    needed = ("bin/nvcc", "include/cuda_runtime_api.h")
    return next((Path(home) for home in folders if home and all(Path(home, name).exists() for name in needed)), None)


def compile_cuda(sources: list[str], folder: Path) -> list[str]:
    """The object files of ``sources``, compiled side by side."""
    home = cuda_home()
    assert home is not None
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> str:
        name = Path(source).name
        target = str(folder / f"{name}.o")
        command = [
            str(home / "bin" / "nvcc"),
            "-c",
            source,
            "-o",
            target,
            *NVCC_FLAGS,
            *ARCHITECTURES.get(name, HOPPER),
        ]
        process = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(shlex.join(command), process.stdout, sep="\n", flush=True)
        if process.returncode != 0:
            raise CompileError(f"nvcc fails on {source}: exit status {process.returncode}")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sources))


def for_host(sources: list[str]) -> list[str]:
    """C++ files that stand for ``sources``: what a file is called decides who compiles it."""
    folder = Path("build", "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{Path(source).stem}.cpp": f'#include "{Path(source).resolve()}"\n' for source in sources}
    for file, text in files.items():
        file.write_text(text)
    return list(map(str, files))


def extensions() -> dict[str, Any]:
    """The arguments of ``setup`` that build what can be built here."""
    cpu, cuda = sorted(glob("csrc/cpu/**/*.cpp", recursive=True)), sorted(glob("csrc/cuda/*.cu"))
    if BUILD_COMMANDS.isdisjoint(sys.argv):
        return {}
    refusal = platform_refusal()
    if refusal is None and importlib.util.find_spec("torch") is None:
        refusal = "torch is not installed where the build runs (pip install --no-build-isolation builds with yours)"
    if refusal is not None:
        return without(refusal)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    failure = compiler_failure(include_paths())
    if failure is not None:
        return without(failure)

    class BuildOptional(BuildExtension):
        def build_extension(self, extension: Any) -> None:
            name = extension.name.rpartition(".")[2]
            note(name).unlink(missing_ok=True)
            try:
                if name == CUDA:
                    extension.extra_objects = compile_cuda(cuda, Path(self.build_temp, "cuda"))
                super().build_extension(extension)
            except (CompileError, LinkError, RuntimeError) as error:  # ninja's failures are RuntimeErrors
                reason = str(error).splitlines()[0]
                if not reason.startswith("nvcc"):
                    reason = f"the C++ compiler {os.environ['CXX']!r} fails, see its messages above: {reason}"
                without(reason, Path(self.build_lib, "fusedformer"), names=[name])

    def extension(name: str, sources: list[str], flags: list[str], **options: Any) -> Any:
        return CppExtension(
            f"fusedformer.{name}",
            sources,
            depends=sorted(glob("csrc/**/*.h", recursive=True) + cuda),
            extra_compile_args=[*FLAGS, STANDARD, STABLE_ABI, *flags],
            py_limited_api=True,
            optional=True,
            **options,
        )

    binding = ["csrc/cuda/binding.cpp"]
    found = [extension(CPU, cpu, EMULATED if IS_EMULATED else [])] if cpu else []
    if cuda and IS_EMULATED:
        emulator = sorted(glob("csrc/cuda/emulator/*.cpp"))
        found.append(extension(ON_HOST, emulator + for_host(binding + cuda), [*EMULATED, "-Wno-unknown-pragmas"]))
    refusal = cuda_refusal() if cuda else None
    if refusal is not None:
        without(refusal, names=[CUDA])
    elif cuda:
        home = cuda_home()
        assert home is not None
        toolkit = {"include_dirs": [str(home / "include")], "library_dirs": [str(home / "lib64")]}
        found.append(extension(CUDA, binding, [], libraries=["cudart_static", "dl", "rt"], **toolkit))
    if not found:
        return {}
    return {
        "ext_modules": found,
        "cmdclass": {"build_ext": BuildOptional},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def note(name: str, folder: Path = PACKAGE) -> Path:
    """The file that says why an extension is absent, to kernels/common/extension.py."""
    return folder / f"{name}_absent.txt"


def without(reason: str, built: Path = PACKAGE, names: list[str] | None = None) -> dict[str, Any]:
    """Says so now, and in the package: in its sources, and where they have been copied to be packed."""
    for name in names or [CPU, CUDA]:
        print(f"fusedformer: no {SAID[name]}: {reason}", file=sys.stderr)
        for folder in (PACKAGE, built):
            if folder.is_dir():
                note(name, folder).write_text(f"{reason}\n")
    return {}


setup(**extensions())
