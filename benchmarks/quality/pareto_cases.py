"""What ``pareto.py`` compares: every caching policy over its knobs, and fewer steps as the control."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.common.hardware import REPOSITORY
from moeca_dist.cache.policies.moeca_forecast import scaled_steps
from moeca_dist.cache.policies.registry import POLICIES, build_policy
from moeca_dist.config import QUALITY_NAMES, CacheConfig, load_config
from moeca_dist.errors import UserError

TUNED = REPOSITORY / "configs" / "tuned"
# Full steps of 50, for runs of 50 steps.
DEFAULT_STEPS = tuple(scaled_steps(50))  # those of moeca_forecast, for the others too


@dataclass(frozen=True)
class Case:
    """One row: ``series`` is the line it belongs to in the plot, ``cache`` the ``cache:`` section of the configuration.

    ``num_steps``: of a run with fewer steps and no cache; None for the benchmark's own number. ``calibrated``: output
    weights are fitted for it before the run, on images of another seed.
    """

    series: str
    label: str
    cache: dict[str, Any] = field(default_factory=dict)
    num_steps: int | None = None
    calibrated: bool = False

    @property
    def name(self) -> str:
        return f"{self.series}: {self.label}" if self.label else self.series


EXACT = Case("exact", "", {"policy": "none"})


def uniform(series: str, policy: str, intervals: Sequence[int], **options: Any) -> list[Case]:
    return [Case(series, f"every {n}", {"policy": policy, "interval": n, **options}) for n in intervals]


def placed(series: str, label: str, policy: str, steps: list[int] | dict[str, list[int]], **options: Any) -> Case:
    return Case(series, label, {"policy": policy, "full_steps": steps, **options})


def calibrated(case: Case) -> Case:
    return replace(case, series=f"{case.series}, calibrated", calibrated=True)


def tuned(quality: str) -> Case:
    """A file that the repository ships, with the calibration that lies beside it."""
    cache = load_config(TUNED / f"demo_{quality}.yaml").cache
    return Case("tuned", quality, cache.model_dump(exclude_none=True))


def at_tuned_steps(series: str, policy: str, **options: Any) -> Case:
    """Another policy with the full steps of the shipped default."""
    steps = tuned("balanced").cache["full_steps"]
    return Case(series, "tuned steps", {"policy": policy, "full_steps": steps, **options})


AT_TUNED_STEPS = (
    at_tuned_steps("taylorseer order 1", "taylorseer", order=1),
    at_tuned_steps("taylorseer order 2", "taylorseer", order=2),
    at_tuned_steps("moeca_forecast placed", "moeca_forecast"),
)

CALIBRATED = (
    *AT_TUNED_STEPS,
    Case("fora", "every 5", {"policy": "fora", "interval": 5}),
    placed("taylorseer order 1", "default steps", "taylorseer", list(DEFAULT_STEPS), order=1),
    Case("moeca_forecast placed", "default", {"policy": "moeca_forecast"}),
    placed("network_forecast", "default steps", "network_forecast", list(DEFAULT_STEPS)),
    *uniform("network_forecast", "network_forecast", [5, 8]),
)

CASES: tuple[Case, ...] = (
    *uniform("fora", "fora", [2, 3, 4]),
    *uniform("taylorseer order 1", "taylorseer", [4, 5], order=1),
    placed("taylorseer order 1", "default steps", "taylorseer", list(DEFAULT_STEPS), order=1),
    *uniform("taylorseer order 2", "taylorseer", [5], order=2),
    placed("taylorseer order 2", "default steps", "taylorseer", list(DEFAULT_STEPS), order=2),
    *uniform("moeca_forecast uniform", "moeca_forecast", [3, 4, 5]),
    Case("moeca_forecast placed", "default", {"policy": "moeca_forecast"}),
    Case("moeca_forecast placed", "default, attention too", {"policy": "moeca_forecast", "attention_sync": True}),
    placed("branch reuse (order 0)", "default steps", "moeca_forecast", list(DEFAULT_STEPS), order=0),
    Case("random branches", "5% every 4", {"policy": "random", "ratio": 0.05}),
    # 7%: the paper's FLOPs ratio of 2.8, with branches chosen by its score and at random.
    Case("random branches", "7% every 4, attention too", {"policy": "random", "ratio": 0.07, "attention_sync": True}),
    *(Case("moeca", f"{ratio:.0%} every 4", {"policy": "moeca", "refresh_ratio": ratio}) for ratio in (0.05, 0.07)),
    Case("moeca", "5% attention not refreshed", {"policy": "moeca", "refresh_ratio": 0.05, "attention_sync": False}),
    *uniform("network_forecast", "network_forecast", [4, 5]),
    placed("network_forecast", "default steps", "network_forecast", list(DEFAULT_STEPS)),
    *map(calibrated, CALIBRATED),
    *AT_TUNED_STEPS,
    *map(tuned, QUALITY_NAMES),
    *uniform("toca", "toca", [3]),
    *(Case("teacache", f"delta {delta}", {"policy": "teacache", "delta": delta}) for delta in (0.05, 0.1)),
    Case("dice_skip", "every 2", {"policy": "dice_skip"}),
    *(Case("fewer steps", f"{steps} steps", {"policy": "none"}, steps) for steps in (10, 13, 25)),
)

# Storage in fewer bits: run only where --only names them.
STORAGE: tuple[Case, ...] = tuple(
    Case(f"storage of {policy}", dtype, {"policy": policy, "dtype": dtype, **options})
    for policy, options in (
        ("moeca_forecast", {}),
        ("taylorseer", {"full_steps": list(DEFAULT_STEPS)}),
        ("moeca", {"refresh_ratio": 0.05}),
    )
    for dtype in ("model", "bfloat16", "float8_e4m3fn")
)

QUICK = ("fora: every 4", "moeca_forecast placed: default", "fewer steps: 13 steps")


def checked(cases: Sequence[Case], num_steps: int, *, guided: bool) -> dict[str, CacheConfig]:
    """The cache configuration of every case, by name.

    Raises UserError for a policy that is not registered, knobs that it refuses, steps beyond the benchmark's, and two
    cases of one name.
    """
    configs: dict[str, CacheConfig] = {}
    for case in cases:
        policy = case.cache["policy"]
        if policy != "none" and policy not in POLICIES:
            known = ", ".join(sorted(POLICIES))
            raise UserError(f"configuration {case.name!r}: policy {policy} is not registered; known are {known}")
        if case.name in configs:
            raise UserError(f"two configurations are called {case.name!r}: name what differs in the label")
        if case.num_steps is not None and case.num_steps >= num_steps:
            raise UserError(f"configuration {case.name!r}: not fewer than the {num_steps} steps of the exact run")
        try:
            configs[case.name] = CacheConfig.model_validate(case.cache)
        except ValueError as error:
            first = str(error).splitlines()[-2].strip()
            raise UserError(f"configuration {case.name!r}: {first}") from None
        build_policy(configs[case.name], num_steps, guided=guided)
    return configs
