"""The progress of a running batch for people: a bar on a terminal, a line now and then in a log file."""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from tqdm import tqdm

from moeca_dist.ray_batch.supervisor import Status

logger = logging.getLogger(__name__)

GangState = Literal["waiting", "starting", "generating", "idle", "lost", "given up"]
LINE_INTERVAL_S = 30.0


@dataclass
class Board:
    """The states of the gangs. Each gang writes its own entries, and the driver reads them."""

    states: dict[int, GangState] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    in_flight: set[int] = field(default_factory=set)

    def summary(self) -> str:
        """Return a line such as ``2 generating (step 31, 7), 1 waiting``."""
        counts = Counter(self.states.values())
        parts = []
        for state, count in counts.items():
            at = [str(self.steps[gang]) for gang in sorted(self.steps) if self.states[gang] == "generating"]
            detail = f" (step {', '.join(at)})" if state == "generating" and at else ""
            parts.append(f"{count} {state}{detail}")
        return ", ".join(parts)


class ProgressBar:
    """A bar over the images of the whole job. The rate is that of this run."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._start = done
        self._started = self._told = time.monotonic()
        self._told_images = done
        # disable=None: no bar where the output is no terminal.
        self._bar = tqdm(total=total, initial=done, unit="image", desc="batch", disable=None, smoothing=0.05)

    def show(self, status: Status, board: Board) -> None:
        retries = f", {status.retries} retries" if status.retries else ""
        retries += f", {status.quarantined} quarantined" if status.quarantined else ""
        text = f"gangs: {board.summary()}{retries}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(status.images - self._bar.n)
        if self._bar.disable:
            self._tell(status.images, text)

    def close(self) -> None:
        self._bar.close()

    def _tell(self, images: int, text: str) -> None:
        now = time.monotonic()
        if now - self._told < LINE_INTERVAL_S:
            return
        self._told = now
        made = images - self._start
        rate = made / (now - self._started)
        left = f"{tqdm.format_interval((self._total - images) / rate)} left" if made else "time left unknown"
        logger.info("%d/%d images, %.2f images/s, %s; %s", images, self._total, rate, left, text)
