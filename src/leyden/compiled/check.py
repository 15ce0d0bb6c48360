"""What a step may change, copied to the host: to undo it, and to compare two ways of making it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leyden.data.generators import generator_states, module_generators, set_generator_states
from leyden.run import Run
from leyden.seed import capture_random_state, restore_random_state

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far a compiled step may be from the eager one, by the dtype that the forward pass computes in: the norm of the difference
over the norm, of all tensors of a kind together. Rounding alone stays a hundred times below."""
UPDATE_FACTOR = 5
"""How many times more the parameters' updates may differ, for Adam divides one rounded number by another."""
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers"}


class Snapshot:
    """The state that a training step may change.

    Held on the host, so that a device that is nearly full does not overflow. Not undone are changes within objects that
    are neither tensors nor lists, dicts or sets among the attributes of a module.

    Args:
        run: whose module, optimizer and scaler.
        others: further tensors.
    """

    def __init__(self, run: Run, others: Iterable[Tensor] = ()) -> None:
        assert run.optimizer is not None
        self._run = run
        self.parameters = [each for group in run.optimizer.param_groups for each in group["params"]]
        state = [value for values in run.optimizer.state.values() for value in values.values()]
        self.state = [*(value for value in state if isinstance(value, Tensor)), *others]
        self.buffers = [*run.module.buffers()]
        self._attributes = [(vars(module), _contents(vars(module))) for module in run.module.modules()]
        held = [value for _, values in self._attributes for value, _ in values.values() if isinstance(value, Tensor)]
        every = [*self.parameters, *run.module.parameters(), *self.state, *self.buffers, *held]
        self.tensors = list({id(tensor): tensor for tensor in every}.values())
        self.copies = to_host(self.tensors)
        self._gradients = [each.grad for each in self.parameters]
        self._random = capture_random_state(run.device)
        self._generators = module_generators(run.module)
        self._generator_states = generator_states(self._generators)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo everything since."""
        for attributes, values in self._attributes:
            for name in attributes.keys() - values.keys():
                del attributes[name]
            for name, (value, contents) in values.items():
                attributes[name] = value
                if contents is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(contents)
        self.write(self.copies)
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        restore_random_state(self._random, self._run.device)
        set_generator_states(self._generators, self._generator_states)

    @torch.no_grad()
    def write(self, copies: Sequence[Tensor]) -> None:
        """Give the tensors other values."""
        for tensor, copy in zip(self.tensors, copies, strict=True):
            tensor.copy_(copy)

    def differences(self, copies: Sequence[Tensor], allowed: float) -> dict[str, float]:
        """How far the tensors are from ``copies`` now, relative to those: of parameters, relative to what they moved by.

        Args:
            copies: of all tensors, after the step that counts as right.
            allowed: the tolerance. Elements whose average gradient is smaller than that, relative to the others', are left out
                of the update: Adam makes a full step of a gradient that is nothing but rounding.
        """
        wanted = {id(tensor): copy.double() for tensor, copy in zip(self.tensors, copies, strict=True)}
        gaps = {id(tensor): tensor.detach().cpu().double() - wanted[id(tensor)] for tensor in self.tensors}
        moved = {
            id(tensor): wanted[id(tensor)] - before.double()
            for tensor, before in zip(self.tensors, self.copies, strict=True)
        }
        counts = self._counting_elements(wanted, allowed)
        found = {
            "update": _ratio(
                [gaps[id(each)] * counts.get(id(each), 1.0) for each in self.parameters],
                [moved[id(each)] for each in self.parameters],
            )
        }
        for name, tensors in (("optimizer state", self.state), ("buffers", self.buffers)):
            found[name] = _ratio([gaps[id(each)] for each in tensors], [wanted[id(each)] for each in tensors])
        return found

    def _counting_elements(self, wanted: dict[int, Tensor], allowed: float) -> dict[int, Tensor]:
        """By parameter, where its first state of its own shape, a running mean of gradients, is more than noise."""
        assert self._run.optimizer is not None
        means = {}
        for parameter in self.parameters:
            state = self._run.optimizer.state.get(parameter, {}).values()
            mean = next((each for each in state if isinstance(each, Tensor) and each.shape == parameter.shape), None)
            if mean is not None and mean.dim():
                means[id(parameter)] = wanted[id(mean)].abs()
        count = sum(mean.numel() for mean in means.values())
        typical = (sum(float(mean.square().sum()) for mean in means.values()) / max(count, 1)) ** 0.5
        return {key: (mean > allowed * typical).double() for key, mean in means.items()}


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in host memory."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def tolerance(run: Run) -> float:
    """The tolerance for what the run's forward pass computes in."""
    dtype = getattr(run.step_context, "fast_dtype", None)  # autocast's
    if dtype is None:
        dtype = next((each.dtype for each in run.module.parameters() if each.is_floating_point()), torch.float32)
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def relative(value: Any, wanted: Any) -> float:
    """How far a number is from the wanted one: relative to it where it is large, absolute below one."""
    if isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.numel() == wanted.numel():
        return _ratio([value.detach().cpu().double() - wanted.detach().cpu().double()], [torch.ones(()), wanted.cpu()])
    return 0.0 if isinstance(value, type(wanted)) else float("inf")


def _ratio(gaps: Sequence[Tensor], sizes: Sequence[Tensor]) -> float:
    gap, size = (math.sqrt(sum(float(each.double().square().sum()) for each in part)) for part in (gaps, sizes))
    return gap / size if size else gap


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and what it holds if it is a collection."""
    return {
        name: (value, type(value)(value) if name not in _TORCHS_OWN and type(value) in (list, dict, set) else None)
        for name, value in attributes.items()
    }
