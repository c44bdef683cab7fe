"""One report over the parts of a large job, each of which some group of ranks generated on its own."""

from collections.abc import Mapping
from typing import Any

from moeca_dist.report import BranchReport, CacheReport, ExchangeReport, FlopsReport, Report

_BRANCHES = ("routed", "refreshed", "unmatched", "reused", "forecast")
_EXCHANGE = ("bytes_sent", "bytes_full", "collectives", "collectives_elided")


class ReportTotal:
    """Adds up reports of the same configuration, given as ``dataclasses.asdict`` makes them; holds only the sums."""

    def __init__(self) -> None:
        self._first: Mapping[str, Any] | None = None
        self._num_images = 0
        self._denoise_s = 0.0
        self._bytes_peak = 0
        self._flops = [0, 0]
        self._branches = dict.fromkeys(_BRANCHES, 0)
        self._exchange = dict.fromkeys(_EXCHANGE, 0)
        self._bytes_per_step: list[int] = []
        self._per_layer: list[dict[str, Any]] = []

    def add(self, report: Mapping[str, Any]) -> None:
        """Count one part. ``denoise_s`` adds up over groups that work at the same time; memory is the largest peak."""
        self._first = self._first or report
        self._num_images += report["num_images"]
        self._denoise_s += report["denoise_s"]
        self._bytes_peak = max(self._bytes_peak, report["cache"]["bytes_peak"])
        self._flops[0] += report["flops"]["computed"]
        self._flops[1] += report["flops"]["full"]
        for name in _BRANCHES:
            self._branches[name] += report["branches"][name]
        for name in _EXCHANGE:
            self._exchange[name] += report["exchange"][name]
        self._bytes_per_step = _sum(self._bytes_per_step, list(report["exchange"]["bytes_per_step"]))
        layers = [dict(layer) for layer in report["cache"]["per_layer"]]
        pairs = zip(self._per_layer, layers, strict=True) if self._per_layer else ()
        self._per_layer = [_sum_layers(mine, theirs) for mine, theirs in pairs] or layers

    def result(self, wall_s: float, batch: dict[str, Any]) -> Report | None:
        """The job as a whole; None where no part was added."""
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
                first["exchange"]["placement"],
                **self._exchange,
                bytes_per_step=tuple(self._bytes_per_step),
            ),
            cache=CacheReport(first["cache"]["policy"], self._bytes_peak, tuple(self._per_layer)),
            batch=batch,
        )


def _sum(mine: list[int], theirs: list[int]) -> list[int]:
    if len(mine) < len(theirs):
        mine = mine + [0] * (len(theirs) - len(mine))
    return [value + (theirs[place] if place < len(theirs) else 0) for place, value in enumerate(mine)]


def _sum_layers(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Counts and lists of counts add up; the block's number stays."""
    total: dict[str, Any] = {"block": mine["block"]}
    for name, value in mine.items():
        if name != "block":
            total[name] = _sum(value, list(theirs[name])) if isinstance(value, list) else value + theirs[name]
    return total
