"""Ranks that are GPUs, as a roofline: what the simulator assumes of machines that this project does not have.

Work is FLOP at a share of the peak, memory traffic, or the host's kernel launches, whichever takes longest. Every
number is a field with its source beside it, and ``plan.py`` prints them with its results.

Shape suffixes: P ranks, O owners, E experts, T tokens, K routed experts per token.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulator.links import Level, Topology
from moeca_dist.tuning.experts.traffic import LayerTraffic

BYTES = 2  # of a value: bfloat16
KERNELS_CODING = 16  # of a leg whose rows are coded and decoded: 14, and two that set own rows apart and join them


@dataclass(frozen=True)
class Shape:
    """One network at one resolution. ``dense``: FLOP of dense feed-forwards, per token and block that has one.

    ``kv_share``: size of keys and values over that of queries. ``routed_tokens``: those that the MoE layers route.
    """

    name: str
    blocks: int
    moe_blocks: int
    hidden: int
    num_experts: int
    num_experts_per_tok: int
    expert_width: int
    shared_width: int
    dense_width: int
    tokens: int
    images_per_gpu: int
    num_steps: int
    parameters: float
    remark: str
    kv_share: float = 1.0

    @property
    def sequences(self) -> int:
        """Of a rank, with both guidance halves."""
        return 2 * self.images_per_gpu

    @property
    def rank_tokens(self) -> int:
        return self.sequences * self.tokens

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden * self.expert_width

    def attention_flops(self) -> float:
        """Of a rank, one block."""
        projections = (2 + 2 * self.kv_share) * self.hidden**2
        return 2 * self.rank_tokens * (projections + 2 * self.tokens * self.hidden)

    def always_flops(self) -> float:
        """Of a rank, all blocks: attention, dense blocks, shared experts."""
        dense = 2 * self.rank_tokens * 2 * self.hidden * self.dense_width * (self.blocks - self.moe_blocks)
        return self.attention_flops() * self.blocks + dense + self.shared_flops() * self.moe_blocks

    def shared_flops(self) -> float:
        """Of a rank, the shared expert of one layer."""
        return 2 * self.rank_tokens * 3 * self.hidden * self.shared_width

    def stored_bytes(self) -> float:
        """Of a rank's cache with branch forecasts: value and difference of every module and every branch."""
        modules = 2 * self.blocks  # attention, and the dense or shared feed-forward
        return 2 * BYTES * self.rank_tokens * self.hidden * (modules + self.num_experts_per_tok * self.moe_blocks)

    def weight_bytes(self, ep_size: int) -> float:
        held = -(-self.num_experts // min(ep_size, self.num_experts))
        experts = self.num_experts * self.expert_parameters * self.moe_blocks
        return BYTES * (self.parameters - experts * (1 - held / self.num_experts))


@dataclass(frozen=True)
class Gpu:
    name: str
    flops: float  # dense, bfloat16
    efficiency: float  # of large matrix products
    bytes_per_s: float  # of its memory
    memory_share: float  # of that rate which kernels reach
    launch_s: float  # of the host, per kernel
    kernels_computed: int  # of a block in a step that computes it
    kernels_served: int  # of a block in a step that serves it from the cache
    kernels_forecast: int  # of a step that forecasts what all blocks do
    activations: float  # reads and writes of a hidden row by small kernels of a computed block


H100 = Gpu("H100 SXM", 989e12, 0.4, 3.35e12, 0.8, 5e-6, 40, 60, 40, 24.0)
RTX_4090 = Gpu("RTX 4090", 165e12, 0.5, 1.008e12, 0.8, 5e-6, 40, 60, 40, 24.0)

NVLINK_AND_400G = Topology(
    (
        Level("NVLink island", 8, 450e9 * 0.8, 20e-6, 0.5e-6),
        Level("400 Gbit/s NIC", 1 << 30, 50e9 * 0.86, 30e-6, 1e-6),
    )
)
PCIE = Topology((Level("PCIe 4.0 through the host", 1 << 30, 32e9 * 0.4, 30e-6, 2e-6),))


class GpuMachine:
    """An expert-parallel group of ``num_ranks`` GPUs. Step 0 computes everything, all others are cache steps.

    ``keeps``: whether step 0 stores what it computes. ``coded``: rows travel as int8 codes. ``scale``: real tokens for
    each sampled one.
    """

    def __init__(
        self, shape: Shape, gpu: Gpu, topology: Topology, num_ranks: int, scale: float, keeps: bool, coded: bool = False
    ) -> None:
        self._shape, self._gpu, self._topology = shape, gpu, topology
        self._num_ranks, self._scale = num_ranks, scale
        self._coded = coded
        self._home_s = (self._computed(keeps), self._served())

    def home_P(self, step: int) -> NDArray[np.float64]:
        return np.full(self._num_ranks, self._home_s[min(step, 1)])

    def experts_P(self, rows_PE: NDArray[np.int64]) -> NDArray[np.float64]:
        shape, gpu = self._shape, self._gpu
        flops_P = 2 * shape.expert_parameters * rows_PE.sum(1) * self._scale
        reads_P = (rows_PE > 0).sum(1) * BYTES * shape.expert_parameters
        return np.maximum(flops_P / (gpu.flops * gpu.efficiency), reads_P / (gpu.bytes_per_s * gpu.memory_share))

    def shared_P(self, full: bool) -> NDArray[np.float64]:
        seconds = self._shape.shared_flops() / (self._gpu.flops * self._gpu.efficiency)
        return np.full(self._num_ranks, seconds if full else 0.0)

    def stretch(self, traffic: LayerTraffic) -> float:
        return 1.0  # assumed: copies have engines of their own

    def together(self, work_P: NDArray[np.float64]) -> float:
        return float(work_P.max())

    def agree(self, numbers: int) -> float:
        return self._topology.gather_counts_s(self._num_ranks, numbers)

    def send(self, sent_PO: NDArray[np.int64], owners_O: NDArray[np.int64], back: bool, meanwhile_s: float) -> float:
        # Rows are gathered on both sides: four reads and writes of each. Codes are half as long: 25 passes of their
        # size make them, 11 decode them, and 8 set own rows apart and join them.
        passes = 2 * 4 + 25 + 11 + 8 if self._coded else 4
        handled = passes * float(sent_PO.sum(1).max(initial=0)) / (self._gpu.bytes_per_s * self._gpu.memory_share)
        coding_s = KERNELS_CODING * self._gpu.launch_s if self._coded else 0.0
        under_way = self._topology.all_to_all_s(sent_PO * self._scale, owners_O)
        return max(handled * self._scale, coding_s) + max(0.0, under_way - meanwhile_s)

    def pass_time(self, seconds: float) -> None:
        pass  # no buckets that fill

    def network_forecast_s(self) -> float:
        """A step that forecasts what all blocks change: embeddings, value and slope, the output layer."""
        row = BYTES * self._shape.rank_tokens * self._shape.hidden
        memory = self._gpu.activations * row / (self._gpu.bytes_per_s * self._gpu.memory_share)
        return max(memory, self._gpu.kernels_forecast * self._gpu.launch_s)

    def _computed(self, keeps: bool) -> float:
        shape, gpu = self._shape, self._gpu
        row = BYTES * shape.rank_tokens * shape.hidden
        memory = gpu.activations * row * shape.blocks + (shape.stored_bytes() if keeps else 0)
        device = shape.always_flops() / (gpu.flops * gpu.efficiency) + memory / (gpu.bytes_per_s * gpu.memory_share)
        return max(device, shape.blocks * gpu.kernels_computed * gpu.launch_s)

    def _served(self) -> float:
        """Everything stored is read once; rows are modulated and added."""
        shape, gpu = self._shape, self._gpu
        row = BYTES * shape.rank_tokens * shape.hidden
        router = 2 * shape.rank_tokens * shape.hidden * shape.num_experts * shape.moe_blocks
        memory = shape.stored_bytes() + gpu.activations / 2 * row * shape.blocks
        device = router / (gpu.flops * gpu.efficiency) + memory / (gpu.bytes_per_s * gpu.memory_share)
        return max(device, shape.blocks * gpu.kernels_served * gpu.launch_s)


def zipf_routing(
    shape: Shape, homes: int, tokens: int, exponent: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct experts [T, K] of ``tokens`` sampled tokens of each home, and the home of each.

    Popularity of an expert falls with its rank to the power of ``exponent``; which expert is popular is drawn.
    """
    rng = np.random.default_rng(seed)
    popularity_E = rng.permutation(np.arange(1, shape.num_experts + 1, dtype=np.float64) ** -exponent)
    # Gumbel top-k: draws without replacement, in proportion to popularity.
    noise_TE = rng.gumbel(size=(homes * tokens, shape.num_experts)) + np.log(popularity_E)
    ids_TK = np.argpartition(-noise_TE, shape.num_experts_per_tok - 1, axis=1)[:, : shape.num_experts_per_tok]
    return ids_TK, np.repeat(np.arange(homes), tokens)
