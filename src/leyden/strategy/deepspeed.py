"""DeepSpeed, through its own library: ZeRO shards optimizer state, gradients and parameters over the ranks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.errors import CheckpointError, ConfigurationError, reject, warn
from leyden.strategy.distributed import DistributedStrategy

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.run import Run
    from leyden.settings import Settings

STAGES = (0, 1, 2, 3)
# what the Trainer's arguments say; "auto" in their place is what DeepSpeed's integrations write there
_OF_THE_TRAINER = {
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "gradient_clipping": "gradient_clip_val",
    "bf16": "precision",
    "fp16": "precision",
    "optimizer": "configure_optimizers",
    "scheduler": "configure_optimizers",
}


class DeepSpeedStrategy(DistributedStrategy):
    """ZeRO through the library ``deepspeed`` (``pip install 'leyden[deepspeed]'``).

    DeepSpeed's engine runs the backward pass, reduces gradients at the end of each window of accumulated batches, clips them by
    their norm and steps the optimizer that `configure_optimizers` has made. Precision: "32-true", "bf16-mixed" (autocast over
    weights in fp32), "bf16-true" and "16-true" (DeepSpeed keeps weights in fp32 beside them for the optimizer).

    A checkpoint has whole weights, in the format of all others. With stages 1 to 3 it lacks the optimizer's state, of which each
    rank holds a part that DeepSpeed writes in files of its own only: a warning says so at the first save, and `fit` refuses to go
    on from such a file.

    Args:
        stage: 0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too.
        config: more of DeepSpeed's configuration, as a dict or the path of a JSON file.
        offload_optimizer: keep the optimizer's state in the CPU's memory; True, or DeepSpeed's own dict.
        offload_parameters: the same for parameters; needs stage 3.
        **options: of `DistributedStrategy`.

    Raises:
        ConfigurationError: if the library is not installed, for another stage, and for a ``config`` that says what the Trainer
            says.

    Source: https://www.deepspeed.ai/docs/config-json/
    """

    def __init__(
        self,
        stage: int = 2,
        *,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        offload_optimizer: bool | Mapping[str, Any] = False,
        offload_parameters: bool | Mapping[str, Any] = False,
        **options: Any,
    ) -> None:
        if stage not in STAGES or isinstance(stage, bool):
            reject("stage", stage, ", ".join(map(str, STAGES)))
        if offload_parameters and stage != 3:
            reject("offload_parameters", offload_parameters, f"False with stage={stage}; stage 3 shards parameters")
        if "deepspeed" not in sys.modules and importlib.util.find_spec("deepspeed") is None:
            raise ConfigurationError("strategy='deepspeed' needs the library: pip install 'leyden[deepspeed]'.")
        super().__init__(**options)
        self.stage = stage
        self.config = _read_config(config)
        self.offload_optimizer = offload_optimizer
        self.offload_parameters = offload_parameters
        self.communicates_in_forward = stage == 3
        self._engine: Any = None
        self._step: nn.Module | None = None
        self._warned = False

    def wrap_training_step(self, module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``step``; DeepSpeed's engine is put around it in `wire`, when there is an optimizer."""
        self._step = _Step(module, step)
        return step

    def wire(self, run: Run, settings: Settings, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Let DeepSpeed's engine do the step, the backward pass and what follows.

        Raises:
            ConfigurationError: for what the engine would not do.
        """
        inner = _check(run, settings)
        if any(hasattr(parameter, "ds_id") for parameter in run.module.parameters()):
            raise ConfigurationError(
                "This module is sharded by a former fit with stage=3. Make a new one for another fit."
            )
        if self._engine is not None:
            self._engine.destroy()
        deepspeed = _library(self.device)
        engine, *_ = deepspeed.initialize(
            model=self._step,
            optimizer=inner,
            model_parameters=[parameter for parameter in run.module.parameters() if parameter.requires_grad],
            config=self.full_config(settings),
            dist_init_required=False,
        )
        self._engine = engine
        optimizer = EngineOptimizer(engine, inner, self.stage, run)
        run.training_step = engine
        run.optimizer = optimizer
        run.backward = _backward(engine)
        run.zero_grad = _nothing  # the engine does it when it has stepped
        run.clip = None
        run.sync_gradients = engine.set_gradient_accumulation_boundary
        return [optimizer]

    def full_config(self, settings: Settings) -> dict[str, Any]:
        """DeepSpeed's configuration: the user's, and what the Trainer's arguments say."""
        config = deepcopy(self.config)
        zero = config.setdefault("zero_optimization", {})
        if zero.setdefault("stage", self.stage) != self.stage:
            reject("config", zero["stage"], f"a stage that is that of the strategy, {self.stage}")
        for name, wanted in (("offload_optimizer", self.offload_optimizer), ("offload_param", self.offload_parameters)):
            if wanted:
                zero[name] = dict(wanted) if isinstance(wanted, Mapping) else {"device": "cpu", "pin_memory": True}
        dtype = settings.precision.parameter_dtype
        if dtype in (torch.bfloat16, torch.float16):
            config["bf16" if dtype is torch.bfloat16 else "fp16"] = {"enabled": True}
        if settings.gradient_clip_val is not None:
            config["gradient_clipping"] = float(settings.gradient_clip_val)
        config.setdefault("train_micro_batch_size_per_gpu", 1)  # it must be there, and only DeepSpeed's reports use it
        # windows are divided by the loop, which knows their real size, and it says where each of them ends
        config["gradient_accumulation_steps"] = 1
        config.setdefault("zero_allow_untested_optimizer", True)
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        return config

    def load_module(self, module: nn.Module, state_dict: dict[str, Any], strict: bool) -> None:
        """See `Strategy.load_module`."""
        with self._whole(module, changed=True):
            super().load_module(module, state_dict, strict)
        refresh = getattr(getattr(self._engine, "optimizer", None), "refresh_fp32_params", None)
        if refresh is not None:
            refresh()

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        """See `Strategy.module_state`. With stage 3 the weights are gathered, which needs room for all of them."""
        if self.stage and self._engine is not None and not self._warned and self.is_global_zero:
            self._warned = True
            warn(
                "deepspeed-optimizer-not-saved",
                f"Checkpoints with DeepSpeed's stage {self.stage} have the weights, but not the optimizer's state, so fit cannot "
                "go on from them. The strategy 'fsdp' saves both.",
            )
        with self._whole(module):
            return {
                name: value.detach().clone() if self._is_sharded(module) else value
                for name, value in module.state_dict().items()
            }

    def _whole(self, module: nn.Module, changed: bool = False) -> AbstractContextManager[Any]:
        if not self._is_sharded(module):
            return nullcontext()
        deepspeed = _library(self.device)
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            list(module.parameters()), modifier_rank=0 if changed else None
        )
        return context

    def _is_sharded(self, module: nn.Module) -> bool:
        return self.stage == 3 and any(hasattr(parameter, "ds_id") for parameter in module.parameters())


