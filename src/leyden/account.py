"""Where the time of a `fit` goes: the seconds of each part, always counted.

The loop reads the clock where a part begins and ends, six times per step, and adds plain floats: a few hundred nanoseconds, no
call of a Python function, nothing allocated that stays. What is rare (validation, saving, logging) is counted through
`TimeAccount.spent_on`, which takes its time out of the part that it interrupts, so that no second is counted twice.

These are seconds of the host. A GPU works behind the host's back: the host's time of a step is the time to hand the work over,
and the device's own time shows wherever the host has to wait for it. `leyden.device_time` samples that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Subset, TensorDataset

from leyden.device_time import DeviceTime

if TYPE_CHECKING:
    from leyden.run import Run

Part = Literal[
    "set-up",
    "waiting for data",
    "host to device",
    "forward and backward",
    "training step",
    "optimizer",
    "validation",
    "checkpoints",
    "logging",
    "waiting for the device",
    "compilation",
]

EVERYTHING_ELSE = "everything else"

_ATTRIBUTE: dict[Part, str] = {
    "set-up": "setup_s",
    "compilation": "compilation_s",
    "waiting for data": "data_s",
    "host to device": "transfer_s",
    "forward and backward": "compute_s",
    "training step": "training_step_s",
    "optimizer": "optimizer_s",
    "validation": "validation_s",
    "checkpoints": "checkpoint_s",
    "logging": "logging_s",
    "waiting for the device": "device_s",
}

# A run without a part that takes the share p would be 1 / (1 - p) times as fast.
WAITING_SHARE = 0.2  # 1.25 times as fast: worth another worker process
OVERHEAD_SHARE = 0.1  # logging, saving and copying train nothing, so less of them is a nuisance
VALIDATION_SHARE = 0.5  # as long as everything else together; up to there it is what was asked for
REST_SHARE = 0.3  # hooks and callbacks: often wanted, so only where a profiler will surely find something
COMPUTE_SHARE = 0.5  # below, a faster step gains little
TINY_STEP_S = 1e-3  # a shorter step on the CPU is mostly Python and dispatch, which one compiled graph does not have
LAUNCHED_STEP_S = 20e-3  # a step on a GPU that takes this long is rarely bound by the launching of its kernels
LAUNCHED_SHARE = 0.8  # of the device's time of a step: a host that is busy as long does not run ahead of it
BUSY_SHARE = 0.9  # a device that works this much of the time waits for nothing worth mending


@dataclass(frozen=True)
class Circumstances:
    """What a hint depends on, besides the seconds.

    Attributes:
        num_workers: processes of the training loader; None if it is no torch DataLoader.
        in_memory: whether its samples are tensors in memory.
        pin_memory: whether its batches come in memory that the device can copy from.
        log_every_n_steps: of the Trainer; 0 never.
        on_cpu: whether steps run on the CPU, so that moving a batch is what the user's hooks do to it.
    """

    num_workers: int | None = None
    in_memory: bool = False
    pin_memory: bool = False
    log_every_n_steps: int = 0
    on_cpu: bool = True


class TimeAccount:
    """Seconds of a `fit`'s wall time by part; `trainer.time_account` is the one of the present or the last `fit`.

    Parts: "set-up" (from the call of `fit` to the first epoch, with the sanity check), "compilation", "waiting for data",
    "host to device" (moving batches, with transfer hooks), "forward and backward" (with `training_step` and the hooks in
    between), "training step" (instead of it and "optimizer": manual optimization, steps compiled into one graph), "optimizer"
    (unscaling, clipping, the step, its schedulers), "validation" (with its data), "checkpoints" (what training waits for, not
    what is written beside it), "logging", "waiting for the device" (to read logged values from it) and "everything else":
    hooks, callbacks, the loop.
    A part that happens inside of another, as a value that is logged in validation, counts for itself only.

    Nothing of it goes into checkpoints: a run that goes on from one begins a new account.

    Args:
        clock: returns seconds; default: `time.perf_counter`.
    """

    __slots__ = (
        "_began", "_circumstances", "_ended", "_first_batch", "_first_step", "_progress", "_set_aside_s", "checkpoint_s",
        "clock", "compilation_s", "compiles", "compute_s", "data_s", "device", "device_s", "logging_s", "mark", "optimizer_s",
        "setup_s", "training_step_s", "transfer_s", "validation_s",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or perf_counter
        self.setup_s = self.compilation_s = self.data_s = self.transfer_s = self.compute_s = self.training_step_s = 0.0
        self.optimizer_s = self.validation_s = self.checkpoint_s = self.logging_s = self.device_s = 0.0
        self._set_aside_s = 0.0  # of all that `add` counted
        self.compiles = False
        self.device: DeviceTime | None = None
        self._circumstances = Circumstances()
        self._progress: Any = None
        self._first_step = self._first_batch = 0
        self._ended: float | None = None
        self._began = self.mark = self.clock()

    # What the engine calls

    def begin(self, run: Run) -> Callable[[], float]:
        """End the set-up: training begins. Returns the clock, for the loop."""
        self.setup_s = self.clock() - self._began - self._set_aside_s
        self._progress = run.progress
        self._first_step, self._first_batch = run.progress.global_step, run.progress.total_batches
        self._circumstances = circumstances_of(run)
        if run.device.type == "cuda" and self.device is None:
            self.device = DeviceTime(run)
        return self.clock

    def timed(self, part: Part, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted as ``part``.

        The function itself is its ``__wrapped__``; its ``around`` counts others as the same part, such as copies that begin
        ahead of time.
        """

        def counted(*args: Any) -> Any:
            with self.spent_on(part):
                return function(*args)

        counted.around = partial(self.timed, part)  # type: ignore[attr-defined]
        return update_wrapper(counted, function, assigned=(), updated=())

    def lap(self, part: Part) -> None:
        """Count the time since the last mark, and set the next. The slow way to do what the loop does in place."""
        name, now = _ATTRIBUTE[part], self.clock()
        setattr(self, name, getattr(self, name) + now - self.mark)
        self.mark = now

    def sample_device(self) -> None:
        """Look at what was sampled on the device, and sample some of the next batches; at the flushes of logged values."""
        if self.device is not None:
            self.device.collect()
            self.device.sample()

    def stop(self) -> None:
        """End the account; what is added later does not count."""
        if self._ended is None:
            self._ended = self.clock()

    # What anybody may call

    def add(self, part: Part, seconds: float) -> None:
        """Count seconds that have just passed, and take them out of the part that they interrupted.

        Args:
            part: see the class.
            seconds: of wall time, up to now, in the thread that trains.
        """
        if self._ended is None:
            name = _ATTRIBUTE[part]
            setattr(self, name, getattr(self, name) + seconds)
            self._set_aside_s += seconds
            self.mark += seconds  # as if the part that was interrupted had begun later

    def spent_on(self, part: Part) -> _Spent:
        """Count the body of a ``with``, less what is counted inside of it."""
        return _Spent(self, part)

    # What came out

    @property
    def steps(self) -> int:
        """Optimizer steps that were made, less those that ``nan_policy="rollback"`` took back."""
        return 0 if self._progress is None else max(0, int(self._progress.global_step) - self._first_step)

    @property
    def on_device_s(self) -> float:
        """Estimate, from samples, of the seconds that a GPU spent on steps; 0 if nothing was sampled."""
        if self.device is None or self._progress is None:
            return 0.0
        return self.device.estimate(self._progress.total_batches - self._first_batch, self.steps)

    @property
    def total(self) -> float:
        """Seconds from the call of `fit` until its end, or until now."""
        return (self.clock() if self._ended is None else self._ended) - self._began

    def seconds(self) -> dict[str, float]:
        """Seconds of every part, in order; together they are `total`."""
        parts: dict[str, float] = {part: getattr(self, name) for part, name in _ATTRIBUTE.items()}
        return {**parts, EVERYTHING_ELSE: max(0.0, self.total - sum(parts.values()))}

    def hint(self) -> str | None:
        """What would save the most time, in a sentence; None if nothing stands out."""
        return _hint(self)

    def summary(self) -> str:
        """The largest parts in a line, and the hint in another."""
        total, shares = self.total, sorted(self.seconds().items(), key=lambda item: -item[1])
        largest = ", ".join(f"{_percent(each, total)} {part}" for part, each in shares[:4] if _shows(each, total))
        lines = [f"{_duration(total)} for {self.steps} steps: {largest}", self.hint()]
        return "\n".join(line for line in lines if line)

    def __str__(self) -> str:
        if self._progress is None:
            return "no time was counted: nothing was trained yet"
        total, parts = self.total, {part: each for part, each in self.seconds().items() if each > 0}
        width = max(map(len, parts), default=0)
        per_step = f", {_duration(total / self.steps)} each" if self.steps else ""
        lines = [f"{_duration(total)} for {self.steps} steps{per_step}"]
        lines += [f"{part:<{width}}  {_duration(each):>9}  {_percent(each, total):>5}" for part, each in parts.items()]
        if self.device is not None and self.device.batches:
            lines.append(str(self.device))
        hint = self.hint()
        return "\n".join([*lines, hint] if hint else lines)


