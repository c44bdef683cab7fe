"""The pictures of ``moeca report OUT --plots``: figures of ``report.json`` per step and per expert.

Shape suffixes: L MoE blocks, S denoising steps, E experts.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moeca_dist.errors import UserError

FOLDER = "plots"
_COLOUR, _GUIDE = "#0072B2", "#555555"
# Okabe and Ito's, which colour-blind readers can tell apart.
_SECTION_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#999999")


def write_plots(report: Mapping[str, Any], out: Path) -> list[Path]:
    """Write every picture for which the report has figures into ``out/plots``, and return the paths.

    Raises UserError if the folder cannot be written.
    """
    per_layer = report["cache"]["per_layer"]
    drawn: dict[str, Callable[[], Figure]] = {"seconds_per_step.png": lambda: seconds_bars(report)}
    if any(entry.get("refreshed_per_step") for entry in per_layer):
        drawn["refreshed_per_step.png"] = lambda: refreshed_heatmap(report)
    if any(entry.get("refreshed_per_expert") for entry in per_layer):
        drawn["refreshed_per_expert.png"] = lambda: expert_bars(report)
    if any(report["exchange"].get("bytes_per_step") or ()):
        drawn["bytes_per_step.png"] = lambda: bytes_bars(report)
    watched = [record for record in (report["telemetry"] or {"ranks": []})["ranks"] if record is not None]
    if any(len(record["series"]["time_s"]) > 1 for record in watched):
        drawn["telemetry.png"] = lambda: telemetry_curves(report)
    folder = out / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        for name, draw in drawn.items():
            draw().savefig(folder / name, dpi=120)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    return [folder / name for name in drawn]


def refreshed_heatmap(report: Mapping[str, Any]) -> Figure:
    """Plot MoE block x step: the share of the routed branches that were computed. Full steps stand out as columns."""
    per_layer = report["cache"]["per_layer"]
    computed_LS = np.array([entry["refreshed_per_step"] for entry in per_layer], dtype=float)
    routed_L = np.array(
        [sum(entry[kind] for kind in ("full", "unmatched", "score", "forced", "served")) for entry in per_layer]
    )
    # Every step routes the same number of branches.
    share_LS = 100 * computed_LS * computed_LS.shape[1] / routed_L[:, None]
    figure = Figure(figsize=(10, 1.8 + 0.25 * len(per_layer)), layout="constrained")
    axes = figure.subplots()
    # A scale that bends: beside full steps, one branch in a hundred should still be seen.
    scale = PowerNorm(0.4, vmin=0, vmax=100)
    image = axes.imshow(share_LS, aspect="auto", norm=scale, cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(per_layer)), [str(entry["block"]) for entry in per_layer])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="denoising step", ylabel="MoE block", title=f"Branches computed, policy {report['cache']['policy']}"
    )
    figure.colorbar(image, ax=axes, label="% of the routed", ticks=[0, 1, 5, 20, 50, 100])
    return figure


def expert_bars(report: Mapping[str, Any]) -> Figure:
    """Plot one row of bars per MoE block: each expert's share of the computed branches. The line is an even share."""
    per_layer = report["cache"]["per_layer"]
    figure = Figure(figsize=(10, 1.2 + 1.1 * len(per_layer)), layout="constrained")
    rows = figure.subplots(len(per_layer), 1, sharex=True, squeeze=False)[:, 0]
    for axes, entry in zip(rows, per_layer, strict=True):
        counts_E = np.array(entry["refreshed_per_expert"], dtype=float)
        axes.bar(range(len(counts_E)), 100 * counts_E / max(1.0, counts_E.sum()), color=_COLOUR)
        axes.axhline(100 / max(1, len(counts_E)), color=_GUIDE, linewidth=0.8, linestyle="--")
        axes.set_ylabel(f"block {entry['block']}")
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    rows[-1].set_xlabel("expert")
    rows[0].set_title("Share of the block's computed branches, %")
    return figure


def bytes_bars(report: Mapping[str, Any]) -> Figure:
    """Plot the payload of each step, all ranks together. The line is what a step sends without a cache."""
    mib_S = np.array(report["exchange"]["bytes_per_step"]) / 2**20
    full_mib = report["exchange"]["bytes_full"] / 2**20 / len(mib_S)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(mib_S)), mib_S, color=_COLOUR)
    axes.axhline(full_mib, color=_GUIDE, linewidth=0.8, linestyle="--", label=f"without a cache: {full_mib:.2f} MiB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="denoising step", ylabel="MiB", title=f"Bytes sent, policy {report['cache']['policy']}")
    figure.legend(loc="outside lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def seconds_bars(report: Mapping[str, Any]) -> Figure:
    """Plot the seconds of each step by section, on the rank that took longest."""
    per_step = report["seconds"]["per_step"]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    bottom_S = np.zeros(len(next(iter(per_step.values()))))
    for colour, (name, seconds) in zip(_SECTION_COLOURS, per_step.items(), strict=False):
        axes.bar(range(len(bottom_S)), seconds, bottom=bottom_S, label=name, color=colour)
        bottom_S += seconds
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="denoising step", ylabel="s", title=f"Seconds of denoising, policy {report['cache']['policy']}")
    figure.legend(loc="outside right upper", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# Panel title, factor of the unit, and the figures drawn in it: solid, dashed.
_PANELS = (
    ("memory, GiB", 2**-30, ("memory_bytes",)),
    ("busy, %", 100, ("utilisation",)),
    ("power, W", 1, ("power_w",)),
    ("PCIe, MB/s", 1e-6, ("pcie_sent_bytes_per_s", "pcie_received_bytes_per_s")),
    ("NVLink, GB/s", 1e-9, ("nvlink_sent_bytes_per_s", "nvlink_received_bytes_per_s")),
)


def telemetry_curves(report: Mapping[str, Any]) -> Figure:
    """Plot each rank's GPU over the run, with one panel per figure that any GPU offers. Received traffic is dashed."""
    ranks = [(rank, record) for rank, record in enumerate(report["telemetry"]["ranks"]) if record is not None]
    offered = {name for _, record in ranks for name in record["series"]}
    panels = [panel for panel in _PANELS if offered & set(panel[2])]
    figure = Figure(figsize=(10, 0.8 + 1.7 * max(1, len(panels))), layout="constrained")
    rows = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, factor, names) in zip(rows, panels, strict=False):
        for rank, record in ranks:
            for line, name in zip(("-", "--"), names, strict=False):
                if name in record["series"]:
                    values = factor * np.array(record["series"][name])
                    label = f"rank {rank}" if line == "-" else None
                    colour = _SECTION_COLOURS[rank % len(_SECTION_COLOURS)]
                    axes.plot(record["series"]["time_s"], values, line, color=colour, label=label, linewidth=1)
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    rows[0].legend(loc="upper right", frameon=False, ncols=8)
    rows[-1].set_xlabel("seconds")
    return figure
