"""A small GPT to plan for, and what a real step of it takes: bytes that torch's allocator hands out, read from its profiler."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

WORDS, LENGTH, WIDTH, LAYERS, HEADS = 1000, 128, 128, 4, 4


class Block(nn.Module):
    """One transformer block. With ``parts`` it is what one rank of a tensor-parallel group would hold of it."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, parts: int = 1) -> None:
        super().__init__()
        self.heads = heads // parts
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width // parts), nn.Linear(width // parts, width)
        self.up, self.down = nn.Linear(width, 4 * width // parts), nn.Linear(4 * width // parts, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Returns the loss; the weights of the last layer are those of the first."""

    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(parts=parts) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def tokens(batch_size: int) -> tuple[Tensor, Tensor]:
    batch = torch.zeros(batch_size, LENGTH, dtype=torch.long)
    return batch, batch


@dataclass
class Measured:
    """Bytes.

    Attributes:
        kept: parameters, gradients, optimizer state, buckets: what is there after a step.
        peak: the fullest moment of the step after it.
        gathered: what this rank's all-gathers brought, in one step.
        reduced: what it gave to reduce-scatters and, with DDP, to all-reduces, in one step.
    """

    kept: int
    peak: int
    gathered: int
    reduced: int


class _Collectives(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


class _Storages(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, after each operation, the sizes that all storages have which were seen and still live."""

    seen: ClassVar[dict[int, weakref.ref[Any]]] = {}  # over all blocks of a process

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = getattr(leaf, "_local_tensor", leaf).untyped_storage()
                self.seen[id(storage)] = weakref.ref(storage)
        self.most = max(self.most, self.now())
        return output

    def now(self) -> int:
        """FSDP gives a storage its memory and takes it away without an operation, so that sizes are asked for anew."""
        living = [(key, each()) for key, each in self.seen.items()]
        for key, storage in living:
            if storage is None:
                del self.seen[key]
        return sum(storage.nbytes() for _, storage in living if storage is not None)


@contextlib.contextmanager
def _storages() -> Any:
    """What `_live` does, by the storages of Python's tensors."""
    found: list[int] = []
    with _Storages() as storages:
        before = storages.now()
        yield found
        found += [storages.now() - before, storages.most - before]


@contextlib.contextmanager
def _live() -> Any:
    """Give a list that holds, when the block is over, what lives more than before it, and the most that lived within."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [
        (event.start_ns(), index, event.nbytes()) for index, event in enumerate(events) if event.name() == "[memory]"
    ]
    now = most = 0
    for _, _, size in sorted(sizes):
        now += size
        most = max(most, now)
    found += [now, most]


def train(
    rank: int,
    strategy: str,
    world_size: int,
    batch_size: int,
    precision: str,
    recompute: bool,
    bucket_view: bool = True,
) -> Measured:
    """Train for three steps by hand-written torch, on one rank."""
    batch = tokens(batch_size)
    reduced = 0
    # A profiler sees all that the allocator gives, but not what gloo's threads let go of.
    live = _live if strategy == "single" else _storages
    with live() as kept:
        model = GPT()
        wrapped, context = _wrapped(model, strategy, precision, bucket_view)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):

            def count(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
                nonlocal reduced
                reduced += bucket.buffer().nbytes
                return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda each: each.value()[0])

            wrapped.register_comm_hook(None, count)
        if recompute:
            for block in model.blocks:
                block.forward = _again(block.forward)  # type: ignore[method-assign]
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            with context:
                loss = wrapped(*batch)
            loss.backward()
            optimizer.step()
            _forget()

        step()
        step()  # DDP makes its buckets anew, in the order in which gradients came
    reduced = 0
    optimizer.zero_grad()
    with live() as within, _Collectives() as collectives:
        step()
    sent = reduced + collectives.reduced
    return Measured(kept[0], kept[0] - within[0] + within[1], collectives.gathered, sent)


def train_any(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Train any model for three steps on one rank; return how much more lives within a step than before it, and after it."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    step()
    step()
    optimizer.zero_grad()
    with _live() as within:
        step()
    return within[1], within[0]


def _wrapped(model: GPT, strategy: str, precision: str, bucket_view: bool) -> tuple[nn.Module, Any]:
    mixed = precision == "bf16-mixed"
    context = torch.autocast("cpu", dtype=torch.bfloat16) if mixed else contextlib.nullcontext()
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view), context
    if strategy == "fsdp":
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy()
        if mixed:  # as leyden's: normalization in fp32, everything else gathered in bf16
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for part in (*model.blocks, model):
            norms = [each for each in part.modules() if isinstance(each, nn.LayerNorm)]
            if mixed:
                fully_shard(
                    [each for each in norms if not isinstance(each, FSDPModule)],
                    mp_policy=replace(policy, param_dtype=None),
                )
            fully_shard(part, mp_policy=policy)
    return model, context


def _again(forward: Any) -> Any:
    return lambda x: checkpoint(forward, x, use_reentrant=False)


def _forget() -> None:
    gc.collect()
