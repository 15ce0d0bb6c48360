"""Save and end when a scheduler takes the machine away: SIGTERM and SIGUSR1."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Literal

from leyden.callbacks.callback import Callback
from leyden.checkpoint.store import join
from leyden.data.worker import PREEMPTION_SIGNALS
from leyden.errors import CheckpointError, SIGTERMException, did_you_mean, reject, warn

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer

EXIT_CODE = 128 + 15  # what a shell reports of a process that SIGTERM ended
_SCONTROL_TIMEOUT_S = 30.0


class Preemption(Callback):
    """Save the state and end with exit code 143 when one of ``signals`` comes during `fit`.

    A `Trainer` adds it by itself, except with ``barebones`` and ``fast_dev_run``; ``Preemption(signals=())`` turns it off.

    The state is saved at the next step boundary, whole: the restarted script goes on from it with
    ``fit(..., ckpt_path="last")`` as if nothing had happened. A validation, or a step of many accumulated batches, is finished
    first, so let the scheduler warn that long ahead. Then hooks, loggers and datamodule are torn down as ever, without a
    traceback: ``on_exception`` sees a `SIGTERMException`, which is a `SystemExit`; loggers are finalized as ``"interrupted"``.
    The exit code is 143 for every signal. A signal before the first step ends the run at once; there is nothing to save. A
    second signal ends the process at once, by its default action. No file is damaged by that.

    The file lies beside those of the first `ModelCheckpoint`: ``last.ckpt`` if that one has ``save_last``, else
    ``preempted.ckpt``, which the next preemption overwrites and nobody deletes. Without a `ModelCheckpoint` nothing is saved.

    A signal that has a handler already, such as that of submitit, Ray or the script itself, is left alone, and so is one that is
    ignored. Signals reach the main thread only: `fit` in another thread is not watched. Windows has no such signals.

    Under SLURM, ``--signal`` warns the job steps ahead of the time limit, and leyden puts the job back into the queue::

        #SBATCH --signal=USR1@120     # seconds before the end; enough for a validation and a save
        #SBATCH --requeue
        #SBATCH --open-mode=append    # the log goes on as well
        srun python train.py          # without srun: --signal=B:USR1@120, and `exec python train.py`

    Args:
        signals: names out of SIGTERM, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU.
        requeue: whether to call ``scontrol requeue`` within a SLURM job. True: always; False: never; ``"auto"``: for all signals
            but SIGTERM, after which the scheduler requeues the job itself or somebody has cancelled it, and only where a
            checkpoint or the very beginning is there to go on from.
        save: False ends without saving.

    Attributes:
        received: whether a signal has come during the present or the last `fit`.

    Raises:
        ConfigurationError: an argument is not one of the above.
    """

    _trainer: Trainer | None
    _exit: SystemExit | None

    def __init__(
        self,
        signals: str | Sequence[str] = ("SIGTERM", "SIGUSR1"),
        requeue: bool | Literal["auto"] = "auto",
        save: bool = True,
    ) -> None:
        self.signals = _checked(signals)
        if requeue != "auto" and not isinstance(requeue, bool):
            reject("requeue", requeue, "'auto', True or False")
        if not isinstance(save, bool):
            reject("save", save, "True or False")
        self.requeue = requeue
        self.save = save
        self.received = False
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch, in `fit`."""
        if stage != "fit" or os.name != "posix" or threading.current_thread() is not threading.main_thread():
            return
        self._forget()
        self.received = False
        self._trainer = trainer
        self._ask = trainer.shared_request(self._reach_boundary)
        self._pid = os.getpid()
        for name in self.signals:
            number = signal.Signals[name]
            if signal.getsignal(number) is signal.SIG_DFL:
                self._watch(number)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell what became of the run, if this callback ended it; any other exception counts for itself."""
        if exception is self._exit:
            self._conclude(trainer)
        self._over = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the signals' former handling back."""
        late = bool(self._received) and not self._over  # no step boundary came any more
        try:
            if late:
                self._conclude(trainer)
        finally:
            self._restore()
            self._forget()
        if late:
            raise SIGTERMException(EXIT_CODE)

    def _forget(self) -> None:
        self._watched: list[signal.Signals] = []
        self._trainer = None
        self._pid = 0
        self._received = ""
        self._saved_in: str | None = None
        self._exit = None
        self._over = False

    def _watch(self, number: signal.Signals) -> None:
        signal.signal(number, self._receive)
        signal.siginterrupt(number, False)  # a read within a C library goes on instead of failing with EINTR
        self._watched.append(number)

    def _restore(self) -> None:
        """Only signals with the default action are watched, so that is what to put back; not over somebody's newer handler."""
        for number in self._watched:
            if signal.getsignal(number) in (self._receive, self._pass_over):
                signal.signal(number, signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Ask for the end at the next step boundary; runs between any two bytecodes of the main thread."""
        if os.getpid() != self._pid and self._pid:
            return  # a loader's worker, which has this handler by fork; the main process decides
        self._restore()  # from here on the system itself ends the process at a signal, also within a long C call
        trainer = self._trainer
        if trainer is None:  # somebody had kept this handler and put it back after fit
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if trainer.strategy.has_failed:
            return  # a launcher's, who ends what another rank's failure has left
        self._received, self.received = signal.Signals(number).name, True
        begun = _has_begun(trainer)
        what = "the run ends at the next step boundary" if begun else "the run ends before its first step"
        with contextlib.suppress(OSError):  # print could be in the middle of printing
            os.write(2, f"{self._received}: {what}. A second signal ends it at once.\n".encode())
        self._ask()
        if not begun:
            self._leave()  # should user code swallow this, the first step boundary follows

    def _reach_boundary(self) -> None:
        """Queue behind what others asked for: a save that is due at this boundary is part of the state."""
        assert self._trainer is not None
        self._received, self.received = self._received or "a signal to another rank", True
        self._trainer.at_step_boundary(self._leave)

    def _leave(self) -> None:
        trainer = self._trainer
        assert trainer is not None
        if self.save and _has_begun(trainer):
            path = _path_beside_checkpoints(trainer)
            if path is not None:
                _save(trainer, path)
            self._saved_in = path
        self._exit = SIGTERMException(EXIT_CODE)
        raise self._exit

    def _conclude(self, trainer: Trainer) -> None:
        """Say what was saved and how to go on; requeue the job if that is wanted."""
        resume = 'fit(..., ckpt_path="last")'
        if not _has_begun(trainer):
            text = "before the first step: nothing was lost."
        elif self._saved_in is not None:
            text = f"the state is saved in {self._saved_in}. {resume} goes on from it."
        elif trainer.checkpoint_callback is None:
            text = "nothing was saved, because there is no ModelCheckpoint (enable_checkpointing=False)."
        elif self._exit is None:
            text = f"training had ended, and its checkpoints are written. {resume} goes on from the newest."
        else:
            text = f"nothing was saved, because of Preemption(save=False). {resume} goes on from the newest checkpoint."
        where = f"in epoch {trainer.current_epoch} after {trainer.global_step} steps"
        trainer.print(f"\nEnded by {self._received} {where}: {text}", flush=True)
        if trainer.is_global_zero and self._wants_requeue(trainer):
            self._requeue()

    def _wants_requeue(self, trainer: Trainer) -> bool:
        if self.requeue != "auto":
            return self.requeue
        in_slurm = "SLURM_JOB_ID" in os.environ
        can_go_on = not _has_begun(trainer) or trainer.checkpoint_callback is not None
        return in_slurm and can_go_on and self._received != "SIGTERM"

    def _requeue(self) -> None:
        """Put the job back into SLURM's queue; a failure is told, and changes nothing else."""
        job = slurm_job(os.environ)
        if job is None:
            warn("preemption-requeue", "Preemption: nothing is requeued, because SLURM_JOB_ID names no job.")
            return
        # slurmctld now sends SIGTERM; loggers still have to be closed
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._pass_over)
            self._watched.append(signal.SIGTERM)
        failure = _scontrol_requeue(job)
        if failure:
            self._restore()
            warn(
                "preemption-requeue",
                f"Preemption: scontrol requeue {job} failed: {failure}. Submit the job again to go on.",
            )
        else:
            print(f"SLURM job {job} is requeued.", flush=True)

    def _pass_over(self, number: int, frame: FrameType | None) -> None:
        """Handle the SIGTERM that requeuing brings by nothing; the next one ends the process."""
        self._restore()


