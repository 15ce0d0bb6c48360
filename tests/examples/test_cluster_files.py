"""examples/cluster: what the files say of nodes, ranks and devices agrees, and each rank they would start finds its place."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from leyden.callbacks import Preemption
from leyden.errors import ConfigurationError
from leyden.strategy.environments import Place, check_place, find_place

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "cluster"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cluster_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return load("train")


def place_of(environment: dict[str, str]) -> Place:
    place = find_place(environment, lambda: False)
    assert place is not None
    return place


def are_the_ranks_of_one_group(places: list[Place], devices: int, nodes: int) -> None:
    assert [place.rank for place in places] == list(range(devices * nodes))
    assert [place.local_rank for place in places] == list(range(devices)) * nodes
    assert len({(place.world_size, place.master_addr, place.master_port) for place in places}) == 1
    for place in places:
        assert place.world_size == devices * nodes
        check_place(place, devices, nodes)


def command_of(text: str, launcher: str) -> tuple[dict[str, str], list[str]]:
    """The options of the launcher, and what train.py is given."""
    words = shlex.split(text[text.index(f"{launcher} ") :], comments=True)
    at = words.index("train.py")
    before, options = [word for word in words[1:at] if word != "python"], {}
    while before:
        name, _, value = before.pop(0).partition("=")
        options[name] = value if value or not before or before[0].startswith("-") else before.pop(0)
    return options, words[at + 1 :]


def directives(text: str, keyword: str) -> dict[str, str]:
    """The options of a batch script, which end at its first command."""
    found = {}
    for line in text.splitlines():
        if line.startswith(f"#{keyword} "):
            name, _, value = line.removeprefix(f"#{keyword} ").split("  ")[0].strip().replace(" ", "=").partition("=")
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


# --------------------------------------------------------------------------------------------------- batch scripts


@pytest.mark.parametrize("name", ["slurm.sbatch", "lsf.sh"])
def test_scripts_are_shell(name: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    assert (FOLDER / name).read_text(encoding="utf-8").startswith("#!/bin/bash\n")
    checked = subprocess.run([bash, "-n", FOLDER / name], capture_output=True, text=True, timeout=30)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_slurm(train: ModuleType) -> None:
    text = (FOLDER / "slurm.sbatch").read_text(encoding="utf-8")
    job = directives(text, "SBATCH")
    assert text.count("#SBATCH --") == len(job)  # none after the first command, where sbatch does not look
    nodes, tasks = int(job["--nodes"]), int(job["--ntasks-per-node"])
    _, given = command_of(text, "\nsrun")
    arguments = train.parse(given)
    assert (int(arguments.devices), arguments.num_nodes) == (tasks, nodes)
    assert int(job["--gpus-per-node"]) == tasks
    assert arguments.accelerator == "cuda"

    places = []
    for rank in range(nodes * tasks):
        node, local = divmod(rank, tasks)
        places.append(
            place_of({
                "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{local}",
                "SLURM_NODEID": f"{node}", "SLURM_STEP_NUM_TASKS": f"{nodes * tasks}", "SLURM_STEP_NUM_NODES": f"{nodes}",
                "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})", "SLURM_STEP_NODELIST": f"gpu[07-{6 + nodes:02d}]",
            })
        )  # fmt: skip
    are_the_ranks_of_one_group(places, tasks, nodes)
    assert places[0].master_addr == "gpu07"


def test_slurm_warns_and_requeues() -> None:
    job = directives((FOLDER / "slurm.sbatch").read_text(encoding="utf-8"), "SBATCH")
    name, _, seconds = job["--signal"].partition("@")
    assert f"SIG{name}" in Preemption().signals  # to the tasks: B: would reach the batch script only
    assert int(seconds) >= 60
    assert "--requeue" in job
    assert job["--open-mode"] == "append"


def test_lsf(train: ModuleType) -> None:
    text = (FOLDER / "lsf.sh").read_text(encoding="utf-8")
    options, given = command_of(text, "\njsrun")
    arguments = train.parse(given)
    sets, tasks = int(options["--nrs"]), int(options["--tasks_per_rs"])
    assert int(directives(text, "BSUB")["-nnodes"]) == sets == arguments.num_nodes
    assert int(options["--gpu_per_rs"]) == tasks == int(arguments.devices)
    places = [
        place_of({
            "JSM_NAMESPACE_RANK": f"{rank}", "JSM_NAMESPACE_SIZE": f"{sets * tasks}", "LSB_JOBID": "12",
            "JSM_NAMESPACE_LOCAL_RANK": f"{rank % tasks}", "JSM_NAMESPACE_LOCAL_SIZE": f"{tasks}",
            "LSB_MCPU_HOSTS": "batch1 1 n07 42 n08 42",
        })
        for rank in range(sets * tasks)
    ]  # fmt: skip
    are_the_ranks_of_one_group(places, tasks, sets)
    assert places[0].master_addr == "n07"


# ------------------------------------------------------------------------------------------------------ Kubernetes


def read_yaml(text: str) -> Any:
    """Read the YAML that job files are made of: maps and lists by indentation, plain scalars, anchors, comments."""
    lines = []
    for line in text.splitlines():
        content = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if content:
            lines.append((len(content) - len(content.lstrip()), content.strip()))
    anchors: dict[str, Any] = {}
    value, rest = _block(lines, anchors)
    assert not rest, rest[0]
    return value


def _block(lines: list[tuple[int, str]], anchors: dict[str, Any]) -> tuple[Any, list[tuple[int, str]]]:
    depth, first = lines[0]
    if first.startswith("- "):
        items = []
        while lines and lines[0][0] == depth and lines[0][1].startswith("- "):
            entry = lines[0][1][2:]
            if re.match(r"[^\s:]+:(\s|$)", entry):  # a map that begins behind the dash
                item, lines = _block([(depth + 2, entry), *lines[1:]], anchors)
            else:
                item, lines = entry, lines[1:]
            items.append(item)
        return items, lines
    found: dict[str, Any] = {}
    while lines and lines[0][0] == depth:
        name, _, value = lines[0][1].partition(":")
        value, lines = value.strip(), lines[1:]
        assert name not in found, f"{name} twice"
        if value.startswith("*"):
            found[name] = anchors[value[1:]]
        elif value and not value.startswith("&"):
            found[name] = value
        else:
            assert lines[0][0] > depth or lines[0][1].startswith("- "), f"{name} is empty"
            found[name], lines = _block(lines, anchors)
            anchors[value[1:]] = found[name]
    return found, lines


def test_the_reader_of_yaml() -> None:
    text = "a: 1  # one\nb: &x\n  - c: d: e\n    f: {}\n  - g#h\ni:\n  k: *x\n"
    assert read_yaml(text) == {
        "a": "1",
        "b": [{"c": "d: e", "f": "{}"}, "g#h"],
        "i": {"k": [{"c": "d: e", "f": "{}"}, "g#h"]},
    }
    with pytest.raises(AssertionError):
        read_yaml("a: 1\n   b: 2\n")


@pytest.fixture(scope="module")
def job() -> Any:
    return read_yaml((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))


def pods(job: Any) -> Iterator[tuple[dict[str, str], Any]]:
    """What the operator starts: each pod's variables, as its source sets them, and the container."""
    replicas = job["spec"]["pytorchReplicaSpecs"]
    count = sum(int(kind["replicas"]) for kind in replicas.values())
    rank = 0
    for name in ("Master", "Worker"):
        for _ in range(int(replicas[name]["replicas"])):
            (container,) = replicas[name]["template"]["spec"]["containers"]
            yield {
                "KUBERNETES_SERVICE_HOST": "10.0.0.1", "PYTHONUNBUFFERED": "1", "MASTER_PORT": "23456",
                "MASTER_ADDR": f"{job['metadata']['name']}-master-0", "WORLD_SIZE": f"{count}", "RANK": f"{rank}",
            }, container  # fmt: skip
            rank += 1


