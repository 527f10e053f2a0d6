"""What crosses between devices, seen without a second one: torch's "meta" device has no data.

A tensor that a step of the reverse chain makes on the CPU and brings to x's device, or a number
that it asks of one, makes the CPU wait for a GPU at every step.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openmm
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import openmm_vtdis
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.covariance.gaussians import MatrixScatter
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.ensemble.provenance import UNKNOWN
from openmm_vtdis.sampling.base import Drawn
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy
from tests.targets.openmm.test_translators import FORCES, N
from tests.targets.reference import system_of

META = torch.device("meta")
GRID = Schedule.geometric(4, 0.1, 10.0)


class Crossings(TorchDispatchMode):
    """Copies between devices, and numbers that are asked of "meta", with their place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        tensors = [a for a in args if isinstance(a, Tensor)]
        if name == "aten::_local_scalar_dense" and tensors[0].device == META:
            self.note(name)
        out = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_"):
            there = tensors[-1].device
            here = out.device if name == "aten::_to_copy" else tensors[0].device
            if there != here:
                self.note(f"{name} {there} -> {here}")
        return out

    def note(self, what: str) -> None:
        root = Path(openmm_vtdis.__file__).parent
        ours = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(root)]
        self.found.append(f"{what} at {ours[-1].filename}: {ours[-1].line}" if ours else what)


@pytest.fixture(autouse=True)
def noise_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no generators on "meta": None stands for one."""
    draw = Space.standard_normal

    def standard_normal(
        self: Space, n: int, rng: Any, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        if rng is not None:
            return draw(self, n, rng, dtype)
        return self.project(torch.empty(n, self.n_particles, self.n_dims, dtype=dtype, device=META))

    monkeypatch.setattr(Space, "standard_normal", standard_normal)


def kernel_on_meta(name: str, kind: str) -> DiffusionProcess:
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    network: nn.Module = gen.network.to(META)
    plain = DiffusionProcess.ddpm(
        PreconditionedDenoiser(network, gen.space), GRID, gen.model_energy
    )
    family = make_covariance("hessian" if kind == "laplace" else kind, gen.space, gen.labels)
    process = plain.with_covariance(family.with_parameters(family.ddpm_parameters(GRID)))
    return process.with_laplace(LaplaceRange(1.0), jump=False) if kind == "laplace" else process


def crossings(process: DiffusionProcess) -> list[str]:
    """Of the second time that two steps are taken: what stays the same is brought once."""
    for _ in range(2):
        with torch.no_grad(), Crossings() as seen:
            x = process.sample_prior(3, None)  # type: ignore[arg-type]
            log_ratio = -process.prior_log_prob(x)
            for level in (2, 1):
                step = process.step(level, x)
                scatter = process.covariance.at(step)
                before = process.mean(step) + scatter.sample(3, None)  # type: ignore[arg-type]
                log_ratio += process.forward_log_prob(level, before, x)
                log_ratio -= scatter.log_prob(before - process.mean(step))
                x = before
    assert x.device == log_ratio.device == META
    return seen.found


@pytest.mark.parametrize("name", ["dw4", "aldp-800K"])
@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "pairwise", "hessian", "laplace"])
def test_a_step_of_the_reverse_chain_stays_on_its_device(name: str, kind: str) -> None:
    assert crossings(kernel_on_meta(name, kind)) == []


def test_a_matrix_that_is_brought_at_every_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""

    def at(self: Any, step: Any) -> MatrixScatter:
        eye = torch.eye(self.space.n_particles, dtype=torch.float64)
        return MatrixScatter(self.space, eye, eye, 0.0, step.variance)

    process = kernel_on_meta("dw4", "isotropic")
    monkeypatch.setattr(type(process.covariance), "at", at)
    assert any("cpu -> meta" in found for found in crossings(process))


@pytest.mark.parametrize("force", FORCES.values(), ids=FORCES.keys())
def test_a_force_is_evaluated_where_the_positions_are(force: Callable[[], openmm.Force]) -> None:
    energy = BatchedEnergy(system_of(force(), n_particles=N))
    x = torch.empty(5, N, 3, dtype=torch.float64, device=META)
    found = (*energy.energy_and_force(x), *energy.derivatives(x))
    assert {part.device for part in found} == {META}
    assert [part.shape[1:] for part in found] == [(), (N, 3), (N, 3), (N, 3, N, 3)]


def test_weights_are_made_where_the_samples_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Energies see the trajectories' own tensor; nothing goes to the CPU before them."""
    gen = DiffusionBoltzmannGenerator.from_pretrained("aldp-800K")
    seen: list[torch.device] = []

    def reduced_energy(x: Tensor) -> Tensor:
        seen.append(x.device)
        raise StopIteration

    monkeypatch.setattr(gen.target, "reduced_energy", reduced_energy)
    y = torch.empty(5, 22, 3, dtype=torch.float64, device=META)
    with pytest.raises(StopIteration):
        gen.path_sampler().weighed(Drawn(y, y.sum(dim=(1, 2))), UNKNOWN)
    assert seen == [META]
