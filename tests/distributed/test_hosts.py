"""Two machines, as two network namespaces that see each other over a virtual cable; torchrun on each, one rendezvous."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("faulty.py")
ADDRESSES = ("10.231.7.1", "10.231.7.2")
PORT = 29511


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (iproute2)")
    tag = uuid.uuid4().hex[:6]
    names = (f"ley{tag}a", f"ley{tag}b")  # 15 characters are the most that a network interface may have
    made = []
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
            cable = ["link", "add", f"{names[0]}-0", "netns", names[0], "type", "veth"]
            _ip(*cable, "peer", "name", f"{names[1]}-0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}-0")
            _ip("-n", name, "link", "set", f"{name}-0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


def start(number: int, host: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """One machine's torchrun: with its own network, and its own name."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": f"{host}-0"}
    command = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
    command += [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    command += [f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", "--rdzv-id=job", f"--local-addr={ADDRESSES[number]}"]
    # names do not resolve here, by which the first machine would know itself
    command += [f"--rdzv-conf=is_host={int(number == 0)},timeout=60", str(PROGRAM), str(folder), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def both(hosts: tuple[str, str], folder: Path, *options: str) -> list[tuple[int, str, str]]:
    """Run the program on both machines: exit code, output and errors of each."""
    folder.mkdir(exist_ok=True)
    processes = [start(number, host, folder, *options) for number, host in enumerate(hosts)]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


def test_two_machines_are_one_process(hosts: tuple[str, str], tmp_path: Path) -> None:
    first, second = both(hosts, tmp_path / "two", "--nodes", "2", "--devices", "1")
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    printed = [line for _, out, _ in (first, second) for line in out.splitlines() if line.startswith("{")]
    assert len(printed) == 1, "rank 0 of all machines prints, once"
    (tmp_path / "one").mkdir()
    alone = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "one"), "--devices", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    one = json.loads(next(line for line in alone.stdout.splitlines() if line.startswith("{")))
    two = json.loads(printed[0])
    assert two["steps"] == one["steps"]
    assert two == pytest.approx(one, rel=1e-4)


def test_a_fault_on_one_machine_ends_both(hosts: tuple[str, str], tmp_path: Path) -> None:
    results = both(hosts, tmp_path / "two", "--nodes", "2", "--devices", "1", "--fault", "exception")
    assert all(code != 0 for code, _, _ in results)
    assert any("ValueError: the culprit's own words" in err for _, _, err in results)
    assert any("rank 1 failed first" in err for _, _, err in results)


def test_another_number_of_machines_is_a_clear_error_on_each(hosts: tuple[str, str], tmp_path: Path) -> None:
    for code, _, err in both(hosts, tmp_path / "two", "--nodes", "3", "--devices", "1"):
        assert code != 0
        assert "ConfigurationError" in err
        assert "num_nodes=3" in err
