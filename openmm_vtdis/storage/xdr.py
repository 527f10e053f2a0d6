"""Frame headers of GROMACS's xtc and trr files, looked at before a reader in C believes them.

Numbers in these headers say how many atoms follow and how their coordinates are packed; where they
are damaged, or a frame is cut short, the library that reads such files may end the process.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_XTC, _XTC_LARGE, _TRR = 1995, 2023, 1993
_CUT = "is cut short, as a killed simulation leaves it; those before it are whole"
_RAW = 9
"""Most atoms of which an xtc holds plain coordinates."""
_INDICES = range(9, 73)
"""Indices of the table by which an xtc packs coordinates."""


def check_frames(path: Path, n_atoms: int) -> None:
    """Refuse an xtc or trr file with a frame that is damaged, or not of ``n_atoms`` atoms.

    Raises
    ------
    ValueError
        If there is such a frame; the message has its number, from 0. Files of other kinds are not
        looked at.
    """
    step: dict[str, Callable[[BinaryIO, int], str | None]] = {".xtc": _xtc, ".trr": _trr}
    kind = path.suffix.lower()
    if kind not in step or not path.is_file():
        return
    size, frame = path.stat().st_size, 0
    with path.open("rb") as file:
        while file.tell() < size:
            try:
                wrong = step[kind](file, n_atoms)
                if wrong is None and file.tell() > size:
                    wrong = _CUT
            except struct.error:
                wrong = _CUT
            if wrong is not None:
                raise ValueError(f"frame {frame} of {path} {wrong}")
            frame += 1


def _read(file: BinaryIO, layout: str) -> tuple[float, ...]:
    return struct.unpack(f">{layout}", file.read(struct.calcsize(f">{layout}")))


def _xtc(file: BinaryIO, n_atoms: int) -> str | None:
    """Move to the next frame; return what is wrong with this one, or None."""
    magic, n, _, _, *box = _read(file, "iiif9f")
    (again,) = _read(file, "i")
    if magic not in (_XTC, _XTC_LARGE) or n != again:
        return "is damaged"
    if n != n_atoms:
        return f"has {int(n)} atoms"
    if not all(map(math.isfinite, box)):
        return "has a damaged box"
    if n <= _RAW:
        file.seek(12 * int(n), 1)
        return None
    precision, *ranges, index = _read(file, "f6ii")
    (n_bytes,) = _read(file, "i" if magic == _XTC else "q")
    low, high = ranges[:3], ranges[3:]
    if not (math.isfinite(precision) and precision > 0.0) or index not in _INDICES:
        return "is damaged"
    if any(a > b or b - a >= 2**24 for a, b in zip(low, high, strict=True)) or n_bytes <= 0:
        return "is damaged"
    file.seek(int(n_bytes + 3) // 4 * 4, 1)
    return None


def _trr(file: BinaryIO, n_atoms: int) -> str | None:
    """Move to the next frame; return what is wrong with this one, or None."""
    magic, _, length = _read(file, "iii")
    if magic != _TRR or length != 12 or file.read(12) != b"GMX_trn_file":
        return "is damaged"
    *sizes, n, _, _ = _read(file, "13i")
    box, x, v, f = sizes[2], *sizes[7:]
    if n != n_atoms:
        return f"has {int(n)} atoms"
    real = 8 if x == 24 * n else 4
    others = sum(sizes) - box - x - v - f
    if x != 3 * real * n or box not in (0, 9 * real) or not {v, f} <= {0, x} or others:
        return "is damaged"
    file.seek(2 * real + int(box + x + v + f), 1)
    return None
