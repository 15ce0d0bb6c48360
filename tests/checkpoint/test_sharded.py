"""Sharded checkpoints of several processes: what is written together comes back to the bit, by as many ranks as there are."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from leyden import load_checkpoint
from leyden.checkpoint import container, folder, write_checkpoint
from leyden.checkpoint.container import Reader
from leyden.checkpoint.sharded import load_sharded, save_sharded, split, templates_for, write_parts
from leyden.checkpoint.snapshot import Buffers
from leyden.checkpoint.store import list_checkpoints
from leyden.errors import CheckpointError
from ranks import run_ranks
from same_values import same

Model = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]


class Net(nn.Module):
    """Seven rows and three on four ranks, one row, a tied weight, a buffer that is not sharded."""

    def __init__(self, hidden: int = 7, tied: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(5, hidden)
        self.b = nn.Linear(hidden, 3)
        self.tied = nn.Linear(hidden, 3, bias=False) if tied else None
        if self.tied is not None:
            self.tied.weight = self.b.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        result = self.b(hidden) if self.tied is None else self.b(hidden) + self.tied(hidden)
        scaled: Tensor = result * self.scale
        return scaled


def net(hidden: int = 7, tied: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(hidden, tied)


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, n: int = 2) -> None:
    for i in range(n):
        module(torch.arange(20.0).reshape(4, 5) + i).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def plain() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = net()
    return module, torch.optim.AdamW(module.parameters())


def fsdp() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = net()
    fully_shard(module.a)
    fully_shard(module)
    return module, torch.optim.AdamW(module.parameters())


def tensor_parallel(mesh: Any = None) -> tuple[Net, torch.optim.Optimizer]:
    module = net(8, tied=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    parallelize_module(module, mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})
    return module, torch.optim.AdamW(module.parameters(), foreach=False)


def two_dimensional() -> tuple[nn.Module, torch.optim.Optimizer]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    module, _ = tensor_parallel(mesh["tensor"])
    fully_shard(module, mesh=mesh["data"])
    return module, torch.optim.AdamW(module.parameters(), foreach=False)


def replicated() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = net()
    fully_shard(module, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
    return module, torch.optim.AdamW(module.parameters())


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 7,
        "run_id": "abc",
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "random_state": torch.arange(5, dtype=torch.uint8),
    }


def whole(value: Any) -> Any:
    """The same with full tensors, of plain types."""
    if isinstance(value, Tensor):
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    if isinstance(value, dict):
        made = {key: whole(item) for key, item in value.items()}
        if not hasattr(value, "_metadata"):
            return made
        result = type(value)(made)
        result._metadata = value._metadata  # type: ignore[attr-defined]
        return result
    return [whole(item) for item in value] if isinstance(value, list) else value


def saved(rank: int, path: str, make: Model) -> None:
    module, optimizer = make()
    steps(module, optimizer)
    checkpoint = state_of(module, optimizer)
    truth = whole(checkpoint)
    if rank == 0:
        write_checkpoint(f"{path}.truth", truth)
        checkpoint["ranks"] = {"1": torch.ones(2)}  # what only rank 0 has
    save_sharded(path, checkpoint)


def loaded(rank: int, path: str, make: Model) -> tuple[int, int, int]:
    """Load into a fresh model, compare; return the bytes that were read in shards, this rank's part, and the DTensors."""
    torch.manual_seed(rank)
    module, optimizer = make()
    count = [0]
    real = Reader.read_into

    def read_into(self: Reader, name: str, memory: memoryview, start: int = 0) -> None:
        if "leyden_chunks" in self.metadata:
            count[0] += len(memory)
        real(self, name, memory, start)

    Reader.read_into = read_into  # type: ignore[method-assign]
    checkpoint = load_sharded(path, templates_for(module, [optimizer]))
    checkpoint.pop("ranks", None)
    own = [each for each in leaves(checkpoint) if isinstance(each, DTensor)]
    kinds = {name: isinstance(each, DTensor) for name, each in module.state_dict().items()}
    assert {name: isinstance(each, DTensor) for name, each in checkpoint["state_dict"].items()} == kinds
    part = sum(each.to_local().nbytes for each in {id(each): each for each in own}.values())
    truth = load_checkpoint(f"{path}.truth")
    assert same(whole(checkpoint), truth)
    module.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    assert same(whole(state_of(module, optimizer)), truth)
    steps(module, optimizer, 1)  # what was loaded can be trained on
    return count[0], part, len(own)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [leaf for item in items for leaf in leaves(item)]


