"""Atomic writes: files are whole or not there.

Writes go to a temporary file in the same directory, are flushed to disk and then renamed, so that
a file under its final name is always whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""Errors for want of room, whose messages do not name the file."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, and move what was written there to ``path``.

    It is flushed to disk first; nothing is replaced if an exception passes. A link stays one: what
    it points to is written.

    Raises
    ------
    ValueError
        If ``path`` is a folder or a device, or in a folder that does not exist.
    OSError
        If there is no room, with the file's name.
    """
    path = Path(os.path.realpath(path))
    free = path.is_file() or not os.path.lexists(path)  # no folder, device or loop of links
    if not free or not path.parent.is_dir():
        raise ValueError(f"{path}: expected the name of a file in a folder that exists")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        temporary.open("xb").close()  # with the permissions that the user's files have
    except OSError as error:
        raise OSError(error.errno, f"cannot write there: {error.strerror}", str(path)) from error
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            error.filename = str(path)
        raise


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write ``content`` to ``path`` as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)
