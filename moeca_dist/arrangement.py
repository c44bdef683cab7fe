"""How a configuration is carried out on the ranks: in which form rows travel."""

from moeca_dist.config import Config
from moeca_dist.kernels.row_codes import FORMATS
from moeca_dist.models.spec import ModelSpec
from moeca_dist.parallel.mesh import Mesh
from moeca_dist.parallel.references import Places, RowCoding


def row_coding(config: Config, spec: ModelSpec, mesh: Mesh, images: int) -> RowCoding | None:
    """How the rows of one round travel, with so many ``images`` here; None where none does, or all as computed.

    A collective of the expert-parallel group where it is not None: its ranks may have different shares.
    """
    group = mesh.expert_group
    if config.parallel.rows == "exact" or group is None:
        return None
    halves = 1 if config.sampling.cfg_scale == 1 else 2
    of_ranks = [halves * count for count in group.gather_objects(images)]
    form = FORMATS[config.parallel.rows]
    return RowCoding(Places.of(form, group.rank, of_ranks, spec.num_tokens, mesh.device))
