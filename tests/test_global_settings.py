"""Nothing that a script has set for itself changes the numbers, or is changed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator

WORK = """
import json, sys
import numpy as np, torch
from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.ensemble import forward_ess, mbar
from openmm_vtdis.targets import double_well
from openmm_vtdis.mcmc import sample_hmc

found = []
gen = DiffusionBoltzmannGenerator.from_pretrained("dw4-small")
ensemble = gen.sample(60, n_steps=15, seed=0, progress=False)
x = ensemble.resample(60, seed=0).positions
log_w = gen.log_weights(x, n_steps=15, seed=1, progress=False)
light = np.append(ensemble.log_weights[:-1], ensemble.log_weights[:-1].max() - 800.0)
wide = ensemble.with_log_weights(light)  # one sample of next to no weight
found += [*ensemble.log_weights, *log_w, *wide.weights, wide.ess, wide.log_z().stderr]
found += [wide.expectation(wide.reduced_energies).value, *wide.histogram(x[:, 0, 0], 3)[0]]
found += [wide.free_energy(log_w).value, forward_ess(np.append(log_w, 900.0))]
found += [mbar(ensemble, [gen.target], [x], [log_w]).log_z().value]
found += [*wide.reweight(gen.target).log_weights, *wide.resample(5, seed=0).positions.ravel()]
found += [*gen.sample_ode(4, n_steps=5, seed=0, progress=False).log_weights]
str(wide.diagnostics())
bench = double_well()
new = DiffusionBoltzmannGenerator(bench.system, None, 120, n_dims=2, network="egnn-1x8", seed=0)
frames = sample_hmc(bench.target(), n_chains=20, n_samples=2, burn_in=10, seed=1, progress=False)
x = frames.positions.numpy()
new.train(x, 12, batch_size=16, progress=False)
new.train_pair_head(x, 4, batch_size=16, n_hidden=8, progress=False)
for kind in ("isotropic", "block", "time-network", "tweedie", "hessian", "pairwise", "auto"):
    new.tune(x, 4, kind, n_trajectories=100, progress=False)
    found += [*new.sample(5, seed=0, progress=False).log_weights]
again = DiffusionBoltzmannGenerator.load(new.save(sys.argv[1]))
found += [*again.sample(5, seed=0, progress=False).log_weights]
np.save(sys.argv[2], np.array(found, dtype=np.float64))
"""

SETTINGS = {
    "plain": "",
    "double precision": "torch.set_default_dtype(torch.float64)",
    "half precision": "torch.set_default_dtype(torch.float16)",
    "another device": "torch.set_default_device('meta')",
    "inference mode": "mode = torch.inference_mode(); mode.__enter__()",
    "no gradients": "torch.set_grad_enabled(False)",
    "numpy raises": "np.seterr(all='raise')",
    "warnings are errors": "warnings.simplefilter('error')",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "printing": "np.set_printoptions(precision=1, suppress=True, threshold=2)",
}


def run(folder: Path, setting: str, *options: str) -> np.ndarray:
    """What the work above gives under a setting, in a process of its own."""
    check = """
        settings = lambda: (np.geterr(), torch.get_default_dtype(), torch.get_default_device().type,
            torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
            np.get_printoptions(), torch.get_num_threads(), os.umask(os.umask(0o22)))
        before = settings()
    """
    after = "\nif settings() != before: raise SystemExit(f'{before} became {settings()}')\n"
    head = f"import os, warnings\nimport numpy as np, torch\ntorch.manual_seed(3)\n{setting}\n"
    script = head + textwrap.dedent(check) + WORK + after
    done = subprocess.run(
        [sys.executable, *options, "-c", script, str(folder / "a.vtdis"), str(folder / "a.npy")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    return np.load(folder / "a.npy")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return run(tmp_path_factory.mktemp("plain"), SETTINGS["plain"])


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "plain"])
def test_settings_change_nothing_and_are_not_changed(
    name: str, plain: np.ndarray, tmp_path: Path
) -> None:
    found = run(tmp_path, SETTINGS[name])
    np.testing.assert_array_equal(found, plain)


def test_without_docstrings_and_assertions(plain: np.ndarray, tmp_path: Path) -> None:
    np.testing.assert_array_equal(run(tmp_path, "", "-OO"), plain)
    help = subprocess.run(
        [sys.executable, "-OO", "-m", "openmm_vtdis", "--help"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert help.returncode == 0, help.stderr
    assert "fit a network to MD" in help.stdout


def test_the_comparison_would_see_a_change(plain: np.ndarray, tmp_path: Path) -> None:
    """Control: another seed of the global stream is not used; one bit of a weight is seen."""
    np.testing.assert_array_equal(run(tmp_path, "torch.manual_seed(4)"), plain)
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4-small")
    with torch.no_grad():
        next(gen.network.parameters()).view(-1)[0] += 1e-3
    log_w = gen.sample(60, n_steps=15, seed=0, progress=False).log_weights
    assert not np.array_equal(log_w, plain[:60])


def test_files_have_the_permissions_of_the_users_other_files(tmp_path: Path) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4-small")
    before = os.umask(0o027)
    try:
        assert gen.save(tmp_path / "a.vtdis").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
