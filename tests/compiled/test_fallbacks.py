"""What cannot be one graph: the result is that of eager all the same, and one warning says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import leyden as L
from both_ways import Net, Ran, batches, both, codes, fit, needs_tracing, same_size, traced_only
from leyden.compiled.backend import Compiler, reason_of
from leyden.compiled.updates import AdamUpdate

pytestmark = [needs_tracing, pytest.mark.usefixtures("traced_only")]
_ = traced_only


def check(ran: Ran, what: str, reason: str) -> None:
    """One warning, which says why; the same in `Trainer.explain`."""
    assert codes(ran) == ["compile"], ran.warned
    assert ran.compiled.what == what
    assert reason in ran.warned[0]
    assert reason in ran.trainer.explain(ran.module)
    assert len([line for line in ran.trainer.explain(ran.module).splitlines() if "compile=True" in line]) == 1


def variant(**members: Any) -> type[Net]:
    return type("Variant", (Net,), members)


def own_backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    (2 * loss).backward(*args, **kwargs)


def own_clipping(self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
    self.clip_gradients(optimizer, 0.1, "norm")


def own_zero_grad(self: Any, epoch: int, batch_idx: int, optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=False)


def scale_gradients(self: Any, optimizer: Any) -> None:
    for parameter in self.parameters():
        parameter.grad *= 0.5


IN_THE_MIDDLE: dict[str, dict[str, Any]] = {
    "on_before_zero_grad": {"on_before_zero_grad": lambda self, optimizer: None},
    "on_before_backward": {"on_before_backward": lambda self, loss: None},
    "on_after_backward": {"on_after_backward": lambda self: None},
    "on_before_optimizer_step": {"on_before_optimizer_step": scale_gradients},
    "the module overrides backward": {"backward": own_backward},
    "the module overrides configure_gradient_clipping": {"configure_gradient_clipping": own_clipping},
    "the module overrides optimizer_zero_grad": {"optimizer_zero_grad": own_zero_grad},
}


@pytest.mark.parametrize("reason", IN_THE_MIDDLE)
def test_hooks_in_the_middle_of_a_step(reason: str, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, variant(**IN_THE_MIDDLE[reason]), same_size)
    check(ran, "forward and backward", reason)
    assert ran.compiled.compilations == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"nan_policy": "skip"}, "nan_policy='skip' looks at it in the middle"),
        ({"oom_policy": "halve"}, "oom_policy='halve' looks at it in the middle"),
        ({"detect_anomaly": True}, "detect_anomaly=True looks at it in the middle"),
        ({"profiler": "simple"}, "the profiler measures its parts"),
    ],
    ids=str,
)
def test_arguments_of_the_trainer(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, same_size, **options)
    check(ran, "forward and backward", reason)


def prints(self: Any, batch: Any, batch_idx: int) -> Tensor:
    loss = self.loss(batch)
    print("batch", batch_idx, loss.shape)
    self.log("loss", loss)
    return loss


def branches(self: Any, batch: Any, batch_idx: int) -> Tensor:
    loss = self.loss(batch)
    self.log("loss", loss)
    return loss * 2 if loss > 1 else loss


def uses_numpy(self: Any, batch: Any, batch_idx: int) -> Tensor:
    import numpy as np

    factor = float(np.random.rand())
    if factor < 2:
        self.log("factor", factor)
    loss = self.loss(batch) * factor
    self.log("loss", loss)
    return loss


UNTRACEABLE = {
    "print": (prints, "builtin operator `print`"),
    "if": (branches, "Data-dependent branching"),
    "numpy": (uses_numpy, ""),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_python_that_cannot_be_traced(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step, reason = UNTRACEABLE[name]
    ran, _ = both(tmp_path, variant(training_step=step), same_size)
    if name == "numpy":  # what is read of it is a constant
        assert ran.warned.pop().startswith("[LEY-recompilations]")
    check(ran, "forward and backward", reason)
    assert f"{__file__}:" in ran.warned[0]  # the user's line
    # nothing was made twice: 20 steps, in eager and compiled
    assert capsys.readouterr().out.count("batch ") == (40 if name == "print" else 0)


def test_what_is_read_of_a_tensor_may_be_logged(tmp_path: Path) -> None:
    def logs_items(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(batch)
        self.log("item", loss.item())
        self.log("numpy", float(batch[0].numpy().mean()))
        return loss

    ran, _ = both(tmp_path, variant(training_step=logs_items), same_size)
    assert ran.whole or codes(ran) == ["compile"]


class Lion(optim.Optimizer):
    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.grad.sign()


class OwnStep(optim.AdamW):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.param_groups[0]["lr"] *= 0.9
        return super().step(closure)


def hooked(net: Any) -> Any:
    optimizer = optim.AdamW(net.parameters(), lr=1e-2)
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.param_groups[0]["params"][0].data.mul_(0.9))
    return optimizer


def replaced(net: Any) -> Any:
    optimizer = optim.AdamW(net.parameters(), lr=1e-2)
    step = optimizer.step

    def slower(*args: Any, **kwargs: Any) -> Any:
        optimizer.param_groups[0]["lr"] *= 0.9
        return step(*args, **kwargs)

    optimizer.step = slower  # type: ignore[method-assign]
    return optimizer


def hooked_parameter(net: Any) -> Any:
    net.net[0].weight.register_hook(lambda gradient: gradient * 0.5)
    return optim.AdamW(net.parameters(), lr=1e-2)


def hooked_gradient(net: Any) -> Any:
    net.net[0].weight.register_post_accumulate_grad_hook(lambda parameter: (parameter.grad.mul_(0.5), None)[1])
    return optim.SGD(net.parameters(), lr=1e-2)


class Sparse(Net):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.embedding = nn.Embedding(3, 1, sparse=True)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]) + self.embedding((batch[0][:, 0] > 0).long()), batch[1])


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "Lion is no optimizer of torch's": lambda net: Lion(net.parameters(), lr=1e-3),
    "OwnStep is no optimizer of torch's": lambda net: OwnStep(net.parameters(), lr=1e-2),
    "the optimizer has hooks on its step": hooked,
    "the optimizer's step was replaced": replaced,
    "a parameter has hooks on its gradient": hooked_parameter,
}


@pytest.mark.parametrize("reason", OPTIMIZERS)
def test_optimizers_that_do_more_than_torchs(reason: str, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Net(OPTIMIZERS[reason]), same_size)
    check(ran, "forward and backward", reason)


def test_hooks_where_gradients_add_up(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Net(hooked_gradient), same_size)
    check(ran, "forward and backward", "a parameter has hooks on its gradient")


def test_sparse_gradients(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Sparse(lambda net: optim.SGD(net.parameters(), lr=1e-2)), same_size)
    check(ran, "forward and backward", "sparse")


class Gan(L.LightningModule):
    """Two players, who step their optimizers themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.generator = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.judge = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        loss = nn.functional.mse_loss(self.judge(self.generator(batch[0])), batch[1])
        first.minimize(loss)
        other = self.judge(self.generator(batch[0]).detach()).square().mean()
        second.minimize(other)
        self.log_dict({"loss": loss, "other": other})

    def configure_optimizers(self) -> Any:
        return [optim.Adam(self.generator.parameters()), optim.SGD(self.judge.parameters(), lr=0.01)]


