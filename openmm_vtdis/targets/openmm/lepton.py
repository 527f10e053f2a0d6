r"""Lepton, the expression language of OpenMM's Custom*Forces, compiled to torch.

An energy such as ``"k*(r-r0)^2; r0=2*l"`` is a primary expression followed by definitions. The
grammar, as OpenMM parses it:

    source      = expression { ";" [ name "=" expression ] }
    expression  = operand { operator expression }
    operand     = number | name | name"(" expression { "," expression } ")"
                | "(" expression ")" | "-" expression

=============  ==========  ==============  =========================================
operator       precedence  associates to
=============  ==========  ==============  =========================================
``+  -``       0           the left
``*  /``       1           the left
unary ``-``    2                           ``-2^2 = -4``, there is no unary ``+``
``^``          3           the right       ``2^3^2 = 512``, ``2^-2 = 0.25``
=============  ==========  ==============  =========================================

A definition may use those on its right; of two with the same name the left one counts; unused ones
are dropped. Any other text is a name, so ``or``, ``lambda``, ``I`` and ``E`` are variables like any
other. The text is parsed here and never handed to Python: only the functions of the table
:data:`FUNCTIONS`, and those that the caller adds, can be called.

Everything is computed in float64. Derivatives are those of the branch taken: ``select(c, a, b)``
keeps an infinite derivative of the branch *not* taken from turning into NaN. (One difference is
left: OpenMM simplifies a literal ``0*f`` to 0 before it evaluates, even where f is infinite.)
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_NAME = re.compile(r"[^\s\d.+\-*/^(),;=][^\s+\-*/^(),;=]*")
_PRECEDENCE = {"+": 0, "-": 0, "*": 1, "/": 1, "^": 3}
_UNARY_MINUS = 2
_MAX_DEPTH = 200
"""Deepest nesting accepted; deeper text would exhaust Python's stack."""
_LARGEST_UNROLLED_POWER = 16


def _integer_power(base: Tensor, exponent: int) -> Tensor:
    """base**exponent by repeated squaring: faster than ``pow``, and right for negative bases."""
    if exponent < 0:
        return torch.reciprocal(_integer_power(base, -exponent))
    if exponent == 0:
        return torch.ones_like(base)
    if exponent == 1:
        return base
    half = _integer_power(base, exponent // 2)
    return half * half * base if exponent % 2 else half * half


def _power(base: Tensor | float, exponent: Tensor | float) -> Tensor:
    base = _as_tensor(base)
    if isinstance(exponent, Tensor):
        return torch.pow(base, exponent)
    if float(exponent).is_integer() and abs(exponent) <= _LARGEST_UNROLLED_POWER:
        return _integer_power(base, int(exponent))
    return torch.pow(base, exponent)


def _step(x: Tensor) -> Tensor:
    return (x >= 0).to(torch.float64)


def _delta(x: Tensor) -> Tensor:
    return (x == 0).to(torch.float64)


Function = tuple[int, Callable[..., Tensor]]
"""Number of arguments, and implementation, of a function."""

FUNCTIONS: dict[str, Function] = {
    "sqrt": (1, torch.sqrt),
    "exp": (1, torch.exp),
    "log": (1, torch.log),
    "sin": (1, torch.sin),
    "cos": (1, torch.cos),
    "sec": (1, lambda x: torch.reciprocal(torch.cos(x))),
    "csc": (1, lambda x: torch.reciprocal(torch.sin(x))),
    "tan": (1, torch.tan),
    "cot": (1, lambda x: torch.reciprocal(torch.tan(x))),
    "asin": (1, torch.asin),
    "acos": (1, torch.acos),
    "atan": (1, torch.atan),
    "atan2": (2, torch.atan2),
    "sinh": (1, torch.sinh),
    "cosh": (1, torch.cosh),
    "tanh": (1, torch.tanh),
    "erf": (1, torch.erf),
    "erfc": (1, torch.erfc),
    "step": (1, _step),
    "delta": (1, _delta),
    "square": (1, torch.square),
    "cube": (1, lambda x: x * x * x),
    "recip": (1, torch.reciprocal),
    "min": (2, torch.minimum),
    "max": (2, torch.maximum),
    "abs": (1, torch.abs),
    "floor": (1, torch.floor),
    "ceil": (1, torch.ceil),
    "select": (3, torch.where),  # evaluated by _Scope, which masks the branches
}
"""Functions that any expression can call."""

_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": _power,
    "negate": operator.neg,
}
"""Operators, whose arguments are tensors and numbers, at least one of them a tensor."""


@dataclass(frozen=True, eq=False)
class _Constant:
    value: float
    depth: int = 0


