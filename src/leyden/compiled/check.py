"""What a step may change, copied to the host: to undo it, and to compare two ways of making it."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import data

from leyden.data.generators import generator_states, module_generators, set_generator_states
from leyden.run import Run
from leyden.seed import capture_random_state, restore_random_state

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far a compiled step may be from the eager one, by the dtype that the forward pass computes in: the norm of the difference
over the norm, of all tensors of a kind together. Rounding alone stays a hundred times below."""
UPDATE_FACTOR = 5
"""How many times more the parameters' updates may differ, for Adam divides one rounded number by another."""
MAX_DEPTH = 4
"""How deep lists, dicts and objects within a module's attributes are looked into."""
MAX_ITEMS = 1000
"""Longer lists and dicts are put back, but not looked into."""
_LEFT_ALONE = (
    *(nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, torch.Generator),
    *(data.Dataset, data.DataLoader, data.Sampler),
)


class Snapshot:
    """The state that a training step may change: of the module, the optimizer, the scaler, the batch, random generators.

    Held on the host, so that a device that is nearly full does not overflow. The attributes of the module and of all modules
    in it are followed into lists, dicts, sets, arrays and plain objects.

    Args:
        run: whose module and optimizer.
        others: further tensors, such as the scaler's.
        batch: which the step may change in place.
        scratch: tensors that are put back, but not compared.
        copied: False only notes what there is, to compare it: it cannot be put back.

    Attributes:
        parameters: of the optimizer.
        state: tensors of the optimizer, and ``others``.
        buffers: of the module.
        held: other tensors that the module's attributes hold.
        random: the state of all random generators on the host.
    """

    def __init__(
        self,
        run: Run,
        others: Iterable[Tensor] = (),
        batch: Any = None,
        scratch: Iterable[Tensor] = (),
        copied: bool = True,
    ) -> None:
        assert run.optimizer is not None
        self._device = run.device
        self.parameters = [each for group in run.optimizer.param_groups for each in group["params"]]
        self.state = [*state_of(run.optimizer), *others]
        self.buffers = [*run.module.buffers()]
        self._walk = _Walk()
        for module in run.module.modules():
            self._walk.look_into(vars(module), MAX_DEPTH)
        known = {id(each) for each in (*run.module.parameters(), *self.buffers)}
        self.held = [each for each in self._walk.tensors if id(each) not in known]
        self._walk.look_into(batch, MAX_DEPTH)
        trained = {id(each): each for each in (*self.parameters, *run.module.parameters())}
        self._gradients = [(each, each.grad) for each in trained.values()]
        gradients = [gradient for _, gradient in self._gradients if gradient is not None]
        every = [*trained.values(), *self.state, *self.buffers, *self._walk.tensors, *gradients, *scratch]
        self._tensors = {id(each): each for each in every if _can_be_written(each)}
        self._copies = {key: each.detach().to("cpu", copy=True) for key, each in self._tensors.items() if copied}
        self.random = capture_random_state(run.device)
        self._generators = module_generators(run.module)
        self._generator_states = generator_states(self._generators)

    @torch.no_grad()
    def put_back(self) -> None:
        """Let everything be as it was."""
        self._walk.put_back()
        for key, tensor in self._tensors.items():
            tensor.copy_(self._copies[key])
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        restore_random_state(self.random, self._device)
        set_generator_states(self._generators, self._generator_states)

    def of(self, tensor: Tensor) -> Tensor:
        """What a tensor held then, on the host, with as many bits as there are."""
        found = self._copies.get(id(tensor))
        return _wide(tensor.detach().cpu() if found is None else found)


def differences(before: Snapshot, got: Snapshot, wanted: Snapshot, run: Run, allowed: float) -> dict[str, float]:
    """How far a step has led from where another leads, relative: of parameters, relative to what they moved by.

    Args:
        before: the state from which both were made.
        got: where one has led.
        wanted: where the one that counts as right has led.
        run: whose step it was.
        allowed: the tolerance. Elements whose average gradient is smaller than that, relative to the others', are left out
            of the update: Adam makes a full step of a gradient that is nothing but rounding.
    """
    counts = _counting_elements(wanted, run, allowed)
    update = _Ratio()
    for mine, other in zip(got.parameters, wanted.parameters, strict=True):
        now, then = wanted.of(other), before.of(mine)
        update.add(_gap(got.of(mine), now) * counts.get(id(other), 1.0), now - then)
    found = {"update": update.value()}
    for kind in ("state", "buffers", "held"):
        name = {"state": "optimizer state", "held": "attributes"}.get(kind, kind)
        mine, others = getattr(got, kind), getattr(wanted, kind)
        ratio = _Ratio()
        same = [each.shape for each in mine] == [each.shape for each in others]
        for one, other in zip(mine, others, strict=True) if same else ():
            right = wanted.of(other)
            ratio.add(_gap(got.of(one), right), right)
        found[name] = ratio.value() if same else math.inf
    if not all(_same(got.random.get(name), wanted.random.get(name)) for name in ("python", "numpy", "torch")):
        found["random numbers"] = math.inf
    return found


