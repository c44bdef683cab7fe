"""Distributed inference for diffusion transformers with Mixture-of-Experts.

The public names are loaded on first use: the command line must answer ``--help`` and config errors at once, and torch
and deepspeed take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeca_dist.version import __version__ as __version__

if TYPE_CHECKING:
    from moeca_dist.checkpoints.load import load_model as load_model
    from moeca_dist.config import Config as Config
    from moeca_dist.config import load_config as load_config
    from moeca_dist.errors import PeerLostError as PeerLostError
    from moeca_dist.errors import UserError as UserError
    from moeca_dist.report.schema import Report as Report
    from moeca_dist.runtime.engine import Engine as Engine
    from moeca_dist.types import Request as Request

__all__ = ("Config", "Engine", "PeerLostError", "Report", "Request", "UserError", "load_config", "load_model")


def __getattr__(name: str) -> Any:
    match name:
        case "Config" | "load_config":
            module = "moeca_dist.config"
        case "Engine":
            module = "moeca_dist.runtime.engine"
        case "PeerLostError" | "UserError":
            module = "moeca_dist.errors"
        case "Report":
            module = "moeca_dist.report.schema"
        case "Request":
            module = "moeca_dist.types"
        case "load_model":
            module = "moeca_dist.checkpoints.load"
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
