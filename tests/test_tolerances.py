"""The accuracy contract's own test: what it lets pass, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import ContractViolation, Draws, assert_equal_bits, assert_no_mistake, assert_within_contract

INF, NAN = float("inf"), float("nan")
TRUTH = torch.tensor([1.0, -2.0, 4.0, 0.5], dtype=torch.float64)
EAGER = (TRUTH + torch.tensor([0.0, 0.01, 0.0, 0.0])).float()
BAND = torch.finfo(torch.float32).eps * 4.0


def off_by(error: float, at: int = 2) -> Tensor:
    return TRUTH.index_fill(0, torch.tensor(at), TRUTH[at].item() + error)


@pytest.mark.parametrize("actual", [TRUTH.float(), EAGER, off_by(0.0199).float(), off_by(-0.0199, at=0).float()])
def test_twice_eagers_error_passes(actual: Tensor) -> None:
    assert_within_contract(actual, TRUTH, EAGER)


@pytest.mark.parametrize("error", [0.0201, -0.0201, 1.0, 1e30])
def test_more_does_not(error: float) -> None:
    with pytest.raises(AssertionError, match=r"weights: largest error .* x eager's 0.01; allowed 2 x eager's"):
        assert_within_contract(off_by(error).float(), TRUTH, EAGER, "weights")


def test_an_exact_eager_leaves_one_rounding() -> None:
    exact = TRUTH.float()
    assert_within_contract(off_by(0.9 * BAND).float(), TRUTH, exact)
    with pytest.raises(AssertionError, match="infinitely many x eager's 0"):
        assert_within_contract(off_by(3 * BAND).float(), TRUTH, exact)


def test_the_band_is_that_of_the_results_dtype() -> None:
    exact = TRUTH.half()
    assert_within_contract(off_by(0.0039).half(), TRUTH, exact)
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_contract(off_by(0.0039).float(), TRUTH, exact)


def test_many_small_errors_count_too() -> None:
    """Each is within the bound of the largest element, all together they are not."""
    truth = torch.ones(1000, dtype=torch.float64)
    eager = truth.clone()
    eager[0] += 0.01
    with pytest.raises(AssertionError, match="root mean square error"):
        assert_within_contract((truth + 0.015).float(), truth, eager.float())


def test_the_worst_of_several_eager_results_counts() -> None:
    assert_within_contract(off_by(0.0199).float(), TRUTH, [TRUTH.float(), EAGER])
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_contract(off_by(0.0199).float(), TRUTH, [TRUTH.float(), TRUTH.float()])


def judged_together(errors: list[float], eager_errors: list[float]) -> None:
    draws = Draws()
    for error, eager_error in zip(errors, eager_errors, strict=True):
        with draws.another():
            assert_within_contract(off_by(error).float(), TRUTH, off_by(eager_error, at=0).float(), "out")
    draws.judge()


@pytest.mark.parametrize("eager_errors", [[0.01, 0.02, 0.01, 0.01], [0.01] * 4])
def test_an_unlucky_draw_is_weighed_with_the_others(eager_errors: list[float]) -> None:
    judged_together([0.03, 0.01, 0.01, 0.02], eager_errors)


@pytest.mark.parametrize(
    ("errors", "eager_errors"),
    [
        ([0.025] * 4, [0.01] * 4),  # wrong in every draw
        ([0.05, 0.0, 0.0, 0.0], [0.01] * 4),  # no draw is discarded
        ([0.039] * 4, [0.02, 0.01, 0.01, 0.01]),  # eager was unlucky once
    ],
)
def test_what_is_wrong_by_more_than_luck_stays_wrong(errors: list[float], eager_errors: list[float]) -> None:
    with pytest.raises(ContractViolation, match=r"out: largest error .* in 4 draws together is .* x eager's"):
        judged_together(errors, eager_errors)


@pytest.mark.parametrize(("count", "draws"), [(1, 64), (5, 13), (8, 8), (1000, 8)])
def test_few_numbers_are_weighed_with_more_draws(count: int, draws: int) -> None:
    truth = torch.ones(count, dtype=torch.float64)
    with pytest.raises(ContractViolation) as violation:
        assert_within_contract((truth + 1.0).float(), truth, truth.float())
    assert violation.value.draws == draws


def test_draws_must_measure_the_same() -> None:
    draws = Draws()
    for what in ("out", "lse"):
        with draws.another():
            assert_within_contract(EAGER, TRUTH, EAGER, what)
    with pytest.raises(AssertionError, match="different things"):
        draws.judge()


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_a_number_must_be_a_number(wrong: float) -> None:
    actual = TRUTH.float().index_fill(0, torch.tensor(1), wrong)
    for check in (lambda: assert_within_contract(actual, TRUTH, EAGER), lambda: assert_no_mistake(actual, TRUTH)):
        with pytest.raises(AssertionError, match=r"at \[\[1\]\] \(1 of 4\)"):
            check()


@pytest.mark.parametrize("wrong", [NAN, INF, 0.0])
def test_infinities_must_be_the_truths(wrong: float) -> None:
    truth = TRUTH.index_fill(0, torch.tensor(3), -INF)
    assert_within_contract(truth.float(), truth, truth.float())
    for check in (lambda x: assert_within_contract(x, truth, truth.float()), lambda x: assert_no_mistake(x, truth)):
        with pytest.raises(AssertionError, match="infinities differ"):
            check(truth.float().index_fill(0, torch.tensor(3), wrong))


def test_nothing_is_measured_against_nothing() -> None:
    nan = torch.full((4,), NAN)
    with pytest.raises(AssertionError, match="no finite element"):
        assert_within_contract(TRUTH.float(), TRUTH, nan)
    with pytest.raises(AssertionError, match="the truth itself holds NaN"):
        assert_within_contract(TRUTH.float(), nan.double(), EAGER)
    with pytest.raises(AssertionError, match=r"truth is torch\.float32"):
        assert_within_contract(TRUTH.float(), TRUTH.float(), EAGER)
    with pytest.raises(AssertionError, match="eager has shape"):
        assert_within_contract(TRUTH.float(), TRUTH, EAGER[:1])


def test_half_the_digits() -> None:
    assert_no_mistake(off_by(1e-3).float(), TRUTH)
    with pytest.raises(AssertionError, match=r"wrong at \[\[2\]\]"):
        assert_no_mistake(off_by(1e-2).float(), TRUTH)


def test_bits() -> None:
    assert_equal_bits(TRUTH, TRUTH.clone())
    for other in (off_by(1e-15), TRUTH.float(), TRUTH.index_fill(0, torch.tensor(0), NAN)):
        with pytest.raises(AssertionError):
            assert_equal_bits(other, TRUTH)


def test_uninitialised_memory_is_not_a_number() -> None:
    """The suite's own setting (conftest.py): what a kernel forgets to write shows."""
    like = torch.zeros(3)
    half = like.half()
    for x in (torch.empty(3), torch.empty_like(like), half.new_empty(3), torch.empty_strided((3,), (1,))):
        assert x.isnan().all()
