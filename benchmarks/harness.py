"""Harness of the benchmarks: options, timing in turns, stored rows, tables and figures.

A script holds what it measures. Where results go, how they are timed, and how cells of a table look
is decided here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from openmm_vtdis.storage.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"
"""Folder of measured rows."""
CACHE = Path("runs") / "benchmarks"
"""Folder of samples and trajectories, which are not committed."""
DOCS = Path(__file__).parents[1] / "docs"
"""Folder of pages, with their tables and figures."""
NETWORKS = ("dw4", "lj13", "aldp-800K")
"""Shipped generators that are timed, unless others are named."""


# -- options ----------------------------------------------------------------------------------
def command_line(
    doc: str | None,
    *,
    systems: Sequence[str] = (),
    rounds: int | None = None,
    batch_size: int | None = None,
    device: bool = False,
    progress: bool = False,
) -> argparse.ArgumentParser:
    """A parser with the common options that are given a default, or asked for.

    ``doc``: the script's docstring, whose first line is shown.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if systems:
        parser.add_argument("systems", nargs="*", default=list(systems))
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="that alternate")
    if batch_size is not None:
        parser.add_argument("--batch-size", type=int, default=batch_size)
    if device:
        parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda")
    if progress:
        parser.add_argument("--no-progress", dest="progress", action="store_false")
    return parser


# -- times ------------------------------------------------------------------------------------
def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(
    works: Sequence[Callable[[], object]], n_rounds: int, device: torch.device, *, warm_up: int = 1
) -> np.ndarray:
    """Seconds of k works in each of n rounds (n, k), after warm-up rounds.

    Works alternate, so that a busy machine hits all alike.
    """
    rounds = [[seconds(work, device) for work in works] for _ in range(warm_up + n_rounds)]
    return np.array(rounds[warm_up:])


def median_seconds(work: Callable[[], object], n: int, device: torch.device) -> float:
    """Median seconds of n calls, after a warm-up call."""
    return float(np.median(in_turns([work], n, device)))


# -- rows and samples that stay ---------------------------------------------------------------
def read_result(name: str, default: Any = None) -> Any:
    """Read the measured document of a name, or return the default."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else default


def write_result(name: str, document: Any) -> None:
    """Write a measured document, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / f"{name}.json", (json.dumps(document, indent=1) + "\n").encode())


def system_rows(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a system by their labels, "<method> @ <steps>"."""
    return read_result(name, {"rows": {}})["rows"]  # type: ignore[no-any-return]


def cached(name: str) -> Path:
    """Path of a file under ``runs/``, whose folder is made if need be."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE / name


# -- tables and figures -----------------------------------------------------------------------
def markdown_row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |\n"


class MarkdownTable:
    """A table that prints each row when it is added."""

    def __init__(self, *columns: str, quiet: bool = False) -> None:
        self.quiet = quiet
        self.text = markdown_row(columns).replace("|  |", "| |") + f"|{'---|' * len(columns)}\n"

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.text += markdown_row(cells)
        if not self.quiet:
            print(self.text.splitlines()[-1], flush=True)

    def __str__(self) -> str:
        return self.text


def percent(value: float, error: float, digits: int = 1) -> str:
    """A fraction with its error."""
    return f"{100 * value:.{digits}f} ± {100 * error:.{digits}f} %"


def spread(values: np.ndarray, spec: str = ".2f") -> str:
    """The median with the range."""
    return f"{np.median(values):{spec}} ({values.min():{spec}}-{values.max():{spec}})"


def machine() -> str:
    """The computer that rows are measured on."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s)"
    )


def hardware(device: torch.device) -> str:
    """The processor or GPU that was timed."""
    name = f"one CPU, {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"


def named(name: str, device: torch.device) -> str:
    """File name of a table or figure that exists once for each kind of device."""
    return f"{name}-{device.type}" if device.type != "cpu" else name


def write_page(name: str, text: str) -> None:
    """Write a table that a page of the docs includes."""
    (DOCS / "tables").mkdir(exist_ok=True)
    write_atomically(DOCS / "tables" / f"{name}.md", text.encode())


def write_table(name: str, table: MarkdownTable, note: str, device: torch.device) -> None:
    """Write a table of times with a note, to which the name of the hardware is appended."""
    write_page(named(name, device), f"{table}\n{note}{hardware(device)}.\n")


def new_figure(width: float, height: float) -> Figure:
    """A figure of the given size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(name: str, figure: Figure) -> None:
    """Write a figure that a page of the docs shows."""
    (DOCS / "figures").mkdir(exist_ok=True)
    figure.savefig(DOCS / "figures" / f"{name}.png", dpi=110)
