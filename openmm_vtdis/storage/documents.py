"""JSON and XML documents: reading those of strangers, and comparing settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree


def parse_json(text: str) -> Any:
    """Parse a JSON document.

    Raises
    ------
    json.JSONDecodeError
        If it holds none, or one that is nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, 0) from error


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """List settings that differ, with both values; "" if none does."""
    names = sorted(there.keys() | here.keys())
    return ", ".join(
        f"{name} ({there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here)"
        for name in names
        if (name in there) != (name in here) or there.get(name) != here.get(name)
    )


def mentions(xml: str, name: str) -> bool:
    """Whether a name occurs in an XML document, as it is written or once entities are resolved.

    Raises
    ------
    ValueError
        If the document cannot be parsed.
    """
    try:
        elements = list(ElementTree.fromstring(xml).iter())
    except ElementTree.ParseError as error:
        raise ValueError(f"text that is no XML ({error})") from error
    words = (word for e in elements for word in (e.tag, e.text or "", *e.attrib.values()))
    return name in xml or any(name in word for word in words)


def check_version(
    path: str | os.PathLike[str], what: str, version: object, expected: int, remedy: str
) -> None:
    """Raise ValueError for a file of another format version; ``remedy`` is for an older one."""
    if version == expected and isinstance(version, int):
        return
    if isinstance(version, int) and 0 < version < expected:
        raise ValueError(
            f"{path}: expected {what} format version {expected}, got {version}, which an older "
            f"openmm-vtdis wrote; {remedy}"
        )
    raise ValueError(
        f"{path}: expected {what} format version <= {expected}, got {version!r}; a newer "
        "openmm-vtdis wrote it: upgrade to read it"
    )
