"""What tuning is asked for."""

from dataclasses import dataclass
from typing import Literal

from moeca_dist.tuning.candidate import Trial


@dataclass(frozen=True)
class Target:
    """``psnr``: at least ``value`` dB for 95% of the images, as fast as can be; ``speedup``: at least ``value`` times
    fewer FLOPs, as close to the exact images as can be.
    """

    kind: Literal["psnr", "speedup"]
    value: float

    def met(self, trial: Trial) -> bool:
        return self.reached(trial) >= self.value

    def reached(self, trial: Trial) -> float:
        """In the target's own unit."""
        return trial.bound_db if self.kind == "psnr" else trial.speedup

    def worth(self, trial: Trial) -> float:
        """What is maximised at a given cost."""
        return trial.bound_db if self.kind == "psnr" else trial.mean_db

    def __str__(self) -> str:
        if self.kind == "psnr":
            return f"{self.value:g} dB PSNR for 95% of the images"
        return f"{self.value:g}x fewer FLOPs"
