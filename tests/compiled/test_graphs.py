"""How many graphs are made, what is said about them, and that nothing of them is left behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leyden as L
from both_ways import Net, batches, fit, needs_tracing, same_size, traced_only
from leyden.compiled.backend import keep_guards, with_own_code
from leyden.trainer import view

pytestmark = [needs_tracing, pytest.mark.usefixtures("traced_only")]
_ = traced_only


class InParts(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        print(end="")
        self.log("loss", 2 * loss)
        return 2 * loss


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.optimizers().minimize(loss)  # type: ignore[union-attr]
        self.log("loss", loss)


def switches() -> dict[str, Any]:
    import torch._dynamo
    import torch.compiler.config as compiler_config

    config: Any = torch._dynamo.config
    names = ("trace_autograd_ops", "skip_nnmodule_hook_guards", "allow_unspec_int_on_nn_module", "recompile_limit")
    return {
        **{name: getattr(config, name) for name in names},
        "sources": compiler_config.dynamic_sources,  # type: ignore[attr-defined]
        "fallback_random": torch._inductor.config.fallback_random,
    }


@pytest.mark.parametrize(("kind", "graphs"), [(Net, 2), (InParts, 4), (Manual, 2)])
def test_every_fit_compiles_anew_and_leaves_nothing_behind(kind: type[Net], graphs: int, tmp_path: Path) -> None:
    import torch._dynamo

    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=2):  # torch's own limit of graphs for one function is 8
        before, kept = switches(), []
        for _ in range(4):
            ran = fit(tmp_path, kind(), batches(3), max_epochs=2)
            kept.append(ran)
            assert ran.compiled.compilations == graphs
            assert ran.compiled.what != "nothing"
            assert ran.trainer._run.training_step == ran.module.training_step  # type: ignore[union-attr]
            assert all(part._compiled_call_impl is None for part in ran.module.modules())
        assert len({str(ran.rows) for ran in kept}) == 1
        assert switches() == before


def test_nothing_is_left_behind_by_an_error(tmp_path: Path) -> None:
    before = switches()

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise OSError("full")

    net = Net()
    with pytest.raises(OSError, match="full"):
        fit(tmp_path, net, batches(), Fails())
    assert switches() == before
    metrics, run = net._metrics, net._run
    assert metrics is None
    assert run is None


def test_the_same_module_is_fitted_twice(tmp_path: Path) -> None:
    net = Net()
    first = fit(tmp_path, net, same_size())
    second = fit(tmp_path, net, same_size())
    assert first.whole
    assert second.whole
    assert second.of("loss_step")[-1] < first.of("loss_step")[0]


def test_explain_and_the_end_of_fit_say_what_was_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "_SHOWN_FROM_S", 0.0)  # it is not printed after a run of a moment
    ran = fit(tmp_path, Net(), batches(), enable_progress_bar=True)
    pattern = r"the whole step is compiled: 2 graphs in \d+\.\d s, at most \de-\d\d from eager when first used"
    assert re.fullmatch(f"compile=True: {pattern}", ran.line)
    assert re.search(f"compile=True: {pattern}", capsys.readouterr().out)
    assert re.search(f"compile=True +{pattern}", ran.trainer.explain(ran.module))
    assert ran.compiled._step is None  # the graphs are gone, what is said of them stays


def test_compiling_is_part_of_the_account(tmp_path: Path) -> None:
    ran = fit(tmp_path, Net(), batches())
    seconds = ran.trainer.time_account.seconds()
    assert seconds["compilation"] > 0
    assert seconds["training step"] > 0
    assert sum(seconds.values()) == pytest.approx(ran.trainer.time_account.total)


def test_a_code_object_and_a_name_of_its_own() -> None:
    factor = 3

    class Multiplies:
        def by(self, value: int, *, more: int = 1) -> int:
            return super().__sizeof__() * 0 + value * factor * more

    method = Multiplies().by
    own, other = with_own_code(method), with_own_code(method)
    assert own(2, more=2) == other(2, more=2) == 12
    codes = [each.__func__.__code__ for each in (method, own, other)]  # type: ignore[attr-defined]
    assert len(set(map(id, codes))) == 3
    assert len({code.co_name for code in codes}) == 3
    assert with_own_code(len) is len


class Guard:
    def __init__(self, name: str, kind: str, value: Any = None, is_global: bool = False) -> None:
        self.name, self.guard_type, self.value, self.is_global = name, kind, value, is_global
        self.has_value = value is not None


def test_which_guards_are_kept() -> None:
    kept = [
        Guard("batch[0]", "TENSOR_MATCH"),
        Guard("self.training_step.__self__.factor", "EQUALS_MATCH"),
        Guard("self.update.parameters[0]", "TENSOR_MATCH"),
        Guard("self.update.form", "CONSTANT_MATCH"),
        Guard("", "GRAD_MODE"),
        Guard("G['SCALE']", "TENSOR_MATCH", torch.ones(1), True),
        Guard("G['LAYER']", "TYPE_MATCH", nn.Linear(1, 1), True),
        Guard("G['FLAG']", "EQUALS_MATCH", True, True),
        Guard("G['loss_of_mine']", "CLOSURE_MATCH", test_a_code_object_and_a_name_of_its_own, True),
    ]
    left_out = [
        Guard("self.gradients", "SEQUENCE_LENGTH"),
        Guard("self.update.rows[0]", "EQUALS_MATCH"),
        Guard("G['F'].relu", "CLOSURE_MATCH", nn.functional.relu, True),
        Guard("G['Tensor']", "CLASS_MATCH", Tensor, True),
        Guard("G['torch']", "MODULE_MATCH", torch, True),
    ]
    assert keep_guards(kept) == [True] * len(kept)
    assert keep_guards(left_out) == [False] * len(left_out)
