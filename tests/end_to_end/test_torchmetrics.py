"""torchmetrics in whole runs, logged as objects and as values; and monitored keys that do not exist."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import MetricError
from leyden.module import LightningModule
from leyden.trainer import Trainer
from quiet import Memory

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchmetrics = pytest.importorskip("torchmetrics")

torch.set_num_threads(1)

CLASSES = 3
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 2,
}


def samples(seed: int, count: int = 22) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What was predicted, and what was right."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, CLASSES, count), generator.integers(0, CLASSES, count)


def loader(seed: int, batch_size: int = 4) -> DataLoader[Any]:
    predicted, right = samples(seed)
    return DataLoader(TensorDataset(torch.from_numpy(predicted), torch.from_numpy(right)), batch_size=batch_size)


def accuracy(seed: int, start: int = 0, stop: int | None = None) -> float:
    predicted, right = samples(seed)
    return float((predicted == right)[start:stop].mean())


def macro_recall(seed: int) -> float:
    predicted, right = samples(seed)
    return float(np.mean([(predicted[right == label] == label).mean() for label in range(CLASSES)]))


def make_accuracy() -> Any:
    return torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)


class Net(LightningModule):
    """Subclasses say what they log."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.metric = make_accuracy()
        self.val_metric = make_accuracy()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder: Path, module: LightningModule, val: Any = None, **options: Any) -> tuple[Trainer, Memory]:
    memory = Memory()
    options = {**QUIET, "default_root_dir": folder, "logger": memory, "log_every_n_steps": 1, **options}
    trainer = Trainer(**options)
    trainer.fit(module, loader(0), val)
    return trainer, memory


