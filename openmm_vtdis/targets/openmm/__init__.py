"""The Boltzmann density of an OpenMM System."""
