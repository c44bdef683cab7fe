"""One outcome for all ranks: an error on one rank is raised on all of them, so that no rank waits for the others."""

from collections.abc import Callable
from typing import TypeVar

from moeca_dist.errors import UserError
from moeca_dist.parallel.mesh import Mesh

T = TypeVar("T")


def on_all_ranks(mesh: Mesh, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank, and raise UserError on all ranks if it does so on any.

    The message names the failing rank unless that is rank 0.
    """
    result: T | None = None
    problem: UserError | None = None
    try:
        result = work()
    except UserError as error:
        problem = error
    if mesh.world is None:
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]  # None only if work() returned None
    problems = mesh.world.gather_objects(str(problem) if problem is not None else None)
    for rank, message in enumerate(problems):
        if message is not None:
            raise UserError(message if rank == 0 else f"rank {rank}: {message}") from problem
    return result  # type: ignore[return-value]
