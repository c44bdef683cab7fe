"""Keys and values that a configuration once had, and their successors.

An old file is answered with one line that names the remedy. Nothing in it is silently ignored.
"""

from collections.abc import Mapping
from types import MappingProxyType

REMOVED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "model.compile": "remove it; on a CPU try the malloc variables of docs/running.md",
        "cache.late_refresh": "remove it; every refreshed branch is served in the step that computes it",
        "parallel.exchange": "remove it; the exact exchange is the only one",
        "parallel.budget": "remove it; a cache step computes what its policy refreshes",
        "parallel.budget_groups": "remove it; a cache step computes what its policy refreshes",
        "parallel.budget_fill": "remove it; a cache step computes what its policy refreshes",
        "parallel.two_batch_overlap": "remove it; on slow links parallel.row_dtype=int8 wins more",
        "cache.extra_entries": "remove it; a token has as many stored branches as routed experts",
        "cache.schedule": "remove it, or state cache.full_steps",
        "cache.tau0": "state cache.refresh_ratio, from which the threshold follows",
        "cache.drift_weight": "remove it; policy moeca has the paper's weights",
        "cache.norm_weight": "remove it; policy moeca has the paper's weights",
        "cache.gate_scale": "remove it; gates are scored as the model gives them",
        "cache.alpha": "remove it; policy moeca has the paper's value, 0.6",
        "cache.decay": "remove it; policy moeca has the paper's value, 0.65",
        "cache.statistics": "remove it; expert usage is that of each image on its own",
        "cache.guard": "remove it; for images unlike those of a calibration, calibrate anew",
    }
)
RENAMED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "cache.placement": "cache.location",
        "parallel.rows": "parallel.row_dtype",
    }
)
REMOVED_VALUES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("parallel.row_dtype", "fp8"): "use int8, which loses 8 to 14 dB less at the same bytes",
        ("cache.dtype", "float16"): "use bfloat16, which takes as much memory",
    }
)


def explain_unknown_key(key: str) -> str | None:
    """Return the successor of ``key`` (``section.key``) as a sentence, or None if the key never existed."""
    if key in REMOVED_KEYS:
        return f"{key} no longer exists: {REMOVED_KEYS[key]}"
    if key in RENAMED_KEYS:
        return f"{key} is now called {RENAMED_KEYS[key]}: rename it"
    return None


def explain_refused_value(key: str, value: object) -> str | None:
    """Return the successor of ``value`` of ``key`` as a sentence, or None if the value was never allowed."""
    if isinstance(value, str) and (key, value) in REMOVED_VALUES:
        return f"{key} {value} no longer exists: {REMOVED_VALUES[key, value]}"
    return None
