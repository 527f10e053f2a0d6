"""Validators for user input: each raises a ValueError that says what was expected and what came.

They are called where data enters the package (constructors, ``train``, ``tune``, ``sample``,
loaders) and nowhere in inner loops.
"""

from __future__ import annotations

import math
import numbers
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from openmm import unit
from torch import Tensor

from openmm_vtdis.core.units import kelvin


def positive_integer(name: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` as an int if it is an integer >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")
    return int(value)


def positive_number(name: str, value: object) -> float:
    """Return ``value`` as a float if it is finite and > 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
    return number


def output_file(name: str, path: str | os.PathLike[str]) -> Path:
    """Return a path that can be written: asked before the work whose result goes there.

    Raises
    ------
    ValueError
        If it is a folder, or in one that does not exist.
    OSError
        If nothing can be written there.
    """
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{name}: expected a path in a folder that exists, got {file}")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise OSError(error.errno, f"cannot write there: {error.strerror}", str(file)) from error
    return file


def checkpoint(path: str | os.PathLike[str] | None, seconds: object) -> Path | None:
    """Return a checkpoint's path, if any; ``seconds`` between writes must be a number >= 0."""
    if not isinstance(seconds, int | float) or not seconds >= 0.0:
        raise ValueError(f"checkpoint_seconds: expected a number >= 0, got {seconds!r}")
    return None if path is None else output_file("checkpoint", path)


def fraction(name: str, value: object) -> float:
    """Return ``value`` as a float if 0 < value < 1."""
    number = positive_number(name, value)
    if number >= 1.0:
        raise ValueError(f"{name}: expected a fraction between 0 and 1, got {value!r}")
    return number


def boolean(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def choice(name: str, value: object, options: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``options``."""
    if not isinstance(value, str) or value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")
    return value


def temperature(value: object) -> float:
    """Return a temperature in kelvin; it must be finite and positive."""
    try:
        if isinstance(value, bool | str):
            raise TypeError(f"{value!r} is no number")
        number = kelvin(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"temperature: expected an openmm.unit temperature or a number in kelvin, got {value!r}"
        ) from error
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"temperature: expected a positive, finite temperature, got {value!r}")
    return number


def configurations(name: str, x: object, n_particles: int, n_dims: int, minimum: int = 1) -> Tensor:
    """Return configurations as a float64 tensor of shape (n, n_particles, n_dims), all finite.

    Accepts anything numpy can read and torch tensors. The message names the first bad frame.
    """
    if isinstance(x, list | tuple) and any(getattr(part, "ndim", 0) > 2 for part in x):
        raise ValueError(
            f"{name}: expected one array of all frames, got {len(x)} of them; join them with "
            "numpy.concatenate"
        )
    array = real_array(name, x)
    if getattr(x, "dtype", None) in (np.dtype(bool), torch.bool):
        raise ValueError(f"{name}: expected positions in nm, got an array of True and False")
    tensor = torch.as_tensor(np.require(array, requirements=["C", "W"]))
    expected = f"(n, {n_particles}, {n_dims})"
    if tensor.ndim != 3 or tuple(tensor.shape[1:]) != (n_particles, n_dims):
        raise ValueError(
            f"{name}: expected positions of shape {expected} in nm, got {tuple(tensor.shape)}"
        )
    if tensor.shape[0] < minimum:
        raise ValueError(f"{name}: expected at least {minimum} frames, got {tensor.shape[0]}")
    finite = torch.isfinite(tensor).flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten()
        raise ValueError(
            f"{name}: expected finite positions, got NaN or infinity in {len(bad)} of "
            f"{len(finite)} frames, the first at index {int(bad[0])}"
        )
    return tensor


def real_array(name: str, x: object) -> np.ndarray:
    """Return real numbers as float64; what would lose something on the way is refused."""
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise ValueError(f"{name}: expected numbers everywhere, got an array with masked entries")
    if unit.is_quantity(x):
        raise ValueError(
            f"{name}: expected plain numbers, got a Quantity in {x.unit}; use value_in_unit()"  # type: ignore[attr-defined]
        )
    try:
        array = np.asarray(x)
        if array.dtype.kind not in "biufO":
            raise TypeError(f"an array of {array.dtype}")
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of real numbers, got {error}") from error


def device(value: torch.device | str) -> torch.device:
    """Return a device that torch can use here."""
    try:
        found = torch.device(value)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device: expected one that torch can use here, got {value!r}: {error}"
        ) from error
    return found


def torch_generator(name: str, rng: object) -> None:
    """Check that an rng is a ``torch.Generator``."""
    if not isinstance(rng, torch.Generator):
        raise ValueError(
            f"{name}: expected a torch.Generator, got {rng!r}; core.rng.make_rng(seed) makes one"
        )


def shape(x: object, n_particles: int, n_dims: int) -> None:
    """Check that x is a tensor of positions, (B, n_particles, n_dims)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch tensor of positions, got {type(x).__name__}")
    if x.ndim != 3 or tuple(x.shape[1:]) != (n_particles, n_dims):
        raise ValueError(
            f"x: expected positions of shape (B, {n_particles}, {n_dims}) in nm, "
            f"got {tuple(x.shape)}"
        )


def log_weights(values: object) -> np.ndarray:
    """Return log weights as (n,) float64, n >= 1; -inf is allowed, NaN and +inf are not."""
    try:
        lw = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "log_weights: expected an array (n,), as log_weights() gives it for frames, got "
            f"{type(values).__name__}"
        ) from error
    if lw.ndim != 1 or len(lw) == 0:
        raise ValueError(f"log_weights: expected shape (n,) with n >= 1, got {lw.shape}")
    bad = np.flatnonzero(np.isnan(lw) | np.isposinf(lw))
    if len(bad):
        raise ValueError(
            "log_weights: expected finite numbers or -inf, got NaN or +inf in "
            f"{len(bad)} of {len(lw)} samples, the first at index {bad[0]}"
        )
    return lw