class EngineOptimizer(Optimizer):
    """What the loop steps: DeepSpeed's engine, with the groups of the optimizer that it drives.

    Args:
        engine: from ``deepspeed.initialize``.
        inner: the user's.
        stage: of ZeRO.
        run: is told when a step was left out because gradients had overflowed.
    """

    def __init__(self, engine: Any, inner: Optimizer, stage: int, run: Run) -> None:
        super().__init__([nn.Parameter(torch.empty(0))], {})
        # the groups themselves are those of the other optimizer, so that schedulers and this one see the same
        self._engine, self._inner, self._stage, self._run = engine, inner, stage, run
        self.defaults, self.param_groups, self.state = inner.defaults, inner.param_groups, inner.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip, step and set gradients to none."""
        skipped = self._engine.skipped_steps
        self._engine.step()
        self._run.moved = self._engine.skipped_steps == skipped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the engine does it when it has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state with stage 0; else its groups without their parameters."""
        if self._is_whole:
            return self._inner.state_dict()
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return {"state": {}, "param_groups": groups, "deepspeed_stage": self._stage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            CheckpointError: if it has no state, or cannot be spread over the ranks.
        """
        if "deepspeed_stage" in state_dict or not self._is_whole:
            stage = max(state_dict.get("deepspeed_stage", 0), self._stage)
            raise CheckpointError(
                f"Training cannot go on from this checkpoint, because DeepSpeed's stage {stage} keeps the optimizer's state in "
                "parts that are not saved. To begin with its weights: "
                "module.load_state_dict(leyden.load_checkpoint(path)['state_dict'])."
            )
        self._inner.load_state_dict(state_dict)

    @property
    def _is_whole(self) -> bool:
        """Whether each rank has the state of all parameters, in the user's own optimizer."""
        return self._engine.optimizer is self._inner


class _Step(nn.Module):
    """What DeepSpeed wraps: its forward pass is the training step, its parameters are the user's module's."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._step = step

    def forward(self, *args: Any) -> Any:
        return self._step(*args)


def _read_config(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        found: Any = deepcopy(dict(config))
    else:
        try:
            with open(config, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"config={config!r} cannot be read as JSON: {error}. Give a dict or the path of a file."
            ) from error
    for name, argument in _OF_THE_TRAINER.items():
        if found.pop(name, "auto") != "auto":
            raise ConfigurationError(
                f"DeepSpeed's config has {name!r}, which the Trainer says by {argument}. Leave it out there."
            )
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if found.get(name) == "auto":
            del found[name]
    checked: dict[str, Any] = found
    return checked


def _check(run: Run, settings: Settings) -> Optimizer:
    """Return the optimizer; refuse what DeepSpeed's engine does otherwise, or not at all."""
    optimizer, module, mode = run.optimizer, type(run.module), run.mode.name
    if mode != "AUTOMATIC" or optimizer is None:
        raise ConfigurationError(
            "strategy='deepspeed' needs automatic optimization with one optimizer that is not LBFGS, and no optimizer_step of "
            "one's own, because DeepSpeed's engine makes the step."
        )
    for name in ("backward", "optimizer_zero_grad", "configure_gradient_clipping"):
        if getattr(module, name).__module__ != "leyden.module" and not getattr(module, name).__module__.startswith(
            "leyden."
        ):
            raise ConfigurationError(f"{module.__name__}.{name} would not be called: DeepSpeed's engine does that.")
    for name, value, allowed in (
        ("gradient_clip_algorithm", settings.gradient_clip_algorithm, (None, "norm")),
        ("nan_policy", settings.nan_policy, (None,)),
        ("oom_policy", settings.oom_policy, ("raise",)),
        ("compile", settings.compile, (False,)),
        ("detect_anomaly", settings.detect_anomaly, (False,)),
    ):
        if value not in allowed:
            reject(name, value, f"{' or '.join(map(repr, allowed))} with strategy='deepspeed'")
    precision = settings.precision
    if precision.scales_loss or precision.parameter_dtype is torch.float64:
        reject(
            "precision", precision.name, "'32-true', 'bf16-mixed', 'bf16-true' or '16-true' with strategy='deepspeed'"
        )
    return optimizer


def _backward(engine: Any) -> Callable[..., None]:
    def backward(loss: Tensor) -> None:
        engine.backward(loss, scale_wrt_gas=False)  # the loop has divided by the size of the window

    return backward


def _library(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at its import; it would look for GPUs
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _nothing() -> None:
    pass
