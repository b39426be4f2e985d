"""What every test runs under: fresh seeds, memory that starts as NaN, Triton interpreted where there is no GPU."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from tests.tolerances import ContractViolation, Draws

# The interpreter multiplies small tiles with numpy, whose threads only get in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Lets cuBLAS be deterministic, as is asked for below.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Triton decides when a kernel is decorated, so this must be said before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

RUN_SEED = pytest.StashKey[int]()
WEIGHED = "WEIGHED ON MORE DRAWS"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat the random inputs of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--seed")
    if hasattr(config, "workerinput"):  # one of several processes
        given = config.workerinput["seed"]
    config.stash[RUN_SEED] = secrets.randbits(31) if given is None else given
    # Tensors here are small, and threads that wait for each other on a busy machine are far slower than one.
    torch.set_num_threads(1)
    # A result that a kernel did not write shows as NaN, wherever the memory was allocated: in a launcher, or in C++.
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["seed"] = node.config.stash[RUN_SEED]


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.stash[RUN_SEED]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test whose ``seed`` draws numbers that violate the contract is judged on more draws, see ``tolerances.py``."""
    given: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    if "seed" not in given:
        return None
    try:
        pyfuncitem.obj(**given)
    except ContractViolation as violation:
        pyfuncitem.user_properties.append((WEIGHED, f"of {violation.count} numbers, {violation}"))
        draws = Draws()
        for draw in range(violation.draws):
            torch.manual_seed(given["seed"] + draw)
            with draws.another():
                pyfuncitem.obj(**{**given, "seed": given["seed"] + draw})
        draws.judge()
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("random inputs", f"--seed {item.config.stash[RUN_SEED]}"))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says what was judged on more than one draw: a kernel that needs that often is to be looked at."""
    for report in terminalreporter.getreports("passed"):
        for name, violation in report.user_properties:
            if name == WEIGHED and report.when == "call":
                terminalreporter.write_line(f"{WEIGHED} {report.nodeid}: {violation}")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed, new in every run; torch's generator starts from it."""
    number = zlib.crc32(f"{request.config.stash[RUN_SEED]} {request.node.nodeid}".encode())
    torch.manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def _torch_state_is_left_alone() -> Iterator[None]:
    """A test that changes a global setting fails, rather than the next one."""
    before = _settings()
    yield
    assert _settings() == before


def _settings() -> dict[str, Any]:
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "fp32 products": torch.get_float32_matmul_precision(),
    }
