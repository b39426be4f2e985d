"""The package as a user gets it: wheel, sdist and editable, each in a fresh environment, and what an import costs.

The environments see the packages of the one that runs the tests, but not its fusedformer; nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ["src", "kernels", "transformer", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
PIP = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
KINDS = ["wheel", "sdist", "editable"]
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
NO_CUDA = {"FUSEDFORMER_CUDA": "0"}  # its kernels take minutes to compile
REASON = "the C++ compiler '/nonexistent/c++' does not run: No such file or directory"
REASON_FILE, CUDA_REASON_FILE = "fusedformer/_native_absent.txt", "fusedformer/_native_cuda_absent.txt"
REASON_FILES = {REASON_FILE, CUDA_REASON_FILE}

# The answer is checked, not only that the names import.
ATTENTION = """
    import torch, fusedformer
    from fusedformer import functional as F
    query, key, value = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(F.attention(query, key, value, is_causal=True), expected)
"""
NATIVE_SOURCE = """
    #include <torch/csrc/stable/library.h>
    STABLE_TORCH_LIBRARY(fusedformer_packaging_test, m) { m.def("dropped_in(Tensor x) -> Tensor"); }
"""


def run(python: Path, code: str, cwd: Path, **environment: str) -> str:
    """What the code prints in a fresh process; environment variables that steer the imports are not inherited."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    process = subprocess.run(
        [python, "-c", textwrap.dedent(code)], cwd=cwd, env=inherited | environment, text=True, capture_output=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def pip(python: Path, *arguments: str | Path, **environment: str) -> None:
    command = [str(python), "-m", "pip", *map(str, arguments)]
    process = subprocess.run(command, env=os.environ | environment, text=True, capture_output=True)
    assert process.returncode == 0, process.stdout + process.stderr


