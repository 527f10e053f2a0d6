"""The progress bar of long work: one setting for all of it."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

_SECONDS, _SECONDS_IN_A_FILE = 0.1, 30.0
"""Between updates, on a terminal and in a log file."""


def progress_bar(
    total: int, what: str, show: bool = True, unit: str = "it", initial: int = 0
) -> tqdm[Any]:
    """A tqdm bar that updates rarely where it is written to a file."""
    seconds = _SECONDS if sys.stderr.isatty() else _SECONDS_IN_A_FILE
    return tqdm(
        total=total, initial=initial, desc=what, unit=unit, disable=not show, mininterval=seconds
    )
