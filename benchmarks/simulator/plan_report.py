"""The planning table with its assumptions, and its plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.simulator.gpu import H100, KERNELS_CODING, NVLINK_AND_400G, Shape

_ISLAND, _NIC = NVLINK_AND_400G.levels

VERDICT = (
    "**These are predictions.** No GPU was measured. The simulator is checked against measured CPU ranks only, see "
    "`benchmarks/results/simulate`; what the figures rest on stands in the table."
)

# (assumption, value, source)
ASSUMPTIONS = (
    (
        "matrix products",
        f"{H100.flops / 1e12:.0f} TFLOP/s dense bfloat16, {H100.efficiency:.0%} of it reached",
        "NVIDIA H100 SXM data sheet; Llama 3 reports 38-43% for training on H100 (arXiv 2407.21783, table 4)",
    ),
    (
        "memory",
        f"{H100.bytes_per_s / 1e12:.2f} TB/s, {H100.memory_share:.0%} of it reached",
        "data sheet; the share is assumed",
    ),
    (
        "host",
        f"{H100.launch_s * 1e6:.0f} us per kernel, {H100.kernels_computed} kernels per computed block, "
        f"{H100.kernels_served} per served one, {H100.kernels_forecast} for a step that network_forecast serves",
        "assumed: eager PyTorch",
    ),
    (
        "NVLink island of 8",
        f"{_ISLAND.bytes_per_s / 1e9:.0f} GB/s per GPU and direction, {_ISLAND.latency_s * 1e6:.0f} us per collective, "
        f"{_ISLAND.message_s * 1e6:.1f} us per peer",
        "data sheet (900 GB/s both ways together), 80% of it; DeepEP reports 153 of 160 GB/s on H800; latencies are "
        "assumed",
    ),
    (
        "400 Gbit/s NIC per GPU",
        f"{_NIC.bytes_per_s / 1e9:.0f} GB/s per GPU and direction, {_NIC.latency_s * 1e6:.0f} us per collective, "
        f"{_NIC.message_s * 1e6:.1f} us per peer",
        "DeepEP (docs/legacy.md) reports 43 of 50 GB/s for two nodes with ConnectX-7; latencies are assumed",
    ),
    (
        "8-bit rows",
        f"one byte per value and {KERNELS_CODING} more kernels per leg, {H100.launch_s * 1e6:.0f} us each",
        "the format is the runtime's; passes and kernels counted in its code, roughly",
    ),
    ("routing", "Zipf-skewed, drawn for every layer and group", "synthetic: there are no traces of these networks"),
    (
        "policies",
        "11 of 50 steps in full; in the others network_forecast forecasts what all blocks change, moeca_forecast "
        "computes the stated share of branches",
        "the shipped schedule; the share is that of the shipped digits model, assumed for these networks",
    ),
    (
        "left out",
        "text encoders, VAE, host work beyond launches, congestion between groups",
        "the shared expert hides part of the hidden rows' way, as in the runtime; nothing else does",
    ),
)

HEADER = ("GPUs", "EP x DP", "uncached, ms/step", "exchange share", "slowest-rank wait", "network_forecast, ms/step",
          "gain", "8-bit rows", "gain", "moeca_forecast", "gain", "its owner",
          "images/s uncached", "images/s network_forecast", "weights + moeca_forecast's cache, GiB/GPU")  # fmt: skip


def plan_markdown(
    rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any], shapes: Sequence[Shape], check: Mapping[str, Any]
) -> str:
    facts = "\n".join(f"- {name.replace('_', ' ')}: {setting[name]}" for name in
                      ("date", "commit", "command", "zipf", "refresh_share"))  # fmt: skip
    low, high = sorted(check["implied_gb_s"])
    against = (
        f"A published share: for {check['model']} on {check['ranks']} {check['gpu']} over PCIe, at 12.8 "
        f"GB/s per GPU, the model gives an exchange share of {check['exchange_share']:.0%}. DICE reports 61.7-73.3% "
        f"(arXiv 2411.16786), which the model gives at {low:.1f}-{high:.1f} GB/s. Cards without peer access copy "
        "through the host's memory, so such a rate is plausible, but it was not measured: the share confirms nothing."
    )
    assumed = ["| assumption | value | source |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in ASSUMPTIONS)]
    parts = ["# Plan: expert parallelism on H100 clusters", VERDICT, facts, "\n".join(assumed), against]
    for shape in shapes:
        mine = [row for row in rows if row["model"] == shape.name]
        about = (
            f"## {shape.name}: {shape.remark}; {shape.tokens} tokens, {shape.images_per_gpu} image(s) per GPU with "
            f"guidance, {shape.num_experts} experts, top-{shape.num_experts_per_tok}"
        )
        lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER), *(_line(row) for row in mine)]
        parts += [about, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    cells = (
        str(row["gpus"]),
        f"{row['ep_size']} x {row['dp_size']}",
        f"{row['uncached_ms']:.1f}",
        f"{row['uncached_exchange_share']:.0%}",
        f"{row['uncached_wait_share']:.0%}",
        f"{row['network_ms']:.1f}",
        f"{row['network_gain']:.2f}x",
        f"{row['network_coded_ms']:.1f}",
        f"{row['uncached_ms'] / row['network_coded_ms']:.2f}x",
        f"{row['branches_home_ms']:.1f}",
        f"{row['branches_gain']:.2f}x",
        f"{row['branches_owner_ms']:.1f}",
        f"{row['uncached_images_per_s']:.1f}",
        f"{row['network_images_per_s']:.1f}",
        f"{row['weight_gib']:.0f} + {row['branches_cache_gib']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4 * len(models), 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        # The best layout of every number of GPUs.
        for name, label, colour in (
            ("uncached_images_per_s", "uncached", "#000000"),
            ("network_images_per_s", "network_forecast", "#0072B2"),
        ):
            gpus = sorted({row["gpus"] for row in mine})
            best = [max(row[name] for row in mine if row["gpus"] == count) for count in gpus]
            widest = [next(row[name] for row in mine if row["gpus"] == row["ep_size"] == count) for count in gpus]
            axes.plot(gpus, best, marker="o", color=colour, label=f"{label}, best layout")
            axes.plot(gpus, widest, marker="v", color=colour, linestyle=":", label=f"{label}, one group of all GPUs")
        axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s, predicted", title=model)
        axes.set_xticks(gpus, [str(count) for count in gpus], minor=False)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
