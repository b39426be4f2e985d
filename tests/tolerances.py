"""The accuracy contract, stated once: no test has a tolerance of its own, and nothing outside this file loosens one.

    error(actual) <= 2 * error(eager) + band

``error`` is the distance to the float64 truth; ``eager`` is torch's own eager computation from the same inputs in the
same dtype; ``band`` is one rounding of the output dtype at the truth's magnitude. It must hold in two norms over the
tensor: the largest element (no element is far off) and the root mean square (most are not slightly off), each with the
truth's magnitude in that norm. Per element it could not be sound: eager hits single elements exactly by luck. So it may
a whole tensor, where one row's cancellation makes up the error; so eager may be computed several times, its sums in
other orders, and the worst counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FACTOR = 2.0

NORMS: dict[str, Callable[[Tensor], float]] = {
    "largest": lambda x: x.abs().max().item(),
    "root mean square": lambda x: x.square().mean().sqrt().item(),
}


class ContractViolation(AssertionError):
    """An error beyond the contract's. Of few numbers the largest error is a matter of luck, eager's as ours."""


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
        band = torch.finfo(actual.dtype).eps * norm(truth[finite])
        limit = FACTOR * eager_error + band
        if not error <= limit:
            raise ContractViolation(
                f"{what}: {norm_name} error {error:.3g} is {_ratio(error, eager_error)} x eager's {eager_error:.3g}; "
                f"allowed {FACTOR:g} x eager's + one rounding band {band:.3g} = {limit:.3g}"
            )


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


def _ratio(error: float, eager_error: float) -> str:
    return f"{error / eager_error:.2f}" if eager_error else "infinitely many"


def _where(wrong: Tensor) -> str:
    places = wrong.nonzero().tolist()
    return f"{places[:3]}{' ...' if len(places) > 3 else ''} ({len(places)} of {wrong.numel()})"
