"""The package's own files, whole and without pickles, and the fingerprints that they carry."""

from openmm_vtdis.storage.archive import (
    FORMAT_VERSION,
    read_any_version,
    read_archive,
    select_prefix,
    write_archive,
)
from openmm_vtdis.storage.atomic import replacing, write_atomically
from openmm_vtdis.storage.documents import differences, mentions, parse_json
from openmm_vtdis.storage.fingerprint import file_fingerprint, fingerprint

__all__ = [
    "FORMAT_VERSION",
    "differences",
    "file_fingerprint",
    "fingerprint",
    "mentions",
    "parse_json",
    "read_any_version",
    "read_archive",
    "replacing",
    "select_prefix",
    "write_archive",
    "write_atomically",
]
