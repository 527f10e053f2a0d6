"""Controls of the judge: it passes what is right, and finds what it is said to find."""

from __future__ import annotations

import numpy as np
import pytest

from tests.statistical.judge import fault, seen


def rate(n: int, change: float = 1.0, bias: float = 0.0) -> float:
    """How often n z-scores with error bars times ``change``, or off by ``bias``, have a fault."""
    rng = np.random.default_rng(n)
    return float(np.mean([bool(fault(rng.normal(bias, 1.0 / change, n))) for _ in range(100)]))


@pytest.mark.parametrize("n", [20, 200])
def test_it_sees_what_it_is_said_to_see(n: int) -> None:
    """In 95 of 100 cases, give or take four standard errors of 100 of them; nothing where all is
    right; and half of it less often than not.
    """
    short, long, bias = seen(n)
    assert rate(n) < 0.02
    for change, off in ((short, 0.0), (long, 0.0), (1.0, bias)):
        assert rate(n, change, off) > 0.95 - 4.0 * 0.022
    for change, off in ((short**0.5, 0.0), (long**0.5, 0.0), (1.0, 0.5 * bias)):
        assert rate(n, change, off) < 0.5


def test_how_wrong_an_error_must_be() -> None:
    """With 200 seeds short by a quarter or long by a third; a tenth takes 1,500."""
    assert seen(20) == pytest.approx((0.43, 2.97, 1.26), rel=0.01)
    assert seen(80) == pytest.approx((0.65, 1.62, 0.63), rel=0.01)
    assert seen(200) == pytest.approx((0.76, 1.34, 0.40), rel=0.01)
    assert seen(1_500) == pytest.approx((0.90, 1.11, 0.146), rel=0.01)


def test_tails_and_values_that_are_none() -> None:
    z = np.random.default_rng(0).standard_normal(200)
    assert not fault(z)
    assert "width" in fault(np.where(np.arange(200) < 10, 8.0, z))
    assert "Kolmogorov" in fault(np.sign(z))
    assert "1 of 200 not finite" in fault(np.where(np.arange(200) == 7, np.nan, z))