def test_an_object_logged_in_training_is_computed_over_the_epoch_and_reset(tmp_path: Path) -> None:
    class ByObject(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.metric(*batch)
            self.log("acc", self.metric, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer, memory = run(tmp_path, ByObject(), max_epochs=3)
    batches = [accuracy(0, start, start + 4) for start in range(0, 22, 4)]
    assert memory.of("acc_step") == pytest.approx(batches * 3)
    assert memory.of("acc_epoch") == pytest.approx([accuracy(0)] * 3)
    assert float(trainer.callback_metrics["acc"]) == pytest.approx(accuracy(0))


def test_an_object_that_is_only_updated_is_logged_by_epoch(tmp_path: Path) -> None:
    class Updated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_metric.update(*batch)
            self.log("acc", self.val_metric)

    _, memory = run(tmp_path, Updated(), loader(1), max_epochs=2)
    assert memory.of("acc") == pytest.approx([accuracy(1)] * 2)  # what the sanity check counted is forgotten


def test_an_object_that_is_only_updated_has_no_step_value(tmp_path: Path) -> None:
    class Updated(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.metric.update(*batch)
            self.log("acc", self.metric, on_step=True)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MetricError, match=r"'acc', metric, on_step=True.*self.metric\(preds, target\).*on_step=False"):
        run(tmp_path, Updated(), max_epochs=1)


def test_an_object_may_be_logged_once_at_the_epochs_end(tmp_path: Path) -> None:
    class AtEnd(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_metric.update(*batch)

        def on_validation_epoch_end(self) -> None:
            self.log("acc", self.val_metric)

    _, memory = run(tmp_path, AtEnd(), loader(1), max_epochs=2)
    assert memory.of("acc") == pytest.approx([accuracy(1)] * 2)


def test_values_computed_and_reset_by_the_user_are_logged_as_they_are(tmp_path: Path) -> None:
    class ByValue(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("batch_acc", self.val_metric(*batch))

        def on_validation_epoch_end(self) -> None:
            self.log("acc", self.val_metric.compute())
            self.val_metric.reset()

    _, memory = run(tmp_path, ByValue(), loader(1), max_epochs=2)
    assert memory.of("acc") == pytest.approx([accuracy(1)] * 2)
    assert memory.of("batch_acc") == pytest.approx([accuracy(1)] * 2)  # means weighted by batch size are the same


def test_a_running_mean_equals_numpys(tmp_path: Path) -> None:
    class Running(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()
            self.total = torchmetrics.SumMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            value = batch[0].float()
            self.mean.update(value)
            self.total.update(value)
            self.log_dict({"mean": self.mean, "total": self.total}, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    _, memory = run(tmp_path, Running(), max_epochs=2)
    values = samples(0)[0]
    assert memory.of("mean") == pytest.approx([values.mean()] * 2)
    assert memory.of("total") == [values.sum()] * 2


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_a_collection_is_logged_with_log_dict(forward: bool, groups: bool, tmp_path: Path) -> None:
    class Collects(Net):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = {"task": "multiclass", "num_classes": CLASSES}
            self.metrics = torchmetrics.MetricCollection(
                {
                    "acc": torchmetrics.Accuracy(average="micro", **options),
                    "recall": torchmetrics.Recall(average="macro", **options),
                    "precision": torchmetrics.Precision(average="micro", **options),
                },
                prefix="train/",
                compute_groups=groups,
            )
            self.val_metrics = self.metrics.clone(prefix="val/")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if forward:
                self.metrics(*batch)
            else:
                self.metrics.update(*batch)
            self.log_dict(self.metrics, on_step=forward, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_metrics.update(*batch)

        def on_validation_epoch_end(self) -> None:
            self.log_dict(self.val_metrics)

    _, memory = run(tmp_path, Collects(), loader(1), max_epochs=2)
    ending = "_epoch" if forward else ""
    assert memory.of(f"train/acc{ending}") == pytest.approx([accuracy(0)] * 2)
    assert memory.of(f"train/precision{ending}") == pytest.approx([accuracy(0)] * 2)
    assert memory.of(f"train/recall{ending}") == pytest.approx([macro_recall(0)] * 2)
    assert memory.of("val/acc") == pytest.approx([accuracy(1)] * 2)
    assert memory.of("val/recall") == pytest.approx([macro_recall(1)] * 2)
    if forward:
        assert memory.of("train/acc_step") == pytest.approx(
            [accuracy(0, start, start + 4) for start in range(0, 22, 4)] * 2
        )


def test_each_loader_has_its_own_object(tmp_path: Path) -> None:
    class Several(Net):
        def __init__(self) -> None:
            super().__init__()
            self.of_loader = torch.nn.ModuleList([make_accuracy(), make_accuracy()])

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            metric = self.of_loader[dataloader_idx]
            metric(*batch)
            self.log("acc", metric, on_step=True, on_epoch=True)

    trainer = Trainer(**QUIET, default_root_dir=tmp_path)
    for _ in range(2):
        results = trainer.test(Several(), [loader(1), loader(2)])
        assert results == [
            {"acc_epoch/dataloader_idx_0": pytest.approx(accuracy(1))},
            {"acc_epoch/dataloader_idx_1": pytest.approx(accuracy(2))},
        ]


def test_an_object_that_gives_one_value_per_class_is_refused(tmp_path: Path) -> None:
    class PerClass(Net):
        def __init__(self) -> None:
            super().__init__()
            self.recall = torchmetrics.Recall(task="multiclass", num_classes=CLASSES, average="none")

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.recall.update(*batch)
            self.log("recall", self.recall)

    with pytest.raises(MetricError, match=r"'recall'.*compute\(\) returned a tensor of shape \(3,\).*self.log_dict"):
        Trainer(**QUIET, default_root_dir=tmp_path).test(PerClass(), loader(1))


def test_computed_values_are_not_computed_twice(tmp_path: Path) -> None:
    class Slow(Net):
        computed = 0

        def __init__(self) -> None:
            super().__init__()
            original = self.val_metric.compute

            def compute() -> Any:
                self.computed += 1
                return original()

            self.val_metric.compute = compute

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_metric.update(*batch)
            self.log("acc", self.val_metric)

    module = Slow()
    run(tmp_path, module, loader(1), max_epochs=2, num_sanity_val_steps=0)
    assert module.computed == 2


# monitored keys that do not exist


class Logs(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("train_loss", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_metric(*batch)
        self.log("val_acc", self.val_metric)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: EarlyStopping("val_ac"), "EarlyStopping"),
        (lambda folder: ModelCheckpoint(folder, monitor="val_ac"), "ModelCheckpoint"),
    ],
)
def test_a_callback_that_monitors_an_unknown_key_names_those_that_exist(
    make: Any, expected: str, tmp_path: Path
) -> None:
    pattern = rf"{expected}.*'val_ac'.*Did you mean 'val_acc'\?"
    with pytest.raises(MetricError, match=pattern) as caught:
        run(tmp_path, Logs(), loader(1), max_epochs=1, callbacks=[make(tmp_path)], enable_checkpointing=None)
    assert "train_loss" in str(caught.value)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_plateau_scheduler_that_monitors_an_unknown_key_names_those_that_exist(interval: str, tmp_path: Path) -> None:
    class Plateau(Logs):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "train_los", "interval": interval},
            }

    with pytest.raises(
        MetricError, match=r"ReduceLROnPlateau monitors 'train_los'.*Did you mean 'train_loss'\?"
    ) as caught:
        run(tmp_path, Plateau(), loader(1), max_epochs=1)
    assert ("'val_acc'" in str(caught.value)) == (interval == "epoch")
