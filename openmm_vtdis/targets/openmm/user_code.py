"""Forces that run the user's code: how to find them, and the identity of their System.

A PythonForce calls a Python object; TorchForce, PlumedForce and whatever else a plugin adds hold
code that OpenMM does not know. Nobody can say whether such code may run in several threads at once,
whether it keeps anything between two calls, or which particles it binds.

A System's XML holds the pickle of a PythonForce's function, in which one and the same object has
other bytes whenever it is written (addresses, shared strings). The identity of such a System is
therefore made of the function's *content*: classes by their names, arrays and tensors by their
numbers.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from typing import Any

import openmm

from openmm_vtdis.storage.fingerprint import content_fingerprint, fingerprint

_PAYLOAD = re.compile(r'\bfunction="([0-9a-fA-F]*)"')
_VERSION = re.compile(r' openmmVersion="[^"]*"')


def all_forces(system: openmm.System) -> Iterator[openmm.Force]:
    """The forces of a System, and those inside of CustomCVForces and ATMForces."""
    waiting = list(system.getForces())
    while waiting:
        force = waiting.pop(0)
        yield force
        if isinstance(force, openmm.CustomCVForce):
            number = force.getNumCollectiveVariables()
            waiting += [force.getCollectiveVariable(k) for k in range(number)]
        elif isinstance(force, openmm.ATMForce):
            waiting += [force.getForce(k) for k in range(force.getNumForces())]


def user_forces(system: openmm.System) -> list[str]:
    """Class names of the forces that run code which is not OpenMM's own."""
    found = []
    for force in all_forces(system):
        kind = type(force)
        own = kind.__module__.startswith("openmm.") and kind is not openmm.Force
        if not own or kind.__name__ == "PythonForce":
            found.append(kind.__name__)
    return found


def copied(system: openmm.System) -> openmm.System:
    """Copy a System, with functions of the user's copied too.

    Raises
    ------
    ValueError
        If it holds something that OpenMM cannot write, and so neither copy nor store.
    """
    try:
        return openmm.XmlSerializer.clone(system)
    except openmm.OpenMMException as error:
        names = user_forces(system)
        hint = ""
        if "PythonForce" in names:
            hint = (
                "; the function of a PythonForce must be one that pickle can write: a function or "
                "an instance of a class at the top level of a module, no lambda, and no function "
                "inside another"
            )
        raise ValueError(
            f"system: expected a System that OpenMM can copy and write to XML, got one it cannot "
            f"({error}){hint}"
        ) from error


def check_importable(xml: str) -> None:
    """Read the functions of PythonForces in a System's XML, before OpenMM does.

    It ends the process if one is of a module that cannot be imported here.

    Raises
    ------
    ValueError
        If it cannot be imported; the message says what is missing. Call this only for XML that is
        trusted: it is unpickled.
    """
    for payload in _PAYLOAD.findall(xml):
        try:
            pickle.loads(bytes.fromhex(payload))
        except Exception as error:
            raise ValueError(
                f"expected a PythonForce whose function can be imported here, got "
                f"{type(error).__name__}: {error}; put the module that it is of where Python finds "
                "it (a function of a script, __main__, is known to that script alone)"
            ) from error


def functions_of(system: openmm.System) -> list[Any]:
    """Copies of the functions of its PythonForces; the System has been copied in this process."""
    if "PythonForce" not in user_forces(system):
        return []
    payloads = _PAYLOAD.findall(openmm.XmlSerializer.serialize(system))
    return [pickle.loads(bytes.fromhex(payload)) for payload in payloads]


def of_a_script(system: openmm.System) -> bool:
    """Whether a PythonForce has a function of the running script, which no other program has."""
    if "PythonForce" not in user_forces(system):
        return False
    payloads = _PAYLOAD.findall(openmm.XmlSerializer.serialize(system))
    return any(b"__main__" in bytes.fromhex(payload) for payload in payloads)


def system_fingerprint(system: openmm.System) -> str:
    """A digest of a System, the same whatever version of OpenMM writes its XML."""
    xml = _VERSION.sub("", openmm.XmlSerializer.serialize(system))
    if "PythonForce" in user_forces(system):
        xml = _PAYLOAD.sub(lambda found: f'function="{_content(bytes.fromhex(found[1]))}"', xml)
    return fingerprint(xml)


def _content(pickled: bytes) -> str:
    """A digest of what a pickle holds; of its bytes if that cannot be walked through.

    The System has been copied in this process before, so that this pickle has been read already.
    """
    with contextlib.suppress(Exception):
        return content_fingerprint(pickle.loads(pickled))
    return fingerprint(pickled)
