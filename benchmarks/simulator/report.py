"""Tables of the simulator: its errors against measured runs."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

METHOD = """\
Predicted is the time of denoising on ranks that are processes of one machine, each behind a link of the stated rate,
from a table of this machine (core-seconds of single ranks, of routed experts by rows, of an exchange) and the recorded
routing and refreshes of each policy. No constant is fitted to the runs below; they say how fast the machine was, by a
fixed piece of work done before and after each. Error: predicted over measured, less 1.

- **measured**: seconds of denoising, slowest rank, median of the repeats [lowest-highest].
- **predicted parts**: home (attention, dense, router, cache) + routed experts + exchange + exchange of row counts.
- **measured parts**: mean of the ranks; their waiting is in exchange and wait, so parts compare only roughly.
- **machine**: seconds of that work over those when the table was made; the prediction is longer by as much.
- **others' cores**: how many cores worked for somebody else meanwhile, the kernel's work for the links among it."""

HEADER = ("policy", "ranks", "link", "ms per step", "measured, s", "predicted, s", "error", "predicted parts, s",
          "measured exchange + wait, s", "machine", "others' cores")  # fmt: skip


def validation_markdown(
    rows: Sequence[Mapping[str, Any]],
    setting: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    target: float,
) -> str:
    errors = [abs(row["error"]) for row in rows]
    verdict = (
        f"{sum(error <= target for error in errors)} of {len(rows)} cells are within {target:.0%}; median error "
        f"{median(errors):.1%}, largest {max(errors):.1%}."
    )
    facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in setting.items() if value != ""]
    for source in sources:
        facts.append(
            f"- measured: {source['file']}, {source['date']}, commit {source['commit']} {source['note']}".rstrip()
        )
    parts = ["# Simulator against measured runs", verdict, "\n".join(facts), METHOD]
    for config in dict.fromkeys(row["config"] for row in rows):
        mine = [row for row in rows if row["config"] == config]
        lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER), *(_line(row) for row in mine)]
        parts += [f"## {config}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    parts, seconds = row["parts"], row["measured_parts"]
    cells = (
        row["policy"],
        str(row["num_ranks"]),
        "loopback" if row["rate_mbit"] is None else f"{row['rate_mbit']:g} Mbit/s",
        f"{row['ms_per_step']:.0f}",
        f"{row['measured_s']:.2f} [{row['measured_low_s']:.2f}-{row['measured_high_s']:.2f}]",
        f"{row['predicted_s']:.2f}",
        f"{row['error']:+.1%}",
        " + ".join(f"{parts[name]:.2f}" for name in ("home", "experts", "exchange", "agree")),
        f"{seconds.get('exchange', 0):.2f} + {seconds.get('wait', 0):.2f}",
        f"{row['slowdown']:.2f}",
        f"{row['cores_used_by_others']:.1f}",
    )
    return "| " + " | ".join(cells) + " |"
