"""Auxiliary-loss-free load balancing of experts (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

Shape suffixes: E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moeca_dist.types import Routing


class LoadBalancer:
    """A counter of each expert's tokens that moves the router's correction bias against the imbalance.

    The bias takes part in the choice of experts only, never in their weights. So this rule moves it, not gradients.
    Each router has one hook, which ``remove()`` takes off.
    """

    def __init__(self, model: nn.Module) -> None:
        gates = {name: module for name, module in model.named_modules() if hasattr(module, "e_score_correction_bias")}
        self._biases: dict[str, Tensor] = {name: gate.e_score_correction_bias for name, gate in gates.items()}
        self._load_E = {name: torch.zeros_like(bias_E) for name, bias_E in self._biases.items()}
        self._hooks = [gate.register_forward_hook(self._counter(name)) for name, gate in gates.items()]

    def _counter(self, name: str) -> Any:
        def count(_module: nn.Module, _inputs: tuple[Any, ...], routing: Routing) -> None:
            load_E = self._load_E[name]
            load_E += torch.bincount(routing.expert_N, minlength=len(load_E))

        return count

    def step(self, rate: float) -> float:
        """Add ``rate * sign(mean load - load)`` to every bias and forget the loads counted since the last step.

        Returns the worst layer's ratio of the largest to the mean load (1 is perfect balance).
        """
        worst = 1.0
        for name, bias_E in self._biases.items():
            load_E = self._load_E[name]
            bias_E += rate * torch.sign(load_E.mean() - load_E)
            worst = max(worst, float(load_E.max() / load_E.mean()))
            load_E.zero_()
        return worst

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
