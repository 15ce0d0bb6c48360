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
    names = (f"leyden-{tag}-a", f"leyden-{tag}-b")
    made = []
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
            _ip("link", "add", f"v{tag}a", "netns", names[0], "type", "veth", "peer", "name", f"v{tag}b", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
        for name, link, address in zip(names, (f"v{tag}a", f"v{tag}b"), ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


def start(host: str, interface_of: str, folder: Path, *options: str, num_nodes: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", f"--nnodes={num_nodes}"]
    command += ["--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", "--rdzv-id=job"]
    command += [f"--local-addr={interface_of}", str(PROGRAM), str(folder), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
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
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    options = ("--nodes", "2", "--devices", "1")
    first, second = ended([
        start(host, address, tmp_path / "two", *options) for host, address in zip(hosts, ADDRESSES, strict=True)
    ])  # fmt: skip
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    printed = [line for _, out, _ in (first, second) for line in out.splitlines() if line.startswith("{")]
    assert len(printed) == 1, "rank 0 of all machines prints, once"
    alone = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "one"), "--devices", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    one = json.loads(next(line for line in alone.stdout.splitlines() if line.startswith("{")))
    two = json.loads(printed[0])
    assert two["steps"] == one["steps"]
    assert two == pytest.approx(one, rel=1e-4)


def test_a_fault_on_one_machine_ends_both(hosts: tuple[str, str], tmp_path: Path) -> None:
    options = ("--nodes", "2", "--devices", "1", "--fault", "exception")
    tmp_path.joinpath("two").mkdir()
    results = ended([
        start(host, address, tmp_path / "two", *options) for host, address in zip(hosts, ADDRESSES, strict=True)
    ])  # fmt: skip
    assert all(code != 0 for code, _, _ in results)
    assert any("ValueError: the culprit's own words" in err for _, _, err in results)
    assert any("rank 1 failed first" in err for _, _, err in results)


def test_another_number_of_machines_is_a_clear_error_on_each(hosts: tuple[str, str], tmp_path: Path) -> None:
    options = ("--nodes", "3", "--devices", "1")
    results = ended([
        start(host, address, tmp_path, *options) for host, address in zip(hosts, ADDRESSES, strict=True)
    ])  # fmt: skip
    for code, _, err in results:
        assert code != 0
        assert "ConfigurationError" in err
        assert "num_nodes=3" in err
