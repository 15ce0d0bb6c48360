"""Who this process is among those that a launcher started, read from the variables that the launcher set."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from leyden.errors import ConfigurationError
from leyden.strategy.hostlist import expand_counts, expand_hostlist

DEFAULT_PORT = 29500  # torchrun's own, where a launcher names no job from which one could follow
_FIRST_PORT, _PORTS = 10_000, 18_000  # below 29500, Kubernetes' node ports (30000) and Linux' ephemeral ports (32768)
_SLURM_SPECIAL_STEPS = 0xFFFFFFF0  # and above: batch script, interactive and other steps that are no group of tasks
_LOOPBACK = ("localhost", "127.", "::1", "[::1]")


@dataclass(frozen=True)
class Place:
    """Who this process is in the group of ranks that a launcher started.

    Attributes:
        name: the launcher: "torchrun", "Ray Train", "SLURM", "Open MPI", "MPICH", "Intel MPI", "MVAPICH", "LSF", "Kubeflow", or
            "environment variables" for RANK, WORLD_SIZE and so on set by anything else.
        world_size: the number of ranks.
        rank: from 0 to ``world_size - 1``.
        local_rank: this rank's number among those of its node.
        master_addr: the host that rank 0 runs on.
        master_port: a port there, for the ranks to meet.
        local_world_size: the number of ranks on this node; None if the launcher does not say.
        node_rank: the number of this node; None if the launcher does not say.
        num_nodes: the number of nodes; None if the launcher does not say.
        ranks_per_node: the number of ranks on each node; None if the launcher does not say.
        agent_store: whether torchrun's agent runs the store at the master's address, so that no rank has to.
        restart_count: how often torchrun has restarted the ranks.
        run_id: the launcher's name for this run, the same on each rank; None if it has none.
    """

    name: str
    world_size: int
    rank: int
    local_rank: int
    master_addr: str
    master_port: int
    local_world_size: int | None = None
    node_rank: int | None = None
    num_nodes: int | None = None
    ranks_per_node: tuple[int, ...] | None = None
    agent_store: bool = False
    restart_count: int = 0
    run_id: str | None = None


def find_place(environ: Mapping[str, str] = os.environ, has_terminal: Callable[[], bool] | None = None) -> Place | None:
    """Find out who this process is from its environment; nothing is sent or awaited.

    The launcher that is nearest to the process counts: torchrun or Ray Train inside a SLURM job, mpirun inside a Kubernetes pod.
    One that started a single process is none, apart from torchrun and Ray Train: a shell within a SLURM job has such an
    environment, and there a Trainer may start ranks of its own.

    Args:
        environ: the variables; `os.environ` by default.
        has_terminal: whether somebody sits at this process's terminal; looked up by default. SLURM's ``srun --pty`` gives a
            shell the variables of a task.

    Returns:
        The place, or None if no launcher started a group that this process belongs to.

    Raises:
        ConfigurationError: a variable is missing, broken, or contradicts another. Names it, its value, the launcher and the mend.
    """
    place = _torchrun(environ) or _ray(environ)
    if place is not None:
        return place
    return _variables(environ, _mpi(environ) or _slurm(environ, has_terminal or _has_terminal))


def check_place(place: Place, devices: int | None, num_nodes: int | None) -> None:
    """Compare what the Trainer was told with what the launcher started. Every rank of an uneven group comes to the same result
    where the launcher says how many ranks each node has.

    Args:
        place: from `find_place`.
        devices: the Trainer's, as a number of ranks per node; None takes what is there.
        num_nodes: the Trainer's; None takes what is there.

    Raises:
        ConfigurationError: they differ. Names both sides and the mend.
    """
    local = place.local_world_size
    told = place.ranks_per_node or ((local,) if local is not None else ())
    uneven = devices is not None and any(count != devices for count in told)
    other_nodes = num_nodes is not None and place.num_nodes is not None and place.num_nodes != num_nodes
    size = devices * num_nodes if devices is not None and num_nodes is not None else place.world_size
    # without a number of nodes, so many ranks must at least make whole nodes
    broken = devices is not None and place.world_size % devices != 0
    if not (uneven or other_nodes or broken or size != place.world_size):
        return
    given = ", ".join(
        f"{name}={value}" for name, value in (("devices", devices), ("num_nodes", num_nodes)) if value is not None
    )
    asked = f"Trainer({given})" + (f" means {_ranks(size)}" if size != place.world_size else "")
    raise ConfigurationError(
        f"{asked}, but {place.name} started {_ranks(place.world_size)}{_layout(place)}. {_mend(place, devices, num_nodes)}"
    )


def advice(environ: Mapping[str, str] = os.environ) -> str | None:
    """One line for a process that is alone although it runs within an allocation for many; None if there is nothing to say.

    Only of use where `find_place` gave None.
    """
    if environ.get("TORCHELASTIC_RUN_ID"):
        return None
    pods = environ.get("PET_NNODES", "1").partition(":")[0]
    if pods.isdecimal() and int(pods) > 1:
        return (
            f"This process runs in one of {pods} pods (PET_NNODES), but torchrun did not start it, so it is alone. "
            "Let the pods' command be: torchrun train.py"
        )
    job = environ.get("SLURM_JOB_ID")
    if job and not _is_slurm_task(environ):
        tasks, nodes = environ.get("SLURM_NTASKS", ""), environ.get("SLURM_JOB_NUM_NODES", "")
        if (tasks.isdecimal() and int(tasks) > 1) or (nodes.isdecimal() and int(nodes) > 1):
            has = " on ".join([f"{tasks} tasks"] * bool(tasks) + [f"{nodes} node{'s' * (nodes != '1')}"] * bool(nodes))
            return (
                f"SLURM job {job} has {has}, but srun did not start this process, so it is alone. "
                "Start one process for each task with: srun python train.py"
            )
    hosts = environ.get("LSB_MCPU_HOSTS", "").split()[::2]
    if len(hosts) > 1 and "JSM_NAMESPACE_RANK" not in environ and "OMPI_COMM_WORLD_RANK" not in environ:
        return (
            f"LSF job {environ.get('LSB_JOBID', '?')} has {len(hosts)} hosts, but neither jsrun nor mpirun started this process, "
            "so it is alone. Start it with: jsrun python train.py"
        )
    return None


# ------------------------------------------------------------------------------------- launcher by launcher


@dataclass(frozen=True)
class _Names:
    """The variables in which a launcher says who a process is; empty where it does not say."""

    world_size: str
    rank: str
    local_rank: str
    local_world_size: str = ""
    node_rank: str = ""
    num_nodes: str = ""


_TORCHRUN = _Names("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_PLAIN = _Names("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
_ONE_HOST = _Names("WORLD_SIZE", "RANK", "RANK", "WORLD_SIZE")
_KUBEFLOW = _Names("WORLD_SIZE", "RANK", "", "", "RANK", "WORLD_SIZE")  # one process in each pod
_JSRUN = _Names("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE")
_OPEN_MPI = _Names(
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
)
_MVAPICH = _Names(
    "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"
)
_HYDRA = _Names("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# Counts of the step: mpiexec.hydra leaves those of the job in SLURM_NTASKS.
_SRUN = _Names("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "", "SLURM_NODEID", "SLURM_STEP_NUM_NODES")


def _torchrun(environ: Mapping[str, str]) -> Place | None:
    """Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    read = _Variables("torchrun", environ)
    return replace(
        read.place(_TORCHRUN, run_id=environ["TORCHELASTIC_RUN_ID"]),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true",
        restart_count=read.number("TORCHELASTIC_RESTART_COUNT") or 0,
    )


