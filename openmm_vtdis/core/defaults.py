"""torch as the package expects it, whatever the caller has set for work of their own.

Global settings belong to the user: a default type, a default device, inference mode. Modules are
made under :func:`package_defaults`, what is public begins with :func:`keeps_to_the_cpu`, and
tensors say their type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from openmm_vtdis.core.forks import use_one_thread

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def package_defaults() -> Iterator[None]:
    """Set single precision and the CPU, leave inference mode; restore the caller's settings."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(before)


def keeps_to_the_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that its tensors are on the CPU unless it names a device.

    In a forked process it also runs with one thread (:mod:`~openmm_vtdis.core.forks`). The default
    type stays the caller's, since energies of the caller's own may rely on it.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        use_one_thread()
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run
