"""How a configuration is carried out on the ranks: how many rows travel, and in which form."""

import torch

from moeca_dist.cache.budget import Budget
from moeca_dist.config import Config
from moeca_dist.models.spec import ModelSpec
from moeca_dist.moe.placement import budget_groups, budget_rows
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.parallel.placement import ExpertPlacement


def rows_of_budget(config: Config, spec: ModelSpec, ep_size: int) -> dict[int, int] | None:
    """Rows by MoE block of each image, guidance half and group in exchange mode ``budget``; None in the others."""
    if config.parallel.exchange != "budget":
        return None
    groups = budget_groups(config.parallel, ExpertPlacement.contiguous(spec.num_experts, ep_size))
    return budget_rows(config.parallel, spec.moe_blocks, spec.num_tokens, spec.num_experts_per_tok, groups)


def budget_of_round(
    config: Config, rows: dict[int, int] | None, spec: ModelSpec, mesh: Mesh, images: int
) -> Budget | None:
    """The rows of one round with so many ``images`` here; None without ``rows``.

    A collective of the expert-parallel group: its ranks may have different shares.
    """
    if rows is None:
        return None
    group = mesh.expert_group
    most = images if group is None else max(group.gather_objects(images))
    groups = budget_groups(config.parallel, ExpertPlacement.contiguous(spec.num_experts, mesh.ep_size))
    return Budget(
        rows,
        torch.tensor(groups, device=mesh.device),
        max(config.parallel.budget_groups or 0, mesh.ep_size),
        mesh.ep_size,
        most,
        config.parallel.budget_fill,
    )
