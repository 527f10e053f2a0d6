"""Work on a GPU that repeats itself, started as one CUDA graph instead of kernel by kernel.

Of small systems, and in small batches, a GPU is done with a kernel before Python has started the
next. A recording starts all of them at once. The kernels and the numbers are the same.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.diffusion.denoiser import Denoiser, PreconditionedDenoiser
from openmm_vtdis.networks import EGNN, MLP

AFTER = 8
"""Runs of a kind before it is recorded: a recording takes as long as several."""
MOST_PAIRS = 2**20
"""Of particles in a batch: with more, kernels take longer than it takes to start them."""
WARM_UP = 2


class Recording:
    """The kernels of a function of tensors on one GPU, which waits for nothing that they compute.

    Whatever tensors it reads beside its inputs must stay where they are. What it returns, or leaves
    anywhere else, is overwritten by the next run of this recording, or of another that shares its
    memory.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, memory: Any = None) -> None:
        self._inputs = [value.clone() for value in inputs]
        self._device = inputs[0].device
        self._graph = torch.cuda.CUDAGraph()
        aside = _stream(self._device)
        with torch.cuda.device(self._device):
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(
                self._graph, pool=memory, stream=aside, capture_error_mode="thread_local"
            ):
                self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Run it again, for other inputs of the same shapes."""
        with torch.cuda.device(self._device):
            for kept, value in zip(self._inputs, inputs, strict=True):
                kept.copy_(value)
            self._graph.replay()
        return self._outputs


@functools.lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where work on a GPU is recorded: one, since libraries keep memory for each that they meet."""
    return torch.cuda.Stream(device)


class RecordedDenoiser:
    """A denoiser of which evaluations are recorded, for as long as its weights stay where they are.

    Those that are differentiated are not, nor are large ones. Everything else is the denoiser's.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.space = denoiser, denoiser.space
        self._runs: Counter[Any] = Counter()
        self._recordings: dict[Any, Recording] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """D(x, t) for x (B, M, D) and t scalar or (B,)."""
        return self._evaluate(self.denoiser, x, t)  # type: ignore[no-any-return]

    def with_pairs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """D(x, t) and pair coefficients (B, P, 4)."""
        return self._evaluate(self.denoiser.with_pairs, x, t)  # type: ignore[attr-defined, no-any-return]

    def _evaluate(self, evaluation: Callable[[Tensor, Tensor], Any], x: Tensor, t: Tensor) -> Any:
        if torch.is_grad_enabled() or not small_enough(x):
            return evaluation(x, t)
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        key = (evaluation == self.denoiser, x.shape, x.dtype)
        self._runs[key] += 1
        if self._runs[key] <= AFTER:
            return evaluation(x, t)
        if key not in self._recordings:
            self._recordings[key] = Recording(evaluation, x, t, memory=self._memory)
        found = self._recordings[key](x, t)
        return found.clone() if isinstance(found, Tensor) else tuple(y.clone() for y in found)


def small_enough(x: Tensor) -> bool:
    """Whether recording pays for configurations (B, M, D)."""
    return x.shape[0] * x.shape[1] ** 2 <= MOST_PAIRS


def can_record(denoiser: object) -> bool:
    """Whether it is of a network of this package, on a GPU.

    A recording must not wait for what it computes, and of other networks nobody knows.
    """
    if type(denoiser) is not PreconditionedDenoiser or type(denoiser.network) not in (EGNN, MLP):
        return False
    return next(denoiser.parameters()).is_cuda


def recorded(denoiser: Denoiser) -> Denoiser:
    """The denoiser for one run of the diffusion: recorded where that can be, or as it is."""
    return RecordedDenoiser(denoiser) if can_record(denoiser) else denoiser