def test_manual_optimization_compiles_the_submodules(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Gan, same_size)
    check(ran, "the submodules", "the step is made by training_step itself")
    assert "Sequential, Sequential" in ran.warned[0]
    assert ran.compiled.compilations >= 2
    assert all(child._compiled_call_impl is None for child in ran.module.children())


def test_what_the_user_compiles_stays_compiled(tmp_path: Path) -> None:
    gan, calls = Gan(), []
    gan.judge._compiled_call_impl = lambda *args: calls.append(1) or gan.judge._call_impl(*args)  # type: ignore[func-returns-value]
    ran = fit(tmp_path, gan, same_size(), max_epochs=1)
    assert len(calls) == 10
    assert gan.judge._compiled_call_impl is not None
    assert "submodules: Sequential." in ran.warned[0]


def test_lbfgs(tmp_path: Path) -> None:
    ran, _ = both(
        tmp_path,
        lambda: Net(lambda net: optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)),
        same_size,
        tolerance=1e-2,
    )
    check(ran, "the submodules", "needs one")


def test_a_step_of_the_users_own(tmp_path: Path) -> None:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        if batch_idx != 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    ran, _ = both(tmp_path, variant(optimizer_step=optimizer_step), same_size)
    check(ran, "the submodules", "through a closure")


