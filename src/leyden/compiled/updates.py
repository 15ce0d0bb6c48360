"""An optimizer's step, written down so that it can be part of a graph.

The numbers that change from step to step (learning rate, bias correction, momentum) are worked out on the host, as the
optimizer itself does, and go into the graph as one small tensor: a scheduler changes them without a new compilation.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from leyden.fused import looks_at_fused
from leyden.optimizers import parameters_of


class CaptureError(Exception):
    """Why a step cannot be part of a graph, in words that end a sentence."""


CHANGED = "other parameters are trained than before"
NEW_STATE = "a parameter gets its first gradient"


class Update(ABC):
    """The step of one optimizer in the graph. `write` is traced, the rest runs on the host.

    Attributes:
        parameters: those that may get gradients, in the optimizer's order.
        frozen: those that do not require any.
        form: of the formula; the graph is made anew when it changes, and for nothing else of what is here.
    """

    parameters: list[Tensor]

    def __init__(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        known = {id(parameter) for parameter in parameters}
        self._others = [each for each in parameters_of(optimizer) if id(each) not in known]
        self.frozen = [each for each in self._others if not each.requires_grad]
        self.form = "0"
        self._known = self._referred_to()

    def _referred_to(self) -> list[Any]:
        """What the graph takes for granted of the optimizer: groups, parameters, state and hooks."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        parts = [groups, *(group["params"] for group in groups), *(values.values() for values in state.values())]
        return list(chain(*parts, *(hooks.values() for hooks in _hooks_of(self.optimizer))))

    def is_current(self) -> bool:
        """Whether the optimizer is still made of the objects that the graph refers to."""
        now = self._referred_to()
        return len(now) == len(self._known) and all(map(is_, now, self._known))

    def refuse_if_changed(self) -> None:
        """Refuse to go on where parameters were frozen or set free. Traced; the compiler watches ``requires_grad``.

        Raises:
            CaptureError: if they were.
        """
        if not all(each.requires_grad for each in self.parameters) or any(each.requires_grad for each in self.frozen):
            raise CaptureError(CHANGED)
        assert self.form  # read, so that the compiler watches it

    def numbers(self) -> list[Tensor]:
        """The tensors that `before_step` writes to."""
        return []

    def change_form(self) -> None:
        """Have the graph made anew."""
        self.form = str(int(self.form) + 1)

    @abstractmethod
    def before_step(self) -> None:
        """Bring what the graph reads up to date with the optimizer's param groups."""

    @abstractmethod
    def write(self, gradients: Sequence[Tensor | None], keep: Tensor | None) -> list[int]:
        """Update parameters and state in place.

        Args:
            gradients: of `parameters`; None for those that the loss does not depend on, which are left alone.
            keep: 0-d bool tensor: whether everything is to stay as it is, because gradients have overflowed.

        Returns:
            The indices of the parameters that were left alone.
        """

    @abstractmethod
    def after_step(self, left_alone: list[int]) -> None:
        """Count a step that was made."""


def make_update(optimizer: Optimizer) -> Update:
    """Write down the step of an optimizer that has stepped before, so that its state is there.

    Raises:
        CaptureError: if there is no telling how it steps.
    """
    step = type(optimizer).step
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise CaptureError("the optimizer has differentiable=True")
        if any(parameter.is_complex() or parameter.is_sparse for parameter in group["params"]):
            raise CaptureError("the optimizer has complex or sparse parameters")
        if any(each._backward_hooks or each._post_accumulate_grad_hooks for each in group["params"]):
            raise CaptureError("a parameter has hooks on its gradient")
    if not all(isinstance(value, Tensor | None) for values in optimizer.state.values() for value in values.values()):
        raise CaptureError("the optimizer's state is more than tensors")
    if not all(looks_at_fused(hook) for hooks in _hooks_of(optimizer) for hook in hooks.values()):
        raise CaptureError("the optimizer has hooks on its step")
    own = vars(optimizer).get("step")  # a scheduler wraps it, to see whether it is called
    if own is not None and not (hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is step):
        raise CaptureError("the optimizer's step was replaced")
    # AdamW is a subclass of Adam that says decoupled_weight_decay=True
    if _steps_as(optimizer, Adam, AdamW):
        return AdamUpdate(optimizer)
    if _steps_as(optimizer, SGD):
        return SGDUpdate(optimizer)
    if step.__module__.startswith("torch.optim.") and hasattr(optimizer, "_init_group"):
        return TracedUpdate(optimizer)
    raise CaptureError(f"{type(optimizer).__name__} is no optimizer of torch's")


