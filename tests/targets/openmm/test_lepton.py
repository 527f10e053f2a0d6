"""Lepton expressions against OpenMM itself, which is asked through a CustomExternalForce."""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import openmm
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openmm_vtdis.targets.openmm import lepton
from openmm_vtdis.targets.openmm.lepton import FUNCTIONS, Expression

POINT = {"x": 0.7, "y": 0.3, "z": -0.4}


def openmm_state(source: str, point: dict[str, float] = POINT) -> tuple[float, list[float]]:
    """The value and gradient of an expression in x, y, z by OpenMM's Reference platform."""
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce(source)
    force.addParticle(0, [])
    system.addForce(force)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions([[point["x"], point["y"], point["z"]]])
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, list(-state.getForces(asNumpy=True)._value[0])


def ours(source: str, point: dict[str, float] = POINT) -> tuple[float, list[float]]:
    values = {
        name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in point.items()
    }
    result = Expression(source, list(point))(values)
    if not result.requires_grad:
        return float(result), [0.0, 0.0, 0.0]
    gradient = torch.autograd.grad(result, list(values.values()), materialize_grads=True)
    return float(result.detach()), [float(g) for g in gradient]


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("-2^2", -4.0),
        ("2^3^2", 512.0),
        ("2^-2", 0.25),
        ("2^-2^2", 0.0625),
        ("2--3", 5.0),
        ("2*-3", -6.0),
        ("- -3", 3.0),
        ("1-2-3", -4.0),
        ("8/4/2", 1.0),
        ("2+-3*4", -10.0),
        ("1.5E-2", 0.015),
        (".5 + 3.", 3.5),
        ("1e400", 1.7976931348623157e308),
        ("a*2; a=b; b=3", 6.0),
        ("a; a=a+1; a=3", 4.0),
        ("a; a=3; a=4", 3.0),
        ("2; unused=nobody*knows", 2.0),
        ("or+lambda*I-E; or=1; lambda=2; I=3; E=4", 3.0),
        ("in.side_1; in.side_1 = 7 ;", 7.0),
        ("select(0, 1, 2)+10*select(-3, 1, 2)", 12.0),
        ("step(0)+2*step(-1e-9)+4*delta(0)+8*delta(1)", 5.0),
        ("floor(-1.5)+10*ceil(-1.5)", -12.0),
        ("atan2(-1, -1)", -0.75 * math.pi),
    ],
)
def test_value_known_by_hand(source: str, value: float) -> None:
    result = Expression(source)({})
    assert result.dtype == torch.float64
    assert float(result) == pytest.approx(value, rel=1e-15)
    assert openmm_state(source)[0] == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_and_its_derivative_agree_with_openmm(name: str) -> None:
    arguments = ["x+0.1*z", "y-0.2*z", "z*x"][: FUNCTIONS[name][0]]
    source = f"{name}({','.join(arguments)})"
    value, gradient = ours(source)
    expected, expected_gradient = openmm_state(source)
    assert value == pytest.approx(expected, rel=1e-13)
    assert gradient == pytest.approx(expected_gradient, rel=1e-12, abs=1e-15)


# Random expressions, each operation with arguments from its domain and of moderate size: OpenMM
# does not return from a constant subexpression that is NaN, such as acos(2).
TEMPLATES = [
    *["{0}+{1}", "{0}-{1}", "{0}*{1}", "{0}/(2+sin({1}))", "-{0}", "--{0}", " ( {0} )"],
    *["-sin({0})^2", "sin({0})^3", "(2+sin({0}))^-3", "sin({0})^12", "(2+cos({0}))^0.5"],
    *["(1.5+sin({0}))^cos({1})", "2^sin({0})^2", "-(1.5+cos({0}))^-sin({1})"],
    *["sqrt(abs({0})+1)", "log(square({0})+0.5)", "exp(sin({0}))", "cube(cos({0}))"],
    *["asin(0.9*sin({0}))", "acos(0.9*cos({0}))", "atan({0})", "atan2({0},2+cos({1}))"],
    *["csc(2+sin({0}))", "sec(sin({0}))", "tan(cos({0}))", "cot(2+cos({0}))", "tanh({0})"],
    *["sinh(sin({0}))", "cosh(cos({0}))", "erf({0})", "erfc({0})", "recip(3+sin({0}))"],
    *["min({0},{1})", "max({0},{1})", "select({0},{1},{2})", "select(step({0}),{1},{2})"],
    *["floor({0})", "ceil({0})", "delta({0})", "abs({0})"],
]
KINKED = ("abs", "min", "max", "floor", "ceil", "step", "delta", "select")
"""At a kink the derivative is one-sided, and the two programs may choose different sides."""


