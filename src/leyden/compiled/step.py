"""`Trainer(compile=True)`: training steps as graphs, checked against eager, given up with a stated reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch.optim import SGD

from leyden.compiled.backend import Compiler, is_endless, reason_of, with_own_code
from leyden.compiled.check import UPDATE_FACTOR, Snapshot, constants_of, differences, relative, state_of, tolerance
from leyden.compiled.graph import Clip, LossScale, Recorder, Result, StepBody
from leyden.compiled.shapes import Shape, Shapes
from leyden.compiled.updates import CHANGED, NEW_STATE, CaptureError, Update, make_update
from leyden.run import Run, detached, loss_of

FEW_BATCHES, MAX_STARTS = 10, 5
"""How often graphs that are used so seldom are made until it is given up."""
_RAISED = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


class Case(NamedTuple):
    """What has a graph of its own: batches of a shape, at a place in windows of a length."""

    shape: Shape
    window: int
    first: bool
    last: bool


class CompiledStep:
    """Trains on batches by graphs: one for each shape of batch, and one for all other shapes when there are four.

    The optimizer's first step is eager, because it makes its state. When a graph is used for the first time, the step is made
    twice from the same state, in eager and by the graph; if they differ by more than `leyden.compiled.check.TOLERANCES`, or
    the step cannot be captured, that batch is trained on in eager and ``on_give_up`` is told why.

    Args:
        run: which it takes steps for.
        clip: how gradients are clipped, or None.
        compiler: makes the graphs.
        shapes: says which batches share a graph.
        on_give_up: is told why there is no graph, in words that end a sentence, whether there were some
            before, and whether there is no use in compiling less.

    Attributes:
        output: what callbacks get of the last batch.
        largest_difference: to eager, relative, of what was compared; None before that.
    """

    def __init__(
        self,
        run: Run,
        clip: Clip | None,
        compiler: Compiler,
        shapes: Shapes,
        on_give_up: Callable[[str, bool, bool], None],
    ) -> None:
        self._run = run
        self._clip = clip
        self._compiler = compiler
        self._on_give_up = on_give_up
        self._recorder = Recorder(run.module)
        self._update: Update | None = None
        self._body: StepBody | None = None
        self._shapes = shapes
        self._was_used = False
        self._since, self._short = 0, 0
        self._graphs: dict[Case, Callable[..., Result]] = {}
        self._checked: set[Case] = set()
        self._takes_window = False
        self.output: Any = None
        self.largest_difference: float | None = None

    def is_ready(self) -> bool:
        """Whether a graph trains on the next batch: not before the optimizer has made its state, and a whole window."""
        progress = self._run.progress
        if progress.micro_batch == 0:
            self._takes_window = progress.global_step > 0 and _has_state(self._run)
        return self._takes_window

    def train_on(self, batch: Any, batch_idx: int) -> bool:
        """Train on a batch: all from the forward pass to the schedulers. Sets `output`.

        Returns:
            Whether that was done. If not, nothing has happened, and the loop is to train on the batch.
        """
        run = self._run
        if self._update is not None and not self._update.is_current():
            return self._start_over()  # parameters or state are not those that the graphs know
        if self._body is None or (run.window > 1 and not self._body.gradients):
            try:
                self._begin()
            except CaptureError as error:
                return self._give_up(str(error))
        window, at = run.window, run.progress.micro_batch
        case = Case(self._shapes.of(batch), window, at == 0, at + 1 == window)
        if case not in self._checked:
            return self._first_use(case, batch, batch_idx)
        graphs = self._compiler.graphs
        try:
            result = self._call(case, batch, batch_idx)
        except self._compiler.errors as error:  # it was to be compiled anew; nothing of the step is done
            return self._not_captured(error)
        if self._compiler.graphs != graphs:
            self._compiler.look_at_recompilation()
            self._checked.remove(case)  # the next one is checked again
        return self._settle(result, case)

    # A step by a graph

    def _call(self, case: Case, batch: Any, batch_idx: int) -> Result:
        assert self._update is not None
        if case not in self._graphs:
            self._graphs[case] = self._new_graph()
        if case.last:
            self._update.before_step()
        self._compiler.begin_step()
        with self._recorder:
            return self._graphs[case](batch, batch_idx, case.window, case.first, case.last)

    def _settle(self, result: Result, case: Case) -> bool:
        """Log and count what was done, as `loop.forward_backward` and `loop.optimizer_step` do."""
        run, progress = self._run, self._run.progress
        self._since += 1
        self._recorder.pass_on()
        run.loss, self.output = result.loss, result.output
        if result.loss is None:
            progress.skipped_batches += 1
            return True
        if not case.last:
            progress.micro_batch += 1
            if self._body is not None:
                self._body.show_gradients()
            return True
        progress.micro_batch = 0
        run.stepped = True
        run.moved = result.overflowed is None or not bool(result.overflowed)  # bool() waits for the device
        if run.moved and self._update is not None:
            self._update.after_step(result.left_alone)
        progress.global_step += 1
        if run.moved and run.step_schedulers:
            run.step_schedulers_after_step()
        return True

    def _new_graph(self) -> Callable[..., Result]:
        return self._compiler.compile(with_own_code(MethodType(StepBody.__call__, self._body)))

    # The first use of a graph

    def _begin(self) -> None:
        run = self._run
        assert run.optimizer is not None
        run.optimizer.zero_grad()  # a graph keeps none
        self._graphs.clear()
        self._checked.clear()
        self._update = make_update(run.optimizer)
        self._body = StepBody(
            training_step=run.training_step,
            arity=run.arity,
            context=run.step_context,
            update=self._update,
            clip=self._clip,
            scale=LossScale(run.scaler.scaler, run.device) if run.scaler is not None else None,
            wants_output=run.wants_outputs,
            gradients=[torch.zeros_like(each) for each in self._update.parameters] if run.window > 1 else [],
        )
        self._compiler.keep_in_place([*run.module.parameters(), *run.module.buffers(), *state_of(run.optimizer)])
        self._compiler.keep_in_place([*self._update.numbers(), *self._body.tensors()])

    def _first_use(self, case: Case, batch: Any, batch_idx: int) -> bool:
        """Make the step by the graph and in eager, compare, and keep the graph's."""
        assert self._body is not None
        scratch, has_gradient = self._body.tensors(), list(self._body.has_gradient)
        # eager clips the gradients where they are, and nobody reads them again
        others = scratch[len(self._body.gradients) :] if case.last else scratch
        before, constants = Snapshot(self._run, others, batch, scratch), constants_of(self._run.module)
        start = time.perf_counter()
        try:
            result = self._call(case, batch, batch_idx)
        except self._compiler.errors as error:
            before.put_back()
            return self._not_captured(error)
        except _RAISED as error:  # if it is the user's own, eager says where
            before.put_back()
            return self._give_up(f"the graph raised {type(error).__name__}: {reason_of(error)}")
        finally:
            self._compiler.note_seconds(time.perf_counter() - start)
        got, calls = Snapshot(self._run, others, batch, scratch), self._recorder.calls
        before.put_back()
        wanted = self._eager(case, batch, batch_idx)
        changed = [name for name, value in constants_of(self._run.module).items() if constants.get(name) != value]
        allowed, now = tolerance(self._run), Snapshot(self._run, others, batch, copied=False)
        found = differences(before, got, now, self._run, allowed)
        found.update(_of_values(result, wanted, calls, self._recorder.calls))
        self.largest_difference = max(self.largest_difference or 0.0, *found.values())
        name, ratio = _worst(found, allowed)
        if changed or not ratio <= 1:  # nan too
            before.put_back()
            self._body.has_gradient = has_gradient
            return self._give_up(
                f"it changes {changed[0]}, and a graph would have to be made for each value. Make it a tensor "
                "(self.register_buffer), or change it in a hook such as on_train_batch_end"
                if changed
                else f"the first compiled step differs from the eager one: {name} by {found[name]:.1e}, "
                f"{ratio:.1f} times the tolerance",
                entirely=bool(changed),
            )
        got.put_back()
        self._recorder.calls = calls
        self._checked.add(case)
        self._was_used = True
        return self._settle(result, case)

    def _eager(self, case: Case, batch: Any, batch_idx: int) -> Result:
        """The same step without a graph, by torch's own optimizer, clipping and loss scaler."""
        run = self._run
        assert run.optimizer is not None
        with self._recorder, run.step_context:
            output = run.training_step(*(batch, batch_idx)[: run.arity])
        loss = loss_of(output)
        if loss is None:
            return Result(None, None, None, [])
        if case.first:
            run.optimizer.zero_grad()
        if run.window > 1:
            loss = loss / run.window
        torch.autograd.backward(loss if run.scaler is None else run.scaler.scale(loss))
        if not case.last and self._body is not None:
            self._body.take_gradients()
        overflowed = None
        if case.last:
            if run.scaler is not None:
                run.scaler.unscale(run.optimizer)
            if run.clip is not None:
                run.clip(run.optimizer)
            if run.scaler is None:
                run.optimizer.step()
            else:
                overflowed = torch.tensor(not run.scaler.step(run.optimizer))
                run.scaler.update()
            run.optimizer.zero_grad()
        return Result(loss.detach(), detached(output) if run.wants_outputs else None, overflowed, [])

    def _not_captured(self, error: BaseException) -> bool:
        reason = reason_of(error)
        if reason in (CHANGED, NEW_STATE):
            return self._start_over()
        return self._give_up(reason, entirely=is_endless(error))

    def _give_up(self, reason: str, entirely: bool = False) -> bool:
        """Leave this batch and the next ones to the loop: with a compiled forward pass, or ``entirely``."""
        self._forget()
        self._on_give_up(reason, self._was_used, entirely)
        return False

    def _start_over(self) -> bool:
        """Leave this batch, and the rest of its window, to the loop, and begin with new graphs."""
        self._short = self._short + 1 if self._since < FEW_BATCHES else 0
        if self._short == MAX_STARTS:
            return self._give_up("the optimizer's parameters or state are others again and again")
        self._forget()
        return False

    def _forget(self) -> None:
        self._since, self._takes_window, self._update, self._body = 0, False, None, None
        self._graphs.clear()
        self._checked.clear()


