"""What a CUDA graph does, on a CPU: operations of torch, taped once, played on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""Operations that would wait for a GPU, which a recording may not."""


class Tape(TorchDispatchMode):
    """Notes operations, and refuses those that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation in WAITING:
            raise RuntimeError(f"a GPU would be waited for in {operation}")
        outputs = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, outputs))
        return outputs


def _memory(tree: Any) -> set[int]:
    return {v.untyped_storage().data_ptr() for v in tree_leaves(tree) if isinstance(v, Tensor)}


class TapedRecording:
    """In place of :class:`openmm_vtdis.runtime.cuda_graphs.Recording`."""

    made: list[TapedRecording]

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, memory: Any = None) -> None:
        self.shapes = [tuple(value.shape) for value in inputs]
        self.inputs = [value.clone() for value in inputs]
        function(*self.inputs)
        with Tape() as tape:
            self.outputs = function(*self.inputs)
        self.operations = tape.operations
        self.made.append(self)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        for kept, value in zip(self.inputs, inputs, strict=True):
            kept.copy_(value)
        with torch.autocast("cpu", enabled=False):  # the casts are on the tape
            for operation, args, kwargs, outputs in self.operations:
                shared = _memory((args, kwargs))
                again = operation(*args, **kwargs)
                for kept, value in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                    if isinstance(kept, Tensor) and not _memory(kept) & shared:
                        kept.detach().copy_(value)
        return self.outputs
