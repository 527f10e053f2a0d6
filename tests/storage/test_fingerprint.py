"""Two things with one fingerprint are the same: also functions and classes without a name."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openmm_vtdis.storage.fingerprint import code_fingerprint, fingerprint
from tests import potentials


def scaled(k: float) -> Callable[[float], float]:
    return lambda x: k * x


def cell(source: str, name: str, **given: Any) -> Any:
    """What a notebook's cell defines: a name of ``__main__``."""
    found: dict[str, Any] = {"__name__": "__main__", **given}
    exec(source, found)
    return found[name]


def test_functions_without_a_name_count_with_code_closure_and_globals() -> None:
    assert fingerprint(scaled(1.0)) == fingerprint(scaled(1.0))
    assert fingerprint(scaled(1.0)) != fingerprint(scaled(2.0))
    one, two = "def f(x, k=1): return K * x + 1", "def f(x, k=1): return K * x + 2"
    assert fingerprint(cell(one, "f", K=1.0)) == fingerprint(cell(one, "f", K=1.0, L=3.0))
    others = [
        cell(two, "f", K=1.0), cell(one, "f", K=2.0),
        cell(one.replace("k=1", "k=2"), "f", K=1.0), cell(one, "f", K=np.array([1.0])),
        cell(one.replace("+", "-"), "f", K=1.0),
    ]  # fmt: skip
    assert fingerprint(cell(one, "f", K=1.0)) not in [fingerprint(other) for other in others]
    assert len({fingerprint(other) for other in others}) == len(others)
    inner = "def g(x): return {}\ndef f(x): return [g(y) for y in x]"
    assert fingerprint(cell(inner.format("x"), "f")) != fingerprint(cell(inner.format("-x"), "f"))


def test_a_function_that_calls_itself_has_an_end() -> None:
    source = "def f(n): return {} if n == 0 else n * f(n - 1)"
    assert fingerprint(cell(source.format(1), "f")) == fingerprint(cell(source.format(1), "f"))
    assert fingerprint(cell(source.format(1), "f")) != fingerprint(cell(source.format(2), "f"))


CLASS = """
class Net(Module):
    scale: float = {scale}
    def __init__(self):
        super().__init__()
        self.weight = Parameter(torch.ones(2))
    def forward(self, x):
        return self.scale * x {sign} self.shift
    @cached_property
    def shift(self):
        return {shift}
    @property
    def other(self):
        return {other}
    @staticmethod
    def third():
        return {third}
"""
SAME = {"scale": 1.0, "sign": "+", "shift": 3.0, "other": 4.0, "third": 5.0}


def an_object(**changes: Any) -> Any:
    given = {
        "torch": torch,
        "Module": nn.Module,
        "Parameter": nn.Parameter,
        "cached_property": functools.cached_property,
    }
    return cell(CLASS.format(**{**SAME, **changes}), "Net", **given)()


@pytest.mark.parametrize(
    "change", [{"scale": 2.0}, {"sign": "-"}, {"shift": 0.0}, {"other": 0.0}, {"third": 0.0}]
)
def test_a_class_that_was_defined_anew_is_another(change: dict[str, Any]) -> None:
    before = fingerprint(an_object())
    assert before == fingerprint(an_object())
    assert before != fingerprint(an_object(**change))


def test_a_named_function_counts_with_its_module_where_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = code_fingerprint(potentials.spring_energy), fingerprint(potentials.spring_energy)
    assert code_fingerprint(potentials.spring_energy) == before[0]
    monkeypatch.setattr(potentials, "SPRING", 1.01 * potentials.SPRING)
    assert code_fingerprint(potentials.spring_energy) != before[0]
    assert fingerprint(potentials.spring_energy) == before[1]
    assert code_fingerprint(math.sin) == fingerprint(math.sin)


class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.weight = torch.ones(2)


def test_what_has_no_content_is_equal_to_itself_alone() -> None:
    one, two = Locked(), Locked()
    before = fingerprint(one)
    assert fingerprint(one) == before != fingerprint(two)
    one.weight += 1.0
    assert fingerprint(one) != before


@dataclasses.dataclass(slots=True)
class Slots:
    n: int = 1


def test_values_of_all_kinds() -> None:
    assert fingerprint(np.float64(0.5)) == fingerprint(0.5)
    assert fingerprint({1: 2, "1": 3}) == fingerprint({"1": 3, 1: 2}) != fingerprint({"1": 2, 1: 3})
    values: list[Any] = [
        {"a"}, ["a"], "a", b"a", 1, 1.0, True, None, 1j, (), Slots(1), Slots(2), Slots,
        np.ones(2), np.ones((2, 1)), np.array(["a", None]), torch.ones(2), torch.eye(2),
        torch.ones(2, dtype=torch.float64), torch.tensor([1j]), torch.tensor([1j]).conj(),
    ]  # fmt: skip
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(torch.eye(2).to_sparse()) == fingerprint(torch.eye(2))
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
