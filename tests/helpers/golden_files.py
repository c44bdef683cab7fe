"""The golden files: one place that reads them and turns them back into checkpoints of the original layout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
DSMOE_NAMES = ("dsmoe_e8", "dsmoe_e12", "dsmoe_grouped")
DIT_MOE_NAMES = ("dit_moe_qkv", "dit_moe_flash")
GOLDEN_NAMES = DSMOE_NAMES + DIT_MOE_NAMES
# The largest absolute difference allowed; the flash layout rounds q and k to fp16, so it differs between kernels.
FORWARD_TOLERANCE = dict.fromkeys(GOLDEN_NAMES, 1e-5) | {"dit_moe_flash": 2e-3}
EULER_TOLERANCE = dict.fromkeys(GOLDEN_NAMES, 1e-4) | {"dit_moe_flash": 1e-2}

STATE_PREFIX = "state_dict."


@dataclass(frozen=True)
class GoldenFile:
    """One golden file: ``state_dict`` has the original keys, ``tensors`` the inputs and the official outputs."""

    name: str
    config: Mapping[str, Any]
    state_dict: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def is_dsmoe(self) -> bool:
        return "moe" in self.config

    @property
    def first_moe_block(self) -> int:
        """Index of the block whose MoE layer ``moe_in`` .. ``moe_out`` belong to."""
        return 1 if self.is_dsmoe else 0

    @property
    def options(self) -> dict[str, Any]:
        """The options of ``load_model`` that the tensors' shapes cannot tell."""
        options = {"num_heads": self.config["num_heads"]}
        if not self.is_dsmoe:
            return options | {"num_experts_per_tok": self.config["num_experts_per_tok"]}
        routing = ("num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor")
        # DSMoE stores no position table, so its checkpoint does not know the image size.
        return (
            options | {"input_size": self.config["input_size"]} | {name: self.config["moe"][name] for name in routing}
        )

    def write_checkpoint(self, path: Path) -> Path:
        """Write the state dict alone to ``path``, keys unchanged: ``.pt`` or ``.safetensors`` by the suffix."""
        if path.suffix == ".safetensors":
            save_file(dict(self.state_dict), path)
        else:
            torch.save(dict(self.state_dict), path)
        return path


def load_golden(name: str) -> GoldenFile:
    """Read ``tests/golden/<name>.safetensors``."""
    state_dict, tensors = {}, {}
    with safe_open(GOLDEN_DIR / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            tensor = file.get_tensor(key)
            if key.startswith(STATE_PREFIX):
                state_dict[key.removeprefix(STATE_PREFIX)] = tensor
            else:
                tensors[key] = tensor
    return GoldenFile(name=name, config=config, state_dict=state_dict, tensors=tensors)
