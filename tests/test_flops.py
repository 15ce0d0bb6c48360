"""Operations are counted as closed forms say, and counting changes nothing of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from leyden import flops as flops_module
from leyden.errors import ConfigurationError, MetricError
from leyden.flops import FlopCounter, Load, Workload, begins_as_graph, is_compiled

torch.set_num_threads(1)


def count(function: Callable[[], Any]) -> int:
    with FlopCounter() as counter:
        function()
    return counter.flops


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


LAYERS = [
    pytest.param(nn.Linear(8, 16), (3, 5, 8), 2 * 15 * 8 * 16, id="linear"),
    pytest.param(nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5), 2 * 2 * (6 * 5) * 4 * (3 * 3 * 3), id="conv"),
    pytest.param(nn.Conv1d(4, 6, 2, groups=2), (2, 4, 9), 2 * 2 * 8 * 6 * (2 * 2), id="grouped conv"),
    pytest.param(nn.ConvTranspose2d(3, 4, 3), (2, 3, 6, 5), 2 * 2 * (6 * 5) * 4 * (3 * 3 * 3), id="transposed conv"),
]


@pytest.mark.parametrize(("layer", "shape", "forward"), LAYERS)
def test_a_layer_costs_what_its_formula_says(layer: nn.Module, shape: tuple[int, ...], forward: int) -> None:
    inputs = leaf(*shape)
    assert count(lambda: layer(inputs)) == forward
    assert count(lambda: layer(inputs).sum().backward()) == 3 * forward  # gradients of the weights, and of the inputs
    assert count(lambda: layer(inputs.detach()).sum().backward()) == 2 * forward  # the data needs no gradient


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_costs_the_same_with_every_kernel(backend: SDPBackend, key_heads: int) -> None:
    query, key, value = leaf(2, 4, 7, 8), leaf(2, key_heads, 9, 8), leaf(2, key_heads, 9, 8)
    forward = 2 * 2 * 4 * 7 * 9 * (8 + 8)

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, enable_gqa=key_heads != 4)

    with sdpa_kernel(backend):
        assert count(attend) == forward
        assert count(lambda: attend().sum().backward()) == 3 * forward


def test_a_recurrent_layer_costs_its_matrices_at_each_position() -> None:
    layer, inputs = nn.LSTM(8, 16, num_layers=2, batch_first=True), leaf(3, 5, 8)
    forward = 2 * 15 * (64 * 8 + 64 * 16) + 2 * 15 * (64 * 16 + 64 * 16)
    assert count(lambda: layer(inputs)) == forward
    assert count(lambda: layer(inputs)[0].sum().backward()) == 3 * forward


def test_cudnns_recurrent_operation_is_counted_by_its_weights() -> None:
    weights = [torch.empty(64, 8), torch.empty(64, 16), torch.empty(64), torch.empty(64)]
    formulas = flops_module._formulas()
    forward = 2 * 15 * (64 * 8 + 64 * 16)
    inputs = torch.empty(3, 5, 8)
    assert formulas[torch.ops.aten._cudnn_rnn](inputs, weights, 4, None, out_val=None) == forward
    assert formulas[torch.ops.aten._cudnn_rnn_backward](inputs, weights, 4, None, out_val=None) == 2 * forward


def test_inference_mode_is_counted() -> None:
    with torch.inference_mode():
        assert count(lambda: nn.Linear(8, 16)(torch.ones(3, 8))) == 2 * 3 * 8 * 16


def test_what_is_done_by_element_counts_nothing() -> None:
    assert count(lambda: (leaf(50).relu() * 2 + 1).sum().backward()) == 0


def test_counting_changes_no_bit() -> None:
    def train(counted: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(4 * 36, 3))
        inputs = torch.randn(5, 1, 8, 8)
        counter = FlopCounter()
        if counted:
            counter.__enter__()
        net(inputs).square().sum().backward()
        if counted:
            counter.__exit__(None, None, None)
            assert counter.flops == 2 * (2 * 5 * 36 * 4 * 9) + 3 * (2 * 5 * 144 * 3)
        gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        return [*gradients, *net.buffers(), torch.get_rng_state()]

    plain, counted = train(False), train(True)
    assert len(plain) == len(counted) == 6 + 3 + 1
    assert all(torch.equal(*pair) for pair in zip(plain, counted, strict=True))


def test_a_formula_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def formula(*_: Any, **__: Any) -> int:
        raise AssertionError("unknown shapes")

    known = flops_module._formulas() | {torch.ops.aten.mm: formula}
    monkeypatch.setattr(flops_module, "_formulas", lambda: known)
    with FlopCounter() as counter:
        assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 2), torch.full((2, 2), 3.0))
    assert counter.flops == 0


# Workload


def batch_of(samples: int, length: int = 3) -> torch.Tensor:
    return torch.ones(samples, length)


def train_on(workload: Workload, batch: torch.Tensor, layer: nn.Linear) -> Load:
    workload.before_batch()
    layer(batch).sum().backward()
    return workload.after_batch(batch)


def test_what_was_counted_is_converted_by_samples() -> None:
    workload, layer = Workload(), nn.Linear(3, 7)
    workload.prepare(layer)
    per_sample = 2 * (2 * 3 * 7)
    assert train_on(workload, batch_of(4), layer) == Load(4, None, 4 * per_sample)
    assert not workload.counts_next
    assert workload.after_batch(batch_of(6)) == Load(6, None, 6 * per_sample)
    assert workload.after_batch(batch_of(6), trained=False) == Load(6, None, None)


def test_what_was_counted_is_converted_by_tokens_where_there_are_some() -> None:
    workload, layer = Workload(length_fn=lambda batch: batch.numel()), nn.Linear(3, 7)
    workload.prepare(layer)
    per_sample = 2 * (2 * 3 * 7)
    assert train_on(workload, batch_of(4), layer) == Load(4, 12, 4 * per_sample)
    assert workload.after_batch(batch_of(1, 30)) == Load(1, 30, 10 * per_sample)


def test_a_batch_that_was_skipped_is_not_what_is_counted() -> None:
    workload, layer = Workload(), nn.Linear(3, 7)
    workload.prepare(layer)
    workload.before_batch()
    layer(batch_of(100)).sum().backward()
    assert train_on(workload, batch_of(4), layer).flops == 4 * 84  # type: ignore[attr-defined]


def test_nothing_is_left_behind() -> None:
    workload, layer = Workload(), nn.Linear(3, 7)
    workload.prepare(layer)
    workload.before_batch()
    counter = workload._counter
    assert counter is not None
    assert workload.abandon() == 0
    layer(batch_of(2))
    assert counter.flops == 0
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


class Squaring(torch.optim.SGD):
    """Multiplies matrices in its step, as Muon does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        weight = self.param_groups[0]["params"][0]
        weight.detach() @ weight.detach().T
        return loss


