"""Launchers as objects, for ``Trainer(plugins=…)``: which one is meant, or one that leyden does not know."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from leyden.errors import ConfigurationError, reject
from leyden.strategy.environments import Place, find_place


class ClusterEnvironment(ABC):
    """Who this process is among those that a launcher started: subclass it for a launcher that leyden does not know.

    torchrun, SLURM, MPI, LSF, Kubeflow, Ray Train and plain variables (RANK, WORLD_SIZE, …) are found without it.
    """

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether the launcher has started all ranks; else the Trainer starts them."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """The host that rank 0 runs on."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """A port there, for the ranks to meet."""

    @abstractmethod
    def world_size(self) -> int:
        """The number of ranks."""

    @abstractmethod
    def global_rank(self) -> int:
        """This process's number among all."""

    @abstractmethod
    def local_rank(self) -> int:
        """Its number on its machine."""

    @abstractmethod
    def node_rank(self) -> int:
        """The number of its machine."""

    def set_world_size(self, size: int) -> None:
        """Accepted for compatibility: the number of ranks is asked for, and never told."""

    def set_global_rank(self, rank: int) -> None:
        """Accepted for compatibility."""

    @staticmethod
    def detect() -> bool:
        """Whether this process was started by the launcher."""
        return False

    def place(self) -> Place | None:
        """What the Trainer asks: who this process is; None if the Trainer is to start the ranks."""
        started = find_place() if "TORCHELASTIC_RUN_ID" in os.environ else None
        if started is not None or not self.creates_processes_externally:
            return started  # the Trainer's own ranks
        return Place(
            name="environment variables",
            world_size=self.world_size(),
            rank=self.global_rank(),
            local_rank=self.local_rank(),
            master_addr=self.main_address,
            master_port=self.main_port,
            node_rank=self.node_rank(),
        )

    @property
    def preemption(self) -> dict[str, Any]:
        """Arguments for the `Preemption` callback that the Trainer adds."""
        return {}


class _Found(ClusterEnvironment):
    """A launcher that `find_place` knows.

    Attributes:
        launchers: its names there.
    """

    launchers: ClassVar[tuple[str, ...]]

    @classmethod
    def detect(cls) -> bool:
        """Whether this process was started by the launcher."""
        found = find_place()
        return found is not None and found.name in cls.launchers

    def place(self) -> Place | None:
        """Who this process is; None if nobody has started ranks.

        Raises:
            ConfigurationError: if another launcher has started it.
        """
        found = find_place()
        if found is not None and found.name not in self.launchers and found.name != "torchrun":
            raise ConfigurationError(
                f"plugins has a {type(self).__name__}, but {found.name} started this process. Leave it out: leyden finds the "
                "launcher by itself."
            )
        return found

    @property
    def creates_processes_externally(self) -> bool:
        """Whether the launcher has started this process."""
        return self.detect()

    @property
    def main_address(self) -> str:
        """The host that rank 0 runs on; this one if nobody has started ranks."""
        return _here().master_addr

    @property
    def main_port(self) -> int:
        """A port there; 0 for any that is free."""
        return _here().master_port

    def world_size(self) -> int:
        """The number of ranks."""
        return _here().world_size

    def global_rank(self) -> int:
        """This process's number among all."""
        return _here().rank

    def local_rank(self) -> int:
        """Its number on its machine."""
        return _here().local_rank

    def node_rank(self) -> int:
        """The number of its machine; 0 if the launcher does not say."""
        return _here().node_rank or 0


def _here() -> Place:
    return find_place() or Place("nobody", world_size=1, rank=0, local_rank=0, master_addr="127.0.0.1", master_port=0)


class LightningEnvironment(_Found):
    """No launcher: the Trainer starts the ranks, also where SLURM or MPI have left variables."""

    launchers = ("torchrun",)

    @classmethod
    def detect(cls) -> bool:
        """Always: it needs nobody."""
        return True

    @property
    def creates_processes_externally(self) -> bool:
        """False."""
        return False

    def place(self) -> Place | None:
        """Who this process is among those that the Trainer has started; None before."""
        return find_place() if "TORCHELASTIC_RUN_ID" in os.environ else None


class TorchElasticEnvironment(_Found):
    """torchrun."""

    launchers = ("torchrun",)


class KubeflowEnvironment(_Found):
    """Kubeflow's PyTorchJob."""

    launchers = ("Kubeflow", "environment variables")


class MPIEnvironment(_Found):
    """Open MPI, MPICH, Intel MPI or MVAPICH."""

    launchers = ("Open MPI", "MPICH", "Intel MPI", "MVAPICH")


class LSFEnvironment(_Found):
    """LSF's jsrun."""

    launchers = ("LSF",)


class SLURMEnvironment(_Found):
    """SLURM's srun.

    Args:
        auto_requeue: put the job back into the queue after a warning signal (default); see `Preemption`.
        requeue_signal: that signal; None: SIGUSR1.

    Raises:
        ConfigurationError: for what is no signal.
    """

    launchers = ("SLURM",)

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        if requeue_signal is not None and not isinstance(requeue_signal, signal.Signals):
            reject("requeue_signal", requeue_signal, "a signal.Signals such as signal.SIGUSR1, or None")
        self.auto_requeue = auto_requeue
        self.requeue_signal = requeue_signal

    @staticmethod
    def job_name() -> str | None:
        """SLURM_JOB_NAME."""
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> int | None:
        """SLURM_JOB_ID."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return int(job) if job.isdecimal() else None

    @property
    def preemption(self) -> dict[str, Any]:
        """See `ClusterEnvironment.preemption`."""
        asked: dict[str, Any] = {} if self.auto_requeue else {"requeue": False}
        if self.requeue_signal is not None:
            asked["signals"] = tuple(dict.fromkeys(("SIGTERM", self.requeue_signal.name)))
        return asked