def test_kubernetes(job: Any, train: ModuleType) -> None:
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert int(job["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"]) == 1
    started = list(pods(job))
    places = []
    for variables, container in started:
        assert container["name"] == "pytorch"
        *shell, script = container["command"]
        assert shell == ["bash", "-c"]
        options, given = command_of(script, "torchrun")
        for option, name in [
            ("--node-rank", "RANK"),
            ("--master-addr", "MASTER_ADDR"),
            ("--master-port", "MASTER_PORT"),
        ]:
            assert options[option] == f"${name}"
        arguments = train.parse(given)
        nodes, devices = int(options["--nnodes"]), int(options["--nproc-per-node"])
        assert nodes == len(started) == arguments.num_nodes
        assert devices == int(container["resources"]["limits"]["nvidia.com/gpu"]) == int(arguments.devices)
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/dev/shm", "/" + arguments.out.split("/")[1]} <= mounted
        node = int(variables["RANK"])
        for local in range(devices):
            of_torchrun = {
                "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
                "RANK": f"{node * devices + local}", "WORLD_SIZE": f"{nodes * devices}", "LOCAL_RANK": f"{local}",
                "LOCAL_WORLD_SIZE": f"{devices}", "GROUP_RANK": f"{node}", "GROUP_WORLD_SIZE": f"{nodes}",
            }  # fmt: skip
            places.append(place_of(variables | of_torchrun))
    are_the_ranks_of_one_group(places, devices, nodes)