def tolerance(run: Run) -> float:
    """The tolerance for what the run's forward pass computes in."""
    dtype = getattr(run.step_context, "fast_dtype", None)  # autocast's
    if dtype is None:
        dtype = next((each.dtype for each in run.module.parameters() if each.is_floating_point()), torch.float32)
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def relative(value: Any, wanted: Any) -> float:
    """How far a number is from the wanted one: relative to it where it is large, absolute below one."""
    numbers = [
        torch.tensor(each, dtype=torch.float64) if isinstance(each, (bool, int, float)) else each
        for each in (value, wanted)
    ]
    if all(isinstance(each, Tensor) for each in numbers):
        if numbers[0].numel() != numbers[1].numel():
            return math.inf
        one, other = (_wide(each.detach().cpu()).reshape(-1) for each in numbers)
        ratio = _Ratio(floor=1.0)
        ratio.add(_gap(one, other), other)
        return ratio.value()
    return 0.0 if type(value) is type(wanted) else math.inf


class _Ratio:
    """The norm of a difference over the norm of what it is a difference to."""

    def __init__(self, floor: float = 0.0) -> None:
        self._gap, self._size = 0.0, floor

    def add(self, gap: Tensor, size: Tensor) -> None:
        """Take one tensor's part; what is not finite has no size."""
        self._gap += float(gap.square().sum())
        self._size += float(size.nan_to_num(0.0, 0.0, 0.0).square().sum())

    def value(self) -> float:
        """The ratio; the difference itself if it is one to nothing."""
        return math.sqrt(self._gap / self._size) if self._size else math.sqrt(self._gap)


class _Walk:
    """Finds the tensors and collections that attributes hold, and puts the collections back as they were."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._collections: list[tuple[Any, list[Any]]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._seen: dict[int, Any] = {}  # the objects too: an id that is free is used again

    def look_into(self, value: Any, depth: int) -> None:
        """Note a value, and all that it holds."""
        if id(value) in self._seen or isinstance(value, (str, bytes, int, float, type(None), *_LEFT_ALONE)):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray):
            self._arrays.append((value, value.copy()))
            return
        parts = _parts(value)
        if parts is None:
            if type(value).__module__.partition(".")[0] != "leyden" and isinstance(
                getattr(value, "__dict__", None), dict
            ):
                self.look_into(vars(value), depth)
            return
        if not isinstance(value, tuple):
            self._collections.append((value, parts))
        if depth and len(parts) <= MAX_ITEMS and not isinstance(value, set):
            for part in [part for _, part in parts] if isinstance(value, dict) else parts:
                self.look_into(part, depth - 1)

    def put_back(self) -> None:
        """Let every collection hold what it held."""
        for value, parts in self._collections:
            if not _identical(_parts(value) or [], parts):
                _fill(value, parts)
        for array, copy in self._arrays:
            array[...] = copy


def _parts(value: Any) -> list[Any] | None:
    """What a collection holds; None for something else."""
    if isinstance(value, dict):
        return list(value.items() if isinstance(value, OrderedDict) else dict.items(value))
    return list(value) if isinstance(value, (list, tuple, set, deque)) else None


def _identical(some: Sequence[Any], others: Sequence[Any]) -> bool:
    def same(one: Any, other: Any) -> bool:
        pairs = isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) == 2
        return one is other or (pairs and one[0] is other[0] and one[1] is other[1])

    return len(some) == len(others) and all(map(same, some, others))


def _fill(value: Any, parts: list[Any]) -> None:
    if isinstance(value, OrderedDict):
        value.clear()
        value.update(parts)
    elif isinstance(value, dict):  # a Counter's own update would add
        dict.clear(value)
        dict.update(value, parts)
    else:
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(parts)


def _can_be_written(tensor: Tensor) -> bool:
    """Whether a step could have changed a tensor in place, so that it must be copied."""
    overlaps = tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.layout is torch.strided and not (overlaps or tensor.is_inference() or tensor.is_meta)


def _counting_elements(wanted: Snapshot, run: Run, allowed: float) -> dict[int, Tensor]:
    """By parameter, where its first state of its own shape, a running mean of gradients, is more than noise."""
    assert run.optimizer is not None
    means = {}
    for parameter in wanted.parameters:
        state = run.optimizer.state.get(parameter, {}).values()
        mean = next((each for each in state if isinstance(each, Tensor) and each.shape == parameter.shape), None)
        if mean is not None and mean.dim():
            means[id(parameter)] = wanted.of(mean).abs()
    count = sum(mean.numel() for mean in means.values())
    typical = math.sqrt(sum(float(mean.square().sum()) for mean in means.values()) / max(count, 1))
    return {key: (mean > allowed * typical).double() for key, mean in means.items()}


def _gap(value: Tensor, wanted: Tensor) -> Tensor:
    """The difference; none where both are the same, infinite or NaN too."""
    same = (value == wanted) | (value.isnan() & wanted.isnan())
    return torch.where(same, torch.zeros((), dtype=torch.float64), value - wanted)


def _wide(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()).double() if tensor.is_complex() else tensor.double()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def constants_of(module: nn.Module) -> dict[str, float]:
    """Floats and the lengths of lists among the attributes of a module and its parts: constants of a graph, by dotted names."""
    found: dict[str, float] = {}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if type(value) is float:
                found[".".join(filter(None, ("self", name, attribute)))] = value
            elif type(value) is list:
                found[f"the length of {'.'.join(filter(None, ('self', name, attribute)))}"] = len(value)
    return found


def state_of(optimizer: Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state."""
    return [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