def fill(template: str, children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arguments = [children] * (1 + max(int(digit) for digit in re.findall(r"{(\d)}", template)))
    return st.tuples(*arguments).map(lambda filled: template.format(*filled))


NUMBERS = st.floats(0.25, 4.0).map(lambda v: repr(round(v, 3)))
EXPRESSIONS = st.recursive(
    st.one_of(NUMBERS, st.sampled_from("xyz")),
    lambda children: st.sampled_from(TEMPLATES).flatmap(lambda t: fill(t, children)),
    max_leaves=10,
)
WITH_DEFINITIONS = st.tuples(EXPRESSIONS, EXPRESSIONS, EXPRESSIONS).map(
    "p+{0[0]}*q; p = q-{0[1]} ;q={0[2]}".format
)


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(source=st.one_of(EXPRESSIONS, WITH_DEFINITIONS))
def test_random_expressions_agree_with_openmm(source: str) -> None:
    expected, expected_gradient = openmm_state(source)
    value, gradient = ours(source)
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-11)
    if not any(name in source for name in KINKED):
        size = max(1.0, *(abs(g) for g in expected_gradient))
        assert gradient == pytest.approx(expected_gradient, rel=1e-8, abs=1e-10 * size)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "expected a number, a name or '\\(', got 'the end' at position 0"),
        ("+3", "got '\\+' at position 0"),
        ("4-+3", "at position 2"),
        ("sin(x", "expected '\\)', got 'the end' at position 5"),
        ("1)", "got '\\)' at position 1"),
        ("x y", "expected an operator or the end, got 'y' at position 2"),
        ("2x", "at position 1"),
        ("x,y", "got ',' at position 1"),
        ("sin (x)", "got '\\(' at position 4"),
        ("1.2.3", "at position 3"),
        (".", "expected a number at position 0"),
        ("x+foo(x)", "unknown function 'foo'.* at position 2"),
        ("pow(x,2)", "unknown function 'pow'"),
        ("min(x)", "min: expected 2 arguments, got 1 at position 0"),
        ("sin()", "at position 4"),
        ("x*w", "unknown variable 'w'; the known ones are x, y, z at position 2"),
        ("a; b=3; a=b", "unknown variable 'b'.* at position 10"),
        ("x; =3", "expected a definition 'name = expression'"),
        ("x; 3", "expected a definition"),
        ("x; a=", "got 'the end' at position 5"),
        ("__import__('os').system('true')", "unknown function '__import__'"),
        ("x.__class__", "unknown variable 'x.__class__'"),
        ("(" * 300 + "x" + ")" * 300, "expected at most 200 levels of nesting"),
        ("+".join(["x"] * 300), "expected at most 200 levels of nesting"),
    ],
)
def test_error_names_the_position(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Expression(source, ["x", "y", "z"])


WORDS = [
    *("+", "-", "*", "/", "^", "(", ")", ",", ";", "=", " ", "\t", "\n", "\0", "{", "}", "%"),
    *(".", "0", "2", "16", "0.5", "-3", "1e308", "1e999", "1e-400", "²", "٣", "\u2028", "\ud800"),
    *("x", "y", "x=", "; x=", "é", "__import__", "eval", "exec", "os.system", "lambda:", "'true'"),
    *(f"{name}(" for name in FUNCTIONS),
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(WORDS), max_size=30).map("".join),
    st.tuples(EXPRESSIONS, st.text(max_size=3), EXPRESSIONS).map("".join),
)


