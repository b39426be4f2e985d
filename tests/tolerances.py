"""The accuracy contract, stated once: no test has a tolerance of its own, and nothing outside this file loosens one.

    error(actual) <= 2 * error(eager) + band

``error`` is the distance to the float64 truth; ``eager`` is torch's own eager computation from the same inputs in the
same dtype; ``band`` is one rounding of the output dtype at the truth's magnitude. It must hold in two norms over the
tensor: the largest element (no element is far off) and the root mean square (most are not slightly off), each with the
truth's magnitude in that norm. Per element it could not be sound: eager hits single elements exactly by luck. So it may
a whole tensor, where one row's cancellation makes up the error; so eager may be computed several times, its sums in
other orders, and the worst counts. And so may a tensor of few numbers: what violates the contract in one draw of the
inputs is judged on ``DRAWS`` of them, or as many as have ``NUMBERS`` numbers, that one included, by each norm's root
mean square over them (``conftest.py`` runs the test on them): the largest of all would be that draw's again, whatever
the others say. What is wrong by more than luck stays wrong; no draw is discarded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

FACTOR = 2.0
DRAWS, NUMBERS = 8, 64

NORMS: dict[str, Callable[[Tensor], float]] = {
    "largest": lambda x: x.abs().max().item(),
    "root mean square": lambda x: x.square().mean().sqrt().item(),
}


class ContractViolation(AssertionError):
    """An error beyond the contract's, in a tensor of so many numbers."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count
        self.draws = max(DRAWS, -(-NUMBERS // count))  # to be weighed with


@dataclass(frozen=True)
class Measurement:
    """One tensor's error and eager's, each in one norm, and the truth's magnitude in it."""

    what: str
    norm: str
    error: float
    eager_error: float
    magnitude: float
    eps: float
    count: int

    def judge(self, of: str = "") -> None:
        """Raises where the contract is violated."""
        band = self.eps * self.magnitude
        limit = FACTOR * self.eager_error + band
        if not self.error <= limit:
            ratio = f"{self.error / self.eager_error:.2f}" if self.eager_error else "infinitely many"
            raise ContractViolation(
                f"{self.what}: {self.norm} error {self.error:.3g}{of} is {ratio} x eager's {self.eager_error:.3g}; "
                f"allowed {FACTOR:g} x eager's + one rounding band {band:.3g} = {limit:.3g}",
                self.count,
            )


@dataclass
class Draws:
    """What several runs of one test measured, each on numbers of its own; judged by their root mean square."""

    runs: list[list[Measurement]] = field(default_factory=list)

    @contextmanager
    def another(self) -> Iterator[None]:
        """Within the block measurements are kept instead of judged."""
        global _run
        assert _run is None
        self.runs.append([])
        _run = self.runs[-1]
        try:
            yield
        finally:
            _run = None

    def judge(self) -> None:
        """Raises where all draws together violate the contract."""
        for same in zip(*self.runs, strict=True):
            first = same[0]
            names = {(one.what, one.norm, one.eps) for one in same}
            assert len(names) == 1, f"the draws of one test measure different things: {names}"
            error, eager_error, magnitude = (
                math.sqrt(sum(getattr(one, name) ** 2 for one in same) / len(same))
                for name in ("error", "eager_error", "magnitude")
            )
            together = Measurement(first.what, first.norm, error, eager_error, magnitude, first.eps, first.count)
            together.judge(f" in {len(same)} draws together")


_run: list[Measurement] | None = None


def assert_within_contract(
    actual: Tensor, truth: Tensor, eager: Tensor | Sequence[Tensor], what: str = "result"
) -> None:
    """Fails unless ``actual`` holds the contract.

    Args:
        actual: the tensor to judge; its dtype says the rounding band.
        truth: the float64 result.
        eager: torch's result in the same dtype as the inputs; or several, equal but for the order of their sums.
        what: its name in messages.
    """
    assert truth.dtype == torch.float64, f"{what}: truth is {truth.dtype}"
    attempts = [eager] if isinstance(eager, Tensor) else eager
    for name, x in [("actual", actual), *(("eager", attempt) for attempt in attempts)]:
        assert x.shape == truth.shape, f"{what}: {name} has shape {tuple(x.shape)}, the truth {tuple(truth.shape)}"
    assert not truth.isnan().any(), f"{what}: the truth itself holds NaN"
    finite = truth.isfinite()
    if not finite.any():
        assert_equal_bits(actual.detach().to(truth.device, torch.float64), truth, what)
        return
    actual64 = actual.detach().to(truth.device, torch.float64)
    assert torch.equal(actual64[~finite], truth[~finite]), f"{what}: infinities differ from the truth's"
    astray = finite & ~actual64.isfinite()
    assert not astray.any(), f"{what}: not finite at {_where(astray)}, where the truth is"
    for norm_name, norm in NORMS.items():
        error = norm((actual64 - truth)[finite])
        eager_error = max(norm(_finite_errors(attempt, truth)) for attempt in attempts)
        eps = torch.finfo(actual.dtype).eps
        measurement = Measurement(what, norm_name, error, eager_error, norm(truth[finite]), eps, int(finite.sum()))
        if _run is None:
            measurement.judge()
        else:
            _run.append(measurement)


def _finite_errors(eager: Tensor, truth: Tensor) -> Tensor:
    eager64 = eager.detach().to(truth.device, torch.float64)
    measured = truth.isfinite() & eager64.isfinite()  # where eager overflows it sets no bound
    assert measured.any(), "eager has no finite element to compare with"
    return (eager64 - truth)[measured]


def assert_no_mistake(actual: Tensor, truth: Tensor, what: str = "result") -> None:
    """Half the digits must be right, where the contract sets no bound.

    For drawn problems, which may be a handful of numbers, or cancel, and for second derivatives. A mistake (a wrong
    index, a term left out) is as large as the result or as the numbers that go in, which are of order 1.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, the truth {tuple(truth.shape)}"
    finite = truth.isfinite()
    actual64 = actual.detach().to(truth.device, torch.float64)
    assert torch.equal(actual64[~finite], truth[~finite]), f"{what}: infinities differ from the truth's"
    magnitude = max(1.0, truth[finite].abs().amax().item()) if finite.any() else 1.0
    wrong = finite & ~((actual64 - truth).abs() <= torch.finfo(actual.dtype).eps ** 0.5 * magnitude)
    assert not wrong.any(), f"{what}: wrong at {_where(wrong)}"


def assert_equal_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Fails unless both hold the same numbers, NaN nowhere."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert not actual.isnan().any(), f"{what}: NaN at {_where(actual.isnan())}"
    assert torch.equal(actual, expected), f"{what}: differs at {_where(actual != expected)}"


def _where(wrong: Tensor) -> str:
    places = wrong.nonzero().tolist()
    return f"{places[:3]}{' ...' if len(places) > 3 else ''} ({len(places)} of {wrong.numel()})"
