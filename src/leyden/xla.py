"""TPUs through torch_xla: operations are recorded, and run as one graph at the end of each step.

torch_xla is looked for and imported where it is asked for, never before. What a run on its device needs besides a device is
here: `sync_each_step` and `sync_each_batch` end the recording, `move_module` keeps shared parameters shared, `check_settings`
refuses what cannot work. Everything else is the same as on other devices.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from leyden.errors import ConfigurationError

if TYPE_CHECKING:
    from leyden.run import Evaluation, Run
    from leyden.settings import Settings

COMPACT_AT = 32
"""Logged values that are held before they are summed between two steps; at twice as many it would be done within one."""


def is_installed() -> bool:
    """Whether torch_xla can be found; it is not imported for that."""
    return "torch_xla" in sys.modules or importlib.util.find_spec("torch_xla") is not None


def count() -> int:
    """How many devices of torch_xla one process can train on: 1, or 0 if it is not installed.

    Raises:
        ConfigurationError: if it is installed, and finds no device.
    """
    return int(is_installed() and bool(started()))


@cache
def started() -> Any:
    """The module torch_xla, with its device at hand and its random numbers seeded as torch's.

    Raises:
        ConfigurationError: if it cannot be imported, or finds no device.
    """
    try:
        torch_xla = importlib.import_module("torch_xla")
        torch_xla.device()
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"accelerator='tpu': torch_xla is installed, but gives no device ({type(error).__name__}: {error}). It needs a torch "
            f"of its own version (this is {torch.__version__}), and the environment variable PJRT_DEVICE to name what is here: "
            f"TPU, or CPU to try it; it is {os.environ.get('PJRT_DEVICE')!r}."
        ) from error
    # It begins with a seed of its own, and `torch.manual_seed` does not reach it.
    torch_xla.manual_seed(torch.initial_seed())
    return torch_xla


def runtime() -> str:
    """What torch_xla runs on: "TPU", or "CPU" where it is only tried."""
    started()
    return str(importlib.import_module("torch_xla.runtime").device_type())


def random_state() -> int:
    """The state of the device's random numbers, which is one number of 64 bits; nothing waits for the device."""
    started()
    return int(importlib.import_module("torch_xla.core.xla_model").get_rng_state())


def set_random_state(state: int) -> None:
    """Take back what `random_state` returned."""
    started().manual_seed(state)


def seed(value: int) -> None:
    """Seed the device's random numbers, if this process has begun to use it; else that is done when it does."""
    if started.cache_info().currsize:
        started().manual_seed(value)


def wait() -> None:
    """Wait until the device has done all that it was given."""
    started()
    importlib.import_module("torch_xla.core.xla_model").wait_device_ops()


def check_settings(settings: Settings) -> None:
    """Refuse what cannot work on a TPU.

    Raises:
        ConfigurationError: for ``compile``, and for precisions in fp16.
    """
    if settings.compile:
        raise ConfigurationError(
            f"compile={settings.compile!r} and accelerator='tpu' contradict each other: XLA compiles each step into one graph "
            "anyway. Leave compile out."
        )
    if torch.float16 in (settings.precision.compute_dtype, settings.precision.parameter_dtype):
        raise ConfigurationError(
            f"precision={settings.precision.name!r} computes in fp16, which TPUs do not. Use 'bf16-mixed', which needs no loss "
            "scaling."
        )


def move_module(module: torch.nn.Module, device: torch.device) -> None:
    """Bring the module to the device, and leave every parameter the object that it is.

    Plain ``module.to("xla")`` makes new parameters: two layers with one weight would have two, and an optimizer that was made
    before would step the old ones.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def sync_each_step(run: Run) -> None:
    """Have the operations of each optimizer step run as one graph, when its last batch is through.

    A window of accumulated batches is one graph. It is handed over before other hooks see the batch, so that one that reads a
    value waits for it, and does not run half a step for it. The host does not wait, except where XLA meets a new graph and
    compiles it; that is counted as "compilation", the rest as "training step". What is computed once in a while, such as the
    means of an epoch, is a graph of its own, because a step with it would be a new graph.
    """
    torch_xla, metrics = started(), importlib.import_module("torch_xla.debug.metrics")
    account, clock = run.account, run.account.clock

    def compiled_s() -> float:
        data = metrics.metric_data("CompileTime")  # (how often, nanoseconds, the newest ones); None before the first
        return data[1] / 1e9 if data else 0.0

    def end_step(output: Any, batch: Any, batch_idx: int) -> None:
        if not run.stepped:
            return
        began, before = clock(), compiled_s()
        torch_xla.sync()
        if run.metrics.compact(COMPACT_AT):
            torch_xla.sync()
        seconds, compilation = clock() - began, compiled_s() - before
        if compilation:
            account.add("compilation", compilation)
        account.add("training step", max(0.0, seconds - compilation))

    run.hooks.on_train_batch_end = (end_step, *run.hooks.on_train_batch_end)
    run.hooks.on_train_epoch_start = (torch_xla.sync, *run.hooks.on_train_epoch_start)


def sync_each_batch(evaluation: Evaluation) -> None:
    """Have the operations of each batch of an evaluation run as one graph, and those of its end; without gradients.

    `torch.inference_mode` is left out, because torch_xla 2.9 has no layers in it: «Cannot set version_counter for inference
    tensor».
    """
    torch_xla = started()

    def end_batch(*_: Any) -> None:
        torch_xla.sync()
        if evaluation.metrics.compact(COMPACT_AT):
            torch_xla.sync()

    hooks = evaluation.hooks
    hooks.batch_end, hooks.end = (end_batch, *hooks.batch_end), (torch_xla.sync, *hooks.end)
    evaluation.no_grad = torch.no_grad
