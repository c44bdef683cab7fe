"""The tables of ``moeca report OUT``: the figures of a run's ``report.json`` for people."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeca_dist.errors import UserError
from moeca_dist.report.schema import scaled

_SECTIONS = ("flops", "branches", "exchange", "cache")


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the report that ``generate`` wrote into ``folder``.

    Raises UserError if there is no folder, no report in it, or a file of another kind.
    """
    folder = Path(folder)
    path = folder / "report.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that `moeca generate --out` wrote")
    if not path.is_file():
        raise UserError(f"{folder} holds no report.json: give the folder that `moeca generate --out` wrote")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; generate again") from None
    missing = [name for name in _SECTIONS if not isinstance(report, dict) or not isinstance(report.get(name), dict)]
    if missing:
        raise UserError(f"{path} is not a report of this program (it has no {missing[0]!r}): generate again")
    return dict(report)


def render(report: Mapping[str, Any]) -> str:
    """Return all tables as text.

    Raises UserError if the report lacks a figure, because another version wrote it.
    """
    try:
        parts = [
            _table("Run", _run(report)),
            _table("Seconds of denoising", _seconds(report)),
            _table("Compute and branches", _compute(report)),
            _table("Exchange", _exchange(report)),
            _table("Cache", _cache(report)),
        ]
        if report["telemetry"] is not None:
            parts += [_table("GPUs", _telemetry(report))]
        if report["cache"]["per_layer"]:
            parts += [_blocks(report["cache"]["per_layer"])]
    except (KeyError, TypeError) as error:
        raise UserError(f"the report is of another version of this program (figure {error}): generate again") from None
    return "\n\n".join(parts)


# ---- sections --------------------------------------------------------------------------------------------------------

_Rows = Sequence[tuple[str, str]]


def _run(report: Mapping[str, Any]) -> _Rows:
    rows = [
        ("images", f"{report['num_images']:,} in {report['num_steps']} steps"),
        ("ranks", f"{report['world_size']} (DP {report['dp_size']} x EP {report['ep_size']})"),
        ("wall clock", f"{report['wall_s']:.1f} s ({report['images_per_s']:.2f} images/s)"),
        ("denoising", f"{report['denoise_s']:.1f} s, slowest rank"),
    ]
    if report.get("wall_speedup") is not None:
        rows.append(("", f"{report['wall_speedup']:.2f}x faster than without a cache"))
    quality = report.get("quality")
    if quality is not None:
        figures = f"PSNR {quality['psnr_db']:.1f} dB, SSIM {quality['ssim']:.4f}, relative L2 {quality['rel_l2']:.4f}"
        rows.append(("quality", f"{figures}, against the images without a cache"))
    return rows


def _seconds(report: Mapping[str, Any]) -> _Rows:
    """Each section on the rank that took longest, and where there are several the mean over the ranks."""
    slowest, mean = report["seconds"]["slowest"], report["seconds"]["mean"]
    total = sum(slowest.values())
    several = report["world_size"] > 1
    return [
        (name, f"{value:.2f} ({value / total:.1%})" + (f", mean of the ranks {mean[name]:.2f}" if several else ""))
        for name, value in slowest.items()
    ]


def _compute(report: Mapping[str, Any]) -> _Rows:
    flops, branches = report["flops"], report["branches"]
    routed = branches["routed"]
    return [
        ("FLOP", f"{scaled(flops['computed'], 1000)} of {scaled(flops['full'], 1000)}: {flops['speedup']:.2f}x fewer"),
        ("branches routed", f"{routed:,}"),
        ("  computed", _share(branches["refreshed"], routed)),
        *(
            (f"    {label}", _share(branches[name], routed))
            for name, label in _REASONS.items()
            if branches[name] or name == "unmatched"
        ),
        ("  forecast", _share(branches["forecast"], routed)),
        ("  reused", _share(branches["reused"], routed)),
    ]


def _exchange(report: Mapping[str, Any]) -> _Rows:
    exchange = report["exchange"]
    if exchange["mode"] == "local":
        return [("mode", "local: every rank holds all experts, nothing travels")]
    sent, full = exchange["bytes_sent"], exchange["bytes_full"]
    ratio = f" ({100 * sent / full:.1f}%)" if full else ""
    rows = [
        ("mode", exchange["mode"]),
        ("bytes sent", f"{scaled(sent, 1024)}iB of {scaled(full, 1024)}iB without a cache{ratio}"),
        ("collectives per rank", f"{exchange['collectives']:,} issued, {exchange['collectives_skipped']:,} not needed"),
        ("exchanges of row counts", f"{exchange['count_exchanges']:,}"),
    ]
    if exchange["location"] is not None:
        rows.insert(1, ("branch values are kept", f"at the {exchange['location']} rank"))
    if exchange["row_dtype"] != "exact":
        rows.insert(1, ("rows travel as", exchange["row_dtype"]))
    return rows


