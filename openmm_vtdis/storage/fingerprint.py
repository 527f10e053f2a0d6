"""Fingerprints: one way to tell whether two things are the same, by their content.

:func:`fingerprint` is the SHA-256 of numbers, texts, tensors, networks and whatever is made of
them: the same in copies, in pickles, on another device, and in another process, where addresses,
shared strings and the order of sets are not. An object that knows its own fingerprint is asked.
Functions and classes that no other process can import by their names, such as a notebook's, count
with their code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import operator
import os
import pickle
import secrets
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn


@runtime_checkable
class Identified(Protocol):
    """Something that has a fingerprint of its own."""

    @property
    def fingerprint(self) -> str | None:
        """A digest of its content; None if it has none."""
        ...


@runtime_checkable
class Described(Protocol):
    """Something that says what it is made of."""

    @property
    def identity(self) -> Any:
        """All that tells it from others: texts, numbers, tensors and collections of them."""
        ...


def fingerprint(*parts: Any) -> str:
    """A digest of texts, numbers, tensors, arrays, modules, objects, and collections of them."""
    found = hashlib.sha256()
    for part in parts:
        _update(found, part)
    return found.hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """A digest of the bytes of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def stream_fingerprint(rng: torch.Generator) -> str:
    """A digest of an rng's state, and so of the random numbers that it will give."""
    return fingerprint(rng.get_state())[:16]


def _update(found: Any, part: Any) -> None:
    """Add one thing, with its kind and length, so that no two read alike."""
    if isinstance(part, np.generic):
        part = part.item()
    if part is None or isinstance(part, bool | int | float | complex | str | bytes):
        text = part if isinstance(part, str | bytes) else repr(part)
        content = text.encode() if isinstance(text, str) else text
        _header(found, type(part).__name__, len(content))
        found.update(content)
    elif isinstance(part, Tensor | np.ndarray):
        _add_numbers(found, part)
    elif isinstance(part, Mapping):
        _header(found, "mapping", len(part))
        for key in sorted(part, key=lambda key: (type(key).__name__, str(key))):
            _update(found, key)
            _update(found, part[key])
    elif isinstance(part, list | tuple):
        _header(found, "sequence", len(part))
        for element in part:
            _update(found, element)
    elif isinstance(part, set | frozenset):
        _header(found, "set", len(part))
        _update(found, sorted(fingerprint(element) for element in part))
    elif isinstance(part, Identified) and not isinstance(part, type):
        _update(found, part.fingerprint)
    elif isinstance(part, Described) and not isinstance(part, type):
        _update(found, part.identity)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part)]
        _update(found, (type(part), {name: operator.attrgetter(name)(part) for name in names}))
    else:
        _update(found, _content(part))


def _header(found: Any, kind: str, size: object) -> None:
    found.update(f"{kind}:{size}|".encode())


def _add_numbers(found: Any, values: Tensor | np.ndarray) -> None:
    if isinstance(values, np.ndarray):
        if values.dtype.hasobject:
            _update(found, (values.shape, values.tolist()))
            return
        array = np.ascontiguousarray(values)
        _header(found, f"array {array.dtype.str}", values.shape)
        found.update(array.tobytes())
        return
    content = values.detach().cpu()
    if content.layout != torch.strided:
        content = content.to_dense()
    content = content.resolve_conj().resolve_neg().contiguous()
    _header(found, f"tensor {content.dtype}", tuple(content.shape))
    found.update(content.flatten().view(torch.uint8).numpy().tobytes())


def _content(thing: Any) -> str:
    """A digest of an object's classes and numbers, as its pickle has them.

    An object that cannot be pickled, such as one that holds a lock, is equal to itself alone, and
    only as long as its tensors stay as they are.
    """
    try:
        return content_fingerprint(thing)
    except Exception:  # whatever the object's own code raises
        held = thing.state_dict() if isinstance(thing, nn.Module) else _attributes(thing)
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        return fingerprint(_token(thing), tensors)


def _attributes(thing: Any) -> Mapping[str, Any]:
    try:
        return vars(thing)
    except TypeError:  # an object without any
        return {}


_TOKENS: dict[int, tuple[str, Callable[[], Any]]] = {}
"""Random names of objects without a content, with (weak) references, by their ids."""