def copy_of_the_sources(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "*_absent.txt")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def new_environment(folder: Path) -> Path:
    """The Python of an environment that imports what ours does, without our .pth files: an editable fusedformer's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site_packages = run(python, "import sysconfig; print(sysconfig.get_path('purelib'), end='')", folder)
    Path(site_packages, "shared.pth").write_text("\n".join(sorted(ours)))
    return python


@dataclass(frozen=True)
class Built:
    """A copy of the sources, the sdist and wheel built from it, and the wheel built from that sdist."""

    sources: Path
    sdist: Path
    wheels: dict[str, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    sources = copy_of_the_sources(tmp_path_factory.mktemp("sources"))
    run(Path(sys.executable), f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", sources)
    (sdist,) = folder.glob("*.tar.gz")
    wheels = {}
    for kind, source in (("wheel", sources), ("sdist", sdist)):
        pip(Path(sys.executable), "wheel", *PIP, "--wheel-dir", folder / kind, source, **NO_COMPILER)
        (wheels[kind],) = (folder / kind).glob("*.whl")
    return Built(sources, sdist, wheels)


@pytest.fixture(scope="module")
def environments(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pythons = {kind: new_environment(tmp_path_factory.mktemp(kind)) for kind in KINDS}
    for kind, wheel in built.wheels.items():
        pip(pythons[kind], "install", *PIP, "--ignore-installed", wheel)
    pip(pythons["editable"], "install", *PIP, "--ignore-installed", "--editable", built.sources, **NO_COMPILER)
    return pythons


def library_files() -> set[str]:
    files = {
        f"fusedformer/{path.relative_to(folder)}"
        if folder.name == "fusedformer"
        else f"fusedformer/{path.relative_to(ROOT)}"
        for folder in (ROOT / "src" / "fusedformer", ROOT / "kernels", ROOT / "transformer")
        for pattern in ("*.py", "*.json", "py.typed")
        for path in folder.rglob(pattern)
    }
    assert "fusedformer/kernels/attention/api.py" in files
    return files


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_wheel_holds_every_file_once_and_nothing_at_the_top(built: Built, kind: str) -> None:
    names = zipfile.ZipFile(built.wheels[kind]).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == library_files() | REASON_FILES
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_sources_of_the_extension(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert ours | {f"src/{name}" for name in library_files()} <= names
    assert REASON_FILES.isdisjoint(name.removeprefix("src/") for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_installed_it_computes(built: Built, environments: dict[str, Path], kind: str, tmp_path: Path) -> None:
    code = f"""
    import importlib.metadata
    {ATTENTION}
    print(fusedformer.__file__, fusedformer.__version__ == importlib.metadata.version("fusedformer"))
    """
    file, same_version = run(environments[kind], code, tmp_path).split()
    home = built.sources / "src" if kind == "editable" else environments[kind].parent.parent
    assert Path(file).is_relative_to(home)
    assert same_version == "True"


@pytest.mark.parametrize(
    ("installed", "at_root"), [(True, True), (False, True), (True, False)], ids=["editable-root", "root", "editable"]
)
def test_hugging_face_transformers_imports(
    environments: dict[str, Path], built: Built, tmp_path: Path, installed: bool, at_root: bool
) -> None:
    python = environments["editable"] if installed else new_environment(tmp_path / "bare")
    code = """
        from transformers import BertConfig, BertModel
        config = BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        print(sum(p.numel() for p in BertModel(config).parameters()) > 0)
    """
    assert run(python, code, built.sources if at_root else tmp_path).strip() == "True"


def test_importing_loads_neither_triton_nor_the_extension_and_asks_no_gpu(
    environments: dict[str, Path], tmp_path: Path
) -> None:
    code = """
        import sys, torch
        def forbidden(*args, **kwargs):
            raise AssertionError("importing fusedformer asked for the GPU or loaded a library")
        queries = ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties",
                   "get_device_capability", "get_device_name", "mem_get_info", "_is_compiled")
        for name in queries:
            assert callable(getattr(torch.cuda, name)), name
            setattr(torch.cuda, name, forbidden)
        torch.ops.load_library = forbidden
        before = set(sys.modules)
        import fusedformer, fusedformer.nn, fusedformer.functional
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """
    packages = run(environments["wheel"], code, tmp_path).split()
    assert "fusedformer" in packages
    assert {"triton", "transformers", "matplotlib"}.isdisjoint(packages)


def test_works_without_triton(environments: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
    import sys
    from importlib.machinery import PathFinder
    class WithoutTriton(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton
    {ATTENTION}
    try:
        F.attention(query, key, value, backend="triton")
    except fusedformer.BackendRefused as refused:
        print(refused)
    """
    assert "triton is not installed" in run(environments["wheel"], code, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_why_there_is_no_extension(environments: dict[str, Path], kind: str, tmp_path: Path) -> None:
    code = "from fusedformer.kernels.common.explain import report; print(report())"
    lines = run(environments[kind], code, tmp_path).splitlines()
    assert f"extension    not built ({REASON})" in lines
    assert f"cpu        absent: not built ({REASON})" in lines


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None


def with_a_native_source(folder: Path, source: str = NATIVE_SOURCE) -> Path:
    """A copy of the sources with a small extension in place of ours, which takes minutes to compile."""
    folder.mkdir()
    sources = copy_of_the_sources(folder)
    shutil.rmtree(sources / "csrc" / "cpu")
    (sources / "csrc" / "cpu").mkdir()
    (sources / "csrc" / "cpu" / "dropped_in.cpp").write_text(textwrap.dedent(source))
    return sources


def built_without(sources: Path, code: str = "", **environment: str) -> tuple[str, set[str]]:
    """The line that says why there is no extension, and the files of the wheel."""
    code = f"import contextlib, sys\n{code}\nwith contextlib.redirect_stderr(sys.stdout): {BUILD}"
    printed = run(Path(sys.executable), code, sources, **(NO_CUDA | environment))
    (line,) = re.findall(r"fusedformer: no native extension: (.*)", printed)
    (wheel,) = (sources / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert zipfile.ZipFile(wheel).read(REASON_FILE).decode() == f"{line}\n"
    return line, {name for name in names if ".dist-info/" not in name}


BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"


def test_without_a_compiler_the_wheel_is_pure_and_one_line_says_why(tmp_path: Path) -> None:
    sources = with_a_native_source(tmp_path / "sources")
    assert built_without(sources, **NO_COMPILER) == (REASON, library_files() | REASON_FILES)
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_on_another_kind_of_machine_it_installs_without(tmp_path: Path) -> None:
    sources = with_a_native_source(tmp_path / "sources")
    line, files = built_without(sources, "import platform; platform.machine = lambda: 'aarch64'")
    assert line == "its kernels are for Linux on x86-64, this is linux on aarch64"
    assert files == library_files() | REASON_FILES


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
def test_a_source_that_does_not_compile_leaves_a_library_without(tmp_path: Path) -> None:
    sources = with_a_native_source(tmp_path / "sources", "int broken(")
    line, files = built_without(sources)
    assert re.match(r"the C\+\+ compiler '.*' fails, see its messages above", line)
    assert files == library_files() | REASON_FILES


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
def test_a_source_dropped_into_csrc_is_built_and_loads(tmp_path: Path) -> None:
    sources = with_a_native_source(tmp_path / "sources")
    run(Path(sys.executable), BUILD, sources, **NO_CUDA)
    (wheel,) = (sources / "dist").glob("*-cp310-abi3-*.whl")
    zipfile.ZipFile(wheel).extract("fusedformer/_native.abi3.so", tmp_path)
    code = """
        import torch
        torch.ops.load_library("fusedformer/_native.abi3.so")
        print(torch.ops.fusedformer_packaging_test.dropped_in.default._schema)
    """
    assert "dropped_in(Tensor x) -> Tensor" in run(Path(sys.executable), code, tmp_path)
