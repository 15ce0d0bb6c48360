"""How much is trained per second, and what share of the device's peak that is."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from leyden import xla
from leyden.errors import reject
from leyden.precision import PRECISIONS

_TERA = 1e12


@dataclass(frozen=True)
class Rates:
    """What was done per second.

    Attributes:
        batches_per_sec: batches.
        samples_per_sec: samples.
        items_per_sec: tokens or other items; None if they were not counted.
        flops_per_sec: floating point operations; None if they are not known.
        mfu: ``flops_per_sec`` as a share of the device's peak, its utilisation; None if one of them is not known.
    """

    batches_per_sec: float
    samples_per_sec: float
    items_per_sec: float | None = None
    flops_per_sec: float | None = None
    mfu: float | None = None

    def known(self) -> dict[str, float]:
        """Those that are known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class _Reading(NamedTuple):
    time: float
    batches: int
    samples: int
    tokens: int | None
    flops: float | None


class Throughput:
    """Rates over a sliding window of readings.

    A rate is what was done between the oldest and the newest reading, divided by the time between them. The meter looks at
    no clock: a device works on after the host has returned, and the caller knows when the two have met. Readings taken at
    like points, such as each time that values are about to be flushed, are late by the same amount, which cancels out; a reading
    before the first of them would not be.

    Args:
        window_size: how many batches the window covers, at least; it is longer where readings are further apart.
        peak_flops: what the device can do, in floating point operations per second; None leaves `Rates.mfu` out.

    Raises:
        ConfigurationError: for a window or a peak that is not above 0.
    """

    def __init__(self, window_size: int = 100, peak_flops: float | None = None) -> None:
        if type(window_size) is not int or window_size < 1:
            reject("window_size", window_size, "a number of batches, an integer ≥ 1")
        check_peak(peak_flops)
        self.window_size = window_size
        self.peak_flops = peak_flops
        self._readings: deque[_Reading] = deque()

    def add(
        self, time: float, samples: int, tokens: int | None = None, flops: float | None = None, batches: int = 1
    ) -> None:
        """Take a reading.

        Args:
            time: of any clock that does not go back, in seconds.
            samples: done since the last reading, as the next three; what the first reading says only opens the window.
            tokens: tokens or other items; None if they are not counted.
            flops: floating point operations; None if they are not known.
            batches: batches.

        Raises:
            ConfigurationError: if the clock went back.
        """
        readings = self._readings
        if readings and time < readings[-1].time:
            reject("time", time, f"at least {readings[-1].time}, the time of the last reading")
        readings.append(_Reading(time, batches, samples, tokens, flops))
        covered = sum(reading.batches for reading in readings) - readings[0].batches
        while len(readings) > 2 and covered - readings[1].batches >= self.window_size:
            readings.popleft()
            covered -= readings[0].batches

    def rates(self) -> Rates | None:
        """Return the rates of the window; None before the second reading."""
        if len(self._readings) < 2:
            return None
        first, *done = self._readings
        seconds = done[-1].time - first.time
        if seconds <= 0:
            return None
        return make_rates(
            seconds,
            sum(reading.batches for reading in done),
            sum(reading.samples for reading in done),
            total([reading.tokens for reading in done]),
            total([reading.flops for reading in done]),
            self.peak_flops,
        )

    def reset(self) -> None:
        """Forget all readings."""
        self._readings.clear()


def make_rates(
    seconds: float, batches: int, samples: int, tokens: float | None, flops: float | None, peak: float | None
) -> Rates:
    """Divide counts by a time.

    Args:
        seconds: the time, above 0.
        batches: what was done in it, as the next three.
        samples: samples.
        tokens: None if they were not counted.
        flops: None if they are not known.
        peak: the device's floating point operations per second; None if that is not known.
    """
    flops_per_sec = None if flops is None else flops / seconds
    return Rates(
        batches_per_sec=batches / seconds,
        samples_per_sec=samples / seconds,
        items_per_sec=None if tokens is None else tokens / seconds,
        flops_per_sec=flops_per_sec,
        mfu=None if flops_per_sec is None or peak is None else flops_per_sec / peak,
    )


def total(parts: list[Any]) -> Any:
    """The sum of the parts; None if one of them is not known."""
    return None if any(part is None for part in parts) else sum(parts)


def check_peak(peak_flops: object) -> None:
    """Refuse a peak that is not a number above 0."""
    is_number = isinstance(peak_flops, int | float) and not isinstance(peak_flops, bool)
    if peak_flops is not None and not (is_number and peak_flops > 0):  # type: ignore[operator]
        reject("peak_flops", peak_flops, "floating point operations per second > 0, such as 989e12, or None")


class _Peak(NamedTuple):
    """TFLOP/s of dense matrix products by number format; None where the device has no units for it, or slow ones."""

    fp64: float | None
    fp32: float | None
    tf32: float | None
    bf16: float | None
    fp16: float | None


