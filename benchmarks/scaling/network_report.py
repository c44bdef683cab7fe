"""From the launches of ``network.py`` to its JSON file, Markdown tables and plot."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.log_axes import plain_log
from benchmarks.common.repeats import (
    denoise_seconds,
    mean_seconds,
    of_cell,
    paired_ratio,
    psnr_db,
    relative_l2,
    shown,
    spread,
)
from benchmarks.common.results import PLOT, save
from benchmarks.scaling.netns import JUMBO_MTU
from benchmarks.scaling.rank_cases import AT_OWNERS, CODED, DEFAULT, ON_ONE_RANK, UNCACHED
from benchmarks.scaling.rank_launch import Outcome
from moeca_dist.report.schema import scaled

# Samples against those of one rank with the same policy: equal to rounding without a cache (relative L2); with one, a
# route near a tie may fall the other way and be carried on by forecasts.
EXACT_REL_L2 = 1e-5
CACHED_PSNR_DB = 60.0
# Coded rows are an approximation that one rank does not make.
CODED_PSNR_DB = 50.0
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#8C564B", "#7F7F7F")
MARKERS = "osD^v*PXh"


def summarise(
    config: str,
    num_ranks: int,
    link: dict[str, float] | None,
    probe: dict[str, float] | None,
    outcome: Outcome,
    alone: Outcome,
    *,
    trained: bool = True,
) -> list[dict[str, Any]]:
    """One row per policy. ``alone``: the same images on one rank. ``trained``: the weights are not random."""
    rows = []
    uncached_s = denoise_seconds(outcome.records, UNCACHED)
    for cell, samples in outcome.samples.items():
        mine = of_cell(outcome.records, cell)
        seconds, report = denoise_seconds(outcome.records, cell), mine[0]["report"]
        twin = ON_ONE_RANK.get(cell, cell)
        row = {
            "config": config,
            "policy": cell,
            "num_ranks": num_ranks,
            "link": link,
            "measured_link": probe,
            "num_images": report["num_images"],
            "num_steps": report["num_steps"],
            "repeats": len(mine),
            "denoise_s": spread(seconds),
            "over_uncached": paired_ratio(uncached_s, seconds),
            "over_one_rank": spread(denoise_seconds(alone.records, twin))["median"] / spread(seconds)["median"],
            "bytes_sent": report["exchange"]["bytes_sent"],
            "link_s": None if probe is None else report["exchange"]["bytes_sent"] / num_ranks * 8e-6 / probe["mbit"],
            "interface_bytes": min(record["interface_bytes"] for record in mine),
            "collectives": report["exchange"]["collectives"],
            "collectives_skipped": report["exchange"]["collectives_skipped"],
            "flops_speedup": report["flops"]["speedup"],
            "seconds": mean_seconds(mine),
            "peak_bytes_per_rank": max(max(record["peak_bytes_per_rank"]) for record in mine),
            "rel_l2_to_one_rank": relative_l2(samples, alone.samples[twin]),
            "psnr_db_to_one_rank": psnr_db(samples, alone.samples[twin]),
            "rel_l2_to_uncached": relative_l2(samples, outcome.samples[UNCACHED]),
            "cores_used_by_others": max(record["cores_used_by_others"] for record in mine),
            "reference_s": median(record["reference_s"] for record in mine),
        }
        # Location owner forecasts sums in place of branches where nothing is refreshed: other images by design.
        # With random weights routes lie near ties: noise of 1e-3 moves samples as far as codes do (int8_rows.py).
        comparable = trained if cell in CODED else cell not in AT_OWNERS
        row["agrees_with_one_rank"] = agrees(row) if comparable else None
        row["line"] = (
            f"{config}, {num_ranks} rank(s), {link_name(row)}, {cell}: {shown(row['denoise_s'])} s, "
            f"{row['over_uncached']['median']:.2f}x uncached, {row['over_one_rank']:.2f}x one rank, "
            f"{scaled(row['bytes_sent'], 1024)}iB, relative L2 to one rank {row['rel_l2_to_one_rank']:.1e}"
        )
        rows.append(row)
    return rows


def agrees(row: Mapping[str, Any]) -> bool:
    if row["policy"] in CODED:
        return bool(row["psnr_db_to_one_rank"] >= CODED_PSNR_DB)
    if ON_ONE_RANK.get(row["policy"], row["policy"]) == UNCACHED:
        return bool(row["rel_l2_to_one_rank"] <= EXACT_REL_L2)
    return bool(row["psnr_db_to_one_rank"] >= CACHED_PSNR_DB)


def link_name(row: Mapping[str, Any]) -> str:
    if row["link"] is None:
        return "loopback" if row["num_ranks"] > 1 else "-"
    return f"{row['link']['rate_mbit']:g} Mbit/s"


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_results(rows: Sequence[dict[str, Any]], setting: Mapping[str, Any], args: argparse.Namespace) -> None:
    kept = [{name: value for name, value in row.items() if name != "line"} for row in rows]
    save(args.out, {"conditions": setting, "rows": kept}, markdown(rows, setting))
    plot(rows, args.out / PLOT)


METHOD = f"""\
Every rank is a process of one thread in a network namespace of its own; a token bucket limits what it sends and what
it receives, in frames of {JUMBO_MTU} bytes unless --mtu says otherwise. "loopback": the same ranks under torchrun,
without namespaces. All rows of a configuration generate the same images from the same noise; its policies run in one
launch, round by round in an order drawn anew.