@dataclass(frozen=True, eq=False)
class _Variable:
    name: str
    depth: int = 0


@dataclass(frozen=True, eq=False)
class _Call:
    operation: str
    arguments: tuple[_Node, ...]
    depth: int
    function: Callable[..., Tensor] | None = None
    """Implementation; None for an operator."""


_Node = _Constant | _Variable | _Call


class Expression:
    """A compiled Lepton expression: call it with the values of its variables.

    Parameters
    ----------
    source
        The text, definitions included.
    variables
        Names that may occur. An unknown one is an error here and not at the first evaluation.
        None: any name.
    functions
        Further functions that may be called, name to (number of arguments, implementation): the
        tabulated ones of a force, or those of particles such as ``distance(p1,p2)``.

    Raises
    ------
    ValueError
        On a syntax error, an unknown function or an unknown variable, with its position.

    Examples
    --------
    >>> spring = Expression("0.5*k*(r-r0)^2; k=300", {"r", "r0"})
    >>> round(float(spring({"r": 0.2, "r0": 0.1})), 6)
    1.5
    """

    def __init__(
        self,
        source: str,
        variables: Collection[str] | None = None,
        functions: Mapping[str, Function] | None = None,
    ) -> None:
        self.source = source
        known = None if variables is None else frozenset(variables)
        self._root = _Parser(source, known, FUNCTIONS | dict(functions or {})).parse()
        self.variables: frozenset[str] = frozenset(_names(self._root))
        """Names whose values a call needs (those in the unused definitions do not count)."""

    def __call__(self, values: Mapping[str, Tensor | float]) -> Tensor:
        """Evaluate on tensors (or numbers) that broadcast together -> float64 tensor.

        Raises
        ------
        ValueError
            If the value of a variable is missing.
        """
        missing = sorted(self.variables - values.keys())
        if missing:
            raise ValueError(
                f"Lepton expression {self.source!r}: expected values for "
                f"{sorted(self.variables)}, missing {missing}"
            )
        tensors = {name: _as_tensor(values[name]) for name in self.variables}
        return _as_tensor(_Scope(tensors).evaluate(self._root))

    def __repr__(self) -> str:
        return f"Expression({self.source!r})"


