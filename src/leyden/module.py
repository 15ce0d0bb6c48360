"""LightningModule: the research code of a project, and the hooks to bend the engine with."""

from __future__ import annotations

import inspect
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.errors import NoTrainerError, StepError, warn
from leyden.hooks import Worn
from leyden.hparams import AttributeDict, Hyperparameters, assign, load_module
from leyden.module_ranks import ModuleRanks
from leyden.optimizers import LightningOptimizer, Toggle, clip_gradients

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from leyden.callbacks.callback import Callback
    from leyden.loggers import Logger
    from leyden.metrics import Metrics, Reduction
    from leyden.run import Run
    from leyden.trainer import Trainer


class LightningModule(ModuleRanks):
    """A model, or a system of models, with what one step computes and which optimizers it needs.

    Write `training_step` and `configure_optimizers`; `validation_step`, `test_step` and `predict_step` as needed.
    It stays an ordinary `torch.nn.Module`: call it, save its state dict, export it. The moments of a run that it can hook
    into (``on_…``) are on the page of `ModuleHooks`.

    Attributes:
        automatic_optimization: False, on the class or in `__init__`, to call `manual_backward` and ``optimizer.step`` yourself.
        example_input_array: an input (or tuple of inputs) of `forward`, for sizes in the summary and for graphs.
        strict_loading: whether a checkpoint must have every key of the state dict, and no other.
    """

    __jit_unused_properties__: ClassVar[list[str]] = [
        "trainer", "current_epoch", "global_step", "global_rank", "local_rank", "device", "dtype", "logger", "loggers",
        "hparams", "hparams_initial", "on_gpu", "device_mesh",
    ]  # fmt: skip

    automatic_optimization: bool = True

    if TYPE_CHECKING:  # TorchScript would want to compile these types
        _trainer: Trainer | None
        _run: Run | None
        _metrics: Metrics | None
        _device: torch.device | None
        _toggles: dict[int, Toggle]
        _saved_hyperparameters: Hyperparameters

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array: Any = None
        self.strict_loading: bool = True
        # Not through nn.Module's slow __setattr__: these are read on every step.
        self.__dict__.update(_trainer=None, _run=None, _metrics=None, _device=None, _toggles={})
        self.__dict__["_saved_hyperparameters"] = Hyperparameters()

    # The steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of one batch.

        Args:
            *args: ``batch, batch_idx``; leave out ``batch_idx`` if you do not need it.
            **kwargs: unused.

        Returns:
            The loss (0-d tensor with a graph), or a dict with it under "loss", or None to skip the batch.
        """
        raise NotImplementedError

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch: ``batch, batch_idx``, and ``dataloader_idx`` if there are several loaders."""
        raise NotImplementedError

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Test one batch: ``batch, batch_idx``, and ``dataloader_idx`` if there are several loaders."""
        raise NotImplementedError

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict one batch; without override, call `forward` with it."""
        return self(args[0])

    # What the engine asks for

    def configure_optimizers(self) -> Any:
        """Return an optimizer, several, with learning-rate schedulers or without; see `leyden.optimizers`."""
        raise NotImplementedError

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Return callbacks that belong to this module; they replace the Trainer's of the same class."""
        return []

    def configure_model(self) -> None:
        """Build layers that are too large to be made in `__init__`; called before every verb, so build only once."""

    def prepare_data(self) -> None:
        """Download and write to disk; called once per machine, before `setup`."""

    def setup(self, stage: str) -> None:
        """Called before loaders are asked for; ``stage`` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Called at the end of each verb, also after an error."""

    def train_dataloader(self) -> Any:
        """Return what to train on."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """Return what to validate on."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """Return what to test on."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """Return what to predict."""
        raise NotImplementedError

    # Hooks of optimization, in the order in which they run

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Called before gradients are set to none."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Set the gradients to none at the start of each window of accumulated batches."""
        optimizer.zero_grad()

    def on_before_backward(self, loss: Tensor) -> None:
        """Called with the loss, already divided by the window's size, before ``loss.backward()``."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; ``loss`` is already scaled under fp16 autocast."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def on_after_backward(self) -> None:
        """Called after ``loss.backward()``, before clipping."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called before clipping and ``optimizer.step()``; gradients are unscaled."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients; override for a rule of your own, which may call `clip_gradients`."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: LightningOptimizer,
        optimizer_closure: Any,
        *former: Any,
        **named: Any,
    ) -> None:
        """Step the optimizer. If you override this, call ``optimizer.step(closure=optimizer_closure)``."""
        if former or named:  # as of 0.7 to 1.9, with the optimizer's index before the closure and flags after it
            optimizer_closure = next((each for each in (*former, *named.values()) if callable(each)), None)
        optimizer.step(closure=optimizer_closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a scheduler; ``metric`` is the monitored value for `ReduceLROnPlateau`, else None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    # Manual optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizer, or the list of several, that `configure_optimizers` made.

        Args:
            use_pl_optimizer: False returns torch's own objects, whose steps are neither counted nor loss-scaled.
        """
        handles = self._running().handles
        found = handles if use_pl_optimizer else [handle.optimizer for handle in handles]
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """Return the scheduler, the list of several, or None."""
        schedulers = [config.scheduler for config in self._running().schedulers]
        return (schedulers[0] if len(schedulers) == 1 else schedulers) if schedulers else None

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients in manual optimization: scales the loss if the precision needs it, and calls hooks."""
        if self.automatic_optimization:
            raise StepError("manual_backward needs self.automatic_optimization = False in __init__.")
        self._running().manual_backward(loss, *args, **kwargs)

    def clip_gradients(
        self,
        optimizer: Optimizer | LightningOptimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of the optimizer's parameters; under fp16 autocast they are unscaled first.

        Args:
            optimizer: whose parameters.
            gradient_clip_val: the bound; None does not clip.
            gradient_clip_algorithm: "norm" (default) or "value".
        """
        if gradient_clip_val is None:
            return
        run = self._running()
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        run.bring_to_size(plain)
        clip_gradients(plain, gradient_clip_val, gradient_clip_algorithm or "norm")

    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Let only this optimizer's parameters require gradients, until `untoggle_optimizer`."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        others = [handle.optimizer for handle in self._running().handles if handle.optimizer is not plain]
        self._toggles[id(plain)] = Toggle(plain, others)

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Iterator[None]:
        """`toggle_optimizer` for a block, and `untoggle_optimizer` at its end."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Undo `toggle_optimizer`."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        toggle = self._toggles.pop(id(plain), None)
        if toggle is None:
            raise StepError("untoggle_optimizer was called for an optimizer that was not toggled.")
        toggle.undo()

    def freeze(self) -> None:
        """Let no parameter require gradients, and set eval mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Let every parameter require gradients, and set train mode."""
        self.requires_grad_(True)
        self.train()

    # Logging

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Reduction = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log one value. It is kept on its device; the host never waits for it here.

        Args:
            name: the key.
            value: a number, a tensor of one element, or a metric object with ``compute`` and ``reset``.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers; None means True.
            on_step: keep the latest value, under ``name`` or ``name_step``. Default: in the hooks of training batches.
            on_epoch: reduce over the epoch, under ``name`` or ``name_epoch``. Default: everywhere else.
            reduce_fx: "mean" (weighted by batch size), "sum", "min", "max", or a function of the stacked values.
            enable_graph: accepted for compatibility; values are always detached.
            sync_dist: accepted for compatibility; what is shown and logged is always reduced over all processes.
            sync_dist_group: accepted for compatibility.
            add_dataloader_idx: with several loaders, end the key in ``/dataloader_idx_N``; False mixes them.
            batch_size: the weight in the mean. Default: the size of dimension 0 of the batch's first tensor.
            metric_attribute: accepted for compatibility.
            rank_zero_only: only what the first process logs counts. Without it, all that log the key do.

        Raises:
            MetricError: if the value is not one number, or the same key is logged with different arguments.
        """
        metrics = self._metrics
        if metrics is None:
            if self._trainer is None:
                warn("log-without-trainer", f"self.log({name!r}, …) has no effect: the module is not run by a Trainer.")
            return
        more = (batch_size, add_dataloader_idx, rank_zero_only)
        metrics.log(name, value, on_step, on_epoch, prog_bar, logger is not False, reduce_fx, *more)

    def log_dict(self, dictionary: Mapping[str, Any], **kwargs: Any) -> None:
        """Log every item of ``dictionary``; the other arguments are those of `log`."""
        for name, value in dictionary.items():
            self.log(name, value, **kwargs)

    # Hyperparameters and checkpoints

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] | str = (), frame: Any = None, logger: bool = True
    ) -> None:
        """Keep the arguments of `__init__` in `hparams`, in checkpoints and in the loggers.

        Arguments that are modules are left out (their weights are in the checkpoint already) and must be passed to
        `load_from_checkpoint` again.

        Args:
            *args: names of the arguments to keep, or one dict or Namespace; nothing keeps all arguments.
            ignore: names to leave out.
            frame: the frame of `__init__`, if it is not the caller's.
            logger: whether the loggers get them.
        """
        here = inspect.currentframe()
        self._saved_hyperparameters.add(self, frame or (here.f_back if here else None), args, ignore, logger)

    @property
    def hparams(self) -> Any:
        """The saved hyperparameters, also by attribute: ``self.hparams.lr``; or the dict or Namespace that was assigned here."""
        return self._saved_hyperparameters.shown

    @hparams.setter
    def hparams(self, values: Mapping[str, Any] | Namespace) -> None:
        assign(self, values)

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyperparameters as they were when they were saved."""
        return self._saved_hyperparameters.initial

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add plain data or tensors to the checkpoint before it is written."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read from the checkpoint before the weights are applied."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str,
        map_location: Any = "cpu",
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the module with the hyperparameters and weights that a checkpoint holds.

        Args:
            checkpoint_path: the file.
            map_location: where to put the tensors.
            hparams_file: a ``.csv`` or ``.yaml`` file with hyperparameters, for old checkpoints that hold none.
            strict: whether all keys must match; default: the module's `strict_loading`.
            weights_only: accepted for compatibility; no pickle is ever run.
            **kwargs: arguments of `__init__` that the checkpoint does not hold, or that replace those it holds.

        Raises:
            CheckpointError: if the file cannot be read or does not fit, or an argument is missing.
        """
        hparams_file = hparams_file or kwargs.pop("tags_csv", None)
        module: Self = load_module(cls, str(checkpoint_path), map_location, strict, kwargs, hparams_file)
        return module

    @classmethod
    def load_from_metrics(cls, weights_path: str, tags_csv: str, map_location: Any = "cpu", **kwargs: Any) -> Self:
        """Former spelling of `load_from_checkpoint` with ``hparams_file``."""
        from leyden.compat.once import tell

        tell(f"{cls.__name__}.load_from_metrics(weights_path, tags_csv)", "load_from_checkpoint(path, hparams_file=…)")
        return cls.load_from_checkpoint(weights_path, map_location, tags_csv, **kwargs)

    # Export

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Export `forward` with `torch.onnx.export`, in eval mode.

        Args:
            file_path: where to write; None returns the program only.
            input_sample: inputs of `forward`; default: `example_input_array`.
            **kwargs: passed on.
        """
        from leyden.export import to_onnx  # of no use to most runs

        return to_onnx(self, file_path, input_sample, **kwargs)

    def to_torchscript(self, file_path: Any = None, method: str = "script", example_inputs: Any = None) -> Any:
        """Return the module as TorchScript, which torch keeps for old deployments only; prefer `torch.export.export`.

        Args:
            file_path: where to save it as well.
            method: "script" or "trace".
            example_inputs: for "trace"; default: `example_input_array`.
        """
        from leyden.export import to_torchscript

        return to_torchscript(self, file_path, method, example_inputs)

    # Where the module stands

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this module."""
        if self._trainer is None:
            raise NoTrainerError(f"{type(self).__name__} is not run by a Trainer now.")
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.__dict__["_trainer"] = trainer

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """The mesh of devices that `configure_model` may divide the module over; None if the strategy has none."""
        return self._trainer.strategy.device_mesh if self._trainer is not None else None

    @property
    def current_epoch(self) -> int:
        """Epochs completed; 0 without a Trainer."""
        return self._trainer.current_epoch if self._trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps done; 0 without a Trainer."""
        return self._trainer.global_step if self._trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """The process's number among all; 0 without a Trainer."""
        return self._trainer.global_rank if self._trainer is not None else 0

    @property
    def local_rank(self) -> int:
        """The process's number on its machine; 0 without a Trainer."""
        return self._trainer.local_rank if self._trainer is not None else 0

    @property
    def logger(self) -> Logger | None:
        """The Trainer's first logger."""
        return self._trainer.logger if self._trainer is not None else None

    @property
    def loggers(self) -> list[Logger]:
        """The Trainer's loggers."""
        return self._trainer.loggers if self._trainer is not None else []

    @property
    def device(self) -> torch.device:
        """Where the module's parameters are, and so where to make new tensors."""
        if self._device is None:
            tensor: Tensor | None = next(self.parameters(), None)
            tensor = next(self.buffers(), None) if tensor is None else tensor
            self.__dict__["_device"] = tensor.device if tensor is not None else torch.device("cpu")
        assert self._device is not None
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's first floating-point parameter."""
        for tensor in self.parameters():
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a CUDA device."""
        return self.device.type == "cuda"

    def _running(self) -> Run:
        if self._run is None:
            raise NoTrainerError(
                f"{type(self).__name__} is not being run by a Trainer; this is possible during fit only."
            )
        return self._run

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.__dict__["_device"] = None  # .to(), .cuda(), … may have moved the parameters
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a module sent to another process, does not take its Trainer along, nor what it wears for a run.
        own = {name: value for name, value in self.__dict__.items() if not isinstance(value, Worn)}
        return {**own, "_trainer": None, "_run": None, "_metrics": None}