- **seconds**: of denoising, slowest rank, median of the repeats [lowest-highest], after a warm-up of a few steps.
- **x uncached**: seconds of the uncached run of the same round over those of the row, median [lowest-highest].
- **x one rank**: median seconds of one rank with the same policy over those of the row: below 1, expert parallelism
  does not pay. (Location owner is compared with one rank of the same policy, which has no location.)
- **payload**: expert rows and headers that left their rank, all ranks together. **interface**: what the nodes' network
  interfaces sent meanwhile, with headers, acknowledgements and row counts.
- **link**: seconds that a rank's share of the payload takes at the measured rate: the least that the exchange can take.
- **exchange + wait**: seconds in payload collectives, and in gathering row counts, where a rank waits for the slower
  ones; mean of the ranks.
- **measured link**: one TCP flow between two nodes before the run.
- **to one rank**: relative L2 distance of the samples to those of one rank with the same policy. Required are at most
  {EXACT_REL_L2:g} without a cache and {CACHED_PSNR_DB:g} dB PSNR (of the range of the samples) with one, where a route
  near a tie may fall the other way; not in location owner, which forecasts sums where one rank forecasts branches.
  Coded rows ("int8 rows"), compared with one rank where nothing travels: {CODED_PSNR_DB:g} dB. No claim
  on coded rows with random weights, where tiny differences change routes.
  **to uncached**: to the uncached samples of the same launch; on random weights it says nothing about quality.
- **others' cores**: how many cores worked for somebody else, the kernel's network work for these ranks among it."""

HEADER = (
    "policy",
    "ranks",
    "link",
    "measured link, Mbit/s",
    "seconds",
    "x uncached",
    "x one rank",
    "payload",
    "interface",
    "collectives (skipped)",
    "link, s",
    "exchange + wait, s",
    "to one rank",
    "to uncached",
    "others' cores",
)


def markdown(rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any]) -> str:
    facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in setting.items() if value != ""]
    sections = ["# Expert parallelism over limited networks", "\n".join(facts), METHOD]
    for config in dict.fromkeys(row["config"] for row in rows):
        mine = [row for row in rows if row["config"] == config]
        sections += [f"## {config}: {mine[0]['num_images']} images, {mine[0]['num_steps']} steps", table(mine)]
        sections += [verdict(mine)]
    return "\n\n".join(sections) + "\n"


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where more ranks are faster than one with the same policy, and where they are not."""
    lines = []
    for policy, num_ranks in dict.fromkeys((row["policy"], row["num_ranks"]) for row in rows if row["num_ranks"] > 1):
        mine = [row for row in rows if (row["policy"], row["num_ranks"]) == (policy, num_ranks)]
        pays = ", ".join(link_name(row) for row in mine if row["over_one_rank"] > 1) or "no link"
        loses = ", ".join(link_name(row) for row in mine if row["over_one_rank"] <= 1) or "no link"
        lines.append(f"- {policy}, {num_ranks} ranks: faster than one rank on {pays}; slower on {loses}")
    return "\n".join(["Where expert parallelism pays:", "", *lines])