def _steps_as(optimizer: Optimizer, *kinds: Any) -> bool:
    """Whether it steps as one of these classes does, its own or one that its class has not changed."""
    mine: Any = type(optimizer)
    return any(mine.step is kind.step and mine._init_group is kind._init_group for kind in kinds)


def _hooks_of(optimizer: Optimizer) -> list[Any]:
    own = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return [*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks]


class FactorUpdate(Update):
    """An update whose formula is written here, with the numbers of a step as a row of ``factors``.

    Parameters that have stepped equally often and are in one group share a row.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, [each for each in parameters_of(optimizer) if each.requires_grad])
        if not self.parameters:
            raise CaptureError("no parameter requires a gradient")
        device = self.parameters[0].device
        if any(each.device != device for each in self.parameters):
            raise CaptureError("the optimizer's parameters are on several devices")
        self.groups = [group for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
        self.states = [
            self._tensors(optimizer.state.get(each, {}), group)
            for each, group in zip(self.parameters, self.groups, strict=True)
        ]
        self.flags = [self._flags(group) for group in self.groups]
        self.steps = [optimizer.state.get(each, {}).get("step") for each in self.parameters]
        self.counts = [0 if step is None else int(step) for step in self.steps]
        # a step that is counted on the host is no work for the device
        self.counted_here = [step for step in self.steps if step is not None and step.device != device]
        self.steps = [step if step is not None and step.device == device else None for step in self.steps]
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._arrange()

    @abstractmethod
    def _tensors(self, state: dict[str, Any], group: dict[str, Any]) -> list[Tensor] | None:
        """The state of one parameter that the formula updates; None if it has none yet."""

    @abstractmethod
    def _flags(self, group: dict[str, Any]) -> tuple[bool, ...]:
        """What of a group decides about the formula's form."""

    @abstractmethod
    def _row(self, group: dict[str, Any], count: int) -> list[float]:
        """The numbers of the step number ``count``."""

    @abstractmethod
    def _updated(
        self, parameter: Tensor, gradient: Tensor, state: list[Tensor], row: Sequence[Tensor], flags: tuple[bool, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """The new parameter and state. Traced."""

    def _arrange(self) -> None:
        """Give each parameter its row."""
        self.change_form()
        places: dict[tuple[int, int], int] = {}
        self.rows = [
            places.setdefault((id(group), count), len(places))
            for group, count in zip(self.groups, self.counts, strict=True)
        ]
        self._first = [self.rows.index(row) for row in range(len(places))]  # a parameter of each row
        self._seen: list[list[float]] = []
        numbers = self._numbers()
        self._memory = array("d", [each for row in numbers for each in row])
        self.factors = torch.frombuffer(self._memory, dtype=torch.float64).view(len(numbers), -1)
        if self.parameters[0].device.type != "cpu":  # there the host just writes to it
            self.factors = self.factors.to(self.parameters[0].device, self._dtype)

    def numbers(self) -> list[Tensor]:
        """See `Update.numbers`."""
        return [self.factors]

    def _numbers(self) -> list[list[float]]:
        return [self._row(self.groups[index], self.counts[index] + 1) for index in self._first]

    def before_step(self) -> None:
        """See `Update.before_step`."""
        flags = [self._flags(self.groups[index]) for index in self._first]
        if flags != [self.flags[index] for index in self._first]:
            self.flags = [self._flags(group) for group in self.groups]
            self.change_form()
        numbers = self._numbers()
        if numbers != self._seen:
            self._seen = numbers
            if self.factors.device.type == "cpu":
                self._memory[:] = array("d", [each for row in numbers for each in row])
                return
            on_host = torch.tensor(numbers, dtype=self._dtype)
            if self.factors.is_cuda:
                on_host = on_host.pin_memory()  # else the copy would wait for the device
            self.factors.copy_(on_host, non_blocking=True)

    def write(self, gradients: Sequence[Tensor | None], keep: Tensor | None) -> list[int]:
        """See `Update.write`."""
        left_alone = []
        for index, gradient in enumerate(gradients):
            if gradient is None:
                left_alone.append(index)
                continue
            parameter, state, step = self.parameters[index], self.states[index], self.steps[index]
            if state is None:
                raise CaptureError(NEW_STATE)
            row = self.factors[self.rows[index]].unbind()
            new, new_state = self._updated(parameter, gradient, state, row, self.flags[index])
            write_back(parameter, new, keep)
            for old, value in zip(state, new_state, strict=True):
                write_back(old, value, keep)
            if step is not None:
                write_back(step, step + 1, keep)
        return left_alone

    def after_step(self, left_alone: list[int]) -> None:
        """See `Update.after_step`."""
        if self.counted_here:
            torch._foreach_add_(self.counted_here, 1)
        if not left_alone:
            for index in range(len(self.counts)):
                self.counts[index] += 1
            return
        for index in range(len(self.counts)):
            self.counts[index] += index not in left_alone
        if self._is_mixed():
            self._arrange()

    def _is_mixed(self) -> bool:
        return any(self.counts[index] != self.counts[self._first[row]] for index, row in enumerate(self.rows))


def write_back(old: Tensor, new: Tensor, keep: Tensor | None) -> None:
    """Give a tensor its new value, unless ``keep`` is true."""
    old.copy_(new if keep is None else torch.where(keep, old, new))


class AdamUpdate(FactorUpdate):
    """`torch.optim.Adam` and `AdamW`: Kingma and Ba 2015, Loshchilov and Hutter 2019."""

    def _tensors(self, state: dict[str, Any], group: dict[str, Any]) -> list[Tensor] | None:
        if not state:
            return None
        return [state[name] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if name in state]

    def _flags(self, group: dict[str, Any]) -> tuple[bool, ...]:
        decays = bool(group["weight_decay"])
        return bool(group["maximize"]), decays, bool(group["decoupled_weight_decay"])

    def _row(self, group: dict[str, Any], count: int) -> list[float]:
        beta1, beta2 = map(float, group["betas"])
        rate, decay = float(group["lr"]), group["weight_decay"]
        return [
            1 - rate * decay if group["decoupled_weight_decay"] else decay,
            1 - beta1,
            beta2,
            1 - beta2,
            1 / (1 - beta2**count) ** 0.5,
            group["eps"],
            rate / (1 - beta1**count),
        ]

    def _updated(
        self, parameter: Tensor, gradient: Tensor, state: list[Tensor], row: Sequence[Tensor], flags: tuple[bool, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        maximize, decays, decoupled = flags
        decay, share1, beta2, share2, correction2, eps, rate = row
        if maximize:
            gradient = -gradient
        if decays and decoupled:
            parameter = parameter * decay
        elif decays:
            gradient = gradient + parameter * decay
        mean = state[0] + (gradient - state[0]) * share1
        square = state[1] * beta2 + gradient * gradient * share2
        new_state, largest = [mean, square], square
        if len(state) == 3:  # amsgrad
            largest = torch.maximum(state[2], square)
            new_state.append(largest)
        return parameter - rate * (mean / (largest.sqrt() * correction2 + eps)), new_state


class SGDUpdate(FactorUpdate):
    """`torch.optim.SGD`, with momentum as torch defines it."""

    def _tensors(self, state: dict[str, Any], group: dict[str, Any]) -> list[Tensor] | None:
        momentum = state.get("momentum_buffer")
        if momentum is not None:
            return [momentum]
        return None if group["momentum"] else []

    def _flags(self, group: dict[str, Any]) -> tuple[bool, ...]:
        return bool(group["maximize"]), bool(group["weight_decay"]), bool(group["nesterov"])

    def _row(self, group: dict[str, Any], count: int) -> list[float]:
        return [group["weight_decay"], group["momentum"], 1 - group["dampening"], float(group["lr"])]

    def _updated(
        self, parameter: Tensor, gradient: Tensor, state: list[Tensor], row: Sequence[Tensor], flags: tuple[bool, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        maximize, decays, nesterov = flags
        decay, momentum, share, rate = row
        if maximize:
            gradient = -gradient
        if decays:
            gradient = gradient + parameter * decay
        new_state = []
        if state:
            velocity = state[0] * momentum + gradient * share
            new_state = [velocity]
            gradient = gradient + velocity * momentum if nesterov else velocity
        return parameter - rate * gradient, new_state


class TracedUpdate(Update):
    """Any other optimizer of torch's: its own code is traced, on a stand-in that has the state tensors at hand.

    Numbers other than the learning rate are constants of the graph; where a scheduler changes them it is made anew.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.stand_in = StandIn(optimizer)
        known = [each for lists in self.stand_in.lists for each in lists[0]]
        ids = {id(each) for each in known}
        new = [each for each in parameters_of(optimizer) if each.requires_grad and id(each) not in ids]
        super().__init__(optimizer, [*known, *new])

    def before_step(self) -> None:
        """See `Update.before_step`."""
        for group, copied in zip(self.optimizer.param_groups, self.stand_in.param_groups, strict=True):
            for name, value in group.items():
                if name == "lr":
                    copied["lr"].fill_(value)
                elif name not in ("params", "capturable", "foreach", "fused") and copied[name] != value:
                    copied[name] = value

    def write(self, gradients: Sequence[Tensor | None], keep: Tensor | None) -> list[int]:
        """See `Update.write`."""
        if keep is not None:
            raise CaptureError("this optimizer cannot be combined with loss scaling in a graph")
        done = 0
        for index, lists in enumerate(self.stand_in.lists):
            own = list(gradients[done : done + len(lists[0])])
            done += len(own)
            if any(gradient is None for gradient in own):
                raise CaptureError("the loss does not depend on all parameters of the optimizer")
            self.stand_in.gradients[index] = own
        if any(gradient is not None for gradient in gradients[done:]):
            raise CaptureError(NEW_STATE)
        self.stand_in.step()
        for index in range(len(self.stand_in.gradients)):
            self.stand_in.gradients[index] = []
        return []

    def after_step(self, left_alone: list[int]) -> None:
        """The step counters are part of the graph."""


class StandIn:
    """Has what an optimizer's ``step`` reads of its ``self``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.defaults = optimizer.defaults
        self.state = optimizer.state
        self.step_of = inspect.unwrap(type(optimizer).step)
        self.param_groups: list[dict[str, Any]] = []
        self.lists: list[list[list[Any]]] = []
        self.answers: list[Any] = []
        self.gradients: list[list[Any]] = []
        count = len(inspect.signature(optimizer._init_group).parameters) - 1  # type: ignore[attr-defined]
        for index, group in enumerate(optimizer.param_groups):
            lists: list[list[Any]] = [[] for _ in range(count)]
            self.answers.append(self._ask(optimizer, group, lists))
            self.lists.append(lists)
            self.gradients.append([])
            self.param_groups.append(self._copied(group, index))

    @staticmethod
    def _copied(group: dict[str, Any], index: int) -> dict[str, Any]:
        device = group["params"][0].device
        # capturable keeps step counters in tensors; torch's compiler sets it too
        changed = {"lr": torch.tensor(float(group["lr"]), device=device), "index": index}
        if "capturable" in group:
            changed["capturable"] = True
        if "fused" in group:
            changed["fused"] = False
        return {**group, **changed, "foreach": True}

    @staticmethod
    def _ask(optimizer: Optimizer, group: dict[str, Any], lists: list[list[Any]]) -> Any:
        """Let the optimizer name its state: that is what `_init_group` does for parameters that have a gradient."""
        kept = [(parameter, parameter.grad) for parameter in group["params"]]
        for parameter, _ in kept:
            wanted = parameter.requires_grad and optimizer.state.get(parameter)  # for others it would make some
            parameter.grad = torch.empty_like(parameter) if wanted else None
        try:
            answer = optimizer._init_group(group, *lists)  # type: ignore[attr-defined]
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient
        lists[1] = []
        if any(item is None for part in lists[2:] for item in part):
            raise CaptureError("the optimizer has no state yet")
        return answer

    def _init_group(self, group: dict[str, Any], parameters: list[Any], gradients: list[Any], *rest: list[Any]) -> Any:
        lists = self.lists[group["index"]]
        parameters.extend(lists[0])
        gradients.extend(self.gradients[group["index"]])
        for wanted, given in zip(rest, lists[2:], strict=True):
            wanted.extend(given)
        return self.answers[group["index"]]

    def _cuda_graph_capture_health_check(self) -> None:
        """Called by optimizers; there is nothing to check in a stand-in."""

    _accelerator_graph_capture_health_check = _cuda_graph_capture_health_check

    def step(self) -> None:
        """Run the optimizer's own code."""
        self.step_of(self)