def test_kubernetes_volumes_are_declared(job: Any) -> None:
    for kind in job["spec"]["pytorchReplicaSpecs"].values():
        pod = kind["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_without_torchrun_is_told_to_use_it(job: Any) -> None:
    for variables, container in pods(job):
        devices = int(container["resources"]["limits"]["nvidia.com/gpu"])
        with pytest.raises(ConfigurationError, match="torchrun --nnodes=2 --nproc-per-node=4"):
            check_place(place_of(variables), devices, 2)


# ---------------------------------------------------------------------------------------------------- Ray and train.py


def test_ray(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for ray that calls the function in this process."""
    seen: dict[str, Any] = {}

    class TorchTrainer:
        def __init__(self, function: Any, *, train_loop_config: Any, scaling_config: Any, run_config: Any) -> None:
            seen.update(scaling_config)
            self.call = lambda: function(train_loop_config)

        def fit(self) -> None:
            self.call()

    modules = {name: ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch")}
    stand_in: Any = modules["ray"]
    stand_in.train = parts = modules["ray.train"]
    stand_in.init = lambda **options: seen.update(options)
    parts.__dict__.update(
        ScalingConfig=dict, RunConfig=dict, FailureConfig=dict, report=lambda metrics: seen.update(metrics)
    )
    modules["ray.train.torch"].__dict__["TorchTrainer"] = TorchTrainer
    script: Any = ModuleType("train")
    script.main = lambda arguments: seen.update(parsed=train.parse(arguments)) or 0.5
    for name, module in (modules | {"train": script}).items():
        monkeypatch.setitem(sys.modules, name, module)

    load("ray_train").run(["--workers", "3", "--epochs", "7", "--out", str(tmp_path)])

    assert (seen["num_workers"], seen["use_gpu"], seen["val_acc"]) == (3, False, 0.5)
    assert (Path(seen["runtime_env"]["working_dir"]) / "train.py").is_file()
    parsed = seen["parsed"]
    assert (parsed.accelerator, parsed.devices, parsed.epochs, parsed.out) == ("cpu", "auto", 7, str(tmp_path))


def test_train(train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--accelerator", "cpu", "--devices", "1", "--batch-size", "128", "--out", str(tmp_path)]
    assert train.main([*arguments, "--epochs", "1"]) > 0.4  # eight classes: chance is 0.125
    # put back into the queue: the second start goes on after the first epoch
    assert train.main([*arguments, "--epochs", "3"]) > 0.9
    assert "1 ranks, validation accuracy" in capsys.readouterr().out
    import leyden

    checkpoint = leyden.load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 3 * 4096 // 128


def test_the_data_are_the_same_in_every_rank(train: ModuleType) -> None:
    import torch

    first, second = train.waves(50, seed=0), train.waves(50, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))
    assert not torch.equal(first.tensors[0], train.waves(50, seed=1).tensors[0])
