"""Turn measured rows into the tables and figures of the documentation.

    python -m benchmarks.tables

Reads ``benchmarks/results/*.json``; writes ``docs/tables/<system>.md`` and ``docs/figures/*.png``.
The figure of ESS against the number of samples also needs the raw log weights that
``benchmarks/run.py`` keeps under ``runs/``; without them the old figure stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks import harness
from benchmarks.harness import (
    MarkdownTable,
    cached,
    command_line,
    new_figure,
    percent,
    read_result,
    write_figure,
    write_page,
)
from benchmarks.methods import AS_SHIPPED, METHODS
from openmm_vtdis.plotting import ess_curve, ess_versus_samples, eta_profile

COLUMNS = (
    "method",
    "steps",
    "forward ESS (n)",
    "reverse ESS (n)",
    "Pareto k",
    "largest weight",
    "GFLOPs / sample",
    "s / 1,000 samples",
    "tuning",
)


def ess_cell(row: dict[str, Any], way: str) -> str:
    """ESS with its error and number of samples."""
    if f"{way}_ess" not in row:
        return ""
    value, error = row[f"{way}_ess"]
    return f"{percent(value, error, 1 if value > 0.02 else 3)} ({row[f'{way}_n']:,})"


def optional(row: dict[str, Any], key: str, spec: str, scale: float = 1.0, unit: str = "") -> str:
    """A formatted number, or an empty cell."""
    return f"{scale * row[key]:{spec}}{unit}" if row.get(key) is not None else ""


def cells(row: dict[str, Any]) -> list[str]:
    """Cells of a row of the table."""
    tuning = ""
    if "tuning_trajectories" in row:
        tuning = f"{row['tuning_trajectories']:,} trajectories"
        if "fit_seconds" in row:
            tuning += f", {row['fit_seconds']:.2f} s"
    elif "tuning" in row:
        tuning = "that of the archive"
    return [
        row["method"],
        str(row["n_steps"]),
        ess_cell(row, "forward"),
        ess_cell(row, "reverse"),
        optional(row, "reverse_pareto_k", ".2f"),
        optional(row, "largest_weight_share", ".2f", 100.0, " %"),
        optional(row, "gflops_per_sample", ".3g") if row.get("gflops_per_sample") else "",
        optional(row, "seconds_per_1000_samples", ".3g")
        or optional(row, "gpu_seconds_per_1000_samples", ".3g", unit=" (GPU)"),
        tuning,
    ]


def table(document: dict[str, Any]) -> str:
    """The whole table of one system, by method and then by steps."""
    order = list(METHODS)
    rows = sorted(
        document["rows"].values(),
        key=lambda r: (
            order.index(r["method"]) if r["method"] in order else len(order),
            r["method"],
            r["n_steps"],
        ),
    )
    devices = sorted({row["device"] for row in rows if "device" in row})
    others = f"; (GPU): {', '.join(devices)}" if devices else ""
    found = MarkdownTable(*COLUMNS, quiet=True)
    for row in rows:
        found.add(*cells(row))
    return f"{found}\nMeasured on {document['machine']}{others}.\n"


def curves(document: dict[str, Any], ax: Axes) -> None:
    """ESS against steps for every method measured at two or more numbers of steps."""
    for method in METHODS:
        if METHODS[method].grid != "geometric":
            continue
        rows = [r for r in document["rows"].values() if r["method"] == method]
        rows.sort(key=lambda r: r["n_steps"])
        if len(rows) > 1:
            forward, reverse = ([r[f"{w}_ess"][0] for r in rows] for w in ("forward", "reverse"))
            ess_curve([r["n_steps"] for r in rows], forward, reverse, method, ax)
    _legend(ax)
    ax.set_title(document["system"])


BEYOND = (
    AS_SHIPPED,
    "isotropic, alpha = 2",
    "isotropic, adaptive grid",
    "hessian",
    "pairwise",
    "tweedie",
    "PF-ODE, exact",
)
"""Methods in the figure of all costs."""
COSTS = {
    "n_steps": "network evaluations per sample",
    "gflops_per_sample": "GFLOPs per sample",
    "seconds_per_1000_samples": "seconds per 1,000 samples",
}


def costs(document: dict[str, Any], figure: Figure) -> bool:
    """ESS against steps, GFLOPs and seconds; False where there are no methods to compare."""
    rows = [r for r in document["rows"].values() if "reverse_ess" in r]
    there = {row["method"] for row in rows}
    by_state = there & {AS_SHIPPED, "hessian", "pairwise", "tweedie"}
    if not by_state or len(rows) < 5 or len(there) < 2:
        return False
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (key, label) in zip(axes, COSTS.items(), strict=True):
        for method in filter(there.__contains__, BEYOND):  # empty curves keep the colours alike
            mine = [r for r in rows if r["method"] == method and key in r]
            mine.sort(key=lambda r: r["n_steps"])
            ways = ([r[f"{way}_ess"][0] for r in mine] for way in ("forward", "reverse"))
            ess_curve([r[key] for r in mine], *ways, method, ax)
        ax.set(xscale="log", xlabel=label, ylabel="ESS / n" if ax is axes[0] else "")
        roomy = ax.get_xlim()[1] < 10_000.0  # labels of five digits run into each other
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if roomy else (1.0, 3.0)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    _legend(axes[-1])
    figure.suptitle(document["system"])
    return True


def _legend(ax: Axes) -> None:
    """Draw a legend outside the axes, with one entry for each method."""
    solid = [line for line in ax.get_lines() if str(line.get_label()).endswith(", forward")]
    names = [str(line.get_label()).removesuffix(", forward") for line in solid]
    ax.legend(
        solid, names, title="forward (reverse: dashed)", frameon=False, loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
    )  # fmt: skip


def etas(document: dict[str, Any], ax: Axes) -> None:
    """Tuned variance over the noise level, one line for each number of steps."""
    rows = [r for r in document["rows"].values() if r["method"] == "isotropic, alpha = 2"]
    for row in sorted(rows, key=lambda r: r["n_steps"]):
        eta_profile(row["times"], row["eta"], ax)
        drawn = ax.get_lines()
        drawn[-2].set_label(f"{row['n_steps']} steps")
        if len(rows) > 1 and row is not rows[-1]:
            drawn[-1].set_label("_")
    if rows:
        ax.legend(frameon=False)
    ax.set_title(document["system"])


def samples(system: str, n_steps: int, ax: Axes) -> bool:
    """ESS against the number of samples, KL and alpha = 2; False without the raw weights."""
    paths = {
        label: cached(f"{system}-isotropic, {label}-{n_steps}.npz") for label in ("KL", "alpha = 2")
    }
    if not all(path.exists() for path in paths.values()):
        return False
    stored = {label: np.load(path) for label, path in paths.items()}
    ess_versus_samples(
        {label: arrays["reverse"] for label, arrays in stored.items()},
        ax,
        forward_log_weights={label: arrays["forward"] for label, arrays in stored.items()},
    )
    ax.set_title(f"{system}, {n_steps} steps")
    return True


def figures(document: dict[str, Any], name: str) -> dict[str, Figure]:
    """Figures of one system by file name, where something has been measured."""
    found = {}
    for kind, draw, width in (("ess-steps", curves, 8.4), ("eta", etas, 6.4)):
        figure = new_figure(width, 4.2)
        draw(document, ax := figure.subplots())
        if ax.get_lines():
            found[f"{name}-{kind}"] = figure
    figure = new_figure(12.0, 4.2)
    if costs(document, figure):
        found[f"{name}-costs"] = figure
    figure = new_figure(6.4, 4.2)
    if samples(name, 100, figure.subplots()):
        found[f"{name}-ess-samples"] = figure
    return found


def main() -> None:
    """Write everything that the results allow: all tables, and the figures that a page shows."""
    command_line(__doc__).parse_args()
    pages = "".join(page.read_text() for page in harness.DOCS.glob("*.md"))
    for system in sorted(path.stem for path in harness.RESULTS.glob("*.json")):
        document = read_result(system)
        if "system" not in document:
            continue
        write_page(system, table(document))
        for name, figure in figures(document, system).items():
            if f"figures/{name}.png" in pages:
                write_figure(name, figure)
        print(f"{system}: {len(document['rows'])} rows")


if __name__ == "__main__":
    main()