def _ray(environ: Mapping[str, str]) -> Place | None:
    """A worker of Ray Train, whose process group exists already. Other processes of Ray have no RANK."""
    if environ.keys().isdisjoint({"RAY_JOB_ID", "RAY_RAYLET_PID"}) or not {"RANK", "LOCAL_RANK"} <= environ.keys():
        return None
    return _Variables("Ray Train", environ).place(_PLAIN)


def _mpi(environ: Mapping[str, str]) -> Place | None:
    """A process of mpirun, mpiexec or jsrun. jsrun comes first: it sets Open MPI's variables as well, and LSF knows the hosts.

    Source: https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html
    """
    if _JSRUN.rank in environ:
        read = _Variables("LSF", environ)
        return read.group(_JSRUN, host=lambda: _first_lsf_host(read), run_id=environ.get("LSB_JOBID"))
    if _OPEN_MPI.rank in environ:
        return _Variables("Open MPI", environ).group(_OPEN_MPI, run_id=environ.get("PMIX_NAMESPACE"))
    if _MVAPICH.rank in environ:
        return _Variables("MVAPICH", environ).group(_MVAPICH)
    of_srun = (environ.get(_SRUN.rank), environ.get(_SRUN.world_size))
    if _HYDRA.rank not in environ or (environ[_HYDRA.rank], environ.get(_HYDRA.world_size)) == of_srun:
        return None  # srun --mpi=pmi2 sets PMI_RANK; SLURM's own variables say more
    intel = any(name.startswith("I_MPI_") for name in environ)
    return _Variables("Intel MPI" if intel else "MPICH", environ).group(_HYDRA)


