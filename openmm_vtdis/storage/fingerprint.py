"""Fingerprints: one way to tell whether two things are the same, by their content.

:func:`fingerprint` is the SHA-256 of numbers, texts, tensors, networks and whatever is made of
them: the same in copies, in pickles, on another device, and in another process, where addresses,
shared strings and the order of sets are not. An object that knows its own fingerprint is asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import pickle
from collections.abc import Mapping
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
    if part is None or isinstance(part, bool | int | float | str | bytes | type):
        text = part if isinstance(part, str | bytes) else repr(part)
        content = text.encode() if isinstance(text, str) else text
        _header(found, type(part).__name__, len(content))
        found.update(content)
    elif isinstance(part, Tensor | np.ndarray):
        _add_numbers(found, part)
    elif isinstance(part, Mapping):
        _header(found, "mapping", len(part))
        for key in sorted(part, key=str):
            _update(found, key)
            _update(found, part[key])
    elif isinstance(part, list | tuple):
        _header(found, "sequence", len(part))
        for element in part:
            _update(found, element)
    elif isinstance(part, set | frozenset):
        _update(found, sorted(fingerprint(element) for element in part))
    elif isinstance(part, Identified):
        _update(found, part.fingerprint)
    elif isinstance(part, Described):
        _update(found, part.identity)
    elif dataclasses.is_dataclass(part):
        fields = {field.name: vars(part)[field.name] for field in dataclasses.fields(part)}
        _update(found, (type(part).__qualname__, fields))
    else:
        _update(found, _content(part))


def _header(found: Any, kind: str, size: object) -> None:
    found.update(f"{kind}:{size}|".encode())


def _add_numbers(found: Any, values: Tensor | np.ndarray) -> None:
    if isinstance(values, np.ndarray):
        if values.dtype.hasobject:
            _update(found, _content(values.tolist()))
            return
        array = np.ascontiguousarray(values)
        _header(found, f"array {array.dtype.str}", array.shape)
        found.update(array.tobytes())
        return
    content = values.detach().cpu().contiguous()
    _header(found, f"tensor {content.dtype}", tuple(content.shape))
    found.update(content.flatten().view(torch.uint8).numpy().tobytes())


def _content(thing: Any) -> str:
    """A digest of an object's classes and numbers, as its pickle has them.

    For an object that cannot be pickled it is made of the class and the tensors.
    """
    with contextlib.suppress(Exception):
        return content_fingerprint(thing)
    held = thing.state_dict() if isinstance(thing, nn.Module) else dict(_attributes(thing))
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    return fingerprint(type(thing).__qualname__, tensors)


def _attributes(thing: Any) -> Mapping[str, Any]:
    try:
        return vars(thing)
    except TypeError:  # an object without any
        return {}


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


class _ByContent(pickle.Pickler):
    """Writes tensors, arrays and sets as digests of their content."""

    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, Tensor) or (
            isinstance(thing, np.ndarray) and not thing.dtype.hasobject
        ):
            return fingerprint(thing)
        if isinstance(thing, set | frozenset):  # whose order is another in every process
            return "set", sorted(content_fingerprint(part) for part in thing)
        return None
