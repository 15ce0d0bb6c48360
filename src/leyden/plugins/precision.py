"""Precisions as objects, for ``Trainer(plugins=MixedPrecision("16-mixed", "cuda", scaler))``; without a scaler, give the name."""

from __future__ import annotations

import torch

from leyden.errors import no_such_name, reject
from leyden.precision import PRECISIONS, Precision

__all__ = [
    "DeepSpeedPrecision",
    "DoublePrecision",
    "FSDPPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "XLAPrecision",
]

_ABSENT = {
    "BitsandbytesPrecision": "quantise the layers in configure_model, with bitsandbytes itself",
    "TransformerEnginePrecision": "fp8 is not there yet",
}


def __getattr__(name: str) -> object:
    return no_such_name(__name__, name, _ABSENT)


class _Named(Precision):
    """A precision by its name.

    Attributes:
        allowed: the names that it may have.
    """

    allowed: tuple[str, ...] = tuple(PRECISIONS)

    def __init__(self, precision: str, scaler: torch.amp.GradScaler | None = None) -> None:
        if precision not in self.allowed:
            reject("precision", precision, ", ".join(map(repr, self.allowed)))
        super().__init__(**vars(PRECISIONS[precision]))
        if scaler is not None and not self.scales_loss:
            reject("scaler", scaler, f"None with precision={precision!r}, whose losses are not scaled")
        object.__setattr__(self, "scaler", scaler)  # the base is frozen

    scaler: torch.amp.GradScaler | None

    @property
    def precision(self) -> str:
        """The canonical name."""
        return self.name

    def grad_scaler(self, device_type: str) -> torch.amp.GradScaler | None:
        """The scaler that was given, else a fresh one, else None where losses are not scaled."""
        return self.scaler if self.scaler is not None else super().grad_scaler(device_type)


class MixedPrecision(_Named):
    """Autocast around each step; under "16-mixed" the loss is scaled.

    Args:
        precision: "16-mixed" or "bf16-mixed".
        device: accepted for compatibility: steps run on the Trainer's device.
        scaler: a `torch.amp.GradScaler` of your own, for "16-mixed".

    Raises:
        ConfigurationError: for another precision, and a scaler without need.
    """

    allowed = ("16-mixed", "bf16-mixed")

    def __init__(self, precision: str, device: str = "cuda", scaler: torch.amp.GradScaler | None = None) -> None:
        super().__init__(precision, scaler)


class HalfPrecision(_Named):
    """Parameters and computation in 16 bits: "16-true" or "bf16-true"."""

    allowed = ("16-true", "bf16-true")

    def __init__(self, precision: str = "16-true") -> None:
        super().__init__(precision)


class DoublePrecision(_Named):
    """Parameters and computation in 64 bits."""

    allowed = ("64-true",)

    def __init__(self) -> None:
        super().__init__("64-true")


class FSDPPrecision(_Named):
    """Any precision; `FSDPStrategy` gathers parameters and reduces gradients as it asks for."""

    allowed = ("32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed")


class DeepSpeedPrecision(_Named):
    """A precision that `DeepSpeedStrategy` knows."""

    allowed = ("32-true", "16-true", "bf16-true", "bf16-mixed")


class XLAPrecision(_Named):
    """A precision that TPUs know."""

    allowed = ("32-true", "16-true", "bf16-true")

    def __init__(self, precision: str = "32-true") -> None:
        super().__init__(precision)