def _cache(report: Mapping[str, Any]) -> _Rows:
    cache = report["cache"]
    if cache["policy"] == "none":
        return [("policy", "none: everything was computed in every step")]
    ranks = f", {report['world_size']} ranks together" if report["world_size"] > 1 else ""
    rows = [("policy", cache["policy"]), ("memory at its peak", f"{scaled(cache['bytes_peak'], 1024)}iB{ranks}")]
    for name, counts in cache["modules"].items():
        every = sum(counts.values())
        shares = ", ".join(f"{counts[kind] / every:.1%} {label}" for kind, label in _MODULES.items() if counts[kind])
        rows.append((f"{name} of tokens", shares))
    return [*rows, *([("remark", cache["remark"])] if cache["remark"] else [])]


def _telemetry(report: Mapping[str, Any]) -> _Rows:
    """Energy of all devices together, then one line per rank."""
    telemetry = report["telemetry"]
    rows = []
    if telemetry["energy_j"] is not None:
        rows.append(("energy", f"{telemetry['energy_j']:,.0f} J, {telemetry['energy_j_per_image']:,.1f} J per image"))
    for rank, record in enumerate(telemetry["ranks"]):
        rows.append((f"rank {rank}", "no GPU to watch" if record is None else ", ".join(_gpu(record))))
    return rows


def _gpu(record: Mapping[str, Any]) -> list[str]:
    """What one rank's device did, as far as it says."""
    facts = [record["device"]]
    if record["memory_bytes_peak"] is not None:
        facts.append(f"{scaled(record['memory_bytes_peak'], 1024)}iB at its peak")
    if record["utilisation_mean"] is not None:
        facts.append(f"{record['utilisation_mean']:.0%} busy")
    if record["power_w_mean"] is not None:
        facts.append(f"{record['power_w_mean']:.0f} W (up to {record['power_w_max']:.0f})")
    for name in ("nvlink", "pcie"):
        moved = record[f"{name}_bytes"]
        if moved is not None:
            label = {"nvlink": "NVLink", "pcie": "PCIe"}[name]
            ways = ", ".join(f"{scaled(moved[way], 1024)}iB {way}" for way in ("sent", "received"))
            facts.append(f"{label} {ways}")
    facts += [
        f"slowed by {reason} in {share:.0%} of the samples" for reason, share in (record["throttled"] or {}).items()
    ]
    if record["ended_early"] is not None:
        facts.append(f"sampling ended early: {record['ended_early']}")
    return facts


_MODULES = {"computed": "computed", "rows": "row by row", "served": "served"}
_REASONS = {
    "full_step": "in full steps",
    "unmatched": "unmatched",
    "score": "by score",
    "forced": "forced",
}
_KINDS = ("full", "unmatched", "score", "forced", "served")
_BLOCK_HEADER = ("block", "full steps", *_KINDS[1:], "computed", "busiest expert", "quietest")


def _blocks(per_layer: Sequence[Mapping[str, Any]]) -> str:
    """One line per MoE block: branches by why they were computed, and how evenly over the experts."""
    lines: list[tuple[str, ...]] = [_BLOCK_HEADER]
    for entry in per_layer:
        counts = [entry[kind] for kind in _KINDS]
        computed, routed = sum(counts[:-1]), sum(counts)
        busiest, quietest = _extremes(entry["refreshed_per_expert"])
        share = f"{computed / routed:.1%}" if routed else "-"
        lines.append((str(entry["block"]), *(f"{count:,}" for count in counts), share, busiest, quietest))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_BLOCK_HEADER))]
    aligned = ("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    legend = (
        "  computed: in full steps, unmatched (nowhere in the cache), by the policy's score, or forced by a rule of it",
        "  served: from the cache",
        "  experts: share of the block's computed branches",
    )
    return "\n".join(["Branches of each MoE block", *aligned, *legend])


def _extremes(per_expert: Sequence[int]) -> tuple[str, str]:
    total = sum(per_expert)
    if not total:
        return "-", "-"
    by_load = sorted(range(len(per_expert)), key=lambda expert: per_expert[expert])
    busiest, quietest = (f"{expert}: {per_expert[expert] / total:.1%}" for expert in (by_load[-1], by_load[0]))
    return busiest, quietest


def _share(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.1%})" if of else f"{count:,}"


def _table(title: str, rows: _Rows) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])
