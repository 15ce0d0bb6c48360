"""Processes that die while they write: what is under a name stays whole, and what they leave behind is cleared away."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from leyden.checkpoint import atomic, copy_checkpoint, link_checkpoint, load_checkpoint, newest, write_checkpoint
from leyden.checkpoint.store import list_checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

KILLS = 80
SIZES = (3_000, 500_000)
"""Elements of the odd and the even versions: some files are written faster than others."""

# Importing torch takes a second and a fork a millisecond: one process forks the ones that are killed.
SERVER = """
import os, sys, torch
torch.set_num_threads(1)  # threads do not survive a fork
from leyden.checkpoint import copy_checkpoint, link_checkpoint, write_checkpoint
from leyden.checkpoint.writer import Writer

def write(folder, start, background):
    writer = Writer()
    same, last = folder + "/same.ckpt", folder + "/last.ckpt"
    weights = [torch.empty(3_000), torch.empty(500_000)]
    for n in range(start, 10**9):
        w = weights[n % 2].fill_(float(n))
        checkpoint = {"global_step": n, "w": w}
        def tell(n=n):
            os.write(1, b"%d\\n" % n)
        def point(n=n):
            copy_checkpoint(same, last) if n % 4 < 2 else link_checkpoint(same, last)
        if background:
            writer.submit(same, checkpoint, (tell, point))
        else:
            writer.write(same, checkpoint, (tell, point))

write_checkpoint(sys.argv[1] + "/warm.ckpt", {"w": torch.zeros(10)})
for line in sys.stdin:
    start, background = map(int, line.split())
    child = os.fork()
    if not child:
        os.write(1, b"%d\\n" % os.getpid())
        write(sys.argv[1], start, background)
    os.waitpid(child, 0)
    os.write(1, b"end\\n")
"""


def temporaries(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_killed_at_random_instants(tmp_path: pathlib.Path) -> None:
    """Whatever was reported as committed is there, whole; and the next process to write clears the leftovers away."""
    rng = random.Random(0)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    leftovers = versions = 0
    with server:
        for kill in range(KILLS):
            start = versions + 1
            server.stdin.write(f"{start} {kill % 2}\n")
            server.stdin.flush()
            pid = int(server.stdout.readline())
            committed = [int(server.stdout.readline()) for _ in range(rng.randrange(3))]
            time.sleep(rng.random() * 0.02)  # some writes long
            os.kill(pid, signal.SIGKILL)
            committed += [int(line) for line in iter(server.stdout.readline, "end\n")]
            leftovers += bool(temporaries(tmp_path))
            if not versions and not committed and not (tmp_path / "same.ckpt").exists():
                continue
            loaded = load_checkpoint(tmp_path / "same.ckpt")  # verifies its checksums
            n = loaded["global_step"]
            assert n >= max(committed, default=0), f"kill {kill}: a committed version was lost"
            assert torch.equal(loaded["w"], torch.full((SIZES[n % 2],), float(n))), f"kill {kill}: versions are mixed"
            found = newest(tmp_path)
            assert found is not None
            assert load_checkpoint(found)["global_step"] == n
            if (tmp_path / "last.ckpt").exists():
                # a copy holds an older version; a link shows what is there now
                assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] <= n
            versions = n
        server.stdin.close()
    assert versions >= KILLS // 2
    assert leftovers > KILLS // 20, "the kills came between the writes: nothing was shown"
    write_checkpoint(tmp_path / "same.ckpt", {"w": torch.ones(3)})
    assert not temporaries(tmp_path)


# Who writes is told by a lock: leftovers are those without.

HOLDER = """
import os, sys, leyden.checkpoint.store as store
from leyden.checkpoint import copy_checkpoint, link_checkpoint, write_checkpoint
from pathlib import Path
path = sys.argv[1] + "/x.ckpt"
real_sync, real_replace = os.fsync, os.replace
def pause():
    print("here", flush=True)
    sys.stdin.readline()
def sync(descriptor):
    real_sync(descriptor)
    if sys.argv[2] == "write" and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
        pause()
def replace(source, target):
    if sys.argv[2] != "write":
        pause()
    real_replace(source, target)
os.fsync, os.replace = sync, replace
{"write": lambda: write_checkpoint(path, {"n": 1}),
 "copy": lambda: copy_checkpoint(path, sys.argv[1] + "/last.ckpt"),
 "link": lambda: link_checkpoint(path, sys.argv[1] + "/last.ckpt")}[sys.argv[2]]()
