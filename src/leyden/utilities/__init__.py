"""Small things that programs import from here. Each is defined elsewhere; this package has no logic of its own."""

from __future__ import annotations

import importlib

from leyden.data.combined import CombinedLoader
from leyden.data.transfer import move_to_device as move_data_to_device
from leyden.data.worker import suggested_max_num_workers
from leyden.errors import no_such_name
from leyden.flops import measure_flops
from leyden.gradients import grad_norm
from leyden.hparams import AttributeDict
from leyden.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_only, rank_zero_warn
from leyden.utilities.enums import GradClipAlgorithmType, LightningEnum
from leyden.utilities.warnings import disable_possible_user_warnings

__all__ = [
    "AttributeDict",
    "CombinedLoader",
    "GradClipAlgorithmType",
    "LightningEnum",
    "disable_possible_user_warnings",
    "grad_norm",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "suggested_max_num_workers",
]

_MODULES = (
    "apply_func",
    "cloud_io",
    "combined_loader",
    "data",
    "distributed",
    "enums",
    "exceptions",
    "grads",
    "model_helpers",
    "model_summary",
    "parsing",
    "rank_zero",
    "seed",
    "types",
    "warnings",
)
_ABSENT = {
    "find_shared_parameters": "parameters that are shared stay shared under all strategies",
    "set_shared_parameters": "parameters that are shared stay shared under all strategies",
    "is_picklable": "nothing is pickled into checkpoints; one that cannot be written names the key",
    "is_shared_filesystem": "rank 0 writes; set prepare_data_per_node = False where machines share a disk",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    return no_such_name(__name__, name, _ABSENT)
