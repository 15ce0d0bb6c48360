"""Writing in the background: one snapshot, one write in flight, failures that are raised once."""

from __future__ import annotations

import copy
import itertools
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from leyden.checkpoint import load_checkpoint, snapshot, writer
from leyden.checkpoint.writer import Writer
from leyden.errors import CheckpointError

NAME = "leyden-checkpoint"


class Gate:
    """Holds the first call of a function until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        module, _, name = target.rpartition(".")
        real = getattr(sys.modules[module], name)

        def held(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return real(*args, **kwargs)

        monkeypatch.setattr(target, held)

    def wait(self) -> None:
        assert self.reached.wait(60)

    def open(self) -> None:
        self.opened.set()


SEAL = "leyden.checkpoint.writer.seal"
WRITE = "leyden.checkpoint.store.write_file"


@pytest.fixture
def background() -> Iterator[Writer]:
    made = Writer()
    yield made
    made.release()
    assert not [thread for thread in threading.enumerate() if thread.name == NAME]


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("where", [SEAL, WRITE])
def test_training_goes_on_and_the_file_does_not_notice(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer, where: str
) -> None:
    gate = Gate(monkeypatch, where)
    model = nn.Linear(300, 200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plain: dict[str, Any] = {"losses": [1.0], "counts": {"a": 1}}

    def step() -> None:
        model(torch.ones(2, 300)).sum().backward()
        optimizer.step()

    step()
    checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "plain": plain}
    expected = copy.deepcopy(checkpoint)
    background.submit(tmp_path / "x.ckpt", checkpoint)
    gate.wait()
    assert background.busy
    step()
    plain["losses"].append(2.0)
    plain["counts"].clear()
    checkpoint.clear()
    assert not torch.equal(model.weight, expected["state_dict"]["weight"])
    gate.open()
    background.wait()
    assert not background.busy
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(loaded["state_dict"]["weight"], expected["state_dict"]["weight"])
    assert torch.equal(loaded["state_dict"]["bias"], expected["state_dict"]["bias"])
    for index, state in expected["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(loaded["optimizer_states"][0]["state"][index][key], value), (index, key)
    assert loaded["plain"] == {"losses": [1.0], "counts": {"a": 1}}


def test_numpy_arrays_are_part_of_the_snapshot(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer
) -> None:
    numpy = pytest.importorskip("numpy")
    gate = Gate(monkeypatch, SEAL)
    array = numpy.arange(5.0)
    background.submit(tmp_path / "x.ckpt", {"array": array})
    array[:] = -1
    gate.open()
    background.wait()
    assert load_checkpoint(tmp_path / "x.ckpt")["array"].tolist() == [0, 1, 2, 3, 4]


def test_a_second_submit_waits_for_the_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer
) -> None:
    """It waits before its snapshot, which would overwrite what is being written."""
    gate = Gate(monkeypatch, WRITE)
    events: list[str] = []
    real_join, real_flatten = Writer._join, writer.flatten

    def join(waiting: Writer) -> None:
        if waiting._thread is not None:
            events.append("wait")
            gate.open()
        real_join(waiting)

    def flatten(checkpoint: Any) -> Any:
        events.append(f"snapshot {checkpoint['n']}")
        return real_flatten(checkpoint)

    monkeypatch.setattr(Writer, "_join", join)
    monkeypatch.setattr(writer, "flatten", flatten)
    path = tmp_path / "x.ckpt"
    background.submit(path, {"n": 1, "w": torch.ones(9)}, [lambda: events.append(f"done {load_checkpoint(path)}")])
    gate.wait()
    background.submit(path, {"n": 2, "w": torch.zeros(9)}, [lambda: events.append("done 2")])
    background.wait()
    first = {"n": 1, "w": torch.ones(9)}
    assert events == ["snapshot 1", "wait", f"done {first}", "snapshot 2", "wait", "done 2"]
    assert load_checkpoint(path)["w"].tolist() == [0.0] * 9


def test_two_versions_are_never_mixed(tmp_path: pathlib.Path, background: Writer) -> None:
    weights = [torch.zeros(50_000) for _ in range(5)]
    seen: list[tuple[int, set[float]]] = []

    def look(path: pathlib.Path) -> None:
        loaded = load_checkpoint(path)
        seen.append((loaded["n"], {float(value) for w in loaded["w"] for value in (w.min(), w.max())}))

    for n in range(30):
        for w in weights:
            w.fill_(n)
        path = tmp_path / f"{n % 2}.ckpt"
        background.submit(path, {"n": n, "w": weights}, [lambda path=path: look(path)])
    background.wait()
    assert seen == [(n, {float(n)}) for n in range(30)]


def test_what_follows_runs_in_order_after_the_commit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer
) -> None:
    gate = Gate(monkeypatch, WRITE)
    events: list[Any] = []
    path = tmp_path / "x.ckpt"
    actions = [lambda: events.append(path.exists()), lambda: events.append(2), lambda: events.append(3)]
    background.submit(path, {"n": 1}, actions)
    gate.wait()
    assert events == []
    assert not path.exists()
    gate.open()
    background.wait()
    assert events == [True, 2, 3]


RAISE: dict[str, Callable[[Writer, pathlib.Path], None]] = {
    "check": lambda made, folder: made.check(),
    "wait": lambda made, folder: made.wait(),
    "submit": lambda made, folder: made.submit(folder / "y.ckpt", {"n": 9}),
    "write": lambda made, folder: made.write(folder / "y.ckpt", {"n": 9}),
}


@pytest.mark.parametrize("raised_by", RAISE)
def test_a_failed_write_is_raised_once_and_nothing_is_deleted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer, raised_by: str
) -> None:
    path = tmp_path / "x.ckpt"
    background.write(path, {"n": 1})
    told, done = [], []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(FULL))
        background.submit(
            path, {"n": 2}, [lambda: done.append(1)], lambda: told.append(threading.current_thread().name)
        )
        background._join()
    assert told == [NAME]
    assert done == []
    with pytest.raises(CheckpointError, match=r"x\.ckpt: cannot be written: No space left on device"):
        RAISE[raised_by](background, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.ckpt"]
    assert load_checkpoint(path) == {"n": 1}
    background.check()
    background.wait()
    background.submit(path, {"n": 3})
    background.wait()
    assert load_checkpoint(path) == {"n": 3}


def test_check_does_not_wait(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer) -> None:
    gate = Gate(monkeypatch, WRITE)
    monkeypatch.setattr(os, "fsync", failing(FULL))
    background.submit(tmp_path / "x.ckpt", {"n": 1})
    gate.wait()
    background.check()
    gate.open()
    with pytest.raises(CheckpointError, match="No space left"):
        background.wait()
    background.check()


@pytest.mark.parametrize("error", [MemoryError("out of memory"), KeyError("x"), SystemExit(3)])
def test_whatever_goes_wrong_becomes_an_error_with_the_path(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer, error: BaseException
) -> None:
    monkeypatch.setattr(SEAL, failing(error))
    background.submit(tmp_path / "x.ckpt", {"n": 1})
    with pytest.raises(CheckpointError, match=rf"x\.ckpt: cannot be written: {type(error).__name__}") as raised:
        background.wait()
    assert raised.value.__cause__ is error


def test_a_failure_in_what_follows(tmp_path: pathlib.Path, background: Writer) -> None:
    """The file is there, later actions do not run, and the error says both which file and what went wrong."""
    done: list[int] = []
    actions = [lambda: done.append(1), failing(CheckpointError("old.ckpt: cannot be deleted")), lambda: done.append(3)]
    background.submit(tmp_path / "x.ckpt", {"n": 1}, actions, lambda: done.append(-1))
    with pytest.raises(CheckpointError, match=r"x\.ckpt is written, but .*: old\.ckpt: cannot be deleted"):
        background.wait()
    assert done == [1, -1]
    assert load_checkpoint(tmp_path / "x.ckpt") == {"n": 1}


def test_a_failure_of_the_one_who_is_told_is_noted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer
) -> None:
    monkeypatch.setattr(os, "fsync", failing(FULL))
    background.submit(tmp_path / "x.ckpt", {"n": 1}, (), failing(KeyError("oops")))
    with pytest.raises(CheckpointError, match="No space left") as raised:
        background.wait()
    assert "oops" in raised.value.__notes__[0]


def test_what_cannot_be_stored_is_refused_at_once(tmp_path: pathlib.Path, background: Writer) -> None:
    with pytest.raises(CheckpointError, match="hook: the function"):
        background.submit(tmp_path / "x.ckpt", {"hook": failing})
    assert not background.busy
    background.wait()
    assert list(tmp_path.iterdir()) == []


# The snapshot


def pointers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Where the tensors that are written lie, save by save."""
    found: list[dict[str, int]] = []
    real = writer.seal

    def seal(tensors: Any, *rest: Any) -> Any:
        found.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        return real(tensors, *rest)

    monkeypatch.setattr(writer, "seal", seal)
    return found