def _slurm(environ: Mapping[str, str], has_terminal: Callable[[], bool]) -> Place | None:
    """A task of srun. Source: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES.

    Batch scripts and shells have SLURM_PROCID=0 too: the former without a step, the latter in a special step (salloc), or in
    one with a terminal (srun --pty). SLURM_JOB_NAME says nothing: it stays "bash" for tasks that were started from such a shell.
    """
    if not _is_slurm_task(environ):
        return None
    read = _Variables("SLURM", environ)
    if read.number(_SRUN.world_size) != 1 and "SLURM_PTY_PORT" in environ and has_terminal():
        return None
    layout, node = read.counts("SLURM_STEP_TASKS_PER_NODE"), read.number(_SRUN.node_rank)
    place = read.group(
        _SRUN,
        local_world_size=layout[node] if layout is not None and node is not None and node < len(layout) else None,
        host=lambda: read.first_host("SLURM_STEP_NODELIST"),
        run_id=f"{environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}",
    )
    if place is None or layout is None:
        return place
    if (sum(layout), len(layout)) != (place.world_size, place.num_nodes):
        read.refuse(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']!r} contradicts "
            f"{_SRUN.world_size}={place.world_size} and {_SRUN.num_nodes}={place.num_nodes}"
        )
    return replace(place, ranks_per_node=layout)


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _SLURM_SPECIAL_STEPS and _SRUN.rank in environ


def _variables(environ: Mapping[str, str], other: Place | None) -> Place | None:
    """RANK and WORLD_SIZE, set by Kubeflow's PyTorchJob or by hand; ``other`` is the place according to MPI, LSF or SLURM."""
    kubernetes = "KUBERNETES_SERVICE_HOST" in environ or "KUBERNETES_PORT" in environ
    read = _Variables("Kubeflow" if kubernetes else "environment variables", environ)
    rank, size = read.number("RANK"), read.number("WORLD_SIZE")
    has_local = "LOCAL_RANK" in environ
    if rank is None:
        if size is not None and size > 1 and other is None and "NODE_RANK" not in environ:
            read.refuse(f"WORLD_SIZE={size} is set, but RANK is not")
        return other
    if other is not None:
        # With RANK and WORLD_SIZE from the script that calls srun, all processes would be rank 0; those of srun itself are right.
        if size is None or size == other.world_size or (size == 1 and not has_local):
            return other
        if not has_local:
            read.refuse(
                f"RANK={rank} and WORLD_SIZE={size} contradict {other.name}, for which this is rank {other.rank} of "
                f"{other.world_size}",
                f"Unset RANK and WORLD_SIZE: {other.name} says it all",
            )
    if kubernetes and not has_local:
        pods = environ.get("PET_NNODES", "")
        if pods.isdecimal() and size is not None and size > 1 and size != int(pods):
            read.refuse(
                f"WORLD_SIZE={size} counts processes, but RANK={rank} counts the {pods} pods (PET_NNODES)",
                "Let the pods' command be torchrun train.py: it starts the processes of each pod",
            )
        return read.group(_KUBEFLOW, local_world_size=1)
    one_host = not has_local and environ.get("MASTER_ADDR", "").startswith(_LOOPBACK)
    return read.group(_ONE_HOST if one_host else _PLAIN)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal, also where its input and output are redirected."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _first_lsf_host(read: _Variables) -> str | None:
    """The first host that tasks run on. jsrun's allocations begin with one slot of the node that runs the batch script."""
    path, text = read.environ.get("LSB_DJOB_RANKFILE"), read.environ.get("LSB_MCPU_HOSTS", "")
    slots: dict[str, int] = {}
    if path:  # a host in each line, once for each slot
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            read.refuse(f"LSB_DJOB_RANKFILE={path!r} cannot be read: {error}")
        slots = {host: lines.count(host) for host in lines}
    elif text:  # a host and its slots by turns
        words = text.split()
        if len(words) % 2 or not all(word.isdecimal() for word in words[1::2]):
            read.refuse(f"LSB_MCPU_HOSTS={text!r} is not a list of hosts, each followed by its number of slots")
        slots = {host: int(count) for host, count in zip(words[::2], words[1::2], strict=True)}
    hosts = list(slots)
    return hosts[1 if len(hosts) > 1 and slots[hosts[0]] == 1 else 0] if hosts else None


