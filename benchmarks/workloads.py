"""The models and the data that everyone trains: five small workloads, with AdamW and cross entropy.

The data lie in memory as tensors and are read in a random order by torch's own DataLoader, so that what a user's data path
costs is part of what is measured. They are random numbers: how fast a step is does not depend on what is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

LEARNING_RATE = 1e-3
WIDTH = 128
CONTEXT = 64
VOCABULARY = 96
"""Of the two character models: the printable characters of ASCII and a line end."""
EVALUATED = 64
"""Samples on which `loss_after` compares what was trained."""


class Attention(nn.Module):
    """Causal self-attention; input and output are (batch, time, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """One layer of a transformer, normalized before each part, as GPT-2 is."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and tied embeddings; (batch, time) to (batch, time, vocabulary)."""

    def __init__(
        self, layers: int = 2, width: int = WIDTH, heads: int = 4, context: int = CONTEXT, vocabulary: int = VOCABULARY
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))


class CharacterLSTM(nn.Module):
    """Two layers of LSTM over characters; (batch, time) to (batch, time, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(tokens))[0])


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 6 * 6, 10),
    )  # fmt: skip


def vectors(shape: tuple[int, ...], classes: int) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Samples of one shape and their classes."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, *shape, generator=generator)
        return inputs, torch.randint(0, classes, (count,), generator=generator)

    return draw


def characters(
    length: int = CONTEXT, vocabulary: int = VOCABULARY
) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Pieces of a text, and the same pieces one character later."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        text = torch.randint(0, vocabulary, (count, length + 1), generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return draw


@dataclass(frozen=True)
class Workload:
    """A model, its data, and how long it is trained.

    Attributes:
        title: what the tables call it.
        batch_size: samples in a batch.
        net: makes the model.
        samples: draws that many inputs and targets.
        warm_up: steps before the first turn.
        turn: steps of one turn, about a quarter of a second of the hand-written loop.
    """

    title: str
    batch_size: int
    net: Callable[[], nn.Module]
    samples: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    warm_up: int
    turn: int

    def data(self, steps: int) -> TensorDataset:
        """As much data as one epoch of ``steps`` steps needs, the same each time."""
        return TensorDataset(*self.samples(steps * self.batch_size, torch.Generator().manual_seed(1)))

    def loader(self, data: TensorDataset, **options: Any) -> DataLoader[Any]:
        """The DataLoader that users write; its order is the same each time."""
        order = torch.Generator().manual_seed(2)
        return DataLoader(data, batch_size=self.batch_size, shuffle=True, generator=order, **options)

    def task(self) -> Task:
        """The model with its loss, with the same weights each time."""
        torch.manual_seed(0)
        return Task(self.net())


WORKLOADS = {
    "tiny": Workload("MLP 8-16-2, batch 8", 8, tiny, vectors((8,), 2), warm_up=300, turn=600),
    "mlp": Workload("MLP 784-256-256-10, batch 64", 64, mlp, vectors((784,), 10), warm_up=60, turn=60),
    "cnn": Workload("CNN of two convolutions, batch 64", 64, cnn, vectors((1, 28, 28), 10), warm_up=60, turn=60),
    "gpt": Workload("GPT of 2 layers, d = 128, batch 16", 16, GPT, characters(), warm_up=20, turn=10),
    "lstm": Workload("LSTM of 2 layers, d = 128, batch 16", 16, CharacterLSTM, characters(), warm_up=30, turn=12),
}


def nothing() -> None:
    """What a step calls first where nobody measures."""


class Task(nn.Module):
    """A model with its loss.

    Attributes:
        tick: called before each step; the clock of whoever measures.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.tick: Callable[[], None] = nothing

    def compute(self, batch: list[Tensor]) -> Tensor:
        """The loss of a batch, without the clock: this may be compiled."""
        inputs, targets = batch
        outputs = self.net(inputs)
        if outputs.ndim > 2:
            outputs, targets = outputs.flatten(0, -2), targets.flatten()
        return functional.cross_entropy(outputs, targets)

    def loss(self, batch: list[Tensor]) -> Tensor:
        """The clock, and the loss of a batch."""
        self.tick()
        return self.compute(batch)

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=LEARNING_RATE, **options)


def loss_after(task: Task, data: TensorDataset) -> float:
    """The loss on the first samples, by which what was trained is compared."""
    with torch.no_grad():
        return float(task.compute([part[:EVALUATED] for part in data.tensors]))
