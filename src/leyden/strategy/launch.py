"""Start the ranks of a run where nobody has: torch's elastic launcher does it, as `torchrun` would.

Under "script" the program is run again in each rank, from its first line to its last, and the process that was started first
only watches over them: it ends where the verb was called, with their exit code. Under "spawn" and "fork" only the verb runs in
new processes; afterwards the module and the Trainer are as rank 0 left them.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from leyden.errors import ConfigurationError, RankError
from leyden.seed import capture_random_state, restore_random_state
from leyden.strategy.environments import at_prompt
from leyden.strategy.own_memory import make_own

if TYPE_CHECKING:
    from leyden.strategy.base import Layout
    from leyden.trainer import Trainer

R = TypeVar("R")
# those that the elastic launcher handles
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn",
            "torch.distributed.elastic.agent.server.api")  # fmt: skip


def launch(trainer: Trainer, verb: Callable[..., R], *args: Any) -> R:
    """Start the ranks that the Trainer lacks, and let each of them run the verb; return what rank 0 returned.

    Args:
        trainer: whose strategy has a ``start_method``.
        verb: its `fit`, `validate`, `test` or `predict`.
        *args: its arguments.
    """
    if trainer.strategy.start_method == "script":
        run_script(trainer)
    result: R = run_function(trainer, verb.__name__, args)
    return result


def run_script(trainer: Trainer) -> None:
    """Run the program again in each rank, and end with their exit code.

    Raises:
        SystemExit: always.
        ConfigurationError: if there is no program that could be run again.
    """
    arguments = sys.orig_argv[1:]
    program = getattr(sys.modules["__main__"], "__file__", None) or ""  # "<stdin>" could not be read again
    if not arguments or hasattr(sys, "ps1") or ("-c" not in arguments and not os.path.exists(program)):
        raise ConfigurationError(
            "devices asks for several ranks, each of which runs the program again, but Python was started without one. Use "
            "strategy='ddp_fork' at a prompt or in a notebook, or put the code into a file."
        )
    for logger in trainer.loggers:
        logger.adopt_version(None)
    sys.stdout.flush()
    sys.stderr.flush()
    _, code, said = _watch_over(trainer, sys.executable, arguments)
    if said:
        print(f"The program has failed in {said}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def run_function(trainer: Trainer, verb: str, args: tuple[Any, ...]) -> Any:
    """Call a verb in a new process for each rank; return what rank 0 returned.

    Raises:
        RankError: if a rank failed; its traceback has been printed.
        ConfigurationError: if the processes cannot be made, or something cannot be sent to them.
        KeyboardInterrupt: if it was interrupted at a prompt.
        SystemExit: if a program was interrupted, with the code that a shell expects of the signal.
    """
    from leyden.strategy.bring_back import take_over
    from leyden.strategy.unpicklable import first_unpicklable

    named = inspect.signature(getattr(trainer, verb)).bind(*args).arguments
    _refuse_what_cannot_start(trainer)
    trainer.strategy.before_start(named.get("model") or trainer.lightning_module, trainer._settings)
    for logger in trainer.loggers:
        if logger.save_dir is not None:
            _ = logger.version  # picked here, so that the next verb's processes write to the same folder
    try:
        with _silenced(), _signals_kept():
            results, code, said = _watch_over(trainer, in_rank, [trainer, verb, args, capture_random_state()])
    except Exception as error:
        fork = trainer.strategy.start_method == "fork"
        found = None if fork else first_unpicklable({"trainer": trainer, **named})
        if found is None:
            raise
        raise ConfigurationError(
            f"{found[0]} cannot be sent to a new process: {found[1]}. Under start_method={trainer.strategy.start_method!r} all "
            f"that {verb} is given is pickled. Define it at the top of a module, use start_method='fork' (strategy='ddp_fork'), "
            "or write a script and leave start_method out."
        ) from error
    if results is not None:
        return take_over(trainer, results[0], named)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        trainer.state.interrupt()
        if code == 128 + signal.SIGINT and at_prompt():
            raise KeyboardInterrupt
        raise SystemExit(code)
    raise RankError(f"{verb} has failed in {said}")


def in_rank(trainer: Trainer, verb: str, args: tuple[Any, ...], random_state: dict[str, Any]) -> Any:
    """What a new process runs: the verb, as the rank that the launcher has made it."""
    from leyden.strategy.bring_back import outcome

    if trainer.strategy.start_method == "fork":
        # GNU's OpenMP waits for ever in a forked process for the threads that the parent had, unless it needs none
        torch.set_num_threads(1)
    for name in _SIGNALS:  # a forked process has inherited the launcher's
        signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
    trainer.find_ranks()
    try:
        restore_random_state(random_state)
        make_own(trainer, args[0] if args[0] is not None else trainer.lightning_module)
        result = getattr(trainer, verb)(*args)
        if trainer.interrupted:  # at a prompt, where a verb returns; but the prompt is the parent's
            raise SystemExit(128 + signal.SIGINT)
        found = outcome(trainer, result)
        trainer.strategy.leave()  # a process of multiprocessing ends without calling what is registered for its exit
        return found
    except Exception as error:
        text = f"{error}\n" if isinstance(error, RankError) else traceback.format_exc()
        sys.stderr.write(f"[rank {trainer.global_rank}] {text}")  # in one piece, as other ranks write as well
        sys.stderr.flush()
        raise


def _refuse_what_cannot_start(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if dist.is_available() and dist.is_initialized():
        raise ConfigurationError(
            "This process is in a process group of torch.distributed already, perhaps since a verb of one rank, so it cannot "
            "start other ranks. Call torch.distributed.destroy_process_group() first."
        )
    if strategy.start_method == "fork" and strategy.device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigurationError(
            "This process has used CUDA already, and a forked one could not. Restart the notebook's kernel and keep tensors and "
            "modules on the CPU until fit, or use start_method='spawn' with everything that is passed defined in a module."
        )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Give signals back their handlers, which the elastic launcher replaces by its own for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {name: signal.getsignal(name) for name in _SIGNALS}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


@contextmanager
def _silenced() -> Iterator[None]:
    """Without loggers of torch, which would say in their way what is said here: each rank prints its traceback itself."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _watch_over(trainer: Trainer, entrypoint: Any, arguments: list[Any]) -> tuple[dict[int, Any] | None, int, str]:
    """Start the ranks and wait for them.

    Returns:
        Their results, None if one has failed; an exit code; and who failed first and with what.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    layout = trainer.layout
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(layout.devices))))
    try:
        return elastic_launch(_launch_config(trainer, layout), entrypoint)(*arguments), 0, ""
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        return None, code, f"rank {rank}, which ended first, with exit code {failure.exitcode}: {_said(failure)}"
    except SignalException as error:
        return None, 128 + int(error.sigval), ""


def _said(failure: Any) -> str:
    """The last line of what a failed rank left: the type and message of its exception, or that a signal ended it."""
    message = failure.message
    if isinstance(message, dict):  # of an error file that the rank wrote
        message = message.get("message", message)
    if isinstance(message, dict):
        message = message.get("message", "")
    lines = str(message).strip().splitlines()
    if not lines or lines[0].startswith("To enable traceback"):  # torch's words for a rank that has left none
        return "it has said nothing of why; see above"
    return lines[0]


def _launch_config(trainer: Trainer, layout: Layout) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    strategy: Any = trainer.strategy
    logs = DefaultLogsSpecs()
    if strategy.log_dir is not None:
        os.makedirs(strategy.log_dir, exist_ok=True)
        logs = DefaultLogsSpecs(log_dir=strategy.log_dir, redirects=Std.ALL, tee=Std.ALL)
    rendezvous: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    run_id = uuid.uuid4().hex
    if layout.num_nodes > 1:
        address, port, node = _master(layout)
        rendezvous = {"rdzv_backend": "static", "rdzv_endpoint": f"{address}:{port}", "rdzv_configs": {"rank": node}}
        run_id = f"{address}:{port}"
    method = strategy.start_method
    return LaunchConfig(
        min_nodes=layout.num_nodes,
        max_nodes=layout.num_nodes,
        nproc_per_node=len(layout.devices),
        run_id=run_id,
        max_restarts=trainer.max_restarts,
        monitor_interval=0.1,
        start_method="spawn" if method == "script" else method,
        logs_specs=logs,
        local_addr="localhost" if layout.num_nodes == 1 else None,
        **rendezvous,
    )


def _master(layout: Layout) -> tuple[str, int, int]:
    """Where the ranks of several machines meet, from the environment."""
    values = {name: os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")}
    if not all(values.values()) or not (values["MASTER_PORT"] + values["NODE_RANK"]).isdigit():
        raise ConfigurationError(
            f"num_nodes={layout.num_nodes} needs to know where the other machines are. Start the program on each with torchrun "
            f"--nnodes={layout.num_nodes} --nproc-per-node={len(layout.devices)} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT, "
            f"or under srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK (now {values})."
        )
    return values["MASTER_ADDR"], int(values["MASTER_PORT"]), int(values["NODE_RANK"])
