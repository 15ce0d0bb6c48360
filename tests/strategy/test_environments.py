"""Who a process is, from the variables that launchers really set.

The environments of torchrun (torch 2.13), SLURM 22.05 (two nodes), Open MPI 4.1, MPICH 4.0 and Ray 2.60 were recorded from runs
of theirs; those of jsrun, MVAPICH, Intel MPI and Kubeflow follow their documentation and source.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden.errors import ConfigurationError
from leyden.strategy.environments import Place, advice, check_place, find_place
from leyden.strategy.hostlist import expand_counts, expand_hostlist

Environment = dict[str, str]
ADDRESS = {"MASTER_ADDR": "first.example", "MASTER_PORT": "12345"}


def nobody() -> bool:
    return False


def somebody() -> bool:
    return True


def find(environment: Environment) -> Place | None:
    return find_place(environment, nobody)


def found(environment: Environment) -> Place:
    place = find(environment)
    assert place is not None
    return place


# ------------------------------------------------------------------------------------------------ recorded


def torchrun(rank: int, local_size: int = 2, nodes: int = 1) -> Environment:
    node, local_rank = divmod(rank, local_size)
    return {
        "GROUP_RANK": f"{node}", "GROUP_WORLD_SIZE": f"{nodes}", "LOCAL_RANK": f"{local_rank}",
        "LOCAL_WORLD_SIZE": f"{local_size}", "MASTER_ADDR": "localhost", "MASTER_PORT": "32825", "RANK": f"{rank}",
        "ROLE_NAME": "default", "ROLE_RANK": f"{rank}", "ROLE_WORLD_SIZE": f"{local_size * nodes}",
        "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "6b610a36",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": f"{local_size * nodes}",
    }  # fmt: skip


def slurm_job(job: int = 1) -> Environment:
    """What a batch script of --nodes=2 --ntasks-per-node=2 sees."""
    return {
        "SLURMD_NODENAME": "a01", "SLURM_GTIDS": "0", "SLURM_JOBID": f"{job}", "SLURM_JOB_ID": f"{job}",
        "SLURM_JOB_NAME": "job.sh", "SLURM_JOB_NODELIST": "a[01-02]", "SLURM_JOB_NUM_NODES": "2", "SLURM_LOCALID": "0",
        "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "a[01-02]", "SLURM_NPROCS": "4", "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_TASK_PID": "16169",
    }  # fmt: skip


def srun(rank: int, layout: str = "2(x2)", step: int = 0, job: int = 1) -> Environment:
    """What a task of srun sees within that job, ranks in blocks."""
    counts = expand_counts(layout)
    node = next(node for node in range(len(counts)) if rank < sum(counts[: node + 1]))
    size, hosts = f"{sum(counts)}", "a[01-02]" if len(counts) == 2 else "a01"
    return slurm_job(job) | {
        "SLURMD_NODENAME": f"a0{node + 1}", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_NNODES": f"{len(counts)}",
        "SLURM_LOCALID": f"{rank - sum(counts[:node])}", "SLURM_NODEID": f"{node}", "SLURM_NPROCS": size,
        "SLURM_NTASKS": size, "SLURM_PROCID": f"{rank}", "SLURM_STEPID": f"{step}", "SLURM_STEP_ID": f"{step}",
        "SLURM_STEP_LAUNCHER_PORT": "37769", "SLURM_STEP_NODELIST": hosts, "SLURM_STEP_NUM_NODES": f"{len(counts)}",
        "SLURM_STEP_NUM_TASKS": size, "SLURM_STEP_TASKS_PER_NODE": layout, "SLURM_TASKS_PER_NODE": layout,
    }  # fmt: skip


SALLOC_SHELL = slurm_job() | {
    "SLURM_JOB_NAME": "interactive", "SLURM_NPROCS": "2", "SLURM_NTASKS": "2", "SLURM_PTY_PORT": "40811",
    "SLURM_STEPID": "4294967290", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "a01", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip


def open_mpi(rank: int, local_size: int = 2, size: int = 2) -> Environment:
    return {
        "OMPI_COMM_WORLD_LOCAL_RANK": f"{rank % local_size}", "OMPI_COMM_WORLD_LOCAL_SIZE": f"{local_size}",
        "OMPI_COMM_WORLD_NODE_RANK": f"{rank % local_size}", "OMPI_COMM_WORLD_RANK": f"{rank}",
        "OMPI_COMM_WORLD_SIZE": f"{size}", "OMPI_UNIVERSE_SIZE": f"{size}", "PMIX_ID": f"1445462017.{rank}",
        "PMIX_NAMESPACE": "1445462017", "PMIX_RANK": f"{rank}",
    }  # fmt: skip


def hydra(rank: int, local_size: int = 2, size: int = 2) -> Environment:
    return {
        "MPI_LOCALNRANKS": f"{local_size}", "MPI_LOCALRANKID": f"{rank % local_size}", "PMI_FD": "6",
        "PMI_RANK": f"{rank}", "PMI_SIZE": f"{size}",
    }  # fmt: skip


def ray_train(rank: int) -> Environment:
    return {
        "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.2", "MASTER_PORT": "60765",
        "NODE_RANK": "0", "RANK": f"{rank}", "RAY_CLIENT_MODE": "0", "RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": "15499",
        "WORLD_SIZE": "2",
    }  # fmt: skip


def jsrun(rank: int, local_size: int = 2, size: int = 4) -> Environment:
    return open_mpi(rank, local_size, size) | {
        "JSM_NAMESPACE_LOCAL_RANK": f"{rank % local_size}", "JSM_NAMESPACE_LOCAL_SIZE": f"{local_size}",
        "JSM_NAMESPACE_RANK": f"{rank}", "JSM_NAMESPACE_SIZE": f"{size}", "LSB_JOBID": "77",
        "LSB_MCPU_HOSTS": "batch5 1 h22n07 42 h22n08 42",
    }  # fmt: skip


def mvapich(rank: int) -> Environment:
    names = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    return {f"MV2_COMM_WORLD_{name}": f"{value}" for name, value in names.items()}


def kubeflow(rank: int, pods: int = 2) -> Environment:
    return {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456",
        "PYTHONUNBUFFERED": "0", "RANK": f"{rank}", "WORLD_SIZE": f"{pods}",
    }  # fmt: skip


def plain(rank: int) -> Environment:
    return ADDRESS | {"RANK": f"{rank}", "WORLD_SIZE": "4", "LOCAL_RANK": f"{rank % 2}", "LOCAL_WORLD_SIZE": "2"}


# ------------------------------------------------------------------------------------------- who this is


def test_nothing_is_no_place() -> None:
    assert find({}) is None
    assert find({"PATH": "/bin", "HOME": "/root", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}) is None
    assert advice({}) is None


def test_torchrun() -> None:
    assert found(torchrun(1)) == Place(
        "torchrun", 2, 1, 1, "localhost", 32825, 2, 0, 1, agent_store=True, restart_count=1, run_id="6b610a36"
    )
    far = found(torchrun(5, local_size=2, nodes=3))
    assert (far.world_size, far.rank, far.local_rank, far.node_rank, far.num_nodes) == (6, 5, 1, 2, 3)
    assert not found(torchrun(0) | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).agent_store
    assert found(torchrun(0, local_size=1)).world_size == 1  # what torchrun starts is a group, be it of one


@pytest.mark.parametrize("rank", range(4))
def test_slurm(rank: int) -> None:
    place = found(srun(rank))
    assert place == Place("SLURM", 4, rank, rank % 2, "a01", place.master_port, 2, rank // 2, 2, (2, 2), run_id="1.0")
    assert 10_000 <= place.master_port < 28_000


def test_uneven_nodes_under_slurm() -> None:
    places = [found(srun(rank, "2,1")) for rank in range(3)]
    assert [(place.local_rank, place.local_world_size, place.node_rank) for place in places] == [
        (0, 2, 0), (1, 2, 0), (0, 1, 1),
    ]  # fmt: skip
    assert {(place.world_size, place.num_nodes, place.ranks_per_node) for place in places} == {(3, 2, (2, 1))}


def test_each_rank_of_a_slurm_step_comes_to_the_same_port_and_each_step_to_another() -> None:
    ports = {(job, step): {found(srun(rank, step=step, job=job)).master_port for rank in range(4)}
             for job in range(1000, 1010) for step in range(3)}  # fmt: skip
    assert all(len(same) == 1 for same in ports.values())
    assert len(set.union(*ports.values())) >= 29  # of 30; two out of 18,000 can be equal


def test_one_slurm_node_needs_no_name() -> None:
    assert found(srun(1, "2")).master_addr == "127.0.0.1"


def test_the_steps_numbers_count_and_not_the_jobs() -> None:
    place = found(srun(1, "1(x2)") | {"SLURM_NTASKS": "4", "SLURM_NNODES": "7", "SLURM_NTASKS_PER_NODE": "2"})
    assert (place.world_size, place.num_nodes, place.ranks_per_node) == (2, 2, (1, 1))


@pytest.mark.parametrize(
    ("launcher", "name"),
    [(open_mpi, "Open MPI"), (hydra, "MPICH"), (mvapich, "MVAPICH"),
     (lambda rank: hydra(rank) | {"I_MPI_MPIRUN": "mpirun"}, "Intel MPI")],
)  # fmt: skip
def test_mpi_on_one_host(launcher: Callable[[int], Environment], name: str) -> None:
    places = [found(launcher(rank)) for rank in range(2)]
    for rank, place in enumerate(places):
        run_id = "1445462017" if name == "Open MPI" else None
        assert place == Place(name, 2, rank, rank, "127.0.0.1", place.master_port, 2, 0, 1, run_id=run_id)
    assert len({place.master_port for place in places}) == 1


@pytest.mark.parametrize(
    ("launcher", "mend"), [(open_mpi, "mpirun -x MASTER_ADDR="), (hydra, "mpiexec -genv MASTER_ADDR")]
)
def test_mpi_on_several_hosts_needs_an_address(launcher: Callable[..., Environment], mend: str) -> None:
    environment = launcher(3, 2, 4)
    with pytest.raises(ConfigurationError, match=f"MASTER_ADDR is not set.*{mend}"):
        find(environment)
    place = found(environment | ADDRESS)
    assert (place.world_size, place.rank, place.local_rank, place.local_world_size) == (4, 3, 1, 2)
    assert (place.master_addr, place.master_port) == ("first.example", 12345)
    assert (place.node_rank, place.num_nodes) == (None, None)  # depends on how mpirun maps ranks, which it does not say


def test_jsrun(tmp_path: Path) -> None:
    place = found(jsrun(3))
    # the first host has one slot: it only runs the batch script
    assert place == Place("LSF", 4, 3, 1, "h22n07", place.master_port, 2, run_id="77")
    assert found(jsrun(3) | {"LSB_MCPU_HOSTS": "h1 2 h2 2"}).master_addr == "h1"
    ranks = tmp_path / "rankfile"
    ranks.write_text("batch1\n" + "h30n01\n" * 3 + "h30n02\n" * 3, encoding="utf-8")
    assert found(jsrun(3) | {"LSB_DJOB_RANKFILE": str(ranks)}).master_addr == "h30n01"
    assert found(jsrun(1, 2, 2)).master_addr == "127.0.0.1"
    with pytest.raises(ConfigurationError, match=r"LSB_DJOB_RANKFILE=.*cannot be read"):
        find(jsrun(3) | {"LSB_DJOB_RANKFILE": str(tmp_path / "none")})
    with pytest.raises(ConfigurationError, match="LSB_MCPU_HOSTS='h1 h2' is not"):
        find(jsrun(3) | {"LSB_MCPU_HOSTS": "h1 h2"})


def test_kubeflow() -> None:
    for rank in range(2):
        assert found(kubeflow(rank)) == Place("Kubeflow", 2, rank, 0, "job-master-0", 23456, 1, rank, 2)
    assert found(kubeflow(0) | {"MASTER_ADDR": "localhost"}).rank == 0  # what old operators tell the master
    assert find(kubeflow(0, pods=1)) is None  # the Trainer starts the ranks of the one pod


def test_kubeflow_pods_for_torchrun_without_torchrun() -> None:
    # with nprocPerNode: 4 the operator counts processes in WORLD_SIZE and pods in RANK
    environment = kubeflow(1, pods=8) | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1"}
    with pytest.raises(ConfigurationError, match=r"WORLD_SIZE=8 .*RANK=1 .*2 pods.*torchrun train.py"):
        find(environment)
    assert found(environment | torchrun(5, 4, 2)).name == "torchrun"
    trainer_v2 = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1"}
    assert find(trainer_v2) is None
    assert "torchrun" in str(advice(trainer_v2))


@pytest.mark.parametrize("rank", range(2))
def test_ray_train(rank: int) -> None:
    assert found(ray_train(rank)) == Place("Ray Train", 2, rank, rank, "192.0.2.2", 60765, 2, 0, 1)


def test_variables_set_by_hand() -> None:
    assert found(plain(3)) == Place("environment variables", 4, 3, 1, "first.example", 12345, 2)
    assert found(plain(3) | {"NODE_RANK": "1"}).node_rank == 1
    alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    assert found(alone) == Place("environment variables", 2, 1, 1, "localhost", 1234, 2, 0, 1)
    assert found(alone | {"MASTER_PORT": ""}).master_port == 29500
    assert find(alone | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    # one such on each machine, where the Trainer starts the ranks
    assert find(ADDRESS | {"NODE_RANK": "0", "WORLD_SIZE": "4"}) is None


# ------------------------------------------------------------------------------------------- which counts


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        pytest.param(srun(1) | torchrun(1), "torchrun", id="torchrun under srun"),
        pytest.param(slurm_job() | torchrun(1), "torchrun", id="torchrun in a batch script"),
        pytest.param(open_mpi(1) | torchrun(1), "torchrun", id="torchrun under mpirun"),
        pytest.param(kubeflow(1) | torchrun(1), "torchrun", id="torchrun in a pod"),
        pytest.param(jsrun(1) | torchrun(1), "torchrun", id="torchrun under jsrun"),
        pytest.param(ray_train(0) | torchrun(1), "torchrun", id="torchrun in a process of ray"),
        pytest.param(srun(1, "1(x2)") | ray_train(0), "Ray Train", id="ray started by srun"),
        pytest.param(kubeflow(1) | ray_train(0), "Ray Train", id="ray in a pod"),
        # mpirun starts one daemon for each node with srun, and the ranks inherit the daemons' numbers
        pytest.param(srun(1, "1(x2)") | open_mpi(3, 2, 4) | ADDRESS, "Open MPI", id="mpirun in a SLURM job"),
        pytest.param(
            srun(1, "1(x2)") | {"SLURM_NTASKS": "4"} | hydra(3, 2, 4) | ADDRESS, "MPICH", id="hydra in a SLURM job"
        ),
        pytest.param(srun(3) | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "1.0"}, "SLURM", id="srun --mpi=pmi2"),
        pytest.param(jsrun(1), "LSF", id="jsrun, which sets Open MPI's variables too"),
        pytest.param(kubeflow(0, 1) | open_mpi(1), "Open MPI", id="mpirun in a single pod"),
        pytest.param(kubeflow(0) | plain(3), "Kubeflow", id="one's own launcher in a pod"),
        pytest.param(srun(1, "1(x2)") | plain(3), "environment variables", id="one's own launcher under srun"),
        pytest.param(srun(1) | {"RANK": "1", "WORLD_SIZE": "4"} | ADDRESS, "SLURM", id="srun with a wrapper"),
        pytest.param(srun(1) | {"WORLD_SIZE": "16"}, "SLURM", id="srun with WORLD_SIZE of something else"),
        pytest.param(slurm_job() | plain(1), "environment variables", id="by hand in a batch script"),
        pytest.param(SALLOC_SHELL | plain(1), "environment variables", id="by hand in a shell of salloc"),
    ],
)
def test_the_nearest_launcher_counts(environment: Environment, name: str) -> None:
    assert found(environment).name == name


def test_ranks_of_mpirun_in_a_slurm_job_are_those_of_mpirun() -> None:
    place = found(srun(1, "1(x2)") | open_mpi(2, 2, 4) | ADDRESS)
    assert (place.rank, place.world_size, place.local_rank) == (2, 4, 0)


@pytest.mark.parametrize("local", [{}, {"LOCAL_RANK": "0"}])
def test_a_rank_exported_before_srun_is_not_believed(local: Environment) -> None:
    exported = {"RANK": "0", "WORLD_SIZE": "4"} | local
    assert [found(srun(rank) | exported).rank for rank in range(4)] == [0, 1, 2, 3]


def test_an_address_given_by_the_user_wins() -> None:
    for environment in (srun(1), jsrun(1), open_mpi(1), hydra(1)):
        place = found(environment | ADDRESS)
        assert (place.master_addr, place.master_port) == ("first.example", 12345)
    assert found(srun(1) | {"MASTER_PORT": "4000"}).master_addr == "a01"


# ------------------------------------------------------------------------------------------ alone in a job


@pytest.mark.parametrize("environment", [slurm_job(), SALLOC_SHELL], ids=["batch script", "shell of salloc"])
def test_a_process_of_a_slurm_job_that_srun_did_not_start(environment: Environment) -> None:
    assert find(environment) is None
    text = advice(environment)
    assert text is not None
    assert "SLURM job 1 has" in text
    assert "srun python train.py" in text
    assert "\n" not in text
    tasks = environment["SLURM_NTASKS"]
    assert f"{tasks} tasks on 2 nodes" in text


def test_a_slurm_job_of_one_task_needs_no_advice() -> None:
    alone = slurm_job() | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    assert find(alone) is None
    assert advice(alone) is None
    assert find(srun(0, "1")) is None  # one task with four GPUs, say: the Trainer starts its ranks
    assert advice(srun(0, "1")) is None


def test_a_shell_of_srun_pty_is_no_task_but_what_srun_starts_from_it_is() -> None:
    shell = srun(0, "2") | {"SLURM_PTY_PORT": "37949", "SLURM_JOB_NAME": "bash"}
    assert find_place(shell, somebody) is None
    assert found(srun(1, "2", step=1) | {"SLURM_PTY_PORT": "37949", "SLURM_JOB_NAME": "bash"}).rank == 1
    place = find_place(srun(1), somebody)  # without SLURM_PTY_PORT a terminal means nothing
    assert place is not None


WHO = "from leyden.strategy.environments import find_place; p = find_place(); print('rank', p and p.rank, flush=True)"


def test_the_terminal_is_looked_up() -> None:
    shell = srun(0, "2") | {"SLURM_PTY_PORT": "37949"}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | shell
    command = [sys.executable, "-c", WHO]
    bare = subprocess.run(command, env=environment, start_new_session=True, capture_output=True, text=True, timeout=60)
    assert (bare.stdout, bare.stderr) == ("rank 0\n", "")
    master, slave = pty.openpty()
    program = (
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); " + WHO
    )  # takes it as its controlling terminal
    seated = subprocess.run(
        [sys.executable, "-c", program], env=environment, start_new_session=True, stdin=slave, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    os.close(master)
    os.close(slave)
    assert (seated.stdout, seated.stderr) == ("rank None\n", "")


def test_advice_for_lsf() -> None:
    job = {"LSB_JOBID": "77", "LSB_MCPU_HOSTS": "batch5 1 h22n07 42 h22n08 42"}
    assert find(job) is None
    assert "jsrun python train.py" in str(advice(job))
    assert advice(job | {"LSB_MCPU_HOSTS": "h1 8"}) is None
    assert advice(jsrun(0)) is None


# ------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (plain(0) | {"RANK": "7"}, ["RANK=7", "WORLD_SIZE=4"]),
        (plain(0) | {"RANK": "x"}, ["RANK='x'", "whole number"]),
        (plain(0) | {"RANK": "-1"}, ["RANK='-1'", "whole number"]),
        (plain(0) | {"RANK": "1.0"}, ["RANK='1.0'", "whole number"]),
        (plain(0) | {"RANK": "٣"}, ["RANK=", "whole number"]),
        (plain(0) | {"WORLD_SIZE": ""}, ["WORLD_SIZE is not set", "torchrun"]),
        (plain(0) | {"WORLD_SIZE": "0"}, ["RANK=0", "WORLD_SIZE=0"]),
        (plain(0) | {"LOCAL_RANK": "first"}, ["LOCAL_RANK='first'", "whole number"]),
        (plain(0) | {"LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"]),
        (plain(0) | {"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": ""}, ["LOCAL_RANK=4", "WORLD_SIZE=4"]),
        (plain(0) | {"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE=8", "WORLD_SIZE=4"]),
        (plain(0) | {"MASTER_PORT": "0"}, ["MASTER_PORT=0", "65535"]),
        (plain(0) | {"MASTER_PORT": "70000"}, ["MASTER_PORT=70000"]),
        (plain(0) | {"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
        (plain(0) | {"MASTER_ADDR": ""}, ["MASTER_ADDR is not set", "rank 0"]),
        ({"RANK": "1", "WORLD_SIZE": "2"} | ADDRESS, ["LOCAL_RANK is not set"]),
        ({"RANK": "0"}, ["WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK is not"]),
        (torchrun(0) | {"RANK": ""}, ["RANK is not set", "torchrun started"]),
        (torchrun(0) | {"MASTER_ADDR": "", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, ["MASTER_ADDR"]),
        (torchrun(0) | {"GROUP_RANK": "1"}, ["GROUP_RANK=1", "GROUP_WORLD_SIZE=1", "torchrun"]),
        (torchrun(0) | {"TORCHELASTIC_RESTART_COUNT": "?"}, ["TORCHELASTIC_RESTART_COUNT='?'"]),
        (srun(1) | {"SLURM_PROCID": "9"}, ["SLURM_PROCID=9", "SLURM_STEP_NUM_TASKS=4", "SLURM started"]),
        (srun(1) | {"SLURM_LOCALID": "2"}, ["SLURM_LOCALID=2", "=2", "SLURM"]),
        (srun(1) | {"SLURM_NODEID": "2"}, ["SLURM_NODEID=2", "SLURM_STEP_NUM_NODES=2"]),
        (srun(1) | {"SLURM_STEP_NUM_TASKS": ""}, ["SLURM_STEP_NUM_TASKS is not set"]),
        (srun(1) | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, ["SLURM_STEP_TASKS_PER_NODE='2,1'", "SLURM_STEP_NUM_TASKS=4"]),
        (srun(1) | {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, ["SLURM_STEP_TASKS_PER_NODE='2(x'"]),
        (srun(1) | {"SLURM_STEP_NODELIST": "a[01-"}, ["SLURM_STEP_NODELIST='a[01-'", "not closed"]),
        (srun(1) | {"SLURM_STEP_NODELIST": ""}, ["MASTER_ADDR", "scontrol show hostnames"]),
        (srun(1) | {"MASTER_ADDR": "localhost"}, ["MASTER_ADDR='localhost'", "2 nodes", "scontrol"]),
        (srun(1) | {"MASTER_ADDR": "127.0.0.1"}, ["MASTER_ADDR='127.0.0.1'", "2 nodes"]),
        (srun(1) | {"RANK": "1", "WORLD_SIZE": "8"}, ["RANK=1", "WORLD_SIZE=8", "SLURM", "rank 1 of 4", "Unset"]),
        (kubeflow(1) | open_mpi(1, 4, 4), ["RANK=1", "WORLD_SIZE=2", "Open MPI", "rank 1 of 4"]),
        (kubeflow(2), ["RANK=2", "WORLD_SIZE=2", "Kubeflow"]),
        (kubeflow(1) | {"MASTER_ADDR": "localhost"}, ["MASTER_ADDR='localhost'", "2 nodes", "Kubeflow"]),
        (open_mpi(0) | {"OMPI_COMM_WORLD_LOCAL_RANK": "a"}, ["OMPI_COMM_WORLD_LOCAL_RANK='a'", "Open MPI"]),
        (hydra(0) | {"PMI_SIZE": "many"}, ["PMI_SIZE='many'", "MPICH"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ["MPI_LOCALRANKID is not set", "MPICH"]),
        (ray_train(1) | {"WORLD_SIZE": "1"}, ["RANK=1", "WORLD_SIZE=1", "Ray Train"]),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(environment: Environment, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find(environment)
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert text.endswith(".")


WRONG = ["", "-1", "99", "x", "1e3", " 1", "²", "9" * 400, "[", "2(x3)", "a[1-2", "\N{GREEK SMALL LETTER PHI}"]
WHOLE = [torchrun(1), srun(1), open_mpi(1), hydra(1), jsrun(1), mvapich(1), kubeflow(1), ray_train(1), plain(1)]


@settings(deadline=None)
@given(data=st.data())
def test_no_variable_brings_anything_but_a_place_or_the_one_error(data: st.DataObject) -> None:
    environment: Environment = {}
    for part in data.draw(st.lists(st.sampled_from(WHOLE), min_size=1, max_size=3)):
        environment |= part
    for name in data.draw(st.lists(st.sampled_from(sorted(environment)), max_size=3)):
        if data.draw(st.booleans()):
            environment[name] = data.draw(st.sampled_from(WRONG) | st.text(max_size=4))
        else:
            environment.pop(name, None)
    try:
        place = find(environment)
    except ConfigurationError:
        return
    if place is None:
        return
    assert 0 <= place.rank < place.world_size
    assert 0 <= place.local_rank < (place.local_world_size or place.world_size) <= place.world_size
    assert 0 < place.master_port < 65536
    assert place.master_addr
    assert place.num_nodes is None or place.node_rank is None or place.node_rank < place.num_nodes


# ----------------------------------------------------------------------------------- what the Trainer was told


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes"),
    [(torchrun(1), 2, 1), (srun(1), 2, 2), (srun(3), None, 2), (srun(3), 2, None), (srun(3), None, None),
     (srun(2, "2,1"), None, 2), (open_mpi(3, 2, 4) | ADDRESS, 2, 2), (kubeflow(1), 1, 2), (plain(3), 2, 2), (plain(3), None, 2)],
)  # fmt: skip
def test_what_agrees_passes(environment: Environment, devices: int | None, num_nodes: int | None) -> None:
    check_place(found(environment), devices, num_nodes)


def cause(environment: Environment, devices: int | None, num_nodes: int | None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_place(found(environment), devices, num_nodes)
    return str(caught.value)


def test_a_mismatch_names_both_sides_and_the_mend() -> None:
    assert cause(srun(0), 4, 2) == (
        "Trainer(devices=4, num_nodes=2) means 8 ranks, but SLURM started 4 ranks (2 on this node, 2 nodes). "
        "Write Trainer(devices=2, num_nodes=2) to use what was started, or start 8 ranks: "
        "#SBATCH --nodes=2 --ntasks-per-node=4, then srun python train.py."
    )
    assert cause(torchrun(0), 1, 1) == (
        "Trainer(devices=1, num_nodes=1) means 1 rank, but torchrun started 2 ranks (2 on this node, 1 node). "
        "Write Trainer(devices=2, num_nodes=1) to use what was started, or start 1 rank: "
        "torchrun --nnodes=1 --nproc-per-node=1 train.py."
    )
    assert "num_nodes=1" in cause(srun(0), None, 1)
    assert "2 nodes" in cause(srun(0), None, 1)
    assert "mpirun -np 6 --map-by ppr:3:node" in cause(open_mpi(0, 2, 4) | ADDRESS, 3, 2)
    assert "torchrun --nnodes=2 --nproc-per-node=4" in cause(kubeflow(0), 4, 2)
    assert "ScalingConfig(num_workers=4)" in cause(ray_train(0), 4, 1)


def test_the_right_number_on_the_wrong_nodes_is_a_mismatch() -> None:
    assert "4 on its nodes" not in cause(srun(0), 4, 1)
    assert "Trainer(devices=1, num_nodes=4)," in cause(srun(0), 1, 4)
    assert "devices=3" in cause(plain(0), 3, None)
    assert "devices=3" in cause(plain(0) | {"LOCAL_WORLD_SIZE": ""}, 3, None)  # four ranks make no whole nodes


@pytest.mark.parametrize("rank", range(6))
def test_every_rank_of_uneven_nodes_refuses_devices(rank: int) -> None:
    # two of six tasks on node 0, three on node 1, one on node 2: on node 0 alone, devices=2 would look right
    environment = srun(0) | {
        "SLURM_STEP_TASKS_PER_NODE": "2,3,1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3",
        "SLURM_PROCID": f"{rank}", "SLURM_NODEID": f"{(0, 0, 1, 1, 1, 2)[rank]}", "SLURM_LOCALID": f"{(0, 1, 0, 1, 2, 0)[rank]}",
    }  # fmt: skip
    assert "(2, 3, 1 on its nodes)" in cause(environment, 2, 3)
    check_place(found(environment), None, 3)


@pytest.mark.parametrize("environment", [srun(0), torchrun(0, 2, 2), plain(0), jsrun(0), open_mpi(0, 2, 4) | ADDRESS])
@settings(deadline=None)
@given(devices=st.none() | st.integers(1, 9), num_nodes=st.none() | st.integers(1, 9))
def test_exactly_what_differs_is_refused(environment: Environment, devices: int | None, num_nodes: int | None) -> None:
    place = found(environment)  # in truth two ranks on each of two nodes
    fits = devices in (None, 2) and num_nodes in (None, 2)
    unknown = devices is None and place.num_nodes is None  # then there is nothing to compare num_nodes with
    if fits or unknown:
        check_place(place, devices, num_nodes)
    else:
        assert "Trainer(" in cause(environment, devices, num_nodes)


# --------------------------------------------------------------------------------------------- hostlists


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a[01-03,7],b2", ["a01", "a02", "a03", "a7", "b2"]),
        ("login", ["login"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("gpu[1,3]-ib.cluster,x-1", ["gpu1-ib.cluster", "gpu3-ib.cluster", "x-1"]),
        ("[1-2]x", ["1x", "2x"]),
        ("a[0]b[0]c[0-1]", ["a0b0c0", "a0b0c1"]),
    ],
)
def test_hostlists(text: str, hosts: list[str]) -> None:
    assert list(expand_hostlist(text)) == hosts


@pytest.mark.parametrize("text", ["", ",", "a,", "a[", "a]", "a[]", "a[1-]", "a[2-1]", "a[1-2-3]", "a[x]", "a[[1]]", "a[1]]",
                                  "a b", "a[1,]", "a[-1]", "a[²]", " a"])  # fmt: skip
def test_what_is_no_hostlist(text: str) -> None:
    with pytest.raises(ValueError):
        expand_hostlist(text)


def test_the_first_of_very_many_hosts_costs_nothing() -> None:
    assert list(islice(expand_hostlist("a[0-999999999999]b[0-999999999999]"), 2)) == ["a0b0", "a0b1"]


words = st.text("abcxyz-._", min_size=1, max_size=4)
numbers = st.tuples(st.integers(0, 1200), st.integers(0, 12), st.integers(0, 5))
pieces = st.one_of(words, st.lists(numbers, min_size=1, max_size=3))


@settings(deadline=None)
@given(st.lists(st.lists(pieces, min_size=1, max_size=4), min_size=1, max_size=3))
def test_any_hostlist(entries: list[list[Any]]) -> None:
    """The text is put together beside the hosts that it stands for."""
    texts, expected = [], []
    for entry in entries:
        text, hosts = "", [""]
        for piece in entry:
            if isinstance(piece, str):
                text, endings = text + piece, [piece]
            else:
                ranges, endings = [], []
                for first, more, width in piece:
                    begin = str(first).zfill(width)
                    ranges.append(begin if more == 0 else f"{begin}-{str(first + more).zfill(len(begin))}")
                    endings += [str(number).zfill(len(begin)) for number in range(first, first + more + 1)]
                text += "[" + ",".join(ranges) + "]"
            hosts = [host + ending for host in hosts for ending in endings]
        texts.append(text)
        expected += hosts
    assert list(expand_hostlist(",".join(texts))) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 50)), min_size=1, max_size=6))
def test_any_counts(groups: list[tuple[int, int]]) -> None:
    text = ",".join(str(count) if times == 1 else f"{count}(x{times})" for count, times in groups)
    assert expand_counts(text) == tuple(count for count, times in groups for _ in range(times))


@pytest.mark.parametrize("text", ["", "2(3)", "2(x)", "(x2)", "2,", "-1", "2(x999999),2(x999999)"])
def test_what_are_no_counts(text: str) -> None:
    with pytest.raises(ValueError):
        expand_counts(text)
