"""What is recorded, when, and that it changes nothing, with tapes in place of CUDA graphs.

``tests/test_cuda.py`` has the real ones.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion import denoiser as denoisers
from openmm_vtdis.diffusion import paths
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser, RecordedDenoiser
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.runtime import cuda_graphs
from openmm_vtdis.training.config import TrainingConfig
from openmm_vtdis.training.trainer import Trainer
from tests.conftest import make_oracle
from tests.tape import Tape, TapedRecording

GRID = Schedule.geometric(12, 0.05, 20.0)
NEVER = 10**9


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[TapedRecording]:
    TapedRecording.made = []
    monkeypatch.setattr(cuda_graphs, "Recording", TapedRecording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return TapedRecording.made


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreconditionedDenoiser, "graph_safe", True)


@pytest.fixture(scope="module")
def shipped() -> DiffusionBoltzmannGenerator:
    return DiffusionBoltzmannGenerator.from_pretrained("lj13")


# -- evaluations ------------------------------------------------------------------------------
@pytest.mark.parametrize("pairs", [False, True], ids=["denoiser", "with pairs"])
def test_the_recorded_denoiser_is_the_denoiser(
    shipped: DiffusionBoltzmannGenerator, pairs: bool, tapes: list[TapedRecording]
) -> None:
    wrapped: Any = RecordedDenoiser(shipped.denoiser)
    plain: Any = shipped.denoiser
    if pairs:
        wrapped, plain = wrapped.with_pairs, plain.with_pairs
    kept: list[tuple[Any, Any]] = []
    with torch.no_grad():
        for k in range(cuda_graphs.AFTER + 4):
            for n in (3, 5):
                x = shipped.space.standard_normal(n, torch.Generator().manual_seed(k))
                t = torch.full((n,), 0.1 + k, dtype=torch.float64)
                kept.append((wrapped(x, t), plain(x, t)))
    assert [tape.shapes[0][0] for tape in tapes] == [3, 5]
    for found, expected in kept:  # what came first has not been written over
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_one_shape_in_other_precisions_and_calls_is_not_mixed_up(
    shipped: DiffusionBoltzmannGenerator, tapes: list[TapedRecording]
) -> None:
    wrapped: Any = RecordedDenoiser(shipped.denoiser)
    x = shipped.space.standard_normal(3, torch.Generator().manual_seed(1))
    t = torch.full((3,), 0.7, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(cuda_graphs.AFTER + 2):
            found = wrapped(x, t), wrapped.with_pairs(x, t), wrapped(x.float(), t.float())
        scalar = wrapped(x, torch.tensor(0.7))  # as the protocol allows
    assert len(tapes) == 3
    assert isinstance(found[0], Tensor)
    assert len(found[1]) == 2
    torch.testing.assert_close(found[0], found[1][0], rtol=0.0, atol=0.0)
    assert found[2].dtype == torch.float32
    torch.testing.assert_close(scalar, found[0], rtol=0.0, atol=1e-7)
    assert wrapped.denoiser.network is shipped.network


def test_large_batches_and_derivatives_are_not_recorded(
    shipped: DiffusionBoltzmannGenerator,
    tapes: list[TapedRecording],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_PAIRS", 3 * 13**2)
    wrapped = RecordedDenoiser(shipped.denoiser)
    x = shipped.space.standard_normal(4, torch.Generator().manual_seed(0))
    t = torch.ones(4, dtype=torch.float64)
    for _ in range(cuda_graphs.AFTER + 2):
        with torch.no_grad():
            wrapped(x, t)
        leaf = x[:3].clone().requires_grad_(True)
        assert wrapped(leaf, t[:3]).requires_grad
    assert not tapes
    with torch.no_grad():
        for _ in range(cuda_graphs.AFTER + 2):
            wrapped(x[:3], t[:3])
    assert len(tapes) == 1  # control


# -- chains -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "half"),
    [
        ("isotropic", False),
        ("isotropic", True),
        ("pairwise", True),
        ("pairwise, Laplace", False),
        ("tweedie", False),
    ],
)
def test_chains_of_a_recorded_denoiser_are_the_same(
    shipped: DiffusionBoltzmannGenerator,
    kind: str,
    half: bool,
    tapes: list[TapedRecording],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(cuda_graphs, "AFTER", 3)
    name, _, laplace = kind.partition(", ")
    process = DiffusionProcess.ddpm(shipped.denoiser, GRID, shipped.model_energy)
    family = make_covariance(name, shipped.space, shipped.labels)
    process = process.with_covariance(family.with_parameters(family.ddpm_parameters(GRID)))
    if laplace:
        process = process.with_laplace(LaplaceRange(0.5), jump=False)
    frames = shipped.space.standard_normal(2, torch.Generator().manual_seed(5))

    def chains() -> list[Tensor]:
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        half_precision = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
        with half_precision:
            there = paths.reverse_paths(process, 7, seeds[0], 4, progress=False)
            back = paths.forward_paths(process, frames, seeds[1], None, 2, progress=False)
        return [there.x, there.log_ratio, back.log_ratio]

    eager = chains()
    assert not tapes  # there is no GPU here
    request.getfixturevalue("as_on_a_gpu")
    for recorded, expected in zip(chains(), eager, strict=True):
        torch.testing.assert_close(recorded, expected, rtol=1e-12, atol=1e-12)
    sizes = [tape.shapes[0][0] for tape in tapes]
    # Of "tweedie" the evaluation that is differentiated gives the mean too
    expected_sizes = {"pairwise, Laplace": [4, 4, 3, 3, 2, 2], "tweedie": []}
    assert sizes == expected_sizes.get(kind, [4, 3, 2])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_recording_that_computes_nothing_would_be_seen(
    shipped: DiffusionBoltzmannGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stale(TapedRecording):
        """As of a graph that was recorded on another GPU than the one that computed."""

        def __call__(self, *inputs: Tensor) -> Any:
            return self.outputs

    process = DiffusionProcess.ddpm(shipped.denoiser, GRID, shipped.model_energy)
    found = []
    for kind in (TapedRecording, Stale):
        monkeypatch.setattr(cuda_graphs, "Recording", kind)
        seed = torch.Generator().manual_seed(1)
        found.append(paths.reverse_paths(process, 4, seed, 4, progress=False).log_ratio)
    assert float((found[0] - found[1]).abs().min()) > 1e-2


def test_only_networks_of_the_package_on_a_gpu_are_recorded(
    shipped: DiffusionBoltzmannGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = make_oracle(4, 2, True).denoiser
    assert denoisers.recorded(mixture) is mixture
    assert not shipped.denoiser.graph_safe  # type: ignore[attr-defined]
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert shipped.denoiser.graph_safe  # type: ignore[attr-defined] # control
    network = shipped.denoiser.network  # type: ignore[attr-defined]
    monkeypatch.setattr(network, "__class__", type("Other", (type(network),), {}))
    assert not shipped.denoiser.graph_safe  # type: ignore[attr-defined]


# -- training ---------------------------------------------------------------------------------
def trained(precision: str = "float32", **settings: Any) -> tuple[list[Tensor], Trainer]:
    """Weights and losses after fourteen steps, at a rate at which they differ."""
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    frames = gen.space.standard_normal(100, torch.Generator().manual_seed(0))
    config = TrainingConfig(
        14, 16, 1e-2, warmup=1, precision=precision, gradient_clip=0.05, **settings
    )
    trainer = Trainer(gen.denoiser, frames, frames[:20], config)
    log = trainer.run(evaluate_every=3, progress=False)
    losses = torch.tensor(log.losses + log.held_out_losses)
    return [*gen.network.state_dict().values(), losses], trainer


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_of_training_are_recorded_once(
    precision: str, tapes: list[TapedRecording], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for after in (NEVER, 3):
        monkeypatch.setattr(cuda_graphs, "AFTER", after)
        found.append(trained(precision)[0])
    assert len(tapes) == 1
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_recording_that_adds_up_gradients_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "AFTER", 3)
    expected, _ = trained()

    class Adding(TapedRecording):
        def __init__(self, function: Any, *inputs: Tensor, memory: Any = None) -> None:
            optimizer = function.__self__.optimizer
            optimizer.zero_grad(set_to_none=False)
            monkeypatch.setattr(optimizer, "zero_grad", lambda set_to_none: None)
            super().__init__(function, *inputs)

    monkeypatch.setattr(cuda_graphs, "Recording", Adding)
    found, _ = trained()
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_training_wait_for_nothing(
    fused: bool, shipped: DiffusionBoltzmannGenerator
) -> None:
    gen = copy.deepcopy(shipped)
    frames = gen.space.standard_normal(20, torch.Generator().manual_seed(0))
    trainer = Trainer(gen.denoiser, frames, frames[:5], TrainingConfig(9, 4))
    if not fused:  # control: the other Adam counts its steps on the host
        trainer.optimizer = torch.optim.Adam(gen.network.parameters(), fused=False)
    trainer._step()
    refusal = pytest.raises(RuntimeError, match="would be waited for in aten._local_scalar_dense")
    with contextlib.nullcontext() if fused else refusal, Tape() as tape:
        trainer._step()
    assert any("adam" in str(operation) for operation, *_ in tape.operations) == fused


@pytest.mark.usefixtures("as_on_a_gpu")
def test_large_batches_and_process_groups_train_without_recordings(
    tapes: list[TapedRecording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "AFTER", 3)
    monkeypatch.setattr(cuda_graphs, "MOST_PAIRS", 16 * 4**2 - 1)
    trained()
    assert not tapes
    monkeypatch.setattr(cuda_graphs, "MOST_PAIRS", 16 * 4**2)
    with monkeypatch.context() as patch:
        patch.setattr("openmm_vtdis.runtime.distributed.in_group", lambda: (0, 2))
        patch.setattr("openmm_vtdis.runtime.distributed.sum_over_group", lambda values: None)
        patch.setattr("openmm_vtdis.runtime.distributed.copy_from_first", lambda values: None)
        patch.setattr("openmm_vtdis.runtime.distributed.all_alike", lambda *_: True)
        patch.setattr("openmm_vtdis.runtime.distributed.any_in_group", lambda value, _: value)
        trained()
    assert not tapes
    trained()
    assert len(tapes) == 1  # control