def describe(callback: Preemption) -> str:
    """What `Trainer.explain` says of it."""
    taken = [name for name in callback.signals if os.name == "posix" and _is_taken(name)]
    words = f"on {' or '.join(callback.signals)}: save at the next step boundary, exit with {EXIT_CODE}"
    return words + (f"; not on {' and '.join(taken)}, which had a handler when the Trainer was made" if taken else "")


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The id by which ``scontrol`` knows the present SLURM job, within an array ``<array>_<task>``; None outside of SLURM."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    job = environment.get("SLURM_JOB_ID", "")
    if job and array and task:
        job = f"{array}_{task}"
    return job if re.fullmatch(r"[0-9]+(_[0-9]+)?", job) else None


def _checked(signals: str | Sequence[str]) -> tuple[str, ...]:
    names = (signals,) if isinstance(signals, str) else signals
    if not isinstance(names, (list, tuple)):
        reject("signals", signals, f"names out of {', '.join(PREEMPTION_SIGNALS)}")
    for name in names:
        if name not in PREEMPTION_SIGNALS:
            hint = did_you_mean(str(name), PREEMPTION_SIGNALS)
            if name == "SIGINT":
                hint = " Ctrl-C is handled by the Trainer."
            reject("signals", name, f"names out of {', '.join(PREEMPTION_SIGNALS)}", hint)
    return tuple(names)


def _has_begun(trainer: Trainer) -> bool:
    """Whether there is something of this run to be lost: training has begun, and may be over."""
    return trainer.state.begun


def _path_beside_checkpoints(trainer: Trainer) -> str | None:
    callback = trainer.checkpoint_callback
    if callback is None or callback.dirpath is None:
        return None
    last = callback.CHECKPOINT_NAME_LAST
    # a template cannot be filled here, and a last.ckpt that is to hold weights only should
    takes_last = callback.save_last and not callback.save_weights_only and "{" not in last
    return join(callback.dirpath, (last if takes_last else "preempted") + callback.FILE_EXTENSION)


def _save(trainer: Trainer, path: str) -> None:
    """Save, at once and whole; this is the last chance, so what an earlier write failed with does not stand in its way."""
    try:
        trainer.save_checkpoint(path)
    except CheckpointError as error:
        trainer.save_checkpoint(path)
        warn("preemption-save", f"Preemption: the state is saved in {path}, at the second attempt. The first: {error}")


def _is_taken(name: str) -> bool:
    return signal.getsignal(signal.Signals[name]) is not signal.SIG_DFL


def _scontrol_requeue(job: str) -> str:
    """Run ``scontrol requeue``; what went wrong, or nothing."""
    import subprocess  # here, so that the one program that leyden starts is started from one place

    try:
        done = subprocess.run(  # noqa: S603 a list and no shell; the job's id is digits, see slurm_job
            ["scontrol", "requeue", job],  # noqa: S607 every cluster has it elsewhere, on PATH
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SCONTROL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}") if done.returncode else ""
