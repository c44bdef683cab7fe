"""From the launches of ``scaling.py`` to its JSON file, Markdown tables and plots."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.common.log_axes import plain_log
from benchmarks.common.repeats import denoise_seconds, mean_seconds, of_cell, paired_ratio, shown, spread
from benchmarks.common.results import PLOT, save
from benchmarks.scaling.rank_cases import DEFAULT, ON_ONE_RANK, UNCACHED
from benchmarks.scaling.rank_launch import Outcome
from moeca_dist.report.schema import scaled
from moeca_dist.timing import SECTIONS

COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#F0E442")
MARKERS = "osD^v*X"


# One rank has every expert and every image: it belongs to both layouts.
ALONE = "-"


def summarise(
    config: str, layout: str, num_ranks: int, outcome: Outcome, before: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One row per policy. ``before``: rows of fewer ranks, the first of which speed-ups refer to."""
    uncached_s = denoise_seconds(outcome.records, UNCACHED)
    for cell in outcome.samples:
        mine = of_cell(outcome.records, cell)
        report, seconds = mine[0]["report"], denoise_seconds(outcome.records, cell)
        rounds = -(-report["num_images"] // (num_ranks * mine[0]["batch_size"]))
        rate = spread(record["report"]["images_per_s"] for record in mine)
        base = base_of(before, config, layout, cell) or {"num_ranks": num_ranks, "images_per_s": rate}
        speedup = rate["median"] / base["images_per_s"]["median"]
        row = {
            "config": config,
            "layout": layout,
            "policy": cell,
            "num_ranks": num_ranks,
            "num_images": report["num_images"],
            "num_steps": report["num_steps"],
            "repeats": len(mine),
            "images_per_s": rate,
            "latency_s": spread(value / rounds for value in seconds),
            "base_ranks": base["num_ranks"],
            "speedup": speedup,
            "efficiency": speedup * base["num_ranks"] / num_ranks,
            "over_uncached": paired_ratio(uncached_s, seconds),
            "bytes_sent": report["exchange"]["bytes_sent"],
            "seconds": mean_seconds(mine),
            "peak_bytes_per_rank": max(max(record["peak_bytes_per_rank"]) for record in mine),
            "flops_speedup": report["flops"]["speedup"],
            "cores_used_by_others": max(record["cores_used_by_others"] for record in mine),
        }
        row["line"] = (
            f"{config}, {num_ranks} rank(s), {layout}, {cell}: {shown(rate)} images/s, speed-up {speedup:.2f} over "
            f"{base['num_ranks']} rank(s), {row['over_uncached']['median']:.2f}x uncached, "
            f"{scaled(row['bytes_sent'], 1024)}iB sent"
        )
        yield row


def base_of(rows: Sequence[Mapping[str, Any]], config: str, layout: str, policy: str) -> Mapping[str, Any] | None:
    """The run with the fewest ranks that this one scales."""
    wanted = {(layout, policy), (ALONE, ON_ONE_RANK.get(policy, policy))}
    return next((row for row in rows if row["config"] == config and (row["layout"], row["policy"]) in wanted), None)


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_results(rows: Sequence[dict[str, Any]], setting: Mapping[str, Any], out: Path) -> None:
    kept = [{name: value for name, value in row.items() if name != "line"} for row in rows]
    save(out, {"conditions": setting, "rows": kept}, markdown(rows, setting))
    plot(rows, setting["mode"], out / PLOT)


METHOD = """\
Real torchrun jobs on this machine, one process per rank. **ep**: all ranks share one set of experts; **dp**: every rank
holds all of them and nothing travels. Strong scaling generates the same images on more ranks, weak scaling as many per
rank. All policies of a row's launch run in it, round by round in an order drawn anew, after a warm-up of a few steps.

- **images/s** and **latency** (seconds from noise to sample of the images of one round): median of the repeats
  [lowest-highest].
- **speed-up**: images/s over those of the fewest ranks with the same policy; **efficiency**: divided by the ratio of
  ranks.
- **x uncached**: seconds of the uncached run of the same round over those of the row.
- **exchange + wait**: seconds in payload collectives, and in gathering row counts, where a rank waits for the slower
  ones; mean of the ranks.
- **memory**: of the rank that held most: peak resident memory of the process on a CPU (libraries among it; memory
  that a process freed may still count), peak allocated device memory on CUDA.
- **others' cores**: how many of the machine's cores worked for somebody else. Ranks beyond the number of cores share
  them: speed-ups above that number cannot be expected."""

HEADER = (
    "layout",
    "ranks",
    "policy",
    "images/s",
    "latency, s",
    "speed-up",
    "efficiency",
    "x uncached",
    "sent",
    "exchange + wait, s",
    "memory / rank",
    "others' cores",
)


def markdown(rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any]) -> str:
    facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in setting.items() if value != ""]
    sections = [f"# Scaling over ranks, {setting['mode']}", "\n".join(facts), METHOD]
    for config in dict.fromkeys(row["config"] for row in rows):
        mine = [row for row in rows if row["config"] == config]
        images = " / ".join(str(count) for count in dict.fromkeys(row["num_images"] for row in mine))
        sections += [f"## {config}: {images} images, {mine[0]['num_steps']} steps", table(mine)]
    return "\n\n".join(sections) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in rows:
        cells = [row["layout"], str(row["num_ranks"]), row["policy"], shown(row["images_per_s"], 3)]
        cells += [shown(row["latency_s"]), f"{row['speedup']:.2f}", f"{row['efficiency']:.0%}"]
        cells += [shown(row["over_uncached"]), f"{scaled(row['bytes_sent'], 1024)}iB"]
        cells += [" + ".join(f"{row['seconds'].get(name, 0):.2f}" for name in ("exchange", "wait"))]
        cells += [f"{scaled(row['peak_bytes_per_rank'], 1024)}iB", f"{row['cores_used_by_others']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], mode: str, path: Path) -> None:
    """Per configuration: throughput and efficiency over the ranks, and where the time goes."""
    configs = list(dict.fromkeys(row["config"] for row in rows))
    figure = Figure(figsize=(16, 0.8 + 3.6 * len(configs)), layout="constrained")
    places = figure.subplots(len(configs), 3, squeeze=False, width_ratios=(1, 1, 1.4))
    for (throughput, efficiency, time), config in zip(places, configs, strict=True):
        mine = [row for row in rows if row["config"] == config]
        draw_lines(throughput, mine, lambda row: row["images_per_s"]["median"])
        draw_lines(efficiency, mine, lambda row: row["efficiency"])
        throughput.set_ylabel("images/s")
        plain_log(throughput)
        if throughput.lines:
            throughput.legend(frameon=False, fontsize=7)
        efficiency.set_ylabel("parallel efficiency")
        efficiency.yaxis.set_major_formatter(PercentFormatter(1))
        efficiency.set_ylim(bottom=0)
        draw_seconds(time, mine)
        for axes in (throughput, efficiency, time):
            axes.set_title(f"{config}, {mode} scaling", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_lines(axes: Axes, rows: Sequence[Mapping[str, Any]], value: Any) -> None:
    for index, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        for layout, line in (("ep", "-"), ("dp", ":")):
            points = [row for row in rows if row["policy"] == policy and row["layout"] in (layout, ALONE)]
            if any(row["layout"] == layout for row in points):
                colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
                ranks, label = [row["num_ranks"] for row in points], f"{layout}, {policy}"
                axes.plot(ranks, [value(row) for row in points], line, label=label, color=colour, marker=marker)
    axes.set_xticks(sorted({row["num_ranks"] for row in rows}))
    axes.set_xlabel("ranks")
    axes.grid(alpha=0.3)


def draw_seconds(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Stacked seconds of the expert-parallel runs, mean of the ranks: no cache and the default policy side by side."""
    shown_rows = [row for row in rows if row["layout"] in ("ep", ALONE) and row["policy"] in (UNCACHED, DEFAULT)]
    names = [f"{row['num_ranks']} rank(s)\n{row['policy']}" for row in shown_rows]
    bottom = [0.0] * len(shown_rows)
    for colour, section in zip(COLOURS[::-1], SECTIONS, strict=True):
        heights = [row["seconds"].get(section, 0.0) for row in shown_rows]
        if any(heights):
            axes.bar(range(len(names)), heights, bottom=bottom, color=colour, label=section)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_ylabel("seconds of denoising")
    axes.legend(frameon=False, fontsize=7)
