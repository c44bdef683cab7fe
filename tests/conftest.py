"""Shared fixtures. Worker ranks are started once per session: each start costs seconds."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which DeepSpeed does wherever it is installed.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.helpers.ranks import RankPool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()
