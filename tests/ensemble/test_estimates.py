"""Values with a standard error: how they print, and how far they are from others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from openmm_vtdis.ensemble import Estimate


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (1.23456, 0.0123, "1.235 ± 0.012"),
        (-12.3456, 1.23, "-12.3 ± 1.2"),
        (0.5, 0.0, "0.5 ± 0"),
        (0.5, math.nan, "0.5 ± nan"),
        (12345.6, 230.0, "12345.6 ± 2.3e+02"),
        ([1.0, 2.0], [0.1, 0.25], "[1.00 ± 0.10, 2.00 ± 0.25]"),
    ],
)
def test_estimates_print_to_the_precision_of_their_error(
    value: Any, stderr: Any, text: str
) -> None:
    assert str(Estimate(value, stderr)) == text


def test_z_scores() -> None:
    assert Estimate(3.0, 0.5).z(1.0) == 4.0
    assert Estimate(3.0, 3.0).z(-2.0, 4.0) == 1.0
    assert Estimate(3.0, 0.0).z(3.0) == 0.0
    assert Estimate(3.0, 0.0).z(4.0) == -math.inf
    np.testing.assert_array_equal(Estimate([1.0, 2.0], [1.0, 2.0]).z([0.0, 6.0]), [1.0, -2.0])


@pytest.mark.parametrize("stderr", [-1.0, [1.0, 1.0]])
def test_invalid_errors_are_refused(stderr: Any) -> None:
    with pytest.raises(ValueError, match="stderr: expected a non-negative standard error"):
        Estimate(1.0, stderr)
