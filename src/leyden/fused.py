"""torch's fused optimizer kernels: set where an optimizer has them, nothing else was asked for, and they compute the same.

A fused kernel does an optimizer's whole step for many parameters in one call. It is choosier than torch's other two ways, and
on the CPU it does not look: it walks through parameter, gradient and state side by side in memory, whatever their strides. So
`choose_kernels` fuses only what the kernels take, after a trial of them, and `_Watch` keeps gradients and state in the form
that they take. What is decided is shown by `Trainer.explain`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from leyden.shards import is_sharded, local_part

FUSED_KINDS: tuple[type[Optimizer], ...] = (AdamW, Adam, SGD, Adagrad)
"""The optimizers that torch has fused kernels for; a subclass comes before its base."""


@dataclass
class KernelChoice:
    """Whether one optimizer steps with torch's fused kernels by our doing, and why.

    Attributes:
        optimizer: its class's name.
        fused: whether ``fused=True`` was set.
        reason: in a few words, for `Trainer.explain`.
    """

    optimizer: str
    fused: bool
    reason: str

    def line(self) -> tuple[str, str]:
        """A setting and its reason."""
        return (f"fused=True for {self.optimizer}" if self.fused else f"kernels of {self.optimizer}"), self.reason


_WHY = "default: torch's fused kernels; fused_optimizer=False leaves torch's own choice"


def choose_kernels(
    optimizers: Sequence[Optimizer], module: nn.Module, *, wanted: bool, scales_loss: bool, hand_made: bool
) -> list[KernelChoice]:
    """Set ``fused=True`` on the optimizers that can have it and whose user left it open.

    Args:
        optimizers: of one run, before its first step. One that an earlier run has fused is put back first.
        module: whose modules say where gradients will be sparse.
        wanted: the Trainer's ``fused_optimizer``; False leaves every optimizer as it is.
        scales_loss: whether a loss scaler decides if a step is made.
        hand_made: whether something other than autograd may put gradients into place, besides torch's own hooks, which are
            looked for here. Then they are looked at before every step (about 0.5 µs for each parameter), and else only where
            they are new.

    Returns:
        What was decided, by optimizer; empty if not ``wanted``.
    """
    for optimizer in optimizers:
        _forget_earlier_run(optimizer)
        if scales_loss:
            _leave_skipping_to_the_scaler(optimizer)
    if not wanted:
        return []
    choices = []
    for optimizer in optimizers:
        reason = why_not(optimizer, module)
        choice = KernelChoice(type(optimizer).__name__, reason is None, reason or _WHY)
        if choice.fused:
            fuse(optimizer)
            _Watch(optimizer, choice, hand_made or _has_hooks(optimizer))
        choices.append(choice)
    return choices


def _forget_earlier_run(optimizer: Optimizer) -> None:
    for hook in [*optimizer._optimizer_step_pre_hooks.values()]:
        if looks_at_fused(hook):
            hook.__self__.end(optimizer)  # type: ignore[attr-defined]


def _has_hooks(optimizer: Optimizer) -> bool:
    """Whether somebody has given torch a function that may replace gradients when autograd has made them."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    before_steps = optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks
    return bool(before_steps) or any(parameter._post_accumulate_grad_hooks for parameter in parameters)


def why_not(optimizer: Optimizer, module: nn.Module) -> str | None:
    """Why the optimizer stays as it is; None if it can be fused.

    Args:
        optimizer: any.
        module: see `choose_kernels`.
    """
    kind = _kind(optimizer)
    if kind is None:
        return "stay as they are: torch has no fused ones for it"
    for group in optimizer.param_groups:
        for name in ("fused", "foreach", "capturable", "differentiable"):
            if group.get(name) not in (None, False) or (name in ("fused", "foreach") and group.get(name) is not None):
                return f"as given: {name}={group[name]}"
        for name, value in group.items():
            several = value if isinstance(value, tuple) else (value,)
            if name != "lr" and any(isinstance(each, Tensor) for each in several):
                return f"stay as they are: {name} is a tensor, which fused ones would read on the host"
        if (reason := _unfit(kind, group["params"])) is not None:
            return f"stay as they are: {reason}"
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and id(part.weight) in own:
            return f"stay as they are: {name or type(part).__name__} has sparse gradients"
    return None


def _kind(optimizer: Optimizer) -> type[Optimizer] | None:
    """The class of `FUSED_KINDS` whose step it makes: its own, or one that a subclass left as it is."""
    mine = type(optimizer)
    for kind in FUSED_KINDS:
        if isinstance(optimizer, kind):
            same = inspect.unwrap(mine.step) is inspect.unwrap(kind.step)  # torch wraps it in every class that it sees
            return kind if same and mine._init_group is kind._init_group else None  # type: ignore[attr-defined]
    return None


