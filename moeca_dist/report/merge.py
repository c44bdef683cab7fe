"""One report over the parts of a large job. Some group of ranks generated each part on its own."""

from collections.abc import Mapping
from typing import Any

from moeca_dist.report.schema import BranchReport, CacheReport, ExchangeReport, FlopsReport, Report
from moeca_dist.timing import Seconds

_BRANCHES = (
    "routed",
    "refreshed",
    "unmatched",
    "reused",
    "forecast",
    "full_step",
    "score",
    "forced",
)
_EXCHANGE = ("bytes_sent", "bytes_full", "collectives", "collectives_skipped", "count_exchanges")


class ReportTotal:
    """The sum of reports of the same configuration, each given as a ``dataclasses.asdict`` mapping."""

    def __init__(self) -> None:
        self._first: Mapping[str, Any] | None = None
        self._num_images = 0
        self._denoise_s = 0.0
        self._bytes_peak = 0
        self._flops = [0, 0]
        self._branches = dict.fromkeys(_BRANCHES, 0)
        self._exchange: dict[str, Any] = dict.fromkeys(_EXCHANGE, 0)
        self._bytes_per_step: list[int] = []
        self._per_layer: list[dict[str, Any]] = []
        self._modules: dict[str, dict[str, int]] = {}
        self._seconds: dict[str, Any] = {}
        self._remarks: set[str | None] = set()

    def add(self, report: Mapping[str, Any]) -> None:
        """Add the report of one part.

        ``denoise_s`` adds up over groups that work at the same time. Memory is the largest peak.
        """
        self._first = self._first or report
        self._num_images += report["num_images"]
        self._denoise_s += report["denoise_s"]
        self._bytes_peak = max(self._bytes_peak, report["cache"]["bytes_peak"])
        self._flops[0] += report["flops"]["computed"]
        self._flops[1] += report["flops"]["full"]
        for name in _BRANCHES:
            self._branches[name] += report["branches"].get(name, 0)
        for name in _EXCHANGE:
            self._exchange[name] += report["exchange"][name]
        self._bytes_per_step = _sum(self._bytes_per_step, list(report["exchange"]["bytes_per_step"]))
        layers = [dict(layer) for layer in report["cache"]["per_layer"]]
        pairs = zip(self._per_layer, layers, strict=True) if self._per_layer else ()
        self._per_layer = [_sum(mine, theirs) | {"block": mine["block"]} for mine, theirs in pairs] or layers
        self._modules = _sum(self._modules, report["cache"]["modules"])
        self._seconds = _sum(self._seconds, report["seconds"])
        self._remarks.add(report["cache"]["remark"])

    def result(self, wall_s: float, batch: dict[str, Any], requests: dict[str, Any]) -> Report | None:
        """Return the report of the whole job, or None if no part was added.

        Args:
            requests: the job's images, as ``describe_requests`` returns them.
        """
        if self._first is None:
            return None
        first, routed = self._first, self._branches["routed"]
        served = self._branches["reused"] + self._branches["forecast"]
        computed, full = self._flops
        return Report(
            num_images=self._num_images,
            world_size=first["world_size"],
            ep_size=first["ep_size"],
            dp_size=first["dp_size"],
            num_steps=first["num_steps"],
            wall_s=wall_s,
            denoise_s=self._denoise_s,
            images_per_s=self._num_images / wall_s if wall_s else 0.0,
            flops=FlopsReport(computed, full, full / computed if computed else 1.0),
            branches=BranchReport(**self._branches, reuse_ratio=served / routed if routed else 0.0),
            exchange=ExchangeReport(
                first["exchange"]["mode"],
                first["exchange"]["location"],
                **self._exchange,
                bytes_per_step=tuple(self._bytes_per_step),
                row_dtype=first["exchange"].get("row_dtype", "exact"),
            ),
            cache=CacheReport(
                first["cache"]["policy"],
                self._bytes_peak,
                tuple(self._per_layer),
                self._modules,
                # What is said of a run is true of the whole where it is of every part.
                remark=self._remarks.pop() if len(self._remarks) == 1 else None,
            ),
            seconds=Seconds(**self._seconds),
            requests=requests,
            batch=batch,
        )


def _sum(mine: Any, theirs: Any) -> Any:
    """Numbers add up; lists and mappings place by place, what only one of them has as it is."""
    if isinstance(mine, Mapping):
        both = {name: _sum(value, theirs[name]) for name, value in mine.items() if name in theirs}
        return {**mine, **theirs, **both}
    if isinstance(mine, list | tuple):
        shorter, longer = sorted((list(mine), list(theirs)), key=len)
        return [_sum(*pair) for pair in zip(shorter, longer, strict=False)] + longer[len(shorter) :]
    return mine + theirs
