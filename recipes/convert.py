"""Convert a generator's archive of format version 1 to the present one.

    python -m recipes.convert old.vtdis new.vtdis

Nothing is computed anew: weights, tuning and settings are the same numbers under other names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from openmm_vtdis import storage

_TARGET = ("system", "topology", "temperature", "n_dims")
_RENAMED = {
    "gains": "mean_coefficients",
    "probes": "target.probes",
    "probe_energies": "target.probe_energies",
}


def read_version_1(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and document of an archive of version 1.

    Raises
    ------
    ValueError
        If it is something else.
    """
    tensors, document = storage.read_any_version(path)
    got = document.get("kind"), document.get("version")
    if got != ("generator", 1):
        raise ValueError(f"{path}: expected a generator archive of version 1, got {got}")
    return tensors, document


def convert(old: str | Path, new: str | Path) -> None:
    """Write the archive ``old``, of version 1, to ``new``."""
    tensors, document = read_version_1(old)
    target = {name: document[name] for name in _TARGET}
    metadata = {
        "target": {"kind": "openmm", **target, "fingerprint": document.get("fingerprint")},
        "labels": document["labels"],
        "stereochemistry": document["stereochemistry"],
        "handedness": document["handedness"],
        "network": document["network"],
        "coordinates": {"kind": "cartesian", "length": document["length"]},
        "tuning": document["tuning"],
    }
    renamed = {_RENAMED.get(name, name): tensor for name, tensor in tensors.items()}
    storage.write_archive(new, "generator", renamed, metadata)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Convert an archive of format version 1.")
    parser.add_argument("old")
    parser.add_argument("new")
    options = parser.parse_args()
    try:
        convert(options.old, options.new)
    except (OSError, ValueError) as error:
        parser.exit(2, f"recipes.convert: {error}\n")


if __name__ == "__main__":
    main()
