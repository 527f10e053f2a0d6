"""Samplers: a proposal density, a target and coordinates, combined to draw and to weigh."""

from openmm_vtdis.sampling.base import Sampler
from openmm_vtdis.sampling.flow_sampler import FlowSampler
from openmm_vtdis.sampling.path_sampler import PathSampler

__all__ = ["FlowSampler", "PathSampler", "Sampler"]