def _has_state(run: Run) -> bool:
    """Whether the optimizer has made its state, or there is none to wait for."""
    optimizer = run.optimizer
    assert optimizer is not None
    plain_sgd = type(optimizer).step is SGD.step and not any(group["momentum"] for group in optimizer.param_groups)
    unknown = not type(optimizer).step.__module__.startswith("torch.optim.")
    return bool(optimizer.state) or plain_sgd or unknown


def _of_values(result: Result, wanted: Result, calls: list[Any], wanted_calls: list[Any]) -> dict[str, float]:
    """How far the loss and the logged values are from those of eager."""
    if [call[0] for call in calls] != [call[0] for call in wanted_calls] or (result.loss is None) != (
        wanted.loss is None
    ):
        return {"the names of logged values": float("inf")}
    found = {
        f"logged value {call[0]!r}": relative(call[1], other[1])
        for call, other in zip(calls, wanted_calls, strict=True)
    }
    return {"loss": 0.0 if result.loss is None else relative(result.loss, wanted.loss), **found}


def _worst(differences: dict[str, float], allowed: float) -> tuple[str, float]:
    """The difference that is largest in relation to its tolerance, and that relation; NaN counts as largest."""
    ratios = {
        name: value / (allowed * UPDATE_FACTOR if name == "update" else allowed) for name, value in differences.items()
    }
    worst = max(ratios, key=lambda name: float("inf") if ratios[name] != ratios[name] else ratios[name])
    return worst, ratios[worst]
