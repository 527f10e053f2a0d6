"""``python -m openmm_vtdis`` is the command line."""

from openmm_vtdis.cli import main

raise SystemExit(main())
