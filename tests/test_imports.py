"""Who may import whom: the layers of the library, held by reading every import statement."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = {"fusedformer": "src/fusedformer", "fusedformer.kernels": "kernels", "fusedformer.transformer": "transformer"}
COMMON = "fusedformer.kernels.common"
OPTIONAL = {
    **{f"fusedformer.transformer.{name}": {"transformers"} for name in ("huggingface", "huggingface_layers")},
    "fusedformer.transformer.models.pretrained": {"safetensors"},
}

PUBLIC = ("api", "kvcache")  # modules of an op that others may import

# Inside an op's folder: what a module of this name never imports from there. "triton" and "torch" stand for triton_*
# and torch_*, the other names for files. Modules not named here are shared by all of them and import none of them.
IMPLEMENTATIONS = {"native_cpu", "reference", "torch", "triton"}
NEVER = {
    "api": {"triton"},
    "kvcache": {"triton"},
    "op": {"api"},
    "kvcache_op": {"api", "kvcache"},
    "native_cpu": {"api", "op", "config", "triton", "torch", "reference"},
    "reference": {"api", "op", "config", "triton", "torch", "native_cpu"},
    "torch": {"api", "op", "config", "triton", "native_cpu", "reference"},
    "triton": {"api", "op", "native_cpu", "reference", "torch"},
    "triton_support": {"api", "op", *IMPLEMENTATIONS},  # what the kernels take, said without Triton
    "config": {"api", "op", *IMPLEMENTATIONS},
    "shared": {"api", "op", "config", *IMPLEMENTATIONS},
}


@dataclass(frozen=True)
class Import:
    """One imported module; ``eager`` when importing the importer runs it."""

    module: str
    line: int
    eager: bool


def library_modules() -> dict[str, Path]:
    modules = {}
    for package, folder in LIBRARY.items():
        base = ROOT / folder
        for path in base.rglob("*.py"):  # does not follow the links in src/fusedformer
            parts = path.relative_to(base).with_suffix("").parts
            modules[".".join([package, *parts]).removesuffix(".__init__")] = path
    return modules


MODULES = library_modules()


def imports_of(tree: ast.AST, package: str, eager: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                yield Import(submodule if submodule in MODULES else origin, node.lineno, eager)
        else:
            yield from imports_of(node, package, eager and not isinstance(node, ast.FunctionDef | ast.Lambda))


def imports_in(module: str) -> list[Import]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(imports_of(ast.parse(path.read_text()), package))


def top(module: str) -> str:
    return module.split(".")[0]


def role(module: str) -> str:
    name = module.rpartition(".")[2]
    for prefix in ("triton", "torch"):
        if name.startswith(f"{prefix}_") and name not in NEVER:
            return prefix
    return name if name in NEVER else "shared"


def op_of(module: str) -> str | None:
    """The package of the op that a module belongs to, such as fusedformer.kernels.attention; None outside of one."""
    parts = module.split(".")
    is_in_op = parts[:2] == ["fusedformer", "kernels"] and len(parts) > 3 and parts[2] != "common"
    return ".".join(parts[:3]) if is_in_op else None


def violation(importer: str, imported: str) -> str | None:
    """Why one module of the library must not import another module; None when it may."""
    if top(imported) == "triton":
        return None if role(importer) == "triton" else "Triton is imported by triton_* alone"
    if top(imported) != "fusedformer":
        if top(imported) in sys.stdlib_module_names:
            return None
        allowed = {"torch"} | OPTIONAL.get(importer, set())
        return None if top(imported) in allowed else "not a dependency of the library"
    if imported.startswith(f"{COMMON}."):
        return None
    if importer.startswith(f"{COMMON}."):
        return "kernels/common imports nothing above it"
    op = op_of(importer)
    if op is None:
        if op_of(imported) is not None:
            is_public = imported.rpartition(".")[2] in PUBLIC
            return None if is_public else "of an op, others import its public functions alone"
        if importer.startswith("fusedformer.transformer.") and not imported.startswith("fusedformer.transformer."):
            return "transformer imports nothing above it"
        return None
    if op_of(imported) != op:
        return "an op imports its own folder and kernels/common alone"
    own, other = role(importer), role(imported)
    return f"{own} never imports {other}" if other in NEVER[own] and importer != imported else None


def test_the_library_was_found() -> None:
    assert {"fusedformer", "fusedformer.kernels.attention.api", f"{COMMON}.backend"} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_layers(module: str) -> None:
    found = [(i.line, i.module, violation(module, i.module)) for i in imports_in(module)]
    assert [entry for entry in found if entry[2] is not None] == []


def test_importing_fusedformer_runs_no_import_of_triton_or_transformers() -> None:
    seen, todo = set(), ["fusedformer", "fusedformer.nn", "fusedformer.functional"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            eager = [i.module for i in imports_in(module) if i.eager]
            assert {top(name) for name in eager}.isdisjoint({"triton", "transformers", "safetensors"}), module
            todo += [name for name in eager if name in MODULES]
    assert len(seen) > 5


def test_the_folders_at_the_top_are_no_packages() -> None:
    # `kernels` is another project's import name; ours is fusedformer.kernels.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "transformer" / "__init__.py").exists()
    for folder in (*LIBRARY.values(), "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {top(i.module) for i in imports_of(ast.parse(path.read_text()), "relative.to.any.package")}
            assert names.isdisjoint({"kernels", "transformer"}), path


ATTENTION = "fusedformer.kernels.attention"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        (f"{COMMON}.philox", f"{ATTENTION}.api"),
        (f"{COMMON}.philox", "numpy"),
        (f"{COMMON}.philox", "triton.language"),
        (f"{ATTENTION}.reference", f"{ATTENTION}.op"),
        (f"{ATTENTION}.reference", f"{ATTENTION}.torch_sdpa"),
        (f"{ATTENTION}.op", f"{ATTENTION}.api"),
        (f"{ATTENTION}.native_cpu", f"{ATTENTION}.reference"),
        (f"{ATTENTION}.api", f"{ATTENTION}.triton_forward"),
        (f"{ATTENTION}.triton_forward", f"{ATTENTION}.reference"),
        (f"{ATTENTION}.masks", f"{ATTENTION}.reference"),
        (f"{ATTENTION}.api", "fusedformer.kernels.norm.api"),
        (f"{ATTENTION}.api", "fusedformer.transformer.attention"),
        (f"{ATTENTION}.api", "transformers"),
        ("fusedformer.transformer.attention", f"{ATTENTION}.op"),
        ("fusedformer.transformer.attention", "fusedformer.functional"),
        ("fusedformer.functional", f"{ATTENTION}.reference"),
        ("fusedformer.functional", "tests.cases"),
    ],
)
def test_the_rules_refuse(importer: str, imported: str) -> None:
    assert violation(importer, imported) is not None


def test_relative_imports_are_resolved() -> None:
    source = (
        "from . import op\nfrom ..common import philox\nfrom ..common.philox import threshold\ndef f(): import triton"
    )
    assert list(imports_of(ast.parse(source), ATTENTION)) == [
        Import(f"{ATTENTION}.op", 1, True),
        Import(f"{COMMON}.philox", 2, True),
        Import(f"{COMMON}.philox", 3, True),
        Import("triton", 4, False),
    ]