def compare_whole(path: pathlib.Path) -> None:
    """One process, no group: the same, whole."""
    checkpoint = load_checkpoint(path)
    checkpoint.pop("ranks", None)
    truth = load_checkpoint(f"{path}.truth")
    assert same(checkpoint, truth)
    weights = load_checkpoint(path, weights_only=True)
    assert same(weights["state_dict"], truth["state_dict"])
    assert "optimizer_states" not in weights


def test_fsdp_on_four_ranks_comes_back_on_four_two_and_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.ckpt"
    run_ranks(saved, 4, str(path), fsdp)
    assert sorted(os.listdir(tmp_path)) == ["x.ckpt", "x.ckpt.truth"]
    shards = [f"shard-0000{i}-of-00004.safetensors" for i in range(4)]
    assert sorted(os.listdir(path)) == ["leyden.safetensors", *shards]
    compare_whole(path)
    assert torch.equal(load_checkpoint(path)["ranks"]["1"], torch.ones(2))
    state = load_checkpoint(path)["state_dict"]
    assert state["b.weight"] is state["tied.weight"]
    for world_size in (4, 2, 1):
        for read, part, sharded in run_ranks(loaded, world_size, str(path), fsdp):
            assert sharded == 6 + 5 * 2  # weights, one of them twice; two moments for each of five parameters
            assert read == part if world_size == 4 else part <= read <= 4 * part + 200


@pytest.mark.parametrize("make", [tensor_parallel, two_dimensional, replicated], ids=lambda make: make.__name__)
def test_other_meshes(tmp_path: pathlib.Path, make: Model) -> None:
    """Columns, both dimensions, copies on several ranks; read by the same mesh, by other placements, and whole."""
    path = tmp_path / "x.ckpt"
    run_ranks(saved, 4, str(path), make)
    compare_whole(path)
    readers: dict[str, int] = Counter()
    for file in path.glob("shard-*"):
        with file.open("rb") as stream:
            readers.update({name: entry.end - entry.begin for name, entry in Reader(stream).entries.items()})
    truth = load_checkpoint(path)
    assert readers["module.a.weight"] == truth["state_dict"]["a.weight"].nbytes  # copies are written once
    run_ranks(loaded, 4, str(path), make)
    if make is replicated:
        run_ranks(loaded, 2, str(path), fsdp)
        run_ranks(loaded, 4, str(path), fsdp)
    else:
        run_ranks(loaded, 2, str(path), tensor_parallel)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_saved_by_one_process_loaded_by_four(tmp_path: pathlib.Path, form: str) -> None:
    path = tmp_path / "x.ckpt"
    module, optimizer = plain()
    steps(module, optimizer)
    checkpoint = state_of(module, optimizer)
    (save_sharded if form == "folder" else write_checkpoint)(path, checkpoint)
    write_checkpoint(f"{path}.truth", whole(checkpoint))
    compare_whole(path)
    assert same(load_sharded(path, lambda *_: None), load_checkpoint(path))
    run_ranks(loaded, 4, str(path), fsdp)


