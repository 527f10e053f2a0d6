"""CUDA graphs: repeated work on a GPU, started at once instead of kernel by kernel.

For small systems and small batches a GPU finishes a kernel before Python has started the next. A
recording starts all of them at once. The kernels and the numbers are the same.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
AFTER = 8
"""Calls of a kind before it is recorded: a recording takes as long as several."""
MOST_PAIRS = 2**20
"""Most pairs of particles in a recorded batch: with more, starting kernels is not what counts."""
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
    """The one stream of a GPU for recordings, since libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


class Recorded(Generic[R]):
    """A function of tensors on a GPU, recorded for each kind of input that it often gets.

    Results are copies, which stay as they are.

    Parameters
    ----------
    function
        A function that returns a tensor, or a tuple of them.
    memory
        Memory of another recording, to be shared with it; None: memory of its own.
    """

    def __init__(self, function: Callable[..., R], memory: Any = None) -> None:
        self.function = function
        self.memory = torch.cuda.graph_pool_handle() if memory is None else memory
        self._runs: Counter[Any] = Counter()
        self._recordings: dict[Any, Recording] = {}

    def __call__(self, *inputs: Tensor) -> R:
        """Call the function, by a recording after some calls with tensors of these shapes."""
        key = tuple((tuple(value.shape), value.dtype) for value in inputs)
        self._runs[key] += 1
        if self._runs[key] <= AFTER:
            return self.function(*inputs)
        if key not in self._recordings:
            self._recordings[key] = Recording(self.function, *inputs, memory=self.memory)
        found = self._recordings[key](*inputs)
        copies: Any = (
            found.clone() if isinstance(found, Tensor) else tuple(y.clone() for y in found)
        )
        return copies


def small_enough(x: Tensor) -> bool:
    """Whether recording pays for configurations (B, M, D)."""
    return x.shape[0] * x.shape[1] ** 2 <= MOST_PAIRS
