"""What is recorded and when, with recordings that are none: a CPU has no graphs of kernels.

``tests/test_cuda.py`` has the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion import recording, sampling
from openmm_vtdis.diffusion.kernel import DiffusionKernel
from openmm_vtdis.diffusion.recording import RecordedDenoiser
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.diffusion.training import Trainer, TrainingConfig
from tests.conftest import make_oracle

GRID = Schedule.geometric(12, 0.05, 20.0)


class FakeRecording:
    """Runs the function again, and puts its results where the last were, as a recording does."""

    made: list[FakeRecording]

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, memory: Any = None) -> None:
        self.function, self.shapes = function, [value.shape for value in inputs]
        self.outputs = function(*inputs)
        self.made.append(self)

    def __call__(self, *inputs: Tensor) -> Any:
        assert [value.shape for value in inputs] == self.shapes
        found = self.function(*inputs)
        pairs = zip(*((v,) if isinstance(v, Tensor) else v for v in (self.outputs, found)))  # noqa: B905
        for kept, value in pairs:
            kept.copy_(value)
        return self.outputs


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecording]:
    FakeRecording.made = []
    monkeypatch.setattr(recording, "Recording", FakeRecording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return FakeRecording.made


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(denoiser: object) -> bool:
        return isinstance(getattr(denoiser, "network", None), nn.Module)

    monkeypatch.setattr(recording, "can_record", network)


@pytest.fixture(scope="module")
def shipped() -> DiffusionBoltzmannGenerator:
    return DiffusionBoltzmannGenerator.from_pretrained("lj13")


@pytest.mark.parametrize("pairs", [False, True], ids=["denoiser", "with pairs"])
def test_the_recorded_denoiser_is_the_denoiser(
    shipped: DiffusionBoltzmannGenerator, pairs: bool, fakes: list[FakeRecording]
) -> None:
    wrapped = RecordedDenoiser(shipped.denoiser)
    call = wrapped.with_pairs if pairs else wrapped
    plain = shipped.denoiser.with_pairs if pairs else shipped.denoiser  # type: ignore[attr-defined]
    kept: list[tuple[Any, Any]] = []
    with torch.no_grad():
        for k in range(recording.AFTER + 4):
            for n in (3, 5):
                x = shipped.space.standard_normal(n, torch.Generator().manual_seed(k))
                t = torch.full((n,), 0.1 + k, dtype=torch.float64)
                kept.append((call(x, t), plain(x, t)))
    assert [fake.shapes[0][0] for fake in fakes] == [3, 5]
    for found, expected in kept:  # what came first has not been written over
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_large_batches_and_derivatives_are_not_recorded(
    shipped: DiffusionBoltzmannGenerator,
    fakes: list[FakeRecording],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "MOST_PAIRS", 3 * 13**2)
    wrapped = RecordedDenoiser(shipped.denoiser)
    x = shipped.space.standard_normal(4, torch.Generator().manual_seed(0))
    t = torch.ones(4, dtype=torch.float64)
    for _ in range(recording.AFTER + 2):
        with torch.no_grad():
            wrapped(x, t)
        leaf = x[:3].clone().requires_grad_(True)
        assert wrapped(leaf, t[:3]).requires_grad
    assert not fakes
    with torch.no_grad():
        for _ in range(recording.AFTER + 2):
            wrapped(x[:3], t[:3])
    assert len(fakes) == 1  # control


def test_chains_of_a_recorded_denoiser_are_the_same(
    shipped: DiffusionBoltzmannGenerator,
    fakes: list[FakeRecording],
    request: pytest.FixtureRequest,
) -> None:
    kernel = DiffusionKernel.ddpm(shipped.denoiser, GRID, shipped.model_energy)
    frames = shipped.space.standard_normal(2, torch.Generator().manual_seed(5))

    def chains() -> list[Tensor]:
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        there = sampling.reverse_paths(kernel, 7, seeds[0], 4, progress=False)
        back = sampling.forward_paths(kernel, frames, seeds[1], None, 2, progress=False)
        return [there.x, there.log_ratio, back.log_ratio]

    eager = chains()
    assert not fakes  # there is no GPU here
    request.getfixturevalue("as_on_a_gpu")
    for recorded, expected in zip(chains(), eager, strict=True):
        torch.testing.assert_close(recorded, expected, rtol=1e-12, atol=1e-12)
    assert [fake.shapes[0][0] for fake in fakes] == [4, 3, 2]


def test_a_denoiser_without_a_network_is_not_recorded() -> None:
    denoiser = make_oracle(4, 2, True).denoiser
    assert recording.recorded(denoiser) is denoiser


@pytest.mark.usefixtures("as_on_a_gpu")
def test_steps_of_training_are_recorded_once(
    fakes: list[FakeRecording], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for after in (10**9, 3):
        monkeypatch.setattr(recording, "AFTER", after)
        gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
        frames = gen.space.standard_normal(100, torch.Generator().manual_seed(0))
        trainer = Trainer(gen.denoiser, frames, frames[:20], TrainingConfig(8, 16))
        log = trainer.run(evaluate_every=4, progress=False)
        found.append([*gen.network.state_dict().values(), torch.tensor(log.losses)])
    assert len(fakes) == 1
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)