def test_the_optimizers_own_products_are_not_the_models() -> None:
    workload, layer = Workload(), nn.Linear(3, 7)
    workload.prepare(layer)
    optimizer = Squaring(layer.parameters(), lr=0.1)
    workload.before_batch()
    layer(batch_of(4)).sum().backward()
    optimizer.step()
    assert workload.after_batch(batch_of(4)).flops == 4 * 84


def test_what_is_trained_in_a_closure_is_counted() -> None:
    workload, layer = Workload(), nn.Linear(3, 7)
    workload.prepare(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def closure() -> float:
        loss = layer(batch_of(4)).sum()
        loss.backward()
        return float(loss.detach())

    workload.before_batch()
    optimizer.step(closure)
    assert workload.after_batch(batch_of(4)).flops == 4 * 84


@pytest.mark.parametrize(("given", "expected"), [(5e9, 5e9), (len, 4.0), (False, None)])
def test_flops_are_taken_as_they_are_given(given: Any, expected: float | None) -> None:
    workload = Workload(flops=given)
    workload.prepare(nn.Linear(3, 7))
    assert not workload.counts_next
    assert workload.after_batch(batch_of(4)).flops == expected


def test_a_modules_own_figure_is_taken_anew_for_each_batch() -> None:
    module: Any = nn.Linear(3, 7)
    module.flops_per_batch = 10.0
    workload = Workload()
    workload.prepare(module)
    assert not workload.counts_next
    assert workload.after_batch(batch_of(4)).flops == 10
    module.flops_per_batch = 20
    assert workload.after_batch(batch_of(4)).flops == 20


def test_samples_are_counted_by_the_users_function() -> None:
    assert Workload(batch_size_fn=len, flops=False).after_batch({"a": 1, "b": 2}) == Load(2, None, None)


def test_a_batch_without_a_size_says_what_to_do() -> None:
    with pytest.raises(MetricError, match="Pass batch_size_fn="):
        Workload().after_batch({"a": object()})


@pytest.mark.parametrize(
    "options",
    [{"batch_size_fn": 3}, {"length_fn": "len"}, {"flops": 0}, {"flops": -1.0}, {"flops": True}, {"flops": "auto"}],
)
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Workload(**options)


@pytest.mark.parametrize("compiled", ["wrapped", "in place"])
def test_a_compiled_module_is_not_counted(compiled: str) -> None:
    module: Any = nn.Sequential(nn.Linear(3, 7))
    assert not is_compiled(module)
    if compiled == "wrapped":
        module = nn.Sequential(torch.compile(module[0], backend="eager"))
    else:
        module[0].compile(backend="eager")
    assert is_compiled(module)
    workload = Workload()
    workload.prepare(module)
    assert workload.counts_next
    workload.before_batch()
    assert not workload.counts_next
    assert "pass flops=" in workload.why_not
    assert workload.after_batch(batch_of(4)).flops is None


@pytest.mark.parametrize(("compiled", "expected"), [(None, False), (False, False), (True, True)])
def test_which_runs_begin_with_a_graph(compiled: bool | None, expected: bool) -> None:
    compilation = None if compiled is None else SimpleNamespace(trains_compiled=compiled)
    assert begins_as_graph(SimpleNamespace(compilation=compilation)) is expected
