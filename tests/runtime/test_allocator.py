"""What a step frees is there for the next, and batches are of the size that this takes."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys

import pytest

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.runtime import allocator

PROBE = """
import resource
import sys

import torch

from openmm_vtdis.diffusion import denoiser

if sys.argv[1] == "without":
    denoiser.keep_freed_memory = lambda: None
from openmm_vtdis.core.space import Space
from openmm_vtdis.networks import EGNN

torch.set_num_threads(1)
model = denoiser.PreconditionedDenoiser(EGNN([0] * 13, 3, 2, 64), Space(13, 3)).eval()
x = model.space.standard_normal(64, torch.Generator().manual_seed(0))
with torch.no_grad():
    for k in range(12):
        if k == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(x, torch.ones(()))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def pages_of_an_evaluation(how: str) -> float:
    """64 configurations of 13 particles, 3 MB of tensors of edges each: the median of 5 processes.

    Where a process's heap happens to lie makes one in fifty of them an exception.
    """
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROBE, how]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        for _ in range(5)
    ]
    return statistics.median(float(run.stdout) for run in runs)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_an_evaluation_finds_the_memory_of_the_one_before() -> None:
    assert pages_of_an_evaluation("with") < 1_000.0
    assert pages_of_an_evaluation("without") > 2_500.0


@pytest.mark.parametrize(
    ("name", "n_hidden"), [("dw4", 128), ("lj13", 64), ("aldp-800K", 64), ("aldp-800K-7x256", 256)]
)
def test_batches_on_a_cpu_fit_the_cache(name: str, n_hidden: int) -> None:
    """4 MB of single-precision edge features, and not a configuration more; 8 at least."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    each = 4 * gen.space.n_particles**2 * n_hidden
    assert each * gen.batch_size() <= 4_000_000 < each * (gen.batch_size() + 1)
    assert allocator.batch_size(gen.device, 200, n_hidden) == 8
