"""Progress bars, with one setting for the whole package."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from tqdm.auto import tqdm

_SECONDS, _SECONDS_IN_A_FILE = 0.1, 30.0
"""Seconds between updates, on a terminal and in a log file."""


class Bar(Protocol):
    """The interface of a progress bar."""

    def update(self, n: int = 1) -> object:
        """Advance by n."""


class NoBar:
    """A bar that shows nothing.

    A disabled tqdm bar takes a lock that a process shares with those that it forked: if one of them
    is killed while it holds the lock, all others wait for ever.
    """

    def update(self, n: int = 1) -> None:
        """Advance by n."""

    def set_postfix(self, **values: str) -> None:
        """Show numbers behind the bar."""

    def close(self) -> None:
        """Close the bar."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def progress_bar(
    total: int, what: str, show: bool = True, unit: str = "it", initial: int = 0
) -> tqdm[Any] | NoBar:
    """A tqdm bar that updates rarely where it is written to a file."""
    if not show:
        return NoBar()
    seconds = _SECONDS if sys.stderr.isatty() else _SECONDS_IN_A_FILE
    return tqdm(total=total, initial=initial, desc=what, unit=unit, mininterval=seconds)