def _token(thing: Any) -> str:
    """A random name of one object, in this process."""
    token, held = _TOKENS.get(id(thing), ("", lambda: None))
    if held() is thing:
        return token
    try:
        reference: Callable[[], Any] = weakref.ref(thing)
    except TypeError:  # an object that cannot be referred to weakly is kept
        reference = functools.partial(lambda kept: kept, thing)
    token = secrets.token_hex(16)
    _TOKENS[id(thing)] = token, reference
    return token


def content_fingerprint(thing: Any) -> str:
    """A digest of what a pickle of an object holds, whatever the addresses of its parts.

    Raises
    ------
    Exception
        Whatever pickle raises for an object that it cannot write.
    """
    buffer = io.BytesIO()
    pickler = _ByContent(buffer, protocol=4)
    pickler.fast = True  # nothing is told apart by being the same object
    try:
        pickler.dump(thing)
    except (ValueError, RecursionError):  # an object that holds itself
        buffer = io.BytesIO()
        _ByContent(buffer, protocol=4).dump(thing)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def code_fingerprint(function: Any) -> str:
    """A digest of a function's code, and of what it calls in its own module.

    Of any other object, and where the code refers to something that cannot be pickled, it is that
    of :func:`fingerprint`.
    """
    if not isinstance(function, types.FunctionType):
        return fingerprint(function)
    buffer = io.BytesIO()
    try:
        _ByContent(buffer, protocol=4, module=function.__module__).dump(function)
    except Exception:  # whatever the objects' own code raises
        return fingerprint(function)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


class _ByContent(pickle.Pickler):
    """Writes tensors, arrays and sets as digests of their content, and code that has no name.

    Parameters
    ----------
    module
        A module whose functions and classes are written with their code as well.
    """

    def __init__(self, file: io.BytesIO, protocol: int, module: str | None = None) -> None:
        super().__init__(file, protocol)
        self._module = module
        self._seen: dict[int, tuple[int, object]] = {}

    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, Tensor) or (
            isinstance(thing, np.ndarray) and not thing.dtype.hasobject
        ):
            return fingerprint(thing)
        if isinstance(thing, set | frozenset):  # whose order is another in every process
            return "set", sorted(content_fingerprint(part) for part in thing)
        return None

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, types.ModuleType):
            return str, (thing.__name__,)
        if isinstance(thing, types.CodeType):
            return str, (thing.co_code, thing.co_consts, thing.co_names, thing.co_argcount)
        if isinstance(thing, _WRAPPERS):
            return str, (type(thing).__name__, tuple(_wrapped(thing)))
        if not isinstance(thing, types.FunctionType | type) or self._has_a_name(thing):
            return NotImplemented
        if id(thing) in self._seen:
            return str, ("again", self._seen[id(thing)][0])
        self._seen[id(thing)] = len(self._seen), thing
        parts = _of_class(thing) if isinstance(thing, type) else _of_function(thing)
        return str, (thing.__qualname__, dict(parts))

    def _has_a_name(self, thing: Any) -> bool:
        """Whether every process finds a function or a class by its name."""
        module = thing.__module__
        if module in (None, "__main__", "__mp_main__", self._module) or module not in sys.modules:
            return False
        try:
            return operator.attrgetter(thing.__qualname__)(sys.modules[module]) is thing
        except AttributeError:  # it is local to a function
            return False


_WRAPPERS = (staticmethod, classmethod, property, functools.cached_property)


def _wrapped(thing: Any) -> Iterator[Any]:
    """The functions in a member of a class."""
    for name in ("__func__", "func", "fget", "fset"):
        with contextlib.suppress(AttributeError):
            yield operator.attrgetter(name)(thing)


def _of_function(function: Any) -> Iterator[tuple[str, Any]]:
    """Whatever a function's values depend on, but for what its globals import."""
    yield "code", function.__code__
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that nothing was put into yet
            yield f"closure {name}", cell.cell_contents
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__ and name != "__builtins__":
            yield f"global {name}", function.__globals__[name]


def _names(code: types.CodeType) -> set[str]:
    """Names that code and the functions in it refer to."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


_SKIPPED = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__",
    "_abc_impl", "__dataclass_fields__", "__dataclass_params__", "__match_args__",
    "__firstlineno__", "__static_attributes__", "__annotate_func__", "__annotations_cache__",
    "__parameters__", "__orig_bases__", "__protocol_attrs__",
}  # fmt: skip


def _of_class(cls: type) -> Iterator[tuple[str, Any]]:
    """The bases and the members of a class."""
    yield "bases", cls.__bases__
    for name, member in vars(cls).items():
        if name not in _SKIPPED:
            yield name, member
