"""Metrics, hyperparameters and graphs for TensorBoard."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from leyden.errors import ConfigurationError, did_you_mean, warn
from leyden.loggers.csv_logger import CSVLogger
from leyden.loggers.logger import (
    Logger,
    VersionFolder,
    add_prefix,
    flat_hyperparams,
    plain_hyperparams,
    scalar,
    write_hyperparams,
)

if TYPE_CHECKING:
    from torch import nn

_WRITER_OPTIONS = ("comment", "purge_step", "max_queue", "flush_secs", "filename_suffix")


class _SilentWriter:
    """Stands for the SummaryWriter where nothing may be written: takes any call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _do_nothing


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Take anything."""


class TensorBoardLogger(Logger):
    """Writes ``<save_dir>/<name>/version_N``: an event file for TensorBoard, and ``hparams.yaml``.

    The folder and the event file are made with the first thing that is logged. To continue an earlier run,
    pass its ``version``; TensorBoard shows both event files as one run. After `fit` with a ``ckpt_path``, it hides what
    had been logged after the checkpoint's step.

    Args:
        save_dir: the folder below which all experiments lie.
        name: the experiment, a folder in ``save_dir``.
        version: a number N for ``version_N``, a folder name, or ``None`` for the next free number, which is
            picked at first use.
        log_graph: write the model's graph, traced with its ``example_input_array``.
        default_hp_metric: with hyperparameters that come without metrics, write ``hp_metric = -1``, so that
            the HParams page lists the run; log ``hp_metric`` yourself to give it a meaning.
        prefix: put before every name, with a dash.
        sub_dir: a folder inside the version's folder for the event file.
        **kwargs: ``max_queue``, ``flush_secs``, ``filename_suffix``, ``purge_step``, ``comment`` of
            `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        ConfigurationError: if tensorboard is not installed, or an option is unknown.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        for option in kwargs:
            if option not in _WRITER_OPTIONS:
                raise ConfigurationError(
                    f"TensorBoardLogger has no argument {option!r}.{did_you_mean(option, _WRITER_OPTIONS)} "
                    f"Options of the SummaryWriter: {', '.join(_WRITER_OPTIONS)}."
                )
        if not _tensorboard_installed():
            raise _missing_tensorboard()
        self._folder = VersionFolder(save_dir, name, version)
        self._name = name or ""
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._prefix = prefix
        self._sub_dir = os.fspath(sub_dir) if sub_dir is not None else ""
        self._writer_options = kwargs
        self._writer: Any = None
        self._hparams: dict[str, Any] = {}
        self._last_step = -1
        self._resumed_at: int | None = None

    @property
    def name(self) -> str:
        """The experiment, a folder in `save_dir`."""
        return self._name

    @property
    def version(self) -> int | str:
        """The version; where it was left open, reading it takes the next free number and makes the folder."""
        return self._folder.version

    @property
    def save_dir(self) -> str:
        """The folder below which all experiments lie."""
        return self._folder.save_dir

    @property
    def root_dir(self) -> str:
        """The folder of the experiment, in which the versions lie."""
        return self._folder.root_dir

    @property
    def sub_dir(self) -> str | None:
        """The folder inside the version's folder, if one was asked for."""
        return self._sub_dir or None

    @property
    def log_dir(self) -> str:
        """The folder of this version, with `sub_dir`; reading it picks the version."""
        return os.path.join(self._folder.path, self._sub_dir) if self._sub_dir else self._folder.path

    @property
    def experiment(self) -> Any:
        """The `torch.utils.tensorboard.SummaryWriter`; the first reading makes the event file.

        Raises:
            ConfigurationError: if tensorboard cannot be imported.
        """
        if self._writer is None:
            options = dict(self._writer_options)
            if self._resumed_at is not None:
                options.setdefault("purge_step", self._resumed_at + 1)  # hides what has this step and later ones
                self._resumed_at = None  # a file that is opened later must not hide this one
            self._writer = _summary_writer(self.log_dir, options)
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write each metric as a scalar.

        Args:
            metrics: numbers, or tensors of one element, by name.
            step: number of optimizer steps done; ``None`` is one more than the last one.

        Raises:
            MetricError: if a value is not one number.
        """
        self._last_step = self._last_step + 1 if step is None else step
        writer = self.experiment
        for name, value in add_prefix(metrics, self._prefix).items():
            writer.add_scalar(name, scalar(name, value), self._last_step)

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Write hyperparameters for the HParams page and to ``hparams.yaml``; metrics go to step 0.

        Args:
            params: anything nested; it is written with ``a/b`` names, and what is not a number, a string or
                a boolean as text.
            metrics: the numbers by which runs are compared.
        """
        plain = plain_hyperparams(params)
        if self._is_silent or not (plain or metrics):
            return
        self._hparams.update(plain)
        write_hyperparams(self._hparams, self.log_dir)
        if metrics is None:
            metrics = {"hp_metric": -1.0} if self._default_hp_metric else {}
        numbers = {name: scalar(name, value) for name, value in add_prefix(metrics, self._prefix).items()}

        from torch.utils.tensorboard.summary import hparams as hparams_summaries

        # SummaryWriter.add_hparams would open a second event file in a folder of its own.
        for summary in hparams_summaries(flat_hyperparams(plain), numbers):  # type: ignore[no-untyped-call]
            self.experiment.file_writer.add_summary(summary)
        for name, number in numbers.items():
            self.experiment.add_scalar(name, number, 0)

    def log_graph(self, model: nn.Module, input_array: Any = None) -> None:
        """Trace the model and write its graph, if the logger was made with ``log_graph=True``.

        The model's modes, buffers and the random state are what they were before.

        Args:
            model: the module to trace.
            input_array: what to call it with; by default its ``example_input_array``.
        """
        if not self._log_graph or self._is_silent:
            return
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if example is None:
            warn("no-example-input", "log_graph=True needs an input. Set the module's `example_input_array`.")
            return
        from torch.jit._trace import TracerWarning
        from torch.nn.parameter import is_lazy

        from leyden.summary import example_arguments, restored_afterwards

        positional, named = example_arguments(model, example)
        if named:
            warn("graph-not-traced", "A graph can be traced with positional inputs only, not with a dict.")
            return
        if any(is_lazy(parameter) for parameter in model.parameters()):
            warn("graph-not-traced", "A graph cannot be traced while parameters wait for their first batch.")
            return
        with restored_afterwards(model), warnings.catch_warnings():
            # torch's own add_graph still uses torch.jit.trace, which torch deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", TracerWarning)
            self.experiment.add_graph(model, positional)

    def save(self) -> None:
        """Bring everything logged so far to the disk."""
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Write everything and close the event file; logging again opens another one in the same folder."""
        if self._writer is not None:
            self._writer.flush()
            self._writer.close()
            if not self._is_silent:
                self._writer = None

    def adopt_version(self, version: int | str | None) -> None:
        """Be a silent copy of rank zero's logger: take its version, and write nothing from here on."""
        self._writer = _SilentWriter()
        self._folder.give_back()
        if version is not None:
            self._folder.set_version(version)

    def state_dict(self) -> dict[str, Any]:
        """Bring everything logged so far to the disk; return the last step, for values that are logged without one."""
        self.save()
        return {"last_step": self._last_step}

    def resume_from(self, global_step: int, state: Mapping[str, Any]) -> None:
        """Have TensorBoard hide what an earlier process logged in this folder after ``global_step``.

        What it logged at the same step after the checkpoint stays, beside what is logged anew.
        """
        if self._is_silent:
            return
        self.finalize("success")  # the next file carries the mark
        self._resumed_at = global_step
        self._last_step = state.get("last_step", global_step)

    @property
    def _is_silent(self) -> bool:
        return isinstance(self._writer, _SilentWriter)


def default_logger(root: str | os.PathLike[str]) -> Logger:
    """Return the logger of a run that asked for none: TensorBoard's where it is installed, else a CSV file.

    Args:
        root: the folder in which ``lightning_logs/version_N`` is made.
    """
    if _tensorboard_installed():
        return TensorBoardLogger(root)
    _note_csv()
    return CSVLogger(root)


@functools.cache
def _note_csv() -> None:
    # Not a warning: a core install has no tensorboard, and must run where warnings are errors.
    logging.getLogger("leyden").info(
        "Metrics go to metrics.csv, because tensorboard is not installed (pip install 'leyden[tensorboard]')."
    )


def _tensorboard_installed() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def _missing_tensorboard() -> ConfigurationError:
    return ConfigurationError(
        "TensorBoardLogger needs tensorboard, which cannot be imported here. Install it with "
        "`pip install 'leyden[tensorboard]'`, or use leyden.loggers.CSVLogger, which needs nothing."
    )


def _summary_writer(log_dir: str, options: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        # What tensorboard and protobuf deprecate while being imported is not for the user to mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing_tensorboard() from error
    return SummaryWriter(log_dir=log_dir, **options)