# ------------------------------------------------------------------------------------ what they have in common

_STARTS = {
    "torchrun": "torchrun --nnodes={nodes} --nproc-per-node={devices} train.py",
    "Ray Train": "TorchTrainer(..., scaling_config=ScalingConfig(num_workers={ranks}))",
    "SLURM": "#SBATCH --nodes={nodes} --ntasks-per-node={devices}, then srun python train.py",
    "Open MPI": "mpirun -np {ranks} --map-by ppr:{devices}:node python train.py",
    "MPICH": "mpiexec -n {ranks} -ppn {devices} python train.py",
    "Intel MPI": "mpirun -n {ranks} -ppn {devices} python train.py",
    "MVAPICH": "mpiexec -n {ranks} -ppn {devices} python train.py",
    "LSF": "jsrun --nrs {nodes} --tasks_per_rs {devices} python train.py",
    "Kubeflow": "{nodes} pods with the command torchrun --nnodes={nodes} --nproc-per-node={devices} --node-rank=$RANK "
    "--master-addr=$MASTER_ADDR --master-port=$MASTER_PORT train.py",
    "environment variables": "set WORLD_SIZE={ranks}, and LOCAL_WORLD_SIZE={devices}",
}
_ADDRESSES = {
    "Open MPI": "Start on the first host with -x: mpirun -x MASTER_ADDR=$(hostname) python train.py",
    "MPICH": "Start on the first host with -genv: mpiexec -genv MASTER_ADDR $(hostname) python train.py",
    "Intel MPI": "Start on the first host with -genv: mpirun -genv MASTER_ADDR $(hostname) python train.py",
    "MVAPICH": "Start on the first host with -genv: mpiexec -genv MASTER_ADDR $(hostname) python train.py",
    "SLURM": "Write into the batch script: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)",
    "LSF": "Write into the batch script: export MASTER_ADDR=… with the first host that ranks run on",
}