# A compiler that fails, or is wrong


@pytest.fixture
def _no_compiler(traced_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(self: Compiler, graph: Any, inputs: list[Any]) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(Compiler, "backend", backend)


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize("make", [Net, variant(training_step=prints), Gan], ids=["whole", "in parts", "submodules"])
def test_without_a_compiler_all_is_eager(make: Callable[[], Any], tmp_path: Path) -> None:
    ran, eager = both(tmp_path, make, same_size, tolerance=0.0)
    assert codes(ran) == ["compile", "compile"]
    assert "No working C++ compiler found" in ran.warned[-1]
    assert ran.warned[-1].endswith("It runs in eager.")
    assert ran.compiled.what == "nothing"
    assert "No working C++ compiler found" in ran.trainer.explain(ran.module) or not ran.compiled.compilations
    assert ran.rows == eager.rows


def test_a_compiler_that_fails_at_a_later_part_makes_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, graphs = Compiler.backend, []

    def backend(self: Compiler, graph: Any, inputs: list[Any]) -> Any:
        graphs.append(graph)
        if len(graphs) == 2:
            raise RuntimeError("this one is too hard")
        return whole(self, graph, inputs)

    monkeypatch.setattr(Compiler, "backend", backend)

    def in_two_parts(self: Any, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1  # in the first graph
        hidden = self.net[:3](batch[0])
        print(end="")
        loss = nn.functional.mse_loss(self.net[3:](hidden), batch[1])
        self.log("loss", loss)
        return loss

    def make() -> Net:
        net = variant(training_step=in_two_parts)(
            Net().optimizer, nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        net.register_buffer("count", torch.zeros(()))
        return net

    ran, _ = both(tmp_path, make, same_size)
    assert int(ran.module.count) == int(ran.module.net[1].num_batches_tracked) == 20
    assert "this one is too hard" in ran.warned[-1]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda new, state: (new * 1.001, state), "update by"),
        (lambda new, state: (new, [state[0] * 1.01, *state[1:]]), "optimizer state by"),
        (lambda new, state: (new * float("nan"), state), "update by"),
    ],
    ids=["weights", "state", "nan"],
)
def test_a_graph_that_is_wrong_is_found(
    spoil: Callable[..., Any], what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = AdamUpdate._updated
    monkeypatch.setattr(AdamUpdate, "_updated", lambda self, *args: spoil(*right(self, *args)))
    ran, _ = both(tmp_path, Net, same_size)
    check(ran, "forward and backward", f"the first compiled step differs from the eager one: {what}")


def spoil_first_graph(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any]], Any]) -> None:
    """Let the first graph that is made change its results."""
    right, made = Compiler.backend, []

    def backend(compiler: Compiler, graph: Any, inputs: list[Any]) -> Any:
        run = right(compiler, graph, inputs)
        made.append(graph)
        return run if len(made) > 1 else lambda *args: change(list(run(*args)))

    monkeypatch.setattr(Compiler, "backend", backend)


def spoil_scalars(results: list[Any]) -> list[Any]:
    return [each * 1.01 if isinstance(each, Tensor) and each.dim() == 0 else each for each in results]


def test_a_loss_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil_first_graph(monkeypatch, spoil_scalars)
    ran, _ = both(tmp_path, Net, same_size)
    assert codes(ran) == ["compile"]
    assert "differs from the eager one" in ran.warned[0]


def test_other_random_numbers_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def draw(results: list[Any]) -> list[Any]:
        torch.rand(1)
        return results

    spoil_first_graph(monkeypatch, draw)
    ran, _ = both(tmp_path, Net, same_size)
    check(ran, "forward and backward", "differs from the eager one: random numbers")