@contextmanager
def nothing_is_executed() -> Iterator[None]:
    """Python's own ways of running a text fail."""
    names = ("eval", "exec", "compile")
    broken = {name: mock.Mock(side_effect=AssertionError(name)) for name in names}
    with mock.patch.multiple(builtins, **broken):
        yield


def test_the_guard_against_execution_holds() -> None:
    with nothing_is_executed(), pytest.raises(AssertionError, match="eval"):
        eval("1")
    assert eval("1") == 1


def test_any_text_is_an_expression_or_refused() -> None:
    """With a ValueError. An expression holds no function but those of the table, and has a value
    wherever its variables have.
    """
    allowed = [function for _, function in FUNCTIONS.values()]
    refused: list[str] = []

    @settings(max_examples=5 * settings.default.max_examples)  # type: ignore[attr-defined]
    @given(text=TEXTS)
    @example(text="2^(1e308*10)")
    @example(text="x^(1e308*10-1e308*10)")
    @example(text="^".join(["x"] * 199))
    @example(text="-" * 10_000 + "x")
    @example(text="sin(" * 190 + "x" + ")" * 190)
    @example(text="select(x," * 190 + "x" + ",1)" * 190)
    def check(text: str) -> None:
        with nothing_is_executed():
            try:
                expression = Expression(text)
            except ValueError as error:
                refused.append(str(error))
                return
            refused.append("")
            value = expression(dict.fromkeys(expression.variables, 0.5))
        assert value.dtype == torch.float64
        for node in nodes(expression):
            assert node.function is None or node.function in allowed

    check()
    messages = [text for text in refused if text]
    assert 0.1 < len(messages) / len(refused) < 0.9
    assert all("at position" in text for text in messages)


def nodes(expression: Expression) -> list[lepton._Call]:
    """The calls of operators and functions."""
    found, pending = [], [expression._root]
    while pending:
        node = pending.pop()
        if isinstance(node, lepton._Call) and not any(node is other for other in found):
            found.append(node)
            pending.extend(node.arguments)
    return found


def test_names_of_python_are_plain_variables() -> None:
    expression = Expression("print+exec; exec=1")
    assert expression.variables == {"print"}
    assert float(expression({"print": 2.0})) == 3.0


def test_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected values for \['a', 'b'\], missing \['b'\]"):
        Expression("a+b")({"a": 1.0})


def test_values_broadcast_in_float64() -> None:
    result = Expression("k*(r-r0)^2")(
        {"k": torch.tensor([[1.0], [2.0]]), "r": torch.arange(3.0), "r0": 1.0}
    )
    assert result.dtype == torch.float64
    assert result.tolist() == [[1.0, 0.0, 1.0], [2.0, 0.0, 2.0]]


def test_integer_powers_of_negative_numbers_have_gradients() -> None:
    x = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    for exponent in (1, 2, 3, 7, 16, 20):
        (gradient,) = torch.autograd.grad(Expression(f"x^{exponent}")({"x": x}).sum(), x)
        assert torch.allclose(gradient, exponent * x.detach() ** (exponent - 1), rtol=1e-14)


def test_the_branch_not_taken_does_not_poison_the_gradient() -> None:
    # 1/x and sqrt(x) have infinite derivatives at 0; through a definition, too.
    x = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    for source in ("select(x, 1/x, 3*x)", "select(x, a, 3*x); a=1/x"):
        (gradient,) = torch.autograd.grad(Expression(source)({"x": x}).sum(), x)
        assert gradient.tolist() == [3.0, -1.0 / 16.0]
    # negative control: the same, masked by multiplication, is NaN
    (gradient,) = torch.autograd.grad((torch.where(x != 0, 1 / x, 3 * x)).sum(), x)
    assert math.isnan(float(gradient[0]))


def test_second_derivatives() -> None:
    x = torch.tensor(1.3, dtype=torch.float64)
    expression = Expression("2*s6*(s6-2); s6=cube(recip(r2)); r2=square(r)")
    hessian = torch.autograd.functional.hessian(lambda r: expression({"r": r}), x)
    exact = 2 * (12 * 13 * 1.3**-14 - 2 * 6 * 7 * 1.3**-8)
    assert float(hessian) == pytest.approx(exact, rel=1e-13)
