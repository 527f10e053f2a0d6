"""What samples say of themselves, as JSON: where they are from, and what was done with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def json_copy(metadata: object) -> dict[str, Any]:
    """A copy of notes, of which nobody else has a part.

    Raises
    ------
    ValueError
        If they are no dictionary of JSON-able values.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata: expected a dictionary, got {type(metadata).__name__}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata: expected JSON-able values without NaN or infinity, got {error}"
        ) from error
    return copy


def parts(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Notes of the ensembles that one was concatenated from; none if it was not."""
    found = metadata.get("concatenated")
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def says(key: str, metadata: Mapping[str, Any]) -> Any:
    """What notes have under a key; if nothing, what the first part has that has anything."""
    if key in metadata:
        return metadata[key]
    return next((found for part in parts(metadata) if (found := says(key, part))), None)


def both(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Any, Any]:
    """What two say, where both know it; else twice None."""
    a, b = says(key, one), says(key, other)
    return (None, None) if a is None or b is None else (a, b)