# Names as torch.cuda.get_device_name gives them, whole: a laptop's GPU, or a slice of one (MIG), has another name and another
# peak. All are dense figures, with accumulation in fp32; where a data sheet gives figures "with sparsity", half of them.
_PEAKS: dict[str, _Peak] = {
    # DGX B200 and HGX B200 data sheets: 36 PFLOP/s of fp16 and bf16, and 18 of tf32, with sparsity, for 8 GPUs.
    r"(NVIDIA )?B200": _Peak(None, None, 1125, 2250, 2250),
    # H200 data sheet, column SXM; and column NVL.
    r"(NVIDIA )?H200": _Peak(67, 67, 494.5, 989.5, 989.5),
    r"(NVIDIA )?H200 NVL": _Peak(60, 60, 417.5, 835.5, 835.5),
    # GH200 data sheet: the H100 of the superchip.
    r"(NVIDIA )?GH200 (480GB|120GB|144G HBM3e)": _Peak(67, 67, 494.5, 989.5, 989.5),
    # H100 data sheet, column SXM; NVL; and, in its first edition, PCIe.
    r"(NVIDIA )?H100 80GB HBM3": _Peak(67, 67, 494.5, 989.5, 989.5),
    r"(NVIDIA )?H100 NVL": _Peak(60, 60, 417.5, 835.5, 835.5),
    r"(NVIDIA )?H100 PCIe": _Peak(51, 51, 378, 756.5, 756.5),
    # A100 data sheet: the same in all forms.
    r"(NVIDIA )?A100(-SXM4|-PCIE|-PG509-200)?([- ](40|80)GB)?( PCIe)?": _Peak(19.5, 19.5, 156, 312, 312),
    # A30, A40 and A10 data sheets.
    r"(NVIDIA )?A30": _Peak(10.3, 10.3, 82, 165, 165),
    r"(NVIDIA )?A40": _Peak(None, 37.4, 74.8, 149.7, 149.7),
    r"(NVIDIA )?A10": _Peak(None, 31.2, 62.5, 125, 125),
    # L40S, L40 and L4 data sheets.
    r"(NVIDIA )?L40S": _Peak(None, 91.6, 183, 362.05, 362.05),
    r"(NVIDIA )?L40": _Peak(None, 90.5, 90.5, 181.05, 181.05),
    r"(NVIDIA )?L4": _Peak(None, 30.3, 60, 121, 121),
    # V100 data sheet, columns SXM2, PCIe and V100S. No matrix units for bf16.
    r"(NVIDIA |Tesla )?V100-SXM[23]-(16|32)GB": _Peak(7.8, 15.7, None, None, 125),
    r"(NVIDIA |Tesla )?V100-PCIE-(16|32)GB": _Peak(7, 14, None, None, 112),
    r"(NVIDIA |Tesla )?V100S-PCIE-32GB": _Peak(8.2, 16.4, None, None, 130),
    # T4 data sheet.
    r"(NVIDIA |Tesla )?T4": _Peak(None, 8.1, None, None, 65),
    # White papers "NVIDIA Ampere GA102", "Ada" and "RTX Blackwell" (GPU architecture), appendix A, tensor figures "with FP32
    # accumulate", half of those with fp16.
    r"(NVIDIA )?GeForce RTX 3090": _Peak(None, 35.6, 35.6, 71, 71),
    r"(NVIDIA )?GeForce RTX 4090": _Peak(None, 82.6, 82.6, 165.2, 165.2),
    r"(NVIDIA )?GeForce RTX 5090": _Peak(None, 104.8, 104.8, 209.5, 209.5),
    # AMD Instinct MI300X data sheet, "peak ... matrix".
    r"AMD Instinct MI300X": _Peak(163.4, 163.4, None, 1307.4, 1307.4),
}


def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float | None:
    """What a device can do at most, in floating point operations per second; None if that is not known here.

    The figures are those of the vendors' data sheets, for dense matrix products at the highest clock, which no long run
    reaches. For fp32 that is the figure of TF32 where matrix products may use it (``torch.set_float32_matmul_precision``).
    cuDNN's convolutions use TF32 without being asked, so a convolutional net in fp32 can seem to exceed the peak of fp32.

    Args:
        device: a device of torch; only CUDA (and ROCm) devices are known.
        dtype: what is multiplied.
    """
    place = torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available():
        return None
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # the one question that torch answers however it was set
    return peak_of(torch.cuda.get_device_name(place), dtype, tf32)


def peak_of(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """`peak_flops` by the device's name.

    Args:
        name: whole, as `torch.cuda.get_device_name` gives it.
        dtype: what is multiplied.
        tf32: whether fp32 products may use TF32.
    """
    peak = next((found for pattern, found in _PEAKS.items() if re.fullmatch(pattern, name)), None)
    if peak is None:
        return None
    by_dtype = {
        torch.float64: peak.fp64,
        torch.float32: peak.tf32 if tf32 and peak.tf32 is not None else peak.fp32,
        torch.bfloat16: peak.bf16,
        torch.float16: peak.fp16,
    }
    found = by_dtype.get(dtype)
    return None if found is None else found * _TERA


def compute_dtype(module: nn.Module, precision: str) -> torch.dtype:
    """What a run multiplies: what its precision says, or else the module's own floating dtype.

    Args:
        module: what is run.
        precision: as ``trainer.precision`` has it.
    """
    chosen = PRECISIONS.get(precision)
    dtype = None if chosen is None else chosen.compute_dtype or chosen.parameter_dtype
    own = (parameter.dtype for parameter in module.parameters() if parameter.dtype.is_floating_point)
    return dtype or next(own, torch.float32)


def device_name(device: torch.device) -> str:
    """What to call a device when talking to users."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xla":
        xla.wait()
