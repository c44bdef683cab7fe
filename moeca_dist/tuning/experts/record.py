"""Recording the routing of a run: the dispatchers of its network are wrapped while it generates, and only then.

Shape suffixes: B images of this rank, T tokens, K routed experts per token, N branches; and those of ``RoutingTrace``.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeca_dist.cache.policy import BranchPolicy, ModulePolicy
from moeca_dist.errors import UserError
from moeca_dist.kernels.types import Kernels
from moeca_dist.models.backbone import DiffusionTransformer
from moeca_dist.parallel.collectives import Handle
from moeca_dist.parallel.dispatcher import DispatchedRows, Dispatcher
from moeca_dist.parallel.row_packing import RowDtype
from moeca_dist.runtime.engine import Engine
from moeca_dist.tuning.experts.trace import RoutingTrace
from moeca_dist.types import Branches, Request, Routing


def record_routing(engine: Engine, requests: Sequence[Request], source: str = "") -> RoutingTrace | None:
    """Generate ``requests`` and return their trace on rank 0, None elsewhere; the images are thrown away.

    A collective of the world. Raises UserError for what leaves no complete trace: values at the owners, CUDA graphs,
    and policies that compute single tokens of a module.
    """
    _check(engine)
    recorder = RoutingRecorder(engine.model)
    with recorder:
        engine.generate_into(lambda _, batch: None, requests)
    num_halves = 2 if engine.config.sampling.cfg_scale != 1 else 1
    mine, world = recorder.rounds(engine.num_steps, num_halves), engine.mesh.world
    ranks = [mine] if world is None else world.gather_objects(mine)
    if engine.mesh.rank:
        return None
    # Requests are dealt round by round, and in rank order within a round.
    parts = [part for round_of_ranks in zip(*ranks, strict=True) for part in round_of_ranks if part is not None]
    ids, refreshed = (np.concatenate(arrays, axis=3) for arrays in zip(*parts, strict=True))
    spec = engine.model.spec
    row_bytes = spec.hidden_size * next(engine.model.parameters()).element_size()
    keeps = isinstance(engine.policy, BranchPolicy)
    return RoutingTrace(ids, refreshed, spec.moe_blocks, spec.num_experts, row_bytes, keeps, source)


def _check(engine: Engine) -> None:
    if engine.plan.location == "owner":
        raise UserError("a routing trace cannot be recorded in cache.location owner: use home, the choices are alike")
    if engine.graphed_model is not None:
        raise UserError("a routing trace is copied to the host in every step: remove model.cuda_graphs")
    if isinstance(engine.policy, ModulePolicy) and engine.policy.refreshes_tokens:
        raise UserError(
            f"a routing trace cannot be recorded with cache.policy {engine.config.cache.policy}, which routes only "
            "some tokens: choose moeca_forecast, or none"
        )


class RoutingRecorder(AbstractContextManager["RoutingRecorder"]):
    """Notes every routing and every dispatch of a network while the context is open.

    Copies them to the host, so on a GPU a recorded run is slower. A network that is not recorded has no part of this.
    """

    def __init__(self, model: DiffusionTransformer) -> None:
        self._model = model
        self._layers = list(model.moe_layers())
        self._unwrapped: list[Dispatcher] = []
        self._steps: list[dict[int, list[_Noted]]] = []
        self._images: list[int] = []

    def __enter__(self) -> "RoutingRecorder":
        self._unwrapped = [layer.dispatcher for _, layer in self._layers]
        for block, layer in self._layers:
            layer.dispatcher = _RecordingDispatcher(layer.dispatcher, self, block)
        # One evaluation of the network is one step of a round.
        self._hook = self._model.register_forward_pre_hook(self._begin_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()
        for (_, layer), dispatcher in zip(self._layers, self._unwrapped, strict=True):
            layer.dispatcher = dispatcher

    def note_routing(self, block: int, routing: Routing) -> None:
        expert_ids_TK = routing.expert_N.view(routing.num_tokens, self._model.spec.num_experts_per_tok)
        self._steps[-1].setdefault(block, []).append(_Noted(expert_ids_TK))

    def note_dispatch(self, block: int, branches: Branches) -> None:
        self._steps[-1][block][-1].mark(branches)

    def rounds(
        self, num_steps: int, num_halves: int
    ) -> list[tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]] | None]:
        """By round: ids and refreshed branches [S, L, H, B, T, K]; None where this rank had no images."""
        starts = range(0, len(self._steps), num_steps)
        return [self._round(start, num_steps, num_halves) for start in starts]

    def _round(
        self, start: int, num_steps: int, num_halves: int
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]] | None:
        spec, rows = self._model.spec, self._images[start]
        if not rows:
            return None
        shape = (num_halves, rows // num_halves, spec.num_tokens, spec.num_experts_per_tok)
        ids = np.zeros((num_steps, len(self._layers), *shape), np.uint8 if spec.num_experts <= 256 else np.uint16)
        refreshed = np.zeros(ids.shape, bool)
        for step, noted in enumerate(self._steps[start : start + num_steps]):
            for place, (block, _) in enumerate(self._layers):
                for halves, found in _by_halves(noted.get(block, []), num_halves, shape):
                    ids[step, place, halves] = found.expert_ids_TK.numpy().reshape(-1, *shape[1:])
                    refreshed[step, place, halves] = found.refreshed_TK.numpy().reshape(-1, *shape[1:])
        return ids, refreshed

    def _begin_step(self, _model: Any, inputs: tuple[Tensor, ...]) -> None:
        self._steps.append({})
        self._images.append(inputs[0].shape[0])


def _by_halves(noted: Sequence["_Noted"], num_halves: int, shape: tuple[int, ...]) -> list[tuple[slice, "_Noted"]]:
    """Which guidance halves each note is of: both at once, or one after the other where a policy serves one of them.

    With a single note of half the tokens the conditional half is the one that was computed or not: its load is that of
    the other, so which one it is changes no count.
    """
    half_tokens, start, found = shape[1] * shape[2], 0, []
    for note in noted:
        halves = note.expert_ids_TK.shape[0] // half_tokens
        found.append((slice(start, start + halves), note))
        start += halves
    assert start <= num_halves
    return found


class _Noted:
    """The routing of some tokens, and which of its branches were dispatched."""

    def __init__(self, expert_ids_TK: Tensor) -> None:
        self.expert_ids_TK = expert_ids_TK.cpu()
        self.refreshed_TK = torch.zeros(self.expert_ids_TK.shape, dtype=torch.bool)

    def mark(self, branches: Branches) -> None:
        token_N, expert_N = branches.token_N.cpu(), branches.expert_N.cpu()
        slot_N = (self.expert_ids_TK[token_N] == expert_N[:, None]).long().argmax(1)
        self.refreshed_TK[token_N, slot_N] = True


class _RecordingDispatcher:
    """A layer's dispatcher, and a note of what it was asked."""

    def __init__(self, inner: Dispatcher, recorder: RoutingRecorder, block: int) -> None:
        self._inner, self._recorder, self._block = inner, recorder, block
        self.row_dtype, self.kernels = inner.row_dtype, inner.kernels

    def arranged(self, row_dtype: RowDtype, kernels: Kernels) -> "_RecordingDispatcher":
        return _RecordingDispatcher(self._inner.arranged(row_dtype, kernels), self._recorder, self._block)

    def count_exact(self, routing: Routing, x_TD: Tensor) -> None:
        self._recorder.note_routing(self._block, routing)
        self._inner.count_exact(routing, x_TD)

    def dispatch(self, x_TD: Tensor, branches: Branches, gates_N: Tensor | None = None) -> Handle[DispatchedRows]:
        self._recorder.note_dispatch(self._block, branches)
        return self._inner.dispatch(x_TD, branches, gates_N)

    def combine(self, outputs_RD: Tensor, dispatched: DispatchedRows) -> Handle[Tensor]:
        return self._inner.combine(outputs_RD, dispatched)

    def combine_sums(self, outputs_RD: Tensor, dispatched: DispatchedRows, routing: Routing) -> Handle[Tensor]:
        return self._inner.combine_sums(outputs_RD, dispatched, routing)

    def weighted_sum(self, rows_ND: Tensor, dispatched: DispatchedRows, routing: Routing) -> Tensor:
        return self._inner.weighted_sum(rows_ND, dispatched, routing)
