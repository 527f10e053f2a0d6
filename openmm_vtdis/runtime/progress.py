"""The progress bar of long work: one setting for all of it."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from tqdm.auto import tqdm

_SECONDS, _SECONDS_IN_A_FILE = 0.1, 30.0
"""Between updates, on a terminal and in a log file."""


class Bar(Protocol):
    """What long work tells of its progress."""

    def update(self, n: int = 1) -> object:
        """So many more are done."""


class NoBar:
    """What is called like a bar, and shows nothing.

    A disabled tqdm bar takes a lock that a process shares with those that it forked: one of them
    that is killed while it has it would leave all others waiting.
    """

    def update(self, n: int = 1) -> None:
        """So many more are done."""

    def set_postfix(self, **values: str) -> None:
        """Numbers to show behind the bar."""

    def close(self) -> None:
        """The work is done."""

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