def test_on_the_meta_device_nothing_is_made_before_it_is_loaded(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.ckpt"
    run_ranks(saved, 4, str(path), fsdp)

    def load(rank: int) -> None:
        with torch.device("meta"):
            module, _ = fsdp()
        checkpoint = load_sharded(path, templates_for(module), weights_only=True)
        assert "optimizer_states" not in checkpoint
        module.load_state_dict(checkpoint["state_dict"], assign=True)
        assert same(whole(module.state_dict()), load_checkpoint(f"{path}.truth")["state_dict"])

    run_ranks(load, 2)


def odd_tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    kinds = [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(kind): torch.randn(9, 4).to(kind) for kind in kinds}
    integers = (torch.int64, torch.uint8, torch.bool)
    tensors |= {str(kind): torch.randint(0, 2, (3, 5, 2)).to(kind) for kind in integers}
    return tensors | {"long": torch.randn(300), "wide": torch.randn(3, 100), "none": torch.empty(0, 3)}


def shared(tensor: Tensor, mesh: Any, dim: int) -> DTensor:
    return distribute_tensor(tensor, mesh, [Shard(min(dim, tensor.dim() - 1))], src_data_rank=None)


def save_odd(rank: int, path: str, dim: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {name: shared(each, mesh, dim) for name, each in odd_tensors().items()}
    state["number"] = distribute_tensor(torch.tensor(3.5), mesh, [Replicate()])
    state["strided"] = distribute_tensor(torch.randn(6, 4), mesh, [Replicate()]).t()
    save_sharded(path, {"state_dict": state})


def load_odd(rank: int, path: str, dim: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = odd_tensors()
    templates = {f"module.{name}": shared(torch.empty(each.shape), mesh, dim) for name, each in expected.items()}
    templates["module.number"] = distribute_tensor(torch.tensor(0.0), mesh, [Replicate()])
    state = load_sharded(path, templates)["state_dict"]
    for name, each in expected.items():
        local = shared(each, mesh, dim).to_local()
        assert same(state[name].to_local(), local)
    assert state["number"].full_tensor().item() == 3.5


def test_dtypes_shapes_and_blocks(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows become columns and back; checksums are of blocks, of which only those with something wanted are read."""
    for module in (container, folder):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    for dim in (0, 1):
        path = tmp_path / f"{dim}.ckpt"
        run_ranks(save_odd, 3, str(path), dim)
        state = load_checkpoint(path)["state_dict"]
        assert same({name: state[name] for name in odd_tensors()}, odd_tensors())
        assert state["number"].item() == 3.5
        assert state["strided"].shape == (4, 6)
        for world_size, other in ((4, 0), (2, 1)):
            run_ranks(load_odd, world_size, str(path), other)


def test_torch_reads_the_folder_with_its_own_reader(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.ckpt"
    run_ranks(saved, 4, str(path), fsdp)

    def load(rank: int) -> None:
        module, _ = fsdp()
        state = {f"module.{name}": tensor for name, tensor in module.state_dict().items() if name != "tied.weight"}
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        truth = load_checkpoint(f"{path}.truth")["state_dict"]
        assert all(torch.equal(whole(tensor), truth[name.removeprefix("module.")]) for name, tensor in state.items())

    run_ranks(load, 2)


def test_a_copy_is_written_in_a_thread_while_training_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.ckpt"

    def save(rank: int) -> None:
        module, optimizer = fsdp()
        steps(module, optimizer)
        background = dist.new_group(backend="gloo")
        checkpoint = state_of(module, optimizer)
        truth = whole(checkpoint)
        if rank == 0:
            write_checkpoint(f"{path}.truth", truth)
        parts = split(checkpoint).copied(Buffers(), is_writer=rank == 0)
        thread = threading.Thread(target=write_parts, args=(path, parts, background))
        thread.start()
        steps(module, optimizer)
        thread.join()

    run_ranks(save, 2)
    compare_whole(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: pathlib.Path) -> None:
    """In a process of its own, with NCCL: parts come from the device and go back to it."""
    program = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from leyden.checkpoint import load_checkpoint
from leyden.checkpoint.sharded import load_sharded, save_sharded, split, templates_for, write_parts
from leyden.checkpoint.snapshot import Buffers

torch.cuda.set_device(0)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
module = torch.nn.Linear(5, 7).cuda()
fully_shard(module)
optimizer = torch.optim.AdamW(module.parameters(), fused=True)
module(torch.ones(2, 5, device="cuda")).sum().backward()
optimizer.step()
state = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
save_sharded(sys.argv[1], state)
write_parts(sys.argv[1] + "2", split(state).copied(Buffers(), is_writer=True))
for path in (sys.argv[1], sys.argv[1] + "2"):
    whole = load_checkpoint(path)
    back = load_sharded(path, templates_for(module, [optimizer]))
    for name, tensor in module.state_dict().items():
        assert back["state_dict"][name].device.type == "cuda"
        assert torch.equal(back["state_dict"][name].full_tensor(), tensor.full_tensor())
        assert torch.equal(whole["state_dict"][name], tensor.full_tensor().cpu())
    optimizer.load_state_dict(back["optimizer_states"][0])
dist.destroy_process_group()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "x.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# failures: on every rank, with the rank and the reason; what was there stays


def errors(rank: int, path: str, fault: str) -> str:
    module, optimizer = fsdp()
    steps(module, optimizer)
    checkpoint: dict[str, Any] = state_of(module, optimizer)
    if rank == 2:
        real = os.open

        def full(name: Any, flags: int, *mode: Any) -> int:
            return real("/dev/full", os.O_WRONLY) if flags & os.O_CREAT else real(name, flags, *mode)

        def broken(name: Any, flags: int, *mode: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO)) if flags & os.O_CREAT else AssertionError

        if fault == "full":
            os.open = full  # type: ignore[assignment]
        elif fault == "broken":
            os.open = broken  # type: ignore[assignment]
        elif fault == "interrupted":
            os.fsync = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[assignment]
        elif fault == "unstorable":
            checkpoint["mine"] = {"f": print}
        elif fault == "partial":
            weight = checkpoint["state_dict"]["a.weight"]
            local = torch.ones(7, 5)
            checkpoint["state_dict"]["a.weight"] = DTensor.from_local(local, weight.device_mesh, [Partial()])
        elif fault == "other":
            del checkpoint["state_dict"]["a.weight"]
    if rank == 0 and fault == "folder":
        os.mkdir(f"{path}.d")
    try:
        save_sharded(f"{path}.d" if fault == "folder" else path, checkpoint)
    except CheckpointError as error:
        return str(error)
    except KeyboardInterrupt:
        return "interrupted"
    return "none"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("full", "rank 2: .*shard-00002-of-00004.safetensors: cannot be written: No space left on device"),
        ("broken", "rank 2: .*Input/output error"),
        ("interrupted", "rank 2: KeyboardInterrupt"),
        ("unstorable", "rank 2: mine.f: the function print cannot be written"),
        ("partial", "rank 2: state_dict.a.weight: .*not summed over the ranks"),
        ("other", "rank 2 has other sharded tensors than rank 0"),
        ("folder", "rank 0: Is a directory, and no checkpoint"),
    ],
)
def test_what_fails_on_one_rank_is_told_on_all(tmp_path: pathlib.Path, fault: str, reason: str) -> None:
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"global_step": 1})
    told = run_ranks(errors, 4, str(path), fault)
    if fault == "interrupted":
        assert told.pop(2) == "interrupted"
    for message in told:
        assert message == told[0]
        assert re.search(rf"^{re.escape(str(path))}(\.d)?: cannot be written: {reason}", message, re.DOTALL), message
    assert load_checkpoint(path) == {"global_step": 1}
    assert sorted(os.listdir(tmp_path)) == sorted({"x.ckpt", *(["x.ckpt.d"] if fault == "folder" else [])})


@pytest.mark.parametrize("damage", ["flip", "missing", "cut"])
def test_a_damaged_shard_is_told_on_all_ranks(tmp_path: pathlib.Path, damage: str) -> None:
    path = tmp_path / "x.ckpt"
    run_ranks(saved, 4, str(path), fsdp)
    shard = path / "shard-00001-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.unlink() if damage == "missing" else shard.write_bytes(content if damage == "flip" else content[:-5])

    def load(rank: int) -> str:
        module, optimizer = fsdp()
        with pytest.raises(CheckpointError) as info:
            load_sharded(path, templates_for(module, [optimizer]))
        return str(info.value)

    told = run_ranks(load, 4)
    assert len(set(told)) == 1
    reason = {"flip": "is damaged: its checksum in shard-00001", "missing": "is missing", "cut": r"has \d+ bytes"}[
        damage
    ]
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)
    assert told[0].startswith(f"{path}: cannot be read: rank ")
    assert "shard-00001-of-00004.safetensors" in told[0]


def test_a_rank_that_is_killed_leaves_the_former_checkpoint(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.ckpt"
    run_ranks(saved, 3, str(path), fsdp)
    before = load_checkpoint(path)

    def save(rank: int) -> None:
        module, optimizer = fsdp()
        steps(module, optimizer, 3)
        if rank == 1:
            os.fsync = lambda _: os.kill(os.getpid(), 9)  # type: ignore[assignment]
        save_sharded(path, state_of(module, optimizer))

    with pytest.raises(AssertionError, match="rank 1: ended without a result"):
        run_ranks(save, 3)
    assert list_checkpoints(tmp_path) == [str(path)]
    assert same(load_checkpoint(path), before)


def test_a_remote_url_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"memory://x\.ckpt: sharded checkpoints are written to local or shared disks"
    ):
        save_sharded("memory://x.ckpt", {"epoch": 1})