class _Spent:
    """The body of a ``with``, counted as one part."""

    __slots__ = ("_account", "_began", "_part", "_set_aside_s")

    def __init__(self, account: TimeAccount, part: Part) -> None:
        self._account, self._part = account, part

    def __enter__(self) -> None:
        self._set_aside_s, self._began = self._account._set_aside_s, self._account.clock()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        account = self._account
        inside_s = account._set_aside_s - self._set_aside_s
        account.add(self._part, account.clock() - self._began - inside_s)


def circumstances_of(run: Run) -> Circumstances:
    """What can be told from the training loader, or from the loaders that it combines, and from the settings."""
    loader = run.source.loader
    parts = getattr(loader, "flattened", [loader])
    workers = [getattr(part, "num_workers", None) for part in parts]
    datasets = [getattr(part, "dataset", None) for part in parts]
    while any(isinstance(each, Subset) for each in datasets):
        datasets = [each.dataset if isinstance(each, Subset) else each for each in datasets]
    return Circumstances(
        # the loader with the fewest is the one to wait for
        num_workers=min((each for each in workers if isinstance(each, int)), default=None),
        in_memory=all(isinstance(each, TensorDataset) for each in datasets),
        pin_memory=all(getattr(part, "pin_memory", False) for part in parts),
        log_every_n_steps=run.log_every_n_steps,
        on_cpu=run.device.type == "cpu",
    )