class _Variables:
    """The variables of one launcher, whose name stands in every error."""

    def __init__(self, launcher: str, environ: Mapping[str, str]) -> None:
        self.launcher = launcher
        self.environ = environ

    def group(
        self,
        names: _Names,
        *,
        local_world_size: int | None = None,
        host: Callable[[], str | None] = lambda: None,
        run_id: str | None = None,
    ) -> Place | None:
        """As `place`; None for a group of one."""
        if self.number(names.world_size) == 1 and self.number(names.rank) == 0:
            return None
        return self.place(names, local_world_size=local_world_size, host=host, run_id=run_id)

    def place(
        self,
        names: _Names,
        *,
        local_world_size: int | None = None,
        host: Callable[[], str | None] = lambda: None,
        run_id: str | None = None,
    ) -> Place:
        """Read and check a place.

        Args:
            names: the variables.
            local_world_size: the number of ranks on this node, if it does not stand in a variable of its own.
            host: the launcher's word for where rank 0 runs; asked where MASTER_ADDR is not set.
            run_id: the launcher's name for this run; a free port follows from it where MASTER_PORT is not set.
        """
        world_size, rank = self.needed(names.world_size), self.needed(names.rank)
        local_rank = self.needed(names.local_rank) if names.local_rank else 0
        local = local_world_size if local_world_size is not None else self.number(names.local_world_size)
        node, nodes = self.number(names.node_rank), self.number(names.num_nodes)
        self.below(names.rank, rank, names.world_size, world_size)
        self.below(names.local_rank, local_rank, names.local_world_size, local)
        self.below(names.node_rank, node, names.num_nodes, nodes)
        self.below(names.local_rank, local_rank, names.world_size, world_size)
        if local is not None and (local > world_size or local < 1):
            self.refuse(f"{names.local_world_size}={local} contradicts {names.world_size}={world_size}")
        if local == world_size:  # one host; torchrun may run several agents on it, each of which is a node
            node, nodes = node or 0, nodes or 1
        return Place(
            name=self.launcher,
            world_size=world_size,
            rank=rank,
            local_rank=local_rank,
            master_addr=self.address(rank, nodes, host),
            master_port=self.port(run_id),
            local_world_size=local,
            node_rank=node,
            num_nodes=nodes,
            run_id=run_id,
        )

    def address(self, rank: int, nodes: int | None, host: Callable[[], str | None]) -> str:
        """MASTER_ADDR; else this host if there is no other; else the launcher's word."""
        mend = _ADDRESSES.get(self.launcher, "Set it to the name or address of the host that rank 0 runs on")
        address = self.environ.get("MASTER_ADDR", "")
        # torchrun's nodes can be one host; the first Kubeflow operators tell the master that it is localhost
        may_be_local = self.launcher == "torchrun" or (self.launcher == "Kubeflow" and rank == 0)
        if address.startswith(_LOOPBACK) and (nodes or 1) > 1 and not may_be_local:
            self.refuse(f"MASTER_ADDR={address!r} is each node's name for itself, and there are {nodes} nodes", mend)
        found = address or ("127.0.0.1" if nodes == 1 else host())
        if not found:
            self.refuse("MASTER_ADDR is not set, and nothing else says which host rank 0 runs on", mend)
        return found

    def port(self, run_id: str | None) -> int:
        """MASTER_PORT, or one that follows from the run's name, so that each rank comes to the same."""
        given = self.number("MASTER_PORT")
        if given is None:
            return DEFAULT_PORT if run_id is None else _FIRST_PORT + zlib.crc32(run_id.encode()) % _PORTS
        if not 0 < given < 65536:
            self.refuse(f"MASTER_PORT={given} is not a port from 1 to 65535")
        return given

    def number(self, name: str) -> int | None:
        """A whole number from 0 on; None if the variable is not set, or has no name."""
        text = self.environ.get(name, "") if name else ""
        if text and not (text.isascii() and text.isdecimal() and len(text) < 10):
            self.refuse(f"{name}={text!r} is not a whole number from 0 on")
        return int(text) if text else None

    def needed(self, name: str) -> int:
        """A number without which there is no place."""
        value = self.number(name)
        if value is None:
            self.refuse(f"{name} is not set")
        return value

    def below(self, name: str, value: int | None, limit_name: str, limit: int | None) -> None:
        """Numbers are counted from 0, so each is below its count."""
        if value is not None and limit is not None and value >= limit:
            self.refuse(f"{name}={value} is not below {limit_name or 'the number of ranks on this node'}={limit}")

    def counts(self, name: str) -> tuple[int, ...] | None:
        """Numbers in SLURM's notation; None if the variable is not set."""
        text = self.environ.get(name)
        try:
            return expand_counts(text) if text else None
        except ValueError as error:
            self.refuse(f"{name}={text!r} cannot be read: {error}")

    def first_host(self, name: str) -> str | None:
        """The first host of a hostlist; None if the variable is not set."""
        text = self.environ.get(name)
        try:
            return next(expand_hostlist(text)) if text else None
        except ValueError as error:
            self.refuse(f"{name}={text!r} cannot be read: {error}")

    def refuse(self, problem: str, mend: str = "") -> NoReturn:
        """Raise with the launcher's name, and with the usual mend if there is no better one."""
        if self.launcher == "environment variables":
            usual = (
                "Each process of a group needs RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and torchrun sets "
                "them; for a single process, unset RANK and WORLD_SIZE"
            )
            raise ConfigurationError(f"{problem}. {mend or usual}.")
        usual = f"Unset or correct what was set by hand, or start again with {self.launcher}"
        raise ConfigurationError(
            f"{problem}. {self.launcher} started this process, as its variables say. {mend or usual}."
        )


def _layout(place: Place) -> str:
    """How the ranks lie on nodes, as far as the launcher says."""
    if place.ranks_per_node is not None and len(set(place.ranks_per_node)) > 1:
        return f" ({', '.join(map(str, place.ranks_per_node))} on its nodes)"
    each = f"{place.local_world_size} on this node" if place.local_world_size is not None else ""
    nodes = f"{place.num_nodes} node{'s' * (place.num_nodes != 1)}" if place.num_nodes is not None else ""
    return f" ({', '.join(filter(None, [each, nodes]))})" if each or nodes else ""


def _mend(place: Place, devices: int | None, num_nodes: int | None) -> str:
    local = place.local_world_size or place.world_size
    found = place.num_nodes or place.world_size // local
    even = f"devices={local}" if local * found == place.world_size else "devices='auto'"
    nodes, count = num_nodes or found, devices or local
    start = _STARTS[place.name].format(nodes=nodes, devices=count, ranks=nodes * count)
    return (
        f"Write Trainer({even}, num_nodes={found}) to use what was started, or start {_ranks(nodes * count)}: {start}."
    )


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


def at_prompt() -> bool:
    """Whether a person types at this interpreter, or in a notebook that it runs."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