print("done", flush=True)
"""


@contextmanager
def holder(folder: pathlib.Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """A process that makes a temporary file, says so, and waits for a line before it goes on."""
    command = [sys.executable, "-c", HOLDER, str(folder), what]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("what", ["write", "copy", "link"])
def test_the_temporary_of_a_live_process_stays_and_that_of_a_dead_one_goes(tmp_path: pathlib.Path, what: str) -> None:
    pytest.importorskip("fcntl")
    if what != "write":
        write_checkpoint(tmp_path / "x.ckpt", {"n": 1})
        atomic._swept.clear()
    with holder(tmp_path, what) as alive, holder(tmp_path, what) as dead:
        for process in (alive, dead):
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
        before = temporaries(tmp_path)
        assert len(before) == 2
        dead.kill()
        dead.wait()
        write_checkpoint(tmp_path / "other.ckpt", {"n": 2})  # this process's first in this folder
        still = temporaries(tmp_path)
        assert len(still) == (1 if what == "write" else 2)  # links share one lock
        alive.communicate("go on\n", timeout=60)
        assert alive.returncode == 0
    write_checkpoint(tmp_path / "other.ckpt", {"n": 3})
    assert not temporaries(tmp_path)
    assert load_checkpoint(tmp_path / ("x.ckpt" if what == "write" else "last.ckpt")) == {"n": 1}


def leftover(folder: pathlib.Path, host: str) -> pathlib.Path:
    path = folder / f".x.ckpt.{host}01234567.tmp"
    path.write_bytes(b"")
    return path


def test_what_is_left_behind(tmp_path: pathlib.Path) -> None:
    """Only files with our kind of name go; those of another host when they are old, for some disks lock per host."""
    pytest.importorskip("fcntl")
    ours, theirs, old = (leftover(tmp_path, host) for host in (atomic._host(), "0" * 8, "1" * 8))
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    (tmp_path / f".last.ckpt.{atomic._host()}01234567.tmp").symlink_to("nothing.ckpt")
    others = [tmp_path / name for name in ("x.tmp", ".x.tmp", ".x.0123.tmp", f"x.{atomic._host()}01234567.tmp")]
    for path in others:
        path.write_bytes(b"")
    write_checkpoint(tmp_path / "x.ckpt", {"n": 1})
    assert set(tmp_path.iterdir()) == {theirs, *others, tmp_path / "x.ckpt"}
    assert not ours.exists()


@pytest.mark.parametrize("missing", ["the module", "the lock"])
def test_without_locks_nothing_is_deleted_and_writing_works(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    if missing == "the module":
        monkeypatch.setattr(atomic, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    kept = leftover(tmp_path, atomic._host())
    write_checkpoint(tmp_path / "x.ckpt", {"n": 1})
    copy_checkpoint(tmp_path / "x.ckpt", tmp_path / "y.ckpt")
    link_checkpoint(tmp_path / "x.ckpt", tmp_path / "z.ckpt")
    assert kept.exists()
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_sweep_between_making_a_file_and_locking_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process looks for leftovers just then, and takes the lock or has deleted the file: a new one is made."""
    fcntl = pytest.importorskip("fcntl")
    real = fcntl.flock
    events = []

    def flock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX | fcntl.LOCK_NB:
            events.append(temporaries(tmp_path))
            if len(events) == 1:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            if len(events) == 2:
                (tmp_path / events[1][-1]).unlink()
                for name in temporaries(tmp_path):
                    (tmp_path / name).unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_checkpoint(tmp_path / "x.ckpt", {"n": 1})
    assert len(events) == 3
    assert load_checkpoint(tmp_path / "x.ckpt") == {"n": 1}
    assert not temporaries(tmp_path)


def test_a_lock_that_a_forked_worker_still_holds_is_no_hindrance(tmp_path: pathlib.Path) -> None:
    """A data loader's workers inherit open files, and so their locks, which last until the last of them is closed."""
    fcntl = pytest.importorskip("fcntl")
    held: list[int] = []
    real_sync = os.fsync

    def inherit(descriptor: int) -> None:
        held.append(os.dup(descriptor))  # the same lock, as a fork would have it
        real_sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", inherit)
        write_checkpoint(tmp_path / "x.ckpt", {"n": 1})
    try:
        descriptor = os.open(tmp_path / "x.ckpt", os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        copy_checkpoint(tmp_path / "x.ckpt", tmp_path / "y.ckpt")
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert load_checkpoint(tmp_path / "y.ckpt") == {"n": 1}