def _hint(account: TimeAccount) -> str | None:
    total = account.total
    if total <= 0 or account.steps == 0:
        return None
    parts = account.seconds()
    if account.on_device_s >= BUSY_SHARE * total:
        return None
    mends = {
        "waiting for data": (WAITING_SHARE, "waits for data", _mend_data),
        "host to device": (OVERHEAD_SHARE, "goes into moving batches to the device", _mend_transfer),
        "validation": (VALIDATION_SHARE, "goes into validation", _mend_validation),
        "checkpoints": (OVERHEAD_SHARE, "waits for checkpoints", _mend_checkpoints),
        "logging": (OVERHEAD_SHARE, "goes into logging", _mend_logging),
        EVERYTHING_ELSE: (REST_SHARE, "goes into hooks and callbacks", _mend_rest),
    }
    due = [part for part, (share, _, _) in mends.items() if parts[part] >= share * total]
    if due:
        worst = max(due, key=lambda part: parts[part])
        _, what, mend = mends[worst]
        return f"{_percent(parts[worst], total)} of the time {what}: {mend(account._circumstances)}."
    return _compile_hint(account, parts, total)


def _mend_data(at: Circumstances) -> str:
    cores = os.cpu_count() or 1
    if at.num_workers is None:
        return "give a DataLoader, whose num_workers prepare batches beside the training"
    if at.in_memory and at.num_workers:
        return f"num_workers={at.num_workers} for tensors in memory costs more than it saves, use 0"
    if at.in_memory:
        return "its samples are tensors in memory, so a larger batch_size saves the most"
    if at.num_workers >= cores:
        return f"{at.num_workers} workers keep all {cores} cores busy, so make the samples cheaper (smaller, cached)"
    return f"raise num_workers (it is {at.num_workers})"


def _mend_transfer(at: Circumstances) -> str:
    if at.on_cpu:
        return "do what the transfer hooks do in the dataset, whose workers run beside the training"
    if at.pin_memory:
        return "move smaller batches (uint8 instead of float32), and convert them on the device"
    return "set pin_memory=True in the DataLoader"


def _mend_validation(at: Circumstances) -> str:
    return "validate less often (val_check_interval, check_val_every_n_epoch) or less (limit_val_batches)"


def _mend_checkpoints(at: Circumstances) -> str:
    return "save less often (ModelCheckpoint(every_n_train_steps=…))"


def _mend_logging(at: Circumstances) -> str:
    return f"raise log_every_n_steps (it is {at.log_every_n_steps}), or log fewer values"


def _mend_rest(at: Circumstances) -> str:
    return 'Trainer(profiler="simple") says into which'


def _compile_hint(account: TimeAccount, parts: dict[str, float], total: float) -> str | None:
    """Whether steps are so short that Python and the launching of kernels must be much of them."""
    computing = parts["forward and backward"] + parts["optimizer"]
    if account.compiles or computing < COMPUTE_SHARE * total:
        return None
    step_s = computing / account.steps
    if account.device is None:
        tiny = step_s < TINY_STEP_S
    else:
        launched = LAUNCHED_SHARE * account.on_device_s <= computing
        tiny = account.on_device_s > 0 and launched and step_s < LAUNCHED_STEP_S
    if not tiny:
        return None
    return f"A step takes {step_s * 1e3:.2g} ms, much of it Python and launching operations: compile=True may help."


def _shows(seconds: float, total: float) -> bool:
    return total > 0 and seconds / total >= 0.01


def _percent(seconds: float, total: float) -> str:
    return f"{100 * seconds / total if total > 0 else 0:.0f} %"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
