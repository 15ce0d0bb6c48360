"""A module with every step and loader that does nothing of interest: subclass it to show one thing in few lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from leyden.datamodule import LightningDataModule
from leyden.module import LightningModule

_FEATURES, _SAMPLES = 32, 64


class RandomDataset(Dataset[Tensor]):
    """``length`` samples of ``size`` random features, drawn when it is made."""

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __len__(self) -> int:
        return self.len


class RandomDictDataset(Dataset[dict[str, Tensor]]):
    """The same with samples that are dicts: "a", and "b", which is one more."""

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"a": self.data[index], "b": self.data[index] + 1}

    def __len__(self) -> int:
        return self.len


class RandomIterableDataset(IterableDataset[Tensor]):
    """``count`` samples of ``size`` random features, drawn anew in each pass; it has no length."""

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)


class RandomIterableDatasetWithLen(IterableDataset[Tensor]):
    """The same with a length."""

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)

    def __len__(self) -> int:
        return self.count


def _loader() -> DataLoader[Tensor]:
    return DataLoader(RandomDataset(_FEATURES, _SAMPLES))


class BoringModel(LightningModule):
    """One linear layer from 32 features to 2, which learns to give ones; with loaders of 64 samples for every verb."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(_FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(batch, 32)``."""
        result: Tensor = self.layer(x)
        return result

    def loss(self, preds: Tensor) -> Tensor:
        """The mean squared distance from one."""
        return nn.functional.mse_loss(preds, torch.ones_like(preds))

    def step(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.loss(self(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return ``{"loss": …}``."""
        return {"loss": self.step(batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Return ``{"x": …}``."""
        return {"x": self.step(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Return ``{"y": …}``."""
        return {"y": self.step(batch)}

    def configure_optimizers(self) -> Any:
        """SGD, and a scheduler that lowers its rate tenfold after each epoch."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]

    def train_dataloader(self) -> Any:
        """64 batches of one sample."""
        return _loader()

    def val_dataloader(self) -> Any:
        """64 batches of one sample."""
        return _loader()

    def test_dataloader(self) -> Any:
        """64 batches of one sample."""
        return _loader()

    def predict_dataloader(self) -> Any:
        """64 batches of one sample."""
        return _loader()


class ManualOptimBoringModel(BoringModel):
    """The same with an optimizer that `training_step` steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Step the optimizer; return the loss."""
        optimizer = self.optimizers()
        loss = self.step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class BoringDataModule(LightningDataModule):
    """64 random samples, made in `setup`, and a loader for every verb."""

    def __init__(self) -> None:
        super().__init__()
        self.random_full: Dataset[Tensor] = RandomDataset(_FEATURES, 4 * _SAMPLES)

    def setup(self, stage: str) -> None:
        """Cut the samples into four parts, one for each loader."""
        parts = [range(start, start + _SAMPLES) for start in range(0, 4 * _SAMPLES, _SAMPLES)]
        subsets = [torch.utils.data.Subset(self.random_full, part) for part in parts]
        if stage in ("fit", "validate"):
            self.random_train, self.random_val = subsets[0], subsets[1]
        if stage == "test":
            self.random_test = subsets[2]
        if stage == "predict":
            self.random_predict = subsets[3]

    def train_dataloader(self) -> Any:
        """64 batches of one sample."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> Any:
        """64 batches of one sample."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> Any:
        """64 batches of one sample."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> Any:
        """64 batches of one sample."""
        return DataLoader(self.random_predict)


class DemoModel(LightningModule):
    """A small classifier of 32 features, with hyperparameters.

    Args:
        out_dim: classes.
        learning_rate: of Adam.
    """

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.l1 = nn.Linear(_FEATURES, out_dim)
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, 32)``, through a ReLU."""
        return torch.relu(self.l1(x.flatten(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The mean of the outputs of a batch, which falls."""
        return self(batch).sum()

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> Any:
        """64 batches of one sample."""
        return _loader()
