"""Files that were damaged at random: an error that says so, or the same content as before.

And numbers that are none, from the network: counted, never weighted.
"""

from __future__ import annotations

import io
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble, cli, storage
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.targets import double_well, gaussian_mixture
from openmm_vtdis.topology import placeholder_topology

FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
DAMAGE = st.lists(
    st.tuples(
        st.floats(0.0, 1.0, exclude_max=True),
        st.sampled_from(["flip", "cut", "insert", "zero"]),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)
"""Where in the file, what happens there, and with which bytes."""


def damaged(content: bytes, damage: list[tuple[float, str, bytes]]) -> bytes:
    for where, what, extra in damage:
        k = int(where * len(content))
        if what == "flip":
            content = content[:k] + extra + content[k + len(extra) :]
        elif what == "cut":
            content = content[:k]
        elif what == "insert":
            content = content[:k] + extra + content[k:]
        else:
            content = content[:k] + bytes(64) + content[k + 64 :]
        if not content:
            return b"\0"
    return content


def read_or_refuse(
    read: Callable[[Path], object], write: Callable[[Path], object], suffix: str, folder: Path
) -> Callable[[list[tuple[float, str, bytes]]], object | None]:
    """What a damaged copy of a file is read as; None where it is refused with a ValueError."""
    original, copy = folder / f"original{suffix}", folder / f"copy{suffix}"
    write(original)
    content = original.read_bytes()

    def attempt(damage: list[tuple[float, str, bytes]]) -> object | None:
        copy.write_bytes(damaged(content, damage))
        try:
            return read(copy)
        except ValueError:
            return None

    return attempt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_archives(folder: Path) -> None:
    tensors = {"a": torch.arange(40.0), "b.c": torch.tensor([True, False])}
    attempt = read_or_refuse(
        lambda path: storage.read_archive(path, "checkpoint"),
        lambda path: storage.write_archive(path, "checkpoint", tensors, {"n": [1, 2.5, "x"]}),
        ".vtdis",
        folder,
    )
    refused = []

    @FUZZ
    @given(damage=DAMAGE)
    @example(damage=[(0.5, "flip", b"\x01")])
    def check(damage: list[tuple[float, str, bytes]]) -> None:
        found = attempt(damage)
        refused.append(found is None)
        if found is not None:
            read, metadata = found  # type: ignore[misc]
            assert read.keys() == tensors.keys()
            assert all(torch.equal(read[name], tensors[name]) for name in tensors)
            assert metadata["n"] == [1, 2.5, "x"]

    check()
    assert any(refused)


def test_generators(folder: Path) -> None:
    system = double_well()
    gen = DiffusionBoltzmannGenerator(
        system.system, None, system.temperature, n_dims=2, network="egnn-1x8", seed=0
    )
    frames = system.positions + 0.1 * np.random.default_rng(0).normal(size=(50, 4, 2))
    gen.train(frames, 1, batch_size=4, progress=False)
    attempt = read_or_refuse(DiffusionBoltzmannGenerator.load, gen.save, ".vtdis", folder)
    x = 0.1 * torch.ones(1, 4, 2, dtype=torch.float64).cumsum(1)
    expected = gen.denoiser(x, torch.tensor([0.5]))

    @settings(FUZZ, max_examples=FUZZ.max_examples // 2)
    @given(damage=DAMAGE)
    def check(damage: list[tuple[float, str, bytes]]) -> None:
        found = attempt(damage)
        if found is not None:
            assert torch.equal(found.denoiser(x, torch.tensor([0.5])), expected)  # type: ignore[attr-defined]

    check()


@pytest.mark.parametrize("suffix", [".nc", ".npz"])
def test_ensembles(suffix: str, folder: Path) -> None:
    rng = np.random.default_rng(0)
    ensemble = WeightedEnsemble(
        rng.normal(size=(7, 3, 3)), rng.normal(size=7), rng.normal(size=7), 300.0,
        placeholder_topology(3), {"times": [0.1, 1.0]},
    )  # fmt: skip
    attempt = read_or_refuse(WeightedEnsemble.load, ensemble.save, suffix, folder)

    @FUZZ
    @given(damage=DAMAGE)
    def check(damage: list[tuple[float, str, bytes]]) -> None:
        found = attempt(damage)
        if found is not None:
            assert isinstance(found, WeightedEnsemble)
            assert found.temperature == 300.0
            assert found.metadata == ensemble.metadata
            for name in ("positions", "log_weights", "reduced_energies"):
                np.testing.assert_array_equal(getattr(found, name), getattr(ensemble, name))

    check()


@pytest.mark.parametrize("n_frames", [8, 10**7, 2**31 - 1])
def test_ensembles_that_declare_more_than_there_is(n_frames: int, folder: Path) -> None:
    """Bytes 4 to 8 of a NetCDF 3 file count its frames; nothing is allocated for them."""
    rng = np.random.default_rng(0)
    path = folder / "frames.nc"
    WeightedEnsemble(
        rng.normal(size=(7, 3, 3)), rng.normal(size=7), rng.normal(size=7), 300.0
    ).save(path)  # fmt: skip
    content = path.read_bytes()
    assert content[:8] == b"CDF\x02\0\0\0\x07"
    path.write_bytes(content[:4] + n_frames.to_bytes(4, "big") + content[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="truncated"):
        WeightedEnsemble.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_an_npz_whose_array_claims_more_than_there_is(folder: Path) -> None:
    """Once with a wrong checksum, once with a right one."""
    rng = np.random.default_rng(0)
    path, forged = folder / "frames.npz", folder / "forged.npz"
    WeightedEnsemble(
        rng.normal(size=(7, 3, 3)), rng.normal(size=7), rng.normal(size=7), 300.0
    ).save(path)  # fmt: skip
    content = path.read_bytes()
    assert content.count(b"(7, 3, 3), }     ") == 1
    altered = content.replace(b"(7, 3, 3), }     ", b"(7777777, 777), }")
    path.write_bytes(altered)
    with pytest.raises(ValueError, match="does not match its checksum"):
        WeightedEnsemble.load(path)
    with zipfile.ZipFile(forged, "w") as archive, np.load(io.BytesIO(content)) as arrays:
        for name in arrays.files:
            member = io.BytesIO()
            np.save(member, arrays[name])
            claimed = member.getvalue().replace(
                b"(7, 3, 3), }           ", b"(77777777, 77777777), }"
            )
            archive.writestr(f"{name}.npy", claimed)
    with pytest.raises(ValueError, match="truncated or foreign"):
        WeightedEnsemble.load(forged)


def test_systems(folder: Path) -> None:
    attempt = read_or_refuse(
        lambda path: cli.read_system(str(path)),
        lambda path: path.write_text(openmm.XmlSerializer.serialize(double_well().system)),
        ".xml",
        folder,
    )

    @FUZZ
    @given(damage=DAMAGE)
    def check(damage: list[tuple[float, str, bytes]]) -> None:
        found = attempt(damage)
        assert found is None or isinstance(found, openmm.System)

    check()


@FUZZ
@given(text=st.text(max_size=80) | st.sampled_from(["[info]\nseed = 'x'", "[info]\nfoo = 1", "["]))
def test_config_files(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        code = cli.main(["info", "dw4", "--config", str(path)])
    except SystemExit as stop:  # argparse's own
        code = int(stop.code or 0)
    assert code in (0, 2)
    assert code == 0 or capsys.readouterr().err


# -- numbers that are none ---------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("covariance", ["isotropic", "tweedie", "hessian"])
def test_a_network_that_breaks_for_some_samples(value: float, covariance: str) -> None:
    """Those that it breaks for have weight zero and are counted; the others are as they were."""
    target = gaussian_mixture(4)
    frames = target.sample(2_000, seed=1)
    exact = GaussianMixtureDenoiser(
        target.space, target.weights, target.means, target.variances
    ).scaled(2.0)

    class Breaking:
        space, broken = exact.space, False

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            denoised = exact(x, t)
            if not self.broken:
                return denoised
            bad = (x[..., 0].abs().sum(dim=-1) > 40.0)[..., None, None]
            return torch.where(bad, value, denoised)

    denoiser = Breaking()
    gen = DiffusionBoltzmannGenerator.from_denoiser(target, denoiser, 2.0)
    gen.tune(
        frames, 8, covariance, schedule="geometric", n_trajectories=300, seed=0, progress=False
    )
    whole = gen.sample(300, seed=4, batch_size=300, progress=False)
    denoiser.broken = True
    some = gen.sample(300, seed=4, batch_size=300, progress=False)
    broken = np.isneginf(some.log_weights)
    assert 0 < broken.sum() < 300
    assert some.diagnostics().n_zero_weight == broken.sum()
    assert np.isfinite(some.log_weights[~broken]).all()
    np.testing.assert_allclose(some.log_weights[~broken], whole.log_weights[~broken], atol=1e-9)