def test_a_graph_that_raises_leaves_the_batch_to_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(results: list[Any]) -> Any:
        raise RuntimeError("out of luck")

    spoil_first_graph(monkeypatch, fail)
    ran, _ = both(tmp_path, Net, same_size)
    check(ran, "forward and backward", "the graph raised RuntimeError: out of luck")


# The user's own mistakes


class Mistaken(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert isinstance(loss, Tensor)
        if self.kind == "raise" and batch_idx == 4:
            raise ZeroDivisionError("mine")
        if self.kind == "shape" and batch_idx == 4:
            return loss + torch.ones(3) @ torch.ones(4)
        if self.kind == "index":
            loss = loss + nn.functional.embedding(torch.tensor(batch_idx), self.net[0].weight[:4]).sum()
        return loss


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("raise", ZeroDivisionError, "mine"),
        ("shape", RuntimeError, "inconsistent tensor size"),
        ("index", IndexError, "out of range"),
    ],
)
def test_an_error_of_the_users_own_comes_out_as_it_is(kind: str, error: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=text) as caught:
        fit(tmp_path, Mistaken(kind), same_size())
    if kind != "index":
        assert any(str(entry.path) == __file__ and "Mistaken" not in entry.name for entry in caught.traceback)
        assert caught.value.__context__ is None
        last = caught.traceback[-1]
        assert str(last.path) == __file__
        assert last.name.startswith("training_step")


def test_reasons() -> None:
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    assert reason_of(RuntimeError("\n  first line.\nsecond")) == "first line"
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(Exception("Observed exception\n CaptureError('the reason')")) == "the reason"
    unsupported = "Data-dependent branching\n  Explanation: It depends.\n\nfrom user code:\n"
    unsupported += (
        '   File "/x/leyden/compiled/graph.py", line 3, in __call__\n   File "/home/me/net.py", line 12, in step\n'
    )
    assert reason_of(Unsupported(unsupported)) == "Data-dependent branching: It depends (/home/me/net.py:12)"
    failed = BackendCompilerFailed(lambda: None, OSError("no g++"), None)
    assert reason_of(failed) == "torch's compiler failed with OSError: no g++"


def test_a_batch_of_another_size_within_a_run_of_parts(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, variant(training_step=branches), batches)
    check(ran, "forward and backward", "Data-dependent branching")


class Annealed(Net):
    """Weighs its loss by a number that each step changes; ``where`` says where it is kept."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.beta, self.options, self.history = 1.0, {"beta": 1.0}, [1.0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.where == "attribute":
            self.beta *= 0.9
            weight = self.beta
        elif self.where == "dict":
            self.options["beta"] *= 0.9
            weight = self.options["beta"]
        else:
            self.history.append(0.9 * self.history[-1])
            weight = self.history[-1]
        return self.loss(batch) * weight


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("attribute", "it changes self.beta"),
        ("list", "it changes the length of self.history"),
        ("dict", "it would be compiled again and again"),
    ],
)
def test_a_number_that_the_step_changes_is_followed(tmp_path: Path, where: str, reason: str) -> None:
    eager, ran = (fit(tmp_path, Annealed(where), same_size(8), compile=each, max_epochs=2) for each in (False, True))
    numbers = [(each.module.beta, each.module.options, each.module.history) for each in (eager, ran)]
    assert numbers[0] == numbers[1]
    for mine, other in zip(ran.module.parameters(), eager.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert ran.compiled.what == "nothing"
    assert reason in ran.compiled.reason
    assert ran.line == f"compile=True: nothing is compiled: {ran.compiled.reason}; all of it is eager"


def test_hooks_in_the_middle_and_a_number_that_the_step_changes(tmp_path: Path) -> None:
    def make(compiled: bool) -> Ran:
        module = Annealed("attribute")
        module.on_after_backward = lambda: None  # type: ignore[method-assign]
        return fit(tmp_path, module, same_size(8), compile=compiled, max_epochs=2)

    eager, ran = make(False), make(True)
    assert ran.module.beta == eager.module.beta
    for mine, other in zip(ran.module.parameters(), eager.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
