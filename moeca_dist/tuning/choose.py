"""From a target to one candidate: how many full steps, which policy and order, which schedule."""

from collections.abc import Callable, Iterator

from moeca_dist.errors import UserError
from moeca_dist.tuning.candidate import ORDERS, Candidate, PolicyName, Trial
from moeca_dist.tuning.schedules import Schedule, even, num_full
from moeca_dist.tuning.target import Target
from moeca_dist.tuning.trials import Trials

# Shares of the evaluations that are full, from the coarsest to the most faithful: the first look, and the table.
LADDER = (0.08, 0.12, 0.16, 0.22, 0.3, 0.4, 0.55)
FIRST_POLICY: PolicyName = "network_forecast"
FIRST_ORDER = 1


class Selector:
    """A search through trials for the one that meets the target best; the same on all ranks."""

    def __init__(self, trials: Trials, target: Target, refinements: int) -> None:
        self.trials = trials
        self.target = target
        self.refinements = refinements
        # Not all that the trials hold: they may know more, from a run that went further before it was interrupted.
        self.tried: dict[Candidate, Trial] = {}

    def ladder(self) -> list[Trial]:
        """One trial for each rung: the range of what can be had."""
        return [self._first(total) for total in _distinct(self._rungs())]

    def choose(self) -> Trial:
        """The best trial that meets the target. Raises UserError, naming the best reached, where none does."""
        total = self._for_speedup() if self.target.kind == "speedup" else self._for_psnr()
        best = self.refined(self.across_policies(total))
        if self.target.kind == "speedup":
            return max((trial for trial in self.tried.values() if self.target.met(trial)), key=self.target.worth)
        while num_full(best.candidate.schedule) > self.trials.num_halves:
            # A step fewer may do once its schedule is refined too.
            fewer = self._with_total(best.candidate, num_full(best.candidate.schedule) - 1)
            fewer = self.refined(fewer, until=self.target.met)
            if not self.target.met(fewer):
                break
            best = fewer
        return best

    def more_faithful(self, trial: Trial) -> Trial:
        """The next candidate where ``trial`` met the target on the images that it was fitted on alone."""
        total = num_full(trial.candidate.schedule) + 1
        if total > self.trials.num_steps * self.trials.num_halves:
            self._refuse()
        return self.refined(self._with_total(trial.candidate, total))

    def across_policies(self, total: int) -> Trial:
        """The best of all policies and orders at the FLOPs of the first policy with ``total`` full steps."""
        reference = self._first(total)
        least = min(self.target.value, reference.speedup) if self.target.kind == "speedup" else reference.speedup
        best = [reference]
        for policy, orders in ORDERS:
            # Rounding apart: equal FLOPs are not fewer.
            trials = [trial for order in orders for trial in self._at_speedup(policy, order, total, least * (1 - 1e-9))]
            if trials:
                best.append(self._with_other_schedules(max(trials, key=self.target.worth)))
        return max(best, key=self.target.worth)

    def refined(self, trial: Trial, until: Callable[[Trial], bool] = lambda trial: False) -> Trial:
        """Other schedules by proxy, then moves of single full steps; each run for real, kept where it helps."""
        trial = self._with_other_schedules(trial)
        for number in range(self.refinements):
            if until(trial):
                break
            tried = {other.schedule for other in self.tried}
            moved = self.trials.neighbour(trial.candidate.schedule, tried, number)
            if moved is not None:
                trial = self._better(trial, moved)
        return trial

    def _with_other_schedules(self, trial: Trial) -> Trial:
        for schedule in self.trials.schedules(num_full(trial.candidate.schedule)):
            trial = self._better(trial, schedule)
        return trial

    def _better(self, trial: Trial, schedule: Schedule) -> Trial:
        other = self._trial(Candidate(trial.candidate.policy, trial.candidate.order, schedule))
        allowed = self.target.kind != "speedup" or self.target.met(other)
        return other if allowed and self.target.worth(other) > self.target.worth(trial) else trial

    def _trial(self, candidate: Candidate) -> Trial:
        self.tried[candidate] = self.trials.trial(candidate)
        return self.tried[candidate]

    def _first(self, total: int) -> Trial:
        return self._trial(Candidate(FIRST_POLICY, FIRST_ORDER, self.trials.schedules(total)[0]))

    def _with_total(self, like: Candidate, total: int) -> Trial:
        return self._trial(Candidate(like.policy, like.order, self.trials.schedules(total)[0]))

    def _at_speedup(self, policy: PolicyName, order: int, total: int, speedup: float) -> Iterator[Trial]:
        """The policy with as many full steps as ``speedup`` allows, at most ``total``; nothing where none is enough."""
        for fewer in range(total, self.trials.num_halves - 1, -1):
            if self._predicted(policy, order, fewer) < speedup:
                continue
            trial = self._trial(Candidate(policy, order, self.trials.schedules(fewer)[0]))
            if trial.speedup >= speedup:
                yield trial
                return

    def _predicted(self, policy: PolicyName, order: int, total: int) -> float:
        schedule = even(total, self.trials.num_steps, self.trials.num_halves)
        return Candidate(policy, order, schedule).predicted_speedup(
            self.trials.engine.model.spec, self.trials.num_steps
        )

    def _for_speedup(self) -> int:
        """The most full steps with which the first policy is fast enough."""
        most = self.trials.num_halves * self.trials.num_steps
        for total in range(most, self.trials.num_halves - 1, -1):
            if self._predicted(FIRST_POLICY, FIRST_ORDER, total) >= self.target.value:
                return total
        raise self._unreachable(self._first(self.trials.num_halves))

    def _for_psnr(self) -> int:
        """The fewest full steps that meet the target, by bisection between two rungs."""
        low, high = self.trials.num_halves, self.trials.num_halves * self.trials.num_steps
        for total in _distinct(self._rungs()):
            if self.target.met(self._first(total)):
                high = min(high, total)
            else:
                low = max(low, total)
        if high == self.trials.num_halves * self.trials.num_steps and not self.target.met(self._first(high - 1)):
            self._refuse()
        while high - low > 1:
            middle = (low + high) // 2
            if self.target.met(self._first(middle)):
                high = middle
            else:
                low = middle
        return low if self.target.met(self._first(low)) else high

    def _rungs(self) -> Iterator[int]:
        evaluations = self.trials.num_halves * self.trials.num_steps
        return (max(self.trials.num_halves, round(share * evaluations)) for share in LADDER)

    def _refuse(self) -> None:
        raise self._unreachable(max(self.tried.values(), key=self.target.reached))

    def _unreachable(self, best: Trial) -> UserError:
        return UserError(
            f"no cache reaches {self.target}: the best found has {best.bound_db:.1f} dB for 95% of the images, "
            f"{best.mean_db:.1f} dB on average, at {best.speedup:.2f}x fewer FLOPs; lower the target, or use "
            "cache.policy none"
        )


def _distinct(totals: Iterator[int]) -> list[int]:
    return sorted(set(totals))
