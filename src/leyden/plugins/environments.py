"""Launchers by name; see `leyden.strategy.cluster`. Without any, leyden finds out by itself who has started it."""

from __future__ import annotations

from leyden.errors import no_such_name
from leyden.strategy.cluster import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]

_ABSENT = {"XLAEnvironment": "one process drives one TPU core; see docs/tpu.md"}


def __getattr__(name: str) -> object:
    return no_such_name(__name__, name, _ABSENT)
