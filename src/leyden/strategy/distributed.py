"""What all strategies of several ranks share: the process group, how ranks talk, and how they end."""

from __future__ import annotations

import atexit
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from leyden.errors import ConfigurationError, RankError, reject
from leyden.strategy.base import Layout, Strategy
from leyden.strategy.carry import packed, unpacked
from leyden.strategy.lifeline import Lifeline, describe
from leyden.strategy.sockets import break_connections, noted_connections

START_METHODS = ("script", "spawn", "fork", "forkserver")
_BROKEN_WAIT_S = 2.0
_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


@dataclass
class _Group:
    """The process group of this process, which is made once, however many Trainers use it one after the other.

    Attributes:
        lifeline: by which ranks learn of each other's failures; None where somebody else has made the group.
        launch_store: a store that outlives a restart of the ranks, or None.
        connections: the group's, by file descriptor.
        failed: whether a rank has failed, so that nobody listens any more.
        fits: how many times this program has called `fit`: one that is run again comes to the same ones in the same order.
    """

    lifeline: Lifeline | None = None
    launch_store: Store | None = None
    connections: dict[int, int] = field(default_factory=dict)
    failed: bool = False
    fits: int = 0


_group = _Group()


class DistributedStrategy(Strategy):
    """Several ranks in one process group of torch.

    Two groups are used: one for tensors on the device, and one over gloo for what the host has to say, so that saying it does
    not wait for a GPU.

    Args:
        process_group_backend: "nccl", "gloo", …; None: nccl on CUDA devices, else gloo.
        timeout: how long a rank waits in a collective for the others.
        start_method: how the Trainer starts ranks if nobody else has: "script" runs the program again in each, through torch's
            elastic launcher; "spawn", "fork" and "forkserver" call the verb in new processes, for notebooks; None: "script", or
            "fork" at an interactive prompt.
        log_dir: a folder for a file with each rank's output (as well as on the terminal), if the Trainer starts the ranks.

    Raises:
        ConfigurationError: an argument is not one of the above.
    """

    def __init__(
        self,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: str | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if start_method is not None and start_method not in START_METHODS:
            reject("start_method", start_method, f"{', '.join(map(repr, START_METHODS))} or None")
        if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
            reject("timeout", timeout, "a datetime.timedelta above 0")
        self.process_group_backend = process_group_backend
        self.timeout = timeout
        self.start_method = start_method
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.layout: Layout | None = None
        self.host_group: dist.ProcessGroup | None = None
        self._joined = False

    def settle(self, layout: Layout) -> None:
        """See `Strategy.settle`."""
        self.layout = layout
        self.device = layout.device
        self.world_size = layout.world_size
        if layout.place is not None:
            self.global_rank, self.local_rank = layout.place.rank, layout.place.local_rank
            self.node_rank = layout.place.node_rank or 0

    # Its life

    def connect(self) -> None:
        """Join the process group, or find the one that is there, as in the workers of Ray Train.

        Raises:
            RankError: if other ranks do not come; it names them.
            ConfigurationError: if the group that is there has another size.
        """
        if _group.failed and (self._joined or dist.is_initialized()):
            raise RankError("A rank of this program has failed, so its process group is gone. Start the program again.")
        if self._joined:
            return
        assert self.layout is not None
        with noted_connections(into=_group.connections):
            self._join()
            self._joined = True
            self.build()

    def build(self) -> None:
        """Make what needs the process group, such as a device mesh."""

    def _join(self) -> None:
        if dist.is_initialized():
            if dist.get_world_size() != self.world_size:
                raise ConfigurationError(
                    f"torch.distributed is initialized with {dist.get_world_size()} ranks, but the Trainer was made for "
                    f"{self.world_size}. Leave devices and num_nodes out to take the group that is there."
                )
        else:
            self._initialize()
        self.host_group = dist.new_group(backend="gloo", timeout=self.timeout)

    def _initialize(self) -> None:
        assert self.layout is not None
        _group.lifeline, _group.launch_store, _group.failed = None, None, False
        backend = self.process_group_backend or ("nccl" if self.device.type == "cuda" else "gloo")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        place = self.layout.place
        if place is None:
            store: Store = HashStore()  # one rank: nobody to talk to
        else:
            store = TCPStore(
                place.master_addr,
                place.master_port,
                is_master=self.global_rank == 0 and not place.agent_store,
                timeout=self.timeout,
                wait_for_workers=False,
            )
            if place.agent_store:  # which outlives a restart of its ranks
                _group.launch_store = PrefixStore("leyden/launch/", store)
            prefix = f"leyden/{place.restart_count}/"
            if self.world_size > 1:
                self._meet(PrefixStore(prefix, store))
                _group.lifeline = Lifeline(
                    PrefixStore(prefix, cast(Any, store).clone()),
                    self.global_rank,
                    self.world_size,
                    launcher=os.getppid() if place.agent_store else None,
                )
            store = PrefixStore(prefix, store)
        dist.init_process_group(
            backend, store=store, rank=self.global_rank, world_size=self.world_size, timeout=self.timeout
        )
        atexit.register(self.leave)

    def _meet(self, store: Store) -> None:
        """Wait for all ranks, and see that they are of one opinion about the run."""
        here = f"{type(self).__name__}, {self.world_size} ranks"
        store.set(f"here/{self.global_rank}", here)
        until = time.monotonic() + self.timeout.total_seconds()
        missing = [rank for rank in range(self.world_size) if rank != self.global_rank]
        while missing:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            if missing and time.monotonic() > until:
                raise RankError(
                    f"Rank {self.global_rank} of {self.world_size} has waited {self.timeout.total_seconds():.0f} s for "
                    f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}, in vain. Were they started, and "
                    "can they reach MASTER_ADDR and MASTER_PORT?"
                )
            if missing:
                time.sleep(0.02)
        for rank in range(self.world_size):
            there = store.get(f"here/{rank}").decode()
            if there != here:
                raise ConfigurationError(
                    f"Rank {self.global_rank} has Trainer(strategy={here}), but rank {rank} has {there}. All ranks must make "
                    "the same Trainer."
                )

    def fail(self, error: BaseException) -> BaseException | None:
        """See `Strategy.fail`. The group is torn down, which breaks the collectives that other ranks wait in."""
        if _group.failed or not self._joined or self.world_size == 1:
            return None
        _group.failed = True
        replaced: BaseException | None = None
        lifeline = _group.lifeline
        if lifeline is not None:
            broken = _is_broken_collective(error)
            found = lifeline.first_failure(wait_s=_BROKEN_WAIT_S if broken else 0.0)
            if found is None and broken and (gone := lifeline.ended_well()):
                error = replaced = _left_alone(self.global_rank, gone)
            first = found or lifeline.report(error)
            if first.rank != self.global_rank and not isinstance(error, SystemExit | KeyboardInterrupt):
                replaced = RankError(f"Rank {self.global_rank} has ended, because {describe(first)}")
                until = time.monotonic() + 2.0
                while not first.is_gone() and time.monotonic() < until:  # so that its traceback is seen first
                    time.sleep(0.05)
            lifeline.stop_watching()
        if replaced is None or replaced is error:  # else another rank has the root cause
            _record(error)
        break_connections(_group.connections)
        if dist.group.WORLD is not None:
            with suppress(RuntimeError):
                dist.group.WORLD.abort()  # of NCCL; destroy_process_group would wait for the others
        return replaced

    @property
    def has_failed(self) -> bool:
        """See `Strategy.has_failed`. Asks nobody, so that a signal's handler may look."""
        return _group.failed or (_group.lifeline is not None and _group.lifeline.seen is not None)

    def interrupted_run(self) -> str | None:
        """See `Strategy.interrupted_run`."""
        store, place = _group.launch_store, self.layout.place if self.layout is not None else None
        _group.fits += 1
        key = f"fit/{_group.fits}"
        if store is None or place is None or place.restart_count == 0 or not store.check([key]):
            return None
        return str(store.get(key).decode())

    def share_run_id(self, run_id: str) -> str:
        """See `Strategy.share_run_id`."""
        shared: str = self.broadcast(run_id)
        if _group.launch_store is not None and self.is_global_zero:
            _group.launch_store.set(f"fit/{_group.fits}", shared)
        return shared

    def leave(self) -> None:
        """See `Strategy.leave`."""
        if _group.failed:
            return
        if _group.lifeline is not None:
            _group.lifeline.leave()
        if dist.is_initialized():
            dist.destroy_process_group()

    # How ranks talk

    def barrier(self, name: str | None = None) -> None:
        """See `Strategy.barrier`."""
        if self._talks():
            dist.barrier(group=self.host_group)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """See `Strategy.broadcast`."""
        if not self._talks():
            return obj
        box = [packed(obj)]
        dist.broadcast_object_list(box, src=src, group=self.host_group)
        return unpacked(box[0], self.device)

    def gather_objects(self, obj: Any) -> list[Any]:
        """See `Strategy.gather_objects`."""
        if not self._talks():
            return [obj]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, packed(obj), group=self.host_group)
        return [unpacked(each, self.device) for each in box]

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """See `Strategy.highest`."""
        if not self._talks():
            return list(numbers)
        held = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self.host_group)
        return held.tolist()

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """See `Strategy.all_gather`."""
        if not self._talks():
            return tensor.unsqueeze(0)
        if sync_grads and tensor.requires_grad:
            gathered: Tensor = _GatherWithGradient.apply(tensor, self.world_size, self.global_rank)  # type: ignore[no-untyped-call]
            return gathered
        return _gather(tensor.detach(), self.world_size)

    def reduce(self, tensor: Tensor, reduce_op: str = "mean") -> Tensor:
        """See `Strategy.reduce`."""
        if reduce_op not in ("mean", *_OPS):
            reject("reduce_op", reduce_op, "'mean', 'sum', 'min' or 'max'")
        if not self._talks():
            return tensor
        held = tensor.detach().clone(memory_format=torch.contiguous_format)
        if reduce_op == "mean" and not held.is_floating_point():
            held = held.to(torch.get_default_dtype())
        dist.all_reduce(held, _OPS.get(reduce_op, dist.ReduceOp.SUM))
        return held / self.world_size if reduce_op == "mean" else held

    def _talks(self) -> bool:
        """Whether there is somebody to talk to: not before a verb, and not after a failure, when nobody listens."""
        return self._joined and not _group.failed and self.world_size > 1

    @abstractmethod
    def wrap_training_step(self, module: Any, step: Callable[..., Any]) -> Callable[..., Any]:
        """See `Strategy.wrap_training_step`."""


def _gather(tensor: Tensor, world_size: int) -> Tensor:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


class _GatherWithGradient(torch.autograd.Function):
    """What a rank contributed has a part in the losses of all: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world_size: int, rank: int) -> Tensor:
        ctx.rank = rank
        return _gather(tensor, world_size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.rank], None, None


def _is_broken_collective(error: BaseException) -> bool:
    """Whether this is what a collective raises when its other end is gone. Torch has no one exception for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _left_alone(rank: int, gone: list[int]) -> RankError:
    ranks = f"rank{'' if len(gone) == 1 else 's'} {', '.join(map(str, gone))}"
    return RankError(
        f"Rank {rank} waits for {ranks}, whose program has come to its end already. All ranks must call the same verbs of the "
        "Trainer, saves and collectives: only what is done with their results may stand under `if trainer.is_global_zero`."
    )


def _record(error: BaseException) -> None:
    """Tell torch's elastic agent, if there is one, so that its report names the root cause; as its ``@record`` would."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and not isinstance(error, SystemExit | KeyboardInterrupt):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
