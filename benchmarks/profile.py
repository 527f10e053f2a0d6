"""Operations of a network evaluation, and the least time that this machine needs for them.

    python -m benchmarks.profile
    python -m benchmarks.profile --device cuda

Every operation of one evaluation is counted as torch runs it: floating-point operations of matrix
products, elements that functions such as SiLU are taken of, and the bytes that go in and out. Rates
that the machine reaches on each of these alone are measured in the same run; work over rate is the
time below which no evaluation can come with these operations. Writes ``docs/tables/profile.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import (
    NETWORKS,
    MarkdownTable,
    command_line,
    median_seconds,
    write_table,
)
from openmm_vtdis import DiffusionBoltzmannGenerator

VIEWS = (
    "view", "_unsafe_view", "expand", "transpose", "permute", "slice", "select", "unsqueeze",
    "squeeze", "split", "detach", "alias", "t.default", "as_strided", "diagonal", "unbind", "lift",
)  # fmt: skip
"""Operations that move nothing."""
FUNCTIONS = ("silu", "sigmoid", "exp", "sin", "cos", "sqrt", "log")
"""Elementwise operations that cost more than the bytes they move."""
N_CALLS = 7
"""Timed calls, of which the median counts."""


@dataclass
class Count(TorchDispatchMode):
    """Count bytes in and out of all operations, and elements that functions were taken of."""

    n_bytes: int = 0
    n_functions: int = 0
    n_calls: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if not name.startswith(VIEWS):
            tensors = [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, Tensor)]
            moved = sum(v.untyped_storage().nbytes() for v in tensors)
            self.n_bytes += moved
            self.n_calls += 1
            self.seen[name] = self.seen.get(name, 0) + moved
            if name.startswith(FUNCTIONS):
                self.n_functions += out.numel()
        return out


def rates(device: torch.device, width: int) -> tuple[float, float, float]:
    """Rates per second: operations of a product (n, width) x (width, width), SiLUs, and bytes."""
    x = torch.randn(60_000, width, device=device)
    weight = torch.randn(width, width, device=device)
    product = median_seconds(lambda: x @ weight, N_CALLS, device)
    small = x[: 250_000 // width].contiguous() if device.type == "cpu" else x
    functions = median_seconds(lambda: torch.nn.functional.silu(small), 31, device)
    out = torch.empty_like(x)
    copy = median_seconds(lambda: out.copy_(x), N_CALLS, device)
    return (
        2.0 * x.shape[0] * width**2 / product,
        small.numel() / functions,
        2.0 * x.numel() * x.element_size() / copy,
    )


@torch.no_grad()
def measure(name: str, device: torch.device) -> list[str]:
    """Measure a row of the table."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, device)
    size = gen.batch_size()
    x = gen.space.standard_normal(size, torch.Generator(device).manual_seed(0))
    t = torch.ones(size, dtype=x.dtype, device=device)
    with FlopCounterMode(display=False) as flops:
        gen.denoiser(x, t)
    with Count() as count:
        gen.denoiser(x, t)
    width = gen.network.config["n_hidden"]
    product, functions, copy = rates(device, width)
    work = flops.get_total_flops(), count.n_functions, count.n_bytes
    least = [
        amount / rate / size for amount, rate in zip(work, (product, functions, copy), strict=True)
    ]
    seconds = median_seconds(lambda: gen.denoiser(x, t), N_CALLS, device) / size
    top = sorted(count.seen.items(), key=lambda item: -item[1])[:6]
    print(name, {key: f"{value / count.n_bytes:.0%}" for key, value in top}, flush=True)
    return [
        name,
        f"{work[0] / size / 1e6:.1f}",
        f"{work[1] / size / 1e3:.0f}",
        f"{work[2] / size / 1e6:.2f}",
        *(f"{1e6 * value:.3g}" for value in least),
        f"{1e6 * seconds:.3g}",
        f"{(least[0] + least[1]) / seconds:.0%}",
    ]


def main() -> None:
    """Command line entry."""
    options = command_line(__doc__, systems=NETWORKS, device=True).parse_args()
    table = MarkdownTable(
        "network",
        "MFLOP",
        "thousand functions",
        "MB",
        "products alone, µs",
        "functions alone, µs",
        "bytes alone, µs",
        "measured, µs",
        "products and functions / measured",
    )
    for name in options.systems:
        table.add(*measure(name, options.device))
    note = "Per configuration, in the package's own batches, on "
    write_table("profile", table, note, options.device)


if __name__ == "__main__":
    main()