def test_its_memory_is_used_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer) -> None:
    found = pointers(monkeypatch)
    model = nn.Sequential(nn.Linear(2000, 3000), nn.Linear(3000, 5), nn.BatchNorm1d(5))
    for _ in range(3):
        background.submit(tmp_path / "x.ckpt", {"state_dict": model.state_dict()})
        background.wait()
    assert found[0] == found[1] == found[2]
    assert not set(found[0].values()) & {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(pointer % 64 == 0 for pointer in found[0].values())


def test_a_buffer_is_made_anew_when_the_tensor_is_another(tmp_path: pathlib.Path, background: Writer) -> None:
    sizes = [
        torch.ones(5),
        torch.ones(7),
        torch.ones(7, dtype=torch.float64),
        torch.ones(7, 1),
        torch.ones(0),
        torch.ones(()),
    ]
    for tensor in (*sizes, *sizes):
        background.submit(tmp_path / "x.ckpt", {"w": tensor})
        background.wait()
        loaded = load_checkpoint(tmp_path / "x.ckpt")["w"]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded, tensor)


def test_buffers_of_names_that_do_not_come_again_are_let_go(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer
) -> None:
    found = pointers(monkeypatch)

    def save(*names: str) -> None:
        background.submit(tmp_path / "x.ckpt", {name: torch.ones(10) for name in names})
        background.wait()

    save("a", "b")
    save("a")
    save("a", "b")  # weights alone and whole states alternate: both keep their memory
    assert found[0] == found[2]
    for i in range(20):
        save("a", f"of step {i}")
    assert 2 <= len(background._buffers._kept) < 8
    background.release()
    assert not background._buffers._kept