def travelling(row: Mapping[str, Any]) -> str:
    return " + ".join(f"{row['seconds'].get(name, 0):.2f}" for name in ("exchange", "wait"))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in rows:
        probe = row["measured_link"]
        cells = [row["policy"], str(row["num_ranks"]), link_name(row), f"{probe['mbit']:.0f}" if probe else "-"]
        cells += [shown(row["denoise_s"]), shown(row["over_uncached"]), f"{row['over_one_rank']:.2f}"]
        cells += [f"{scaled(row[name], 1024)}iB" if row[name] else "-" for name in ("bytes_sent", "interface_bytes")]
        cells += [f"{row['collectives']} ({row['collectives_skipped']})"]
        cells += ["-" if row["link_s"] is None else f"{row['link_s']:.2f}", travelling(row)]
        cells += [f"{row[name]:.1e}" for name in ("rel_l2_to_one_rank", "rel_l2_to_uncached")]
        lines.append("| " + " | ".join([*cells, f"{row['cores_used_by_others']:.2f}"]) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Per configuration: speed against one rank over the links, and what caching gains over the ranks."""
    configs = list(dict.fromkeys(row["config"] for row in rows))
    figure = Figure(figsize=(15, 1 + 4.4 * len(configs)), layout="constrained")
    grid = figure.subplots(len(configs), 2, squeeze=False, width_ratios=(3, 2))
    for (speed, gain), config in zip(grid, configs, strict=True):
        mine = [row for row in rows if row["config"] == config]
        draw_speed(speed, mine)
        draw_gain(gain, mine)
        for axes in (speed, gain):
            axes.set_title(config, fontsize=10)
            plain_log(axes)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines:
                axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def draw_speed(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    links = list(dict.fromkeys(link_name(row) for row in rows if row["num_ranks"] > 1))
    base = next(row for row in rows if row["num_ranks"] == 1 and row["policy"] == UNCACHED)["denoise_s"]["median"]
    for index, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        for line, num_ranks in zip(("-", "--", ":"), sorted({row["num_ranks"] for row in rows} - {1}), strict=False):
            found = {link_name(r): r for r in rows if r["policy"] == policy and r["num_ranks"] == num_ranks}
            places = [place for place, name in enumerate(links) if name in found]
            values = [base / found[links[place]]["denoise_s"]["median"] for place in places]
            axes.plot(places, values, line, label=f"{policy}, {num_ranks} ranks", **style(index))
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set_xticks(range(len(links)), links)
    axes.set_ylabel("speed, uncached on one rank = 1")


def draw_gain(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """How many times faster the default policy is than no cache, on the same ranks and links, and with coded rows."""
    alone = [row for row in rows if row["num_ranks"] == 1 and row["policy"] == DEFAULT]
    for policy, line in ((DEFAULT, "-"), (f"{DEFAULT}, int8 rows", "--")):
        cached = [row for row in rows if row["policy"] == policy and row["num_ranks"] > 1]
        for index, name in enumerate(dict.fromkeys(link_name(row) for row in cached)):
            points = [*alone, *(row for row in cached if link_name(row) == name)]
            ranks = [row["num_ranks"] for row in points]
            values = [row["over_uncached"]["median"] for row in points]
            axes.plot(ranks, values, line, label=f"{name}{policy.removeprefix(DEFAULT)}", **style(index))
    if axes.lines:
        axes.set_ylim(1, None)
    axes.set_xticks(sorted({row["num_ranks"] for row in rows}))
    axes.set_xlabel("expert-parallel ranks")
    axes.set_ylabel(f"{DEFAULT} over uncached")


def style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
