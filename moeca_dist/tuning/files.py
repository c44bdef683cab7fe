"""The files of a tuning run: all of them appear, or none."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moeca_dist.config import QUALITY_NAMES, Config
from moeca_dist.errors import UserError
from moeca_dist.tuning.page import page
from moeca_dist.tuning.plots import plot
from moeca_dist.tuning.tune import Tuned


@dataclass(frozen=True)
class TunedFiles:
    """``config`` is the one that the others lie beside."""

    config: Path

    @property
    def calibration(self) -> Path:
        return self.config.with_suffix(".calibration.json")

    @property
    def page(self) -> Path:
        return self.config.with_suffix(".md")

    @property
    def plot(self) -> Path:
        return self.config.with_suffix(".png")

    @property
    def state(self) -> Path:
        return self.config.with_suffix(".state")

    def check(self, *, overwrite: bool) -> None:
        """Raise UserError where the files could not be written."""
        if self.config.suffix not in (".yaml", ".yml"):
            raise UserError(f"--out {self.config}: name a .yaml file")
        if not self.config.parent.is_dir():
            raise UserError(f"--out {self.config}: there is no folder {self.config.parent}")
        there = [path for path in (self.config, self.calibration, self.page, self.plot) if path.exists()]
        if there and not overwrite:
            raise UserError(f"{there[0]} exists already; choose another --out, or add --overwrite to replace it")

    def write(self, tuned: Tuned, config: Config) -> None:
        """Write everything beside its place, then rename; the configuration last, because it names the calibration."""
        partial = {path: path.with_name(f".{path.name}.partial") for path in (self.calibration, self.page, self.plot)}
        partial[self.config] = self.config.with_name(f".{self.config.name}.partial")
        try:
            partial[self.calibration].write_text(tuned.calibration.to_json())
            partial[self.page].write_text(page(tuned, self.config, self.calibration, self.plot))
            plot(tuned, partial[self.plot])
            partial[self.config].write_text(self._yaml(tuned, config))
            for path, written in partial.items():
                os.replace(written, path)
        finally:
            for written in partial.values():
                written.unlink(missing_ok=True)

    def _yaml(self, tuned: Tuned, config: Config) -> str:
        """The run as a file that may be moved together with what it names."""
        chosen, held_out, target = tuned.chosen, tuned.held_out, tuned.settings.target
        cache = chosen.candidate.cache().model_copy(update={"calibration": Path(self.calibration.name)})
        sections = _stated(config.model_copy(update={"cache": cache}))
        # What the weights were fitted for, whatever the defaults will be.
        fitted_for = tuned.calibration.fitted_for
        sections["sampling"] = sections.get("sampling", {}) | {
            "num_steps": fitted_for.num_steps,
            "cfg_scale": fitted_for.cfg_scale,
        }
        folder = self.config.parent.resolve()
        for section, key in _PATHS:
            if path := sections.get(section, {}).get(key):
                sections[section][key] = os.path.relpath(path, folder)
        head = (
            f"# Tuned for {target}: {held_out.speedup:.2f}x fewer FLOPs, {held_out.mean_db:.1f} dB on average on "
            f"held-out images.\n# {self.page.name} says how it was chosen.\n"
        )
        return head + yaml.safe_dump(sections, sort_keys=False, width=120, default_flow_style=None)


# Other files that a configuration may name.
_PATHS = (
    ("model", "checkpoint"),
    ("sampling", "vae"),
    ("parallel", "expert_placement"),
    *(("quality", name) for name in QUALITY_NAMES),
)


def _stated(config: Config) -> dict[str, Any]:
    """What differs from the defaults, without empty sections."""
    sections: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    return sections
