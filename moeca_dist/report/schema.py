"""The figures of a run, in the layout of ``report.json``. Sizes are in bytes, times in seconds, work in FLOP."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moeca_dist.timing import Seconds
from moeca_dist.types import Request


@dataclass(frozen=True)
class FlopsReport:
    """Counted work of the denoising network, all ranks together. ``full`` is the work of the exact path."""

    computed: int
    full: int
    speedup: float


@dataclass(frozen=True)
class BranchReport:
    """Branches (token x routed expert) of all ranks and steps.

    ``refreshed`` divides into ``full_step``, ``unmatched``, ``score`` and ``forced`` (see ``cache.statistics.Reason``).
    """

    routed: int
    refreshed: int
    unmatched: int
    reused: int
    forecast: int
    reuse_ratio: float
    full_step: int = 0
    score: int = 0
    forced: int = 0


@dataclass(frozen=True)
class ExchangeReport:
    """Payload of the expert all-to-all that left its rank, all ranks together. Collectives are counted per rank.

    - ``mode``: ``local`` if every rank holds all experts and nothing travels, else ``exact``.
    - ``location``: the side that keeps branch values, ``home`` or ``owner``. It is None without a branch cache, or if
      every rank holds all experts.
    - ``bytes_full``: bytes of the exact path. If the routers run in every step, this is counted from their routing.
      They do so without a cache and with policies of single branches. Policies of whole modules route in full steps
      only. The bytes of the other steps are extrapolated from these.
    - ``bytes_per_step``: ``bytes_sent`` by denoising step.
    - ``count_exchanges``: times that each rank's row counts were gathered. The few bytes of these counts are not
      included.
    - ``row_dtype``: the format of the rows. It is ``exact`` also if nothing travels.
    """

    mode: str
    location: str | None
    bytes_sent: int
    bytes_full: int
    collectives: int
    collectives_skipped: int
    count_exchanges: int = 0
    bytes_per_step: tuple[int, ...] = ()
    row_dtype: str = "exact"


@dataclass(frozen=True)
class CacheReport:
    """The figures of the cache.

    ``per_layer`` has one entry per MoE block if branches are cached (see ``figures.RunFigures.per_layer``). ``modules``
    has the tokens by module (see ``figures.RunFigures.modules``). ``remark`` is the policy's remark about the run, such
    as a threshold that never fired.
    """

    policy: str
    bytes_peak: int
    per_layer: tuple[dict[str, Any], ...] = ()
    modules: dict[str, dict[str, int]] = field(default_factory=dict)
    remark: str | None = None


@dataclass(frozen=True)
class Report:
    """The figures of one run.

    - ``wall_s``: seconds from the first request to the last image.
    - ``denoise_s``: seconds of denoising on the slowest rank. ``seconds`` divides them into sections.
    - ``wall_speedup``: ratio of the uncached run's ``denoise_s`` to this one. It is None without an uncached run.
    - ``quality``: image quality against the uncached images. It is None without an uncached run, and for latents.
    - ``requests``: a description of the images (see ``describe_requests``).
    """

    num_images: int
    world_size: int
    ep_size: int
    dp_size: int
    num_steps: int
    wall_s: float
    denoise_s: float
    images_per_s: float
    flops: FlopsReport
    branches: BranchReport
    exchange: ExchangeReport
    cache: CacheReport
    seconds: Seconds
    wall_speedup: float | None = None
    quality: dict[str, float] | None = None
    telemetry: dict[str, Any] | None = None
    requests: dict[str, Any] | None = None
    batch: dict[str, Any] | None = None

    def compared_with(self, uncached: "Report", quality: dict[str, float] | None) -> "Report":
        """Return this report with the wall-clock ratio to the exact run of the same requests.

        Args:
            quality: image quality against the uncached images, or None for latents.
        """
        ratio = uncached.denoise_s / self.denoise_s if self.denoise_s else 1.0
        exchange = replace(self.exchange, bytes_full=uncached.exchange.bytes_sent)
        return replace(self, exchange=exchange, wall_speedup=ratio, quality=quality)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def summary(self) -> str:
        """Return a short table for people."""
        share = f"DP {self.dp_size} x EP {self.ep_size}"
        rows = [
            ("images", f"{self.num_images} in {self.num_steps} steps"),
            ("ranks", f"{self.world_size} ({share})"),
            ("wall clock", f"{self.wall_s:.1f} s ({self.images_per_s:.2f} images/s)"),
            ("denoising", f"{self.denoise_s:.1f} s"),
            ("compute", f"{scaled(self.flops.computed, 1000)}FLOP"),
            ("branches routed", f"{self.branches.routed:,}"),
            ("exchange", f"{scaled(self.exchange.bytes_sent, 1024)}iB in {self.exchange.collectives:,} collectives"),
            ("cache", self.cache.policy),
        ]
        rows += self._cache_rows() if self.cache.policy != "none" else []
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)

    def _cache_rows(self) -> list[tuple[str, str]]:
        """What the cache saved, and what it cost."""
        branches = self.branches
        rows = [
            ("  FLOP", f"{self.flops.speedup:.2f}x fewer"),
            ("  branches", f"{100 * branches.refreshed / max(1, branches.routed):.1f}% computed"),
            ("  memory", f"{scaled(self.cache.bytes_peak, 1024)}iB"),
        ]
        if self.exchange.bytes_full:
            rows.append(("  bytes", f"{100 * self.exchange.bytes_sent / self.exchange.bytes_full:.1f}% sent"))
        if self.wall_speedup is not None:
            rows.append(("  denoising", f"{self.wall_speedup:.2f}x faster than uncached"))
        if self.quality is not None:
            rows.append(("  quality", f"{self.quality['psnr_db']:.1f} dB PSNR, SSIM {self.quality['ssim']:.4f}"))
        return rows


def describe_requests(requests: Iterable[Request]) -> dict[str, Any]:
    """Return the seeds, and a digest of every (index, label, seed) in order.

    Runs with equal digests made images of the same noise.
    """
    digest, seeds = hashlib.sha256(), set()
    for request in requests:
        seeds.add(request.seed)
        digest.update(f"{request.index} {request.label} {request.seed}\n".encode())
    return {"seeds": sorted(seeds), "sha256": digest.hexdigest()}


def scaled(value: float, base: int) -> str:
    """Return a value with a metric prefix, such as ``1.23 G``. The caller adds the unit (``iB`` for base 1024)."""
    prefixes = ["", "K" if base == 1024 else "k", "M", "G", "T", "P"]
    while value >= base and len(prefixes) > 1:
        value /= base
        prefixes.pop(0)
    return f"{value:.2f} {prefixes[0]}"
