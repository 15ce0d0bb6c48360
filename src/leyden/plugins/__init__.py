"""What ``Trainer(plugins=…)`` takes: a precision of one's own, or the launcher that is meant."""

from __future__ import annotations

from leyden.errors import no_such_name
from leyden.plugins.io import CheckpointIO
from leyden.plugins.precision import (
    DeepSpeedPrecision,
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    XLAPrecision,
)

__all__ = [
    "CheckpointIO",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "FSDPPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "XLAPrecision",
]

_ABSENT = {
    "AsyncCheckpointIO": "checkpoints are always written in the background; leave it out",
    "TorchCheckpointIO": "checkpoints have one format, whose files no pickle is in; leave it out",
    "XLACheckpointIO": "checkpoints of TPUs are like all others; leave it out",
    "LayerSync": "BatchNorm layers are synchronised by Trainer(sync_batchnorm=True)",
    "TorchSyncBatchNorm": "BatchNorm layers are synchronised by Trainer(sync_batchnorm=True)",
    "BitsandbytesPrecision": "quantise the layers in configure_model, with bitsandbytes itself",
    "TransformerEnginePrecision": "fp8 is not there yet",
}


def __getattr__(name: str) -> object:
    return no_such_name(__name__, name, _ABSENT)
