"""Rates against closed forms, and the table of peaks."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from leyden import throughput
from leyden.errors import ConfigurationError
from leyden.throughput import Rates, Throughput, compute_dtype, make_rates, peak_flops, peak_of

torch.set_num_threads(1)


def test_rates_are_counts_over_time() -> None:
    meter = Throughput(peak_flops=1000.0)
    meter.add(10.0, samples=99, tokens=99, flops=99.0, batches=99)  # opens the window; what was before does not count
    assert meter.rates() is None
    meter.add(12.0, samples=8, tokens=80, flops=400.0, batches=2)
    meter.add(14.0, samples=16, tokens=40, flops=800.0, batches=4)
    assert meter.rates() == Rates(6 / 4, 24 / 4, 120 / 4, 1200 / 4, 0.3)
    assert list(meter.rates().known()) == [  # type: ignore[union-attr]
        "batches_per_sec",
        "samples_per_sec",
        "items_per_sec",
        "flops_per_sec",
        "mfu",
    ]


def test_the_window_slides() -> None:
    meter = Throughput(window_size=3)
    for step in range(20):
        meter.add(float(step), samples=step)
        seen = list(range(max(1, step - 2), step + 1))
        rates = meter.rates()
        if step:
            assert rates is not None
            assert rates.samples_per_sec == sum(seen) / len(seen)


@pytest.mark.parametrize(("batches", "kept"), [(1, 100), (30, 4), (50, 2), (99, 2), (100, 1), (250, 1)])
def test_the_window_covers_as_many_batches_as_it_must(batches: int, kept: int) -> None:
    meter = Throughput(window_size=100)
    for reading in range(300):
        meter.add(float(reading) ** 2, samples=1, batches=batches)
    rates = meter.rates()
    assert rates is not None
    assert rates.samples_per_sec == kept / (299**2 - (299 - kept) ** 2)


def test_what_is_not_known_is_left_out() -> None:
    meter = Throughput(peak_flops=10.0)
    meter.add(0.0, samples=1)
    meter.add(1.0, samples=1, tokens=5, flops=5.0)
    assert meter.rates() == Rates(1, 1, 5, 5, 0.5)
    meter.add(2.0, samples=1)
    rates = meter.rates()
    assert rates == Rates(1, 1)
    assert rates.known() == {"batches_per_sec": 1, "samples_per_sec": 1}
    assert make_rates(1.0, 1, 1, None, 5.0, None).mfu is None


def test_no_time_gives_no_rate() -> None:
    meter = Throughput()
    meter.add(1.0, samples=1)
    meter.add(1.0, samples=1)
    assert meter.rates() is None
    meter.reset()
    meter.add(0.0, samples=1)
    assert meter.rates() is None


def test_a_clock_that_goes_back_is_refused() -> None:
    meter = Throughput()
    meter.add(1.0, samples=1)
    with pytest.raises(ConfigurationError, match=r"time=0\.5 is not valid.*at least 1\.0"):
        meter.add(0.5, samples=1)


@pytest.mark.parametrize("options", [{"window_size": 0}, {"window_size": 1.5}, {"peak_flops": 0}, {"peak_flops": True}])
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Throughput(**options)


# Peaks


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        # data sheets: H200 and H100 SXM 1,979 with sparsity; A100 312; L4 242 with sparsity; T4 65; V100 SXM2 125
        ("NVIDIA H200", torch.bfloat16, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.5),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.5),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float64, 19.5),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5),
        ("A100-PCIE-40GB", torch.float16, 312),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("Tesla T4", torch.float16, 65),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla V100-SXM2-16GB", torch.float32, 15.7),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA B200", torch.bfloat16, 2250),
    ],
)
def test_peaks_are_the_data_sheets_dense_ones(name: str, dtype: torch.dtype, teraflops: float) -> None:
    assert peak_of(name, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10G",
        "NVIDIA A10-8Q",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H800",
        "some other device",
    ],
)
def test_a_device_of_another_name_has_another_peak(name: str) -> None:
    assert all(peak_of(name, dtype) is None for dtype in (torch.float16, torch.float32))


def test_fp32_has_the_peak_of_tf32_where_that_is_used() -> None:
    assert peak_of("NVIDIA H200", torch.float32, tf32=False) == 67e12
    assert peak_of("NVIDIA H200", torch.float32, tf32=True) == 494.5e12
    assert peak_of("Tesla T4", torch.float32, tf32=True) == 8.1e12  # it has none
    assert peak_of("Tesla T4", torch.bfloat16) is None
    assert peak_of("NVIDIA H200", torch.int8) is None


def test_every_row_is_consistent() -> None:
    for pattern, peak in throughput._PEAKS.items():
        figures = [figure for figure in peak if figure is not None]
        assert figures, pattern
        assert peak.fp16 is not None, pattern
        assert peak.bf16 in (None, peak.fp16), pattern
        for narrower, wider in ((peak.fp16, peak.tf32), (peak.tf32, peak.fp32)):
            assert narrower is None or wider is None or narrower >= wider, pattern


@pytest.mark.parametrize("precision", ["none", "tf32"])
def test_the_peak_of_this_device_is_looked_up(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {"cuda:1": "NVIDIA H200"}[str(device)])
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        assert peak_flops("cuda:1") == (494.5e12 if precision == "tf32" else 67e12)
        assert peak_flops("cuda:1", torch.bfloat16) == 989.5e12
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops("cpu") is None
    assert peak_flops(torch.device("mps"), torch.float16) is None


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("64-true", torch.float64),
    ],
)
def test_the_precision_says_what_is_multiplied(precision: str, expected: torch.dtype) -> None:
    assert compute_dtype(torch.nn.Linear(2, 2), precision) == expected


def test_a_module_that_was_cast_by_hand_says_it_itself() -> None:
    assert compute_dtype(torch.nn.Linear(2, 2).bfloat16(), "32-true") == torch.bfloat16
    assert compute_dtype(torch.nn.ReLU(), "32-true") == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_product_is_faster_than_the_peak(dtype: torch.dtype) -> None:
    peak = peak_flops("cuda", dtype)
    if peak is None:
        pytest.skip(f"the peak of {torch.cuda.get_device_name()} is not in the table")
    size, repeats = 8192, 20
    left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    meter = Throughput(peak_flops=peak)
    left @ right
    torch.cuda.synchronize()
    meter.add(time.perf_counter(), samples=0)
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    meter.add(time.perf_counter(), samples=1, flops=repeats * 2.0 * size**3)
    rates = meter.rates()
    assert rates is not None
    assert rates.mfu is not None
    assert 0.1 < rates.mfu < 1.0