def _unfit(kind: type[Optimizer], parameters: Iterable[Tensor]) -> str | None:
    """What about the parameters torch's fused kernels do not take."""
    parameters = list(parameters)
    meshes = {parameter.device_mesh if is_sharded(parameter) else None for parameter in parameters}
    if len(meshes) > 1:
        return "ranks have parts of parameters in different ways"
    if meshes != {None} and meshes and kind not in (Adam, AdamW):
        return "torch has no fused ones for parameters of which each rank has a part"
    for parameter in map(local_part, parameters):
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"a parameter is a {type(parameter).__name__}"
        if parameter.layout is not torch.strided or not torch.ops.aten.is_non_overlapping_and_dense(parameter):
            return "a parameter's elements do not lie side by side in memory"
        if not has_kernel(kind, parameter.device, parameter.dtype):  # type: ignore[arg-type]
            dtype = str(parameter.dtype).removeprefix("torch.")
            return f"torch has no fused ones that are right for {dtype} on {parameter.device.type}"
    return None


@cache
def has_kernel(kind: type[Optimizer], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a fused kernel for this, and it does what the plain step does: three steps of both are compared.

    There may be one that is wrong: that of SGD for fp16 and bf16 on the CPU leaves most elements as they are in torch 2.13 and
    before (https://github.com/pytorch/pytorch/issues/191763).
    """
    options: dict[str, Any] = {"lr": 0.25, **({"momentum": 0.9} if kind is SGD else {})}
    try:
        fused, plain = (_trial(kind, device, dtype, fused=choice, **options) for choice in (True, False))
    except (RuntimeError, TypeError):  # torch refuses the dtype, the device, or both
        return False
    return torch.allclose(fused, plain, rtol=0.0, atol=16 * torch.finfo(dtype).eps)


def _trial(kind: type[Optimizer], device: torch.device, dtype: torch.dtype, **options: Any) -> Tensor:
    """A parameter after three steps: 100 elements, so that whole vectors and a rest are computed."""
    start = torch.linspace(0.5, 1.5, 100, dtype=torch.float32).to(device, dtype)
    parameter = nn.Parameter(start.clone())
    optimizer = kind([parameter], **options)
    step = inspect.unwrap(kind.step)  # without the hooks that somebody may have registered for all optimizers
    with torch.no_grad():
        for _ in range(3):
            parameter.grad = start.clone()
            step(optimizer)
    return parameter.detach().cpu().double()


def fuse(optimizer: Optimizer) -> None:
    """Have the optimizer step with fused kernels, groups that are added later as well.

    What torch's constructor would do besides is to let a loss scaler leave the skipping of steps to the kernels
    (``_step_supports_amp_scaling``). That is not done: see `_leave_skipping_to_the_scaler`.
    """
    for options in (optimizer.defaults, *optimizer.param_groups):
        options["fused"] = True
    for parameter, state in _states(optimizer):
        if "step" in state:  # Adagrad has made it when it was constructed, the others in an earlier run
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)


def _unfuse(optimizer: Optimizer) -> None:
    for options in (optimizer.defaults, *optimizer.param_groups):
        options["fused"] = None
    for _, state in _states(optimizer):
        if "step" in state:
            state["step"] = state["step"].cpu()  # where the other ways read it without waiting for the device


def _states(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The parameters that have a state, and it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                yield parameter, optimizer.state[parameter]


def _leave_skipping_to_the_scaler(optimizer: Optimizer) -> None:
    """Have a loss scaler leave out a whole step if gradients overflowed, also with the user's own ``fused=True``.

    Else the step is called all the same and its kernels leave out the update, so that nobody on the host knows whether the
    weights have moved: hooks after the step are called, and schedulers step.
    """
    if _kind(optimizer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


class _Watch:
    """A hook before an optimizer's step: keeps gradients and state in the form that fused kernels take, or unfuses.

    - A sparse gradient, or a new parameter that the kernels do not take: the optimizer steps unfused from then on.
    - A gradient or state with other strides than its parameter gets those. autograd makes gradients with a parameter's
      strides, but for dimensions of one element, which only the CPU's kernels do not look at; what was read from a file
      or assigned by hand has any. If a parameter gets other strides itself, all is looked at again.
    - SGD with momentum: a parameter whose first gradient comes later than others' has no buffer yet, which torch's fused
      step does not expect. Zeros are the same, unless ``dampening`` is to be left out in its first step.

    Args:
        optimizer: which is fused.
        choice: what is shown of it; it says so if it has to be unfused.
        always: look at all gradients before each step.
    """

    def __init__(self, optimizer: Optimizer, choice: KernelChoice, always: bool) -> None:
        self._choice = choice
        self._always = always
        self._groups = 0  # looked at so far
        self._watched: list[tuple[int, Tensor, bool]] = []  # group's number, parameter, whether it had no gradient yet
        self._matrices: list[Tensor] = []  # the parameters that may be laid out in several ways
        self._strides: list[Any] = []
        self._hooks = (
            optimizer.register_step_pre_hook(self.before_step),
            optimizer.register_load_state_dict_post_hook(self.after_load),
        )

    def end(self, optimizer: Optimizer) -> None:
        """Leave the optimizer as it was before it was fused."""
        for hook in self._hooks:
            hook.remove()
        if self._choice.fused:
            _unfuse(optimizer)

    def after_load(self, optimizer: Optimizer) -> None:
        """Look at everything again; a state that the user's own code has loaded does not choose the kernels either."""
        self._groups = 0
        if self._choice.fused:
            fuse(optimizer)

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Look at what is new since the last step, and at what may change."""
        if self._choice.fused and (
            len(optimizer.param_groups) != self._groups or [*map(Tensor.stride, self._matrices)] != self._strides
        ):
            self._begin(optimizer)
        if self._watched:
            self._look(optimizer)

    def _begin(self, optimizer: Optimizer) -> None:
        groups = [(at, group) for at, group in enumerate(optimizer.param_groups) if group["fused"]]
        self._groups = len(optimizer.param_groups)
        self._watched = [(at, parameter, True) for at, group in groups for parameter in group["params"]]
        self._matrices = [parameter for _, parameter, _ in self._watched if parameter.dim() > 1]
        self._strides = [parameter.stride() for parameter in self._matrices]
        reason = _unfit(_kind(optimizer) or type(optimizer), (parameter for _, parameter, _ in self._watched))
        if reason is not None:
            self._give_up(optimizer, f"unfused in the course of the run: {reason}")

    def _look(self, optimizer: Optimizer) -> None:
        still = []
        for at, parameter, new in self._watched:
            gradient = parameter.grad
            if gradient is None:
                still.append((at, parameter, new))
                continue
            if gradient.layout is not torch.strided:
                return self._give_up(optimizer, "unfused at the first sparse gradient")
            if gradient.stride() != parameter.stride():
                parameter.grad = in_layout_of(parameter, gradient)
                still.append((at, parameter, False))
            elif self._always or (parameter.device.type != "cpu" and 1 in parameter.shape):
                still.append((at, parameter, False))
            if new and not _has_right_state(optimizer, optimizer.param_groups[at], parameter):
                return self._give_up(optimizer, "unfused when a first gradient came late, because of dampening")
        self._watched = still
        return None

    def _give_up(self, optimizer: Optimizer, reason: str) -> None:
        _unfuse(optimizer)
        self._choice.fused, self._choice.reason = False, reason
        self._watched = []


def _has_right_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Bring the state of a parameter into its layout; whether fused kernels can go on with it."""
    state = optimizer.state.get(parameter) or {}
    lay_out_state(parameter, state)
    if not group.get("momentum") or state.get("momentum_buffer") is not None:
        return True
    if all((optimizer.state.get(each) or {}).get("momentum_buffer") is None for each in group["params"]):
        return True  # the group's first step
    if group["dampening"]:
        return False
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return True


def in_layout_of(parameter: Tensor, value: Tensor) -> Tensor:
    """The same values, with the strides of a parameter of the same shape; a view if they lie in the same order."""
    strides = zip(parameter.shape, parameter.stride(), value.stride(), strict=True)
    if all(length == 1 or mine == other for length, mine, other in strides):
        return value.as_strided(parameter.shape, parameter.stride())
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device).copy_(value)


def lay_out_state(parameter: Tensor, state: dict[str, Any]) -> None:
    """Give the parts of a parameter's state that have its shape its strides, as they had when they were made.

    Files hold tensors contiguously; that of a parameter in ``channels_last`` would be read in another order by fused
    kernels on the CPU, and refused by those on a GPU.
    """
    for key, value in state.items():
        if (
            isinstance(value, Tensor)
            and value.layout is torch.strided
            and value.shape == parameter.shape
            and value.stride() != parameter.stride()
        ):
            state[key] = in_layout_of(parameter, value)


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Give the optimizer a saved state, but leave it the kernels that were chosen in this run.

    A file may come from another device, an older version, or a run with other settings. torch brings the counts of steps to
    where the present kernels read them.

    Args:
        optimizer: which is given the state.
        saved: what its ``state_dict`` returned when it was saved; stays as it is.

    Raises:
        ValueError: torch's, if the groups or their parameters are others.
    """
    groups = [
        {**theirs, **{name: here[name] for name in ("fused", "foreach") if name in here}}
        for theirs, here in zip(saved["param_groups"], optimizer.param_groups, strict=False)
    ]
    groups += saved["param_groups"][len(groups) :]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for parameter, state in _states(optimizer):
        if type(parameter) in (Tensor, nn.Parameter) and torch.ops.aten.is_non_overlapping_and_dense(parameter):
            lay_out_state(parameter, state)


def looks_at_fused(hook: Any) -> bool:
    """Whether a hook before an optimizer's step is this module's own, which matters only to fused kernels."""
    return isinstance(getattr(hook, "__self__", None), _Watch)