class _Scope:
    """Values of the variables, and of the shared subexpressions computed from them so far."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values
        self._cache: dict[int, Tensor | float] = {}

    def evaluate(self, node: _Node) -> Tensor | float:
        if isinstance(node, _Constant):
            return node.value
        if isinstance(node, _Variable):
            return self._values[node.name]
        key = id(node)
        if key not in self._cache:
            self._cache[key] = self._call(node)
        return self._cache[key]

    def _call(self, node: _Call) -> Tensor:
        if node.operation == "select":
            return self._select(*node.arguments)
        arguments = [self.evaluate(argument) for argument in node.arguments]
        if node.function is not None:
            return node.function(*map(_as_tensor, arguments))
        if all(isinstance(argument, float) for argument in arguments):
            arguments[0] = _as_tensor(arguments[0])
        return _OPERATORS[node.operation](*arguments)

    def _select(self, condition: _Node, a: _Node, b: _Node) -> Tensor:
        taken = _as_tensor(self.evaluate(condition)) != 0
        value_a = self._where(taken).evaluate(a)
        value_b = self._where(~taken).evaluate(b)
        return torch.where(taken, _as_tensor(value_a), _as_tensor(value_b))

    def _where(self, mask: Tensor) -> _Scope:
        """The same values, cut off from differentiation where ``mask`` is False.

        ``where`` selects in the backward pass too, so an infinite derivative of a branch is
        dropped, not multiplied by zero.
        """
        if not any(value.requires_grad for value in self._values.values()):
            return self
        return _Scope(
            {
                name: torch.where(mask, value, value.detach()) if value.requires_grad else value
                for name, value in self._values.items()
            }
        )


class _Parser:
    def __init__(
        self, source: str, variables: frozenset[str] | None, functions: Mapping[str, Function]
    ) -> None:
        self._source = source
        self._variables = variables
        self._functions = functions
        self._definitions: dict[str, _Node] = {}
        self._unknown: dict[int, tuple[str, int]] = {}
        self._position = 0
        self._end = 0
        self._nesting = 0

    def parse(self) -> _Node:
        starts = [0] + [i + 1 for i, c in enumerate(self._source) if c == ";"]
        ends = [start - 1 for start in starts[1:]] + [len(self._source)]
        for start, end in zip(reversed(starts[1:]), reversed(ends[1:]), strict=True):
            text = self._source[start:end]
            if not text.strip():
                continue
            name, equals, _ = text.partition("=")
            if not equals or not _NAME.fullmatch(name.strip()):
                self._position = start
                self._fail("expected a definition 'name = expression'")
            self._definitions[name.strip()] = self._segment(start + len(name) + 1, end)
        root = self._segment(0, ends[0])
        self._check_known(root)
        return root

    def _segment(self, start: int, end: int) -> _Node:
        self._position, self._end = start, end
        node = self._expression(0)
        if self._peek():
            self._fail(f"expected an operator or the end, got {self._peek()!r}")
        return node

    def _expression(self, precedence: int) -> _Node:
        self._nesting += 1
        if self._nesting > _MAX_DEPTH:
            self._fail(f"expected at most {_MAX_DEPTH} levels of nesting")
        left = self._operand()
        while True:
            symbol = self._peek()
            if symbol not in _PRECEDENCE or _PRECEDENCE[symbol] < precedence:
                self._nesting -= 1
                return left
            self._position += 1
            associates_to_the_left = symbol != "^"
            right = self._expression(_PRECEDENCE[symbol] + associates_to_the_left)
            left = self._call(symbol, (left, right))

    def _operand(self) -> _Node:
        character = self._peek()
        if character == "-":
            self._position += 1
            return self._call("negate", (self._expression(_UNARY_MINUS),))
        if character == "(":
            self._position += 1
            node = self._expression(0)
            self._close()
            return node
        if character and (character.isdigit() or character == "."):
            return self._number()
        match = _NAME.match(self._source, self._position, self._end)
        if match is None:
            self._fail(f"expected a number, a name or '(', got {character or 'the end'!r}")
        start, self._position = match.start(), match.end()
        if self._position < self._end and self._source[self._position] == "(":
            return self._function(match.group(), start)
        if match.group() in self._definitions:
            return self._definitions[match.group()]
        variable = _Variable(match.group())
        self._unknown[id(variable)] = (variable.name, start)
        return variable

    def _number(self) -> _Node:
        match = _NUMBER.match(self._source, self._position, self._end)
        if match is None:
            self._fail("expected a number")
        self._position = match.end()
        return _Constant(min(float(match.group()), sys.float_info.max))

    def _function(self, name: str, start: int) -> _Node:
        if name not in self._functions:
            self._position = start
            known = ", ".join(self._functions)
            self._fail(f"unknown function {name!r}; the known ones are {known}")
        self._position += 1
        arguments = [self._expression(0)]
        while self._peek() == ",":
            self._position += 1
            arguments.append(self._expression(0))
        self._close()
        expected, function = self._functions[name]
        if len(arguments) != expected:
            self._position = start
            self._fail(f"{name}: expected {expected} arguments, got {len(arguments)}")
        return self._call(name, tuple(arguments), function)

    def _call(
        self,
        operation: str,
        arguments: tuple[_Node, ...],
        function: Callable[..., Tensor] | None = None,
    ) -> _Node:
        depth = 1 + max(argument.depth for argument in arguments)
        if depth > _MAX_DEPTH:
            self._fail(f"expected at most {_MAX_DEPTH} levels of nesting")
        call = _Call(operation, arguments, depth, function)
        if all(isinstance(argument, _Constant) for argument in arguments):
            return _Constant(float(_as_tensor(_Scope({}).evaluate(call))))
        return call

    def _close(self) -> None:
        if self._peek() != ")":
            self._fail(f"expected ')', got {self._peek() or 'the end'!r}")
        self._position += 1

    def _peek(self) -> str:
        """Skip white space; the next character of this segment, or '' at its end."""
        while self._position < self._end and self._source[self._position].isspace():
            self._position += 1
        return self._source[self._position] if self._position < self._end else ""

    def _check_known(self, root: _Node) -> None:
        if self._variables is None:
            return
        for variable in _leaves(root):
            name, self._position = self._unknown[id(variable)]
            if name not in self._variables:
                known = ", ".join(sorted(self._variables))
                self._fail(f"unknown variable {name!r}; the known ones are {known}")

    def _fail(self, message: str) -> NoReturn:
        raise ValueError(
            f"Lepton expression {self._source!r}: {message} at position {self._position}"
        )


def _leaves(root: _Node) -> list[_Variable]:
    """The distinct variable nodes below ``root``."""
    seen: set[int] = set()
    found: list[_Variable] = []
    pending: list[_Node] = [root]
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, _Variable):
            found.append(node)
        elif isinstance(node, _Call):
            pending.extend(node.arguments)
    return found


def _names(root: _Node) -> set[str]:
    return {variable.name for variable in _leaves(root)}


def _as_tensor(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