def test_slabs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer) -> None:
    """Many small tensors share memory, and it does not matter where it is cut."""
    monkeypatch.setattr(snapshot, "_SLAB_BYTES", 1000)
    found = pointers(monkeypatch)
    tensors = {
        f"w{i}": torch.full((1 + 37 * i % 101,), i, dtype=torch.float64 if i % 3 else torch.uint8) for i in range(50)
    }
    tensors["large"] = torch.arange(5000)
    background.submit(tmp_path / "x.ckpt", tensors)
    background.wait()
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    places = sorted((found[0][name], tensor.nbytes) for name, tensor in tensors.items())
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(places))


@pytest.mark.parametrize("refused", [False, True])
def test_large_tensors_are_copied_by_several_threads(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer, refused: bool
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(snapshot, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(snapshot, "_BYTES_PER_THREAD", 50_000)
    begun: list[str] = []
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        begun.append(thread.name)
        if refused and begun.count("leyden-snapshot") > 1:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    tensors = {f"w{i}": torch.randn(40_000 + i) for i in range(3)} | {
        "t": torch.randn(300, 200).t(),
        "s": torch.ones(3),
    }
    background.submit(tmp_path / "x.ckpt", tensors)
    background.wait()
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert begun.count("leyden-snapshot") == (2 if refused else 3)


def test_tied_strided_and_lazy_tensors(tmp_path: pathlib.Path, background: Writer) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    waves = torch.randn(3, 4, dtype=torch.complex64)
    checkpoint = {
        "tied": [base, base],
        "transposed": base.t(),
        "every_other": base[::2, 1::2],
        "expanded": torch.ones(1).expand(5),
        "channels_last": torch.arange(120.0).reshape(1, 2, 3, 20).to(memory_format=torch.channels_last),
        "conjugated": waves.conj(),
        "negated": waves.conj().imag,
        "brain": base.to(torch.bfloat16).t(),
        "flags": base > 5,
        "parameter": nn.Parameter(base.clone()),
    }
    for _ in range(2):
        background.submit(tmp_path / "x.ckpt", checkpoint)
        background.wait()
        loaded = load_checkpoint(tmp_path / "x.ckpt")
        assert loaded["tied"][0].data_ptr() == loaded["tied"][1].data_ptr()
        for key in checkpoint.keys() - {"tied"}:
            assert torch.equal(loaded[key], checkpoint[key].detach()), key  # type: ignore[union-attr, attr-defined]
        base.add_(1)


def test_in_inference_mode_and_out_of_it(tmp_path: pathlib.Path, background: Writer) -> None:
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            background.submit(tmp_path / "x.ckpt", {"w": torch.full((3,), float(mode))})
            background.wait()
        assert load_checkpoint(tmp_path / "x.ckpt")["w"].tolist() == [float(mode)] * 3


def test_the_sync_way_copies_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer
) -> None:
    written: list[int] = []
    real = sys.modules["leyden.checkpoint.store"].write_file

    def write_file(stream: Any, tensors: Any, metadata: Any) -> None:
        written.extend(tensor.data_ptr() for tensor in tensors.values())
        real(stream, tensors, metadata)

    monkeypatch.setattr(WRITE, write_file)
    w, done = torch.ones(1000), []
    background.write(tmp_path / "x.ckpt", {"w": w}, [lambda: done.append(threading.current_thread())])
    assert written == [w.data_ptr()]
    assert done == [threading.main_thread()]
    assert not background._buffers._kept
    with pytest.raises(KeyError):
        background.write(tmp_path / "x.ckpt", {"w": w}, [failing(KeyError("x"))])
    with pytest.raises(CheckpointError, match="cannot be written"):
        background.write(tmp_path, {"w": w}, [failing(AssertionError())])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_come_over_through_pinned_memory(tmp_path: pathlib.Path, background: Writer) -> None:
    w = torch.arange(1_000_000.0, device="cuda")
    strided = w.reshape(1000, 1000).t()
    for n in range(3):
        w.fill_(n)
        background.submit(tmp_path / "x.ckpt", {"w": w, "t": strided, "cpu": torch.full((3,), n)})
        w.fill_(-1)
        background.wait()
        loaded = load_checkpoint(tmp_path / "x.ckpt")
        assert torch.equal(loaded["w"], torch.full((1_000_000,), float(n)))
        assert torch.equal(loaded["t"], torch.full((1000, 1000), float(n)))
        assert background._buffers._kept["w"].is_pinned()
        assert not background._buffers._kept["cpu"].is_pinned()


# Threads and processes


def test_there_is_a_thread_only_while_it_writes(tmp_path: pathlib.Path, background: Writer) -> None:
    threads: list[threading.Thread] = []
    background.submit(tmp_path / "x.ckpt", {"n": 1}, [lambda: threads.append(threading.current_thread())])
    background.wait()
    (thread,) = threads
    assert thread.name == NAME
    assert not thread.daemon  # the interpreter waits for it
    assert not thread.is_alive()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_while_waiting_does_not_lose_the_write_in_flight(tmp_path: pathlib.Path, background: Writer) -> None:
    main, go_on, done = threading.main_thread(), threading.Event(), []

    def interrupt_the_one_who_waits() -> None:
        while not sys._current_frames()[main.ident or 0].f_code.co_filename.endswith("threading.py"):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        go_on.wait()
        done.append(True)

    background.submit(tmp_path / "a.ckpt", {"state_dict": {}}, then=(interrupt_the_one_who_waits,))
    with pytest.raises(KeyboardInterrupt):
        background.wait()
    assert background.busy
    threading.Timer(0.05, go_on.set).start()
    background.release()
    assert done == [True]
    assert not background.busy


def test_without_a_thread_it_writes_itself(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer
) -> None:
    monkeypatch.setattr(threading.Thread, "start", failing(RuntimeError("can't start new thread")))
    background.submit(tmp_path / "x.ckpt", {"n": 1})
    background.wait()
    assert load_checkpoint(tmp_path / "x.ckpt") == {"n": 1}


def test_a_copy_is_idle_and_empty(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, background: Writer) -> None:
    """Trainers are copied and pickled, for instance by data loaders that start their workers anew."""
    gate = Gate(monkeypatch, WRITE)
    background.submit(tmp_path / "x.ckpt", {"w": torch.ones(3)})
    gate.wait()
    for other in (copy.deepcopy(background), pickle.loads(pickle.dumps(background))):
        assert not other.busy
        assert not other._buffers._kept
    gate.open()
    background.wait()


def run(program: str, folder: pathlib.Path) -> str:
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_ends_when_the_file_is_there(tmp_path: pathlib.Path) -> None:
    program = """
import os, sys, threading, torch
from leyden.checkpoint.writer import Writer
real, main = os.fsync, threading.main_thread()
def sync(descriptor):
    while main.is_alive():  # false once the main thread is at its end and waits for the others
        pass
    real(descriptor)
os.fsync = sync
Writer().submit(sys.argv[1] + "/x.ckpt", {"w": torch.ones(3)})
"""
    run(program, tmp_path)
    assert load_checkpoint(tmp_path / "x.ckpt")["w"].tolist() == [1, 1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_knows_nothing_of_the_write_in_flight(tmp_path: pathlib.Path) -> None:
    program = """
import os, sys, threading, warnings, torch
torch.set_num_threads(1)
from leyden.checkpoint import store
from leyden.checkpoint.writer import Writer
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
reached, opened, real = threading.Event(), threading.Event(), store.write_file
def held(*args):
    reached.set()
    opened.wait(60)
    real(*args)
store.write_file = held
writer = Writer()
writer.submit(sys.argv[1] + "/parent.ckpt", {"w": torch.ones(3)}, [lambda: print("parent", flush=True)])
reached.wait()
child = os.fork()
if not child:
    store.write_file = real
    try:
        assert not writer.busy
        writer.wait()
        writer.check()
        writer.submit(sys.argv[1] + "/child.ckpt", {"w": torch.zeros(3)}, [lambda: print("child", flush=True)])
        writer.wait()
    except BaseException as error:
        print(repr(error), flush=True)
    os._exit(0)
os.waitpid(child, 0)
assert writer.busy
opened.set()
writer.wait()
"""
    assert run(program, tmp_path).split() == ["child", "parent"]
    assert load_checkpoint(tmp_path / "parent.ckpt")["w"].tolist() == [1, 1, 1]
    assert load_checkpoint(tmp_path / "child.ckpt")["w"].tolist() == [0, 0, 0]


def test_to_a_url(background: Writer) -> None:
    background.submit("memory://writer/x.ckpt", {"w": torch.ones(3)})
    background.wait()
    assert load_checkpoint("memory://writer/x.ckpt")["w"].tolist() == [1, 1, 1]
    background.submit("nowhere://writer/x.ckpt", {"w": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"nowhere://writer/x\.ckpt"):
        background.wait()
