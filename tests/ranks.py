"""Run a function in several processes, and bring what they return back: as a gloo group, or as ranks that torchrun started."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_FORK = multiprocessing.get_context("fork")  # functions of test modules cannot be imported by name elsewhere


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Call ``function(rank, *args)`` in each of ``world_size`` processes; return what they returned, by rank.

    The processes are forked and joined in a gloo group before the call. What they return is pickled.

    Raises:
        AssertionError: with the traceback of each rank that raised, or naming those that did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        return _in_processes(
            _rank, [(rank, world_size, store, function, args) for rank in range(world_size)], timeout_s
        )


def run_trainers(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 90.0) -> list[Any]:
    """Call ``function(rank, *args)`` in each of ``world_size`` processes; return what they returned, by rank.

    The processes are forked and find the environment that `torchrun --nproc-per-node={world_size}` would have given them, so that
    a Trainer made there joins them into a group by itself. What they return is pickled: no tensors of other devices.

    Raises:
        AssertionError: with the traceback of each rank that raised, or naming those that did not end in time.
    """
    # as torchrun's agent does: the store outlives the ranks, and no free port has to be guessed
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    places = [(rank, world_size, store.port, function, args) for rank in range(world_size)]
    return _in_processes(_torchrun_rank, places, timeout_s)


def _in_processes(target: Callable[..., None], calls: list[tuple[Any, ...]], timeout_s: float) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder, str(rank)) for rank in range(len(calls))]
        return _gathered(target, calls, stacks, timeout_s)


def _gathered(
    target: Callable[..., None], calls: list[tuple[Any, ...]], stacks: list[Path], timeout_s: float
) -> list[Any]:
    pipes = [_FORK.Pipe(duplex=False) for _ in calls]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
        processes = [
            _FORK.Process(target=_showing_stacks, args=(stack, target, send, *call))
            for call, (_, send), stack in zip(calls, pipes, stacks, strict=True)
        ]
        for process in processes:
            process.start()
    for _, send in pipes:
        send.close()
    until = time.monotonic() + timeout_s
    results: list[Any] = [None] * len(calls)
    problems = []
    for rank, (receive, _) in enumerate(pipes):
        try:
            ready = receive.poll(max(0.0, until - time.monotonic()))
            late = None if ready else f"not over after {timeout_s} s, in\n{_stack_of(processes[rank], stacks[rank])}"
            failed, results[rank] = pickle.loads(receive.recv_bytes()) if late is None else (True, late)
        except EOFError:
            failed, results[rank] = True, "ended without a result"
        if failed:
            problems.append(f"rank {rank}: {results[rank]}")
    for process in processes:
        process.join(1.0 if problems else 10.0)
        if process.is_alive():
            process.kill()
            process.join()
    assert not problems, "\n".join(problems)
    return results


def _showing_stacks(stack: Path, target: Callable[..., None], *args: Any) -> None:
    with stack.open("w") as file:
        faulthandler.register(signal.SIGUSR2, file, all_threads=True)
        target(*args)


def _stack_of(process: Any, stack: Path) -> str:
    """Where the threads of a process are, which waits for something."""
    os.kill(process.pid, signal.SIGUSR2)
    time.sleep(0.5)
    return stack.read_text()


def _torchrun_rank(
    send: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    atexit._clear()  # the parent's; those of this rank tell the others that it has ended well
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
        GROUP_WORLD_SIZE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    try:
        result = (False, function(rank, *args))
    except BaseException:  # noqa: BLE001 raised in the parent
        result = (True, traceback.format_exc())
    send.send_bytes(pickle.dumps(result))  # send() would share the memory of tensors with a process that ends
    send.close()
    atexit._run_exitfuncs()
    os._exit(0)


def _rank(
    send: Connection, rank: int, world_size: int, path: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(path, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        send.send_bytes(pickle.dumps((False, function(rank, *args))))
    except BaseException:  # noqa: BLE001 raised in the parent
        send.send_bytes(pickle.dumps((True, traceback.format_exc())))
    send.close()
    os._exit(0)  # without the parent's exit handlers
