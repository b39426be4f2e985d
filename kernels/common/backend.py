"""Backends as data: which there are, which one runs a problem, and why each other one refuses it.

An operation lists its candidates in ``ORDER``. Each looks at metadata alone (shapes, dtypes, devices, flags) and
returns its reasons for refusing; ``auto`` takes the first without any, a backend asked for by name runs or raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ORDER = ("cuda", "triton", "cpu", "torch", "reference")
AUTO = "auto"


class BackendRefused(RuntimeError):
    """No backend, or not the one asked for by name, takes the problem. The message lists every reason."""


@dataclass(frozen=True)
class Candidate:
    """One backend of one operation.

    Attributes:
        refusals: ``(problem, automatic) -> reasons``; empty when it runs. ``automatic`` is True under ``auto``.
        workspace: ``problem -> bytes`` allocated beyond inputs and results, forward and backward together.
        notes: ``problem -> remarks`` that ``explain`` shows, such as a kernel not yet verified on this architecture.
    """

    refusals: Callable[[Any, bool], list[str]]
    workspace: Callable[[Any], int] = lambda problem: 0
    notes: Callable[[Any], list[str]] = lambda problem: []


@dataclass(frozen=True)
class Decision:
    """What was chosen for one call of one operation, and what every other backend said."""

    operation: str
    problem: str
    requested: str
    chosen: str | None
    refusals: Mapping[str, list[str]]
    workspace_bytes: int
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{self.operation}({self.problem})", f"  requested: {self.requested}"]
        for name in ORDER:
            if name == self.chosen:
                lines.append(f"  {name:<10} chosen, workspace {self.workspace_bytes:,} bytes")
                lines += [f"  {'':<10} note: {note}" for note in self.notes]
            elif self.refusals.get(name):
                lines += [f"  {name:<10} refuses: {reason}" for reason in self.refusals[name]]
            elif name in self.refusals:
                lines.append(f"  {name:<10} could run")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """Every decision made while a function ran, in order. ``print`` it."""

    decisions: list[Decision] = field(default_factory=list)

    @property
    def backend(self) -> str | None:
        """The backend of the first decision; None when every one refused or no fused operation was called."""
        return self.decisions[0].chosen if self.decisions else None

    def __str__(self) -> str:
        return "\n".join(map(str, self.decisions)) or "no fusedformer operation was called"


class _Scope(threading.local):
    # Thread-local rather than a ContextVar: Dynamo guards attributes of the former. They are the instance's (one for
    # each thread): a default that the class holds is not guarded against an instance's that comes later.
    def __init__(self) -> None:
        self.backend: str = AUTO
        self.decisions: list[Decision] | None = None


_scope = _Scope()


def check_name(backend: str) -> None:
    if backend != AUTO and backend not in ORDER:
        raise ValueError(f"backend: got {backend!r}, expected one of {(AUTO, *ORDER)}")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, and in this thread, calls that say ``backend="auto"`` use this backend.

    Raises:
        ValueError: the name is not one of "auto", "cuda", "triton", "cpu", "torch", "reference".
    """
    check_name(backend)
    before, _scope.backend = _scope.backend, backend
    try:
        yield
    finally:
        _scope.backend = before


@contextmanager
def record_decisions() -> Iterator[Explanation]:
    """Within the block, and in this thread, every decision is kept in the Explanation that is yielded."""
    before, _scope.decisions = _scope.decisions, []
    try:
        yield Explanation(_scope.decisions)
    finally:
        _scope.decisions = before


def is_free_to(name: str, backend: str) -> bool:
    """Whether a call that says ``backend`` may run on ``name``, and nobody records how that is decided."""
    return _scope.decisions is None and (_scope.backend if backend == AUTO else backend) in (AUTO, name)


def select(operation: str, candidates: Mapping[str, Candidate], problem: Any, backend: str) -> str:
    """The name of the backend that runs ``problem``.

    Raises:
        ValueError: ``backend`` is no backend's name.
        BackendRefused: the backend asked for refuses, or under "auto" all do; with every reason.
    """
    check_name(backend)
    requested = _scope.backend if backend == AUTO else backend
    automatic = requested == AUTO
    chosen = None
    for name in ORDER if automatic else (requested,):
        if not candidates[name].refusals(problem, automatic):
            chosen = name
            break
    if _scope.decisions is not None:
        _scope.decisions.append(_explain(operation, candidates, problem, requested, chosen))
    if chosen is None:
        raise BackendRefused(_refusal_message(operation, candidates, problem, requested))
    return chosen


def _all_refusals(candidates: Mapping[str, Candidate], problem: Any, automatic: bool) -> dict[str, list[str]]:
    return {name: candidates[name].refusals(problem, automatic) for name in ORDER}


def _explain(
    operation: str, candidates: Mapping[str, Candidate], problem: Any, requested: str, chosen: str | None
) -> Decision:
    return Decision(
        operation=operation,
        problem=str(problem),
        requested=requested,
        chosen=chosen,
        refusals=_all_refusals(candidates, problem, requested == AUTO),
        workspace_bytes=candidates[chosen].workspace(problem) if chosen else 0,
        notes=candidates[chosen].notes(problem) if chosen else [],
    )


def _refusal_message(operation: str, candidates: Mapping[str, Candidate], problem: Any, requested: str) -> str:
    asked = "no backend takes" if requested == AUTO else f'backend="{requested}" refuses'
    lines = [f"{asked} {operation}({problem}):"]
    for name, reasons in _all_refusals(candidates, problem, requested == AUTO).items():
        verdict = "; ".join(reasons) if reasons else "could run"
        lines.append(f"  {name}: {verdict}")
    return "\n".join(lines)
