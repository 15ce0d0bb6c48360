from __future__ import annotations

import io
import random
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leyden.callbacks import ModelSummary
from leyden.errors import ConfigurationError
from leyden.summary import human_number, summarize


class Net(nn.Module):
    """Convolution, norm, dropout, a tied pair and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.long))
        self.example_input_array: Any = torch.zeros(2, 3, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        torch.rand(1)
        random.random()
        np.random.rand()
        return self.second(self.first(self.body(x).mean((2, 3)))) * self.scale


CONV, NORM, TIED, BIASES, SCALE = 3 * 4 * 9, 8, 16, 8, 1
CONV_FLOPS = 2 * (2 * 4 * 6 * 6) * (3 * 9)
LINEAR_FLOPS = 2 * 2 * 4 * 4


def test_parameters_are_counted_once() -> None:
    model = Net()
    model.body.requires_grad_(False)
    summary = summarize(model)
    assert summary.total_parameters == CONV + NORM + TIED + BIASES + SCALE
    assert summary.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert summary.trainable_parameters == TIED + BIASES + SCALE
    assert summary.non_trainable_parameters == CONV + NORM
    assert [(row.name, row.type, row.params) for row in summary.rows] == [
        ("body", "Sequential", CONV + NORM),
        ("first", "Linear", 20),
        ("second", "Linear", 20),
        ("", "Parameter", SCALE),
    ]


def test_size_counts_bytes_of_each_type() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 500, bias=False).half())
    assert summarize(model).model_size == pytest.approx((4 * 1_000_000 + 2 * 500_000) / 1e6)


def test_sizes_and_operations() -> None:
    summary = summarize(Net(), max_depth=-1)
    rows = {row.name: row for row in summary.rows}
    assert rows["body"].in_size == [2, 3, 8, 8]
    assert rows["body.0"].out_size == [2, 4, 6, 6]
    assert rows["first"].in_size == [2, 4]
    assert rows["body"].flops == rows["body.0"].flops == CONV_FLOPS
    assert rows["first"].flops == rows["second"].flops == LINEAR_FLOPS
    assert summary.total_flops == CONV_FLOPS + 2 * LINEAR_FLOPS


def test_a_layer_used_twice_has_the_operations_of_both_calls() -> None:
    layer = nn.Linear(4, 4)
    summary = summarize(nn.Sequential(layer, layer), example_input=torch.zeros(2, 4))
    assert [row.flops for row in summary.rows] == [2 * LINEAR_FLOPS]
    assert summary.total_parameters == 20


def snapshot(model: nn.Module) -> list[Any]:
    return [
        [layer.training for layer in model.modules()],
        [(name, id(tensor), tensor.tolist()) for name, tensor in model.state_dict(keep_vars=True).items()],
        [parameter.grad for parameter in model.parameters()],
        [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[union-attr]
    ]


def test_the_module_is_left_as_it_was() -> None:
    model = Net()
    model.body[1].eval()
    before = snapshot(model)
    summary = summarize(model, max_depth=2)
    assert snapshot(model) == before
    assert [row.is_training for row in summary.rows if row.name.startswith("body")] == [True, True, False, True]
    assert (summary.modules_in_train_mode, summary.modules_in_eval_mode) == (5, 1)


def test_the_module_is_left_as_it_was_after_an_error() -> None:
    model = Net()
    model.example_input_array = torch.zeros(2, 5, 8, 8)
    before = snapshot(model)
    with pytest.raises(RuntimeError) as caught:
        summarize(model)
    assert "example_input_array" in caught.value.__notes__[0]
    assert snapshot(model) == before


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.layer(a) + b}


@pytest.mark.parametrize(
    "example", [(torch.zeros(1, 2), torch.zeros(1, 2)), {"b": torch.zeros(1, 2), "a": torch.zeros(1, 2)}]
)
def test_several_inputs_in_the_precision_of_the_module(example: Any) -> None:
    summary = summarize(nn.Sequential(TwoInputs()).double()[0], example_input=example)
    assert summary.rows[0].in_size == [1, 2]
    assert summary.rows[0].out_size == [1, 2]


def test_lazy_parameters_are_shown_and_not_initialised() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    summary = summarize(model, example_input=torch.zeros(1, 5))
    assert isinstance(model[0], nn.LazyLinear)
    assert summary.total_parameters == 8
    assert summary.total_flops is None
    assert [row.is_uninitialised for row in summary.rows] == [True, False]
    text = str(summary)
    assert "| ?" in text
    assert "without uninitialised" in text


def test_a_compiled_module_is_run_uncompiled() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend=backend, fullgraph=True), nn.Linear(4, 4))
    summary = summarize(model, example_input=torch.zeros(2, 4))
    assert summary.total_flops == 2 * LINEAR_FLOPS
    assert compiled == []


@pytest.mark.parametrize(("depth", "names"), [(0, []), (1, ["0"]), (2, ["0", "0.0"]), (-1, ["0", "0.0", "0.0.0"])])
def test_depth(depth: int, names: list[str]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(1, 1))))
    summary = summarize(model, max_depth=depth)
    assert [row.name for row in summary.rows] == names
    assert summary.total_parameters == 2


def test_the_text_is_a_plain_table() -> None:
    lines = str(summarize(nn.Sequential(nn.Linear(100, 20), nn.ReLU()), example_input=torch.zeros(1, 100))).splitlines()
    assert lines == [
        "  | Name | Type   | Params | Mode  | FLOPs | In sizes | Out sizes",
        "-----------------------------------------------------------------",
        "0 | 0    | Linear | 2.0 K  | train | 4.0 K | [1, 100] | [1, 20]",
        "1 | 1    | ReLU   | 0      | train | 0     | [1, 20]  | [1, 20]",
        "-----------------------------------------------------------------",
        "2.0 K     Trainable params",
        "0         Non-trainable params",
        "2.0 K     Total params",
        "0.008     Size of the params (MB)",
        "2         Modules in train mode",
        "0         Modules in eval mode",
        "4.0 K     FLOPs of one forward",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 K"),
        (1_234_567, "1.2 M"),
        (999_960, "1.0 M"),
        (7e9, "7.0 B"),
        (2e15, "2,000.0 T"),
        (None, "-"),
    ],
)
def test_human_number(number: int | None, text: str) -> None:
    assert human_number(number) == text


class Stdout(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_callback_prints_once_where_it_should(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stdout = Stdout(is_terminal)
    monkeypatch.setattr(sys, "stdout", stdout)
    model: Any = Net()
    trainer: Any = SimpleNamespace(is_global_zero=False)
    ModelSummary().on_fit_start(trainer, model)
    assert stdout.getvalue() == ""
    trainer.is_global_zero = True
    ModelSummary(max_depth=2).on_fit_start(trainer, model)
    text = stdout.getvalue()
    if not is_terminal:
        assert text == str(summarize(model, 2)) + "\n"
        assert text.isascii()
    assert "[2, 3, 8, 8]" in text
    assert "Trainable params" in text


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="max_depth=-2"):
        ModelSummary(max_depth=-2)
    with pytest.raises(ConfigurationError, match="max_depth=-2"):
        summarize(nn.Linear(1, 1), max_depth=-2)
