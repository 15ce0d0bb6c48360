"""Ranks that write to one memory without locks: what they share, that all of their steps arrive, and where they wait."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.errors import ConfigurationError, RankError
from leyden.strategy import Layout
from leyden.strategy.environments import Place
from leyden.strategy.hogwild import HogwildStrategy
from quiet import make_trainer

pytestmark = [
    # of forking where there are threads, which Python 3.12 and later say
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LEY-no-val-loader"),
]


def hogwild(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings: dict[str, Any] = {"strategy": "hogwild", "devices": 2, "enable_checkpointing": saves}
    return make_trainer(folder, *callbacks, **(settings | options))


class Regression(L.LightningModule):
    """Least squares, whose optimum is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return ((batch[0] @ self.weight - batch[1]) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", ((batch[0] @ self.weight - batch[1]) ** 2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def regression() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.1 * torch.randn(64, generator=generator).double()
    return TensorDataset(x, y)


def test_it_converges_to_the_least_squares_optimum(tmp_path: Path) -> None:
    module, data = Regression(), regression()
    trainer = hogwild(tmp_path, max_epochs=60)
    trainer.fit(module, DataLoader(data, 8, shuffle=True), DataLoader(data, 8))
    x, y = data.tensors
    optimum = torch.linalg.lstsq(x, y.unsqueeze(1)).solution[:, 0]
    torch.testing.assert_close(module.weight.detach(), optimum, atol=2e-3, rtol=0)
    least = float(((x @ optimum - y) ** 2).mean())
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(least, rel=1e-3)
    assert trainer.global_step == 60 * 4  # of 8 batches in all, each rank has 4
    assert trainer.current_epoch == 60


class Count(L.LightningModule):
    """Each sample is one element of the weights, and one step adds 1 to it."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(samples))
        self.register_buffer("by_rank", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("addresses", torch.zeros(4, dtype=torch.int64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.by_rank[self.global_rank] += 1
        self.addresses[self.global_rank] = self.weight.data_ptr()
        return (-self.weight[batch]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0)


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Embeds(Count):
    """The same with gradients that have only the rows of the batch: writes that cannot meet are all kept."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.weight = None
        self.table = nn.Embedding(samples, 1, sparse=True)
        nn.init.zeros_(self.table.weight)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.by_rank[self.global_rank] += 1
        self.addresses[self.global_rank] = self.table.weight.data_ptr()
        return (-self.table(batch)).sum()


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_sparse_steps_of_all_ranks_arrive(ranks: int, tmp_path: Path) -> None:
    module = Embeds(60)
    address = module.table.weight.data_ptr()
    hogwild(tmp_path, max_epochs=5, devices=ranks).fit(module, DataLoader(Numbers(60), 1, shuffle=True))
    assert module.table.weight.detach()[:, 0].tolist() == [5.0] * 60  # each sample once an epoch, by whichever rank
    assert module.by_rank.tolist()[:ranks] == [5 * 60 // ranks] * ranks
    here = module.table.weight.data_ptr()
    assert here != address
    assert module.addresses.tolist()[:ranks] == [here] * ranks  # forked: the memory itself is where the parent has it
    assert module.table.weight.is_shared()


class Turns(Count):
    """Ranks step one after the other, so that nothing can be overwritten, and each sees what the other wrote."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        while int(self.by_rank.sum()) % 2 != self.global_rank:
            time.sleep(0.001)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (-self.weight).sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.by_rank[self.global_rank] += 1


def test_dense_steps_in_turns_add_up(tmp_path: Path) -> None:
    module = Turns(3)
    hogwild(tmp_path).fit(module, DataLoader(Numbers(20), 1))
    assert module.by_rank.tolist()[:2] == [10, 10]
    assert module.weight.tolist() == [20.0] * 3


class Uneven(Count):
    """Rank 1 trains all its batches before rank 0 has trained its second one: they do not wait for each other."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        while self.global_rank == 0 and batch_idx == 1 and int(self.by_rank[1]) < 10:
            time.sleep(0.001)


def test_a_rank_does_not_wait_for_the_others(tmp_path: Path) -> None:
    module = Uneven(20)
    hogwild(tmp_path).fit(module, DataLoader(Numbers(20), 1))
    assert module.by_rank.tolist()[:2] == [10, 10]


class Steady(Count):
    """Looks at the weights during validation, while the other rank is behind or before."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("sum", self.weight.sum())

    def on_train_epoch_end(self) -> None:
        self.log("at_end", self.weight.sum())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.uneven_delay()

    def uneven_delay(self) -> None:
        for _ in range(self.global_rank * 100):
            time.sleep(0.001)


def test_validation_and_checkpoints_see_weights_that_stand_still(tmp_path: Path) -> None:
    module = Steady(20)
    saves = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = hogwild(tmp_path, saves, max_epochs=3)
    trainer.fit(module, DataLoader(Numbers(20), 1), DataLoader(Numbers(6), 1))
    total = module.weight.detach().sum()
    assert float(trainer.callback_metrics["sum"]) == float(total)
    assert float(trainer.callback_metrics["at_end"]) == float(total)
    values = [L.load_checkpoint(path)["state_dict"] for path in sorted(tmp_path.glob("epoch=*.ckpt"))]
    assert [value["by_rank"].tolist()[:2] for value in values] == [[10, 10], [20, 20], [30, 30]]
    assert torch.equal(values[-1]["weight"], module.weight)


class Skips(Count):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if self.global_rank == 1 and batch_idx % 2 else super().training_step(batch, batch_idx)


def test_a_rank_may_skip_a_batch(tmp_path: Path) -> None:
    module = Skips(20)
    hogwild(tmp_path).fit(module, DataLoader(Numbers(20), 1))
    assert module.by_rank.tolist()[:2] == [10, 5]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(10))


def test_a_stream_of_unknown_length_ends_for_all(tmp_path: Path) -> None:
    module = Count(10)
    hogwild(tmp_path, use_distributed_sampler=False).fit(module, DataLoader(Stream(), 1))
    assert module.by_rank.sum() in (10, 20)  # divided among the ranks, or read by each


def test_a_resumed_run_goes_on_with_the_shared_weights(tmp_path: Path) -> None:
    trainer = hogwild(tmp_path, ModelCheckpoint(dirpath=tmp_path / "saved"), max_epochs=2)
    trainer.fit(Embeds(20), DataLoader(Numbers(20), 1))
    path = trainer.checkpoint_callback.best_model_path
    module = Embeds(20)
    second = hogwild(tmp_path, ModelCheckpoint(dirpath=tmp_path / "second"), max_epochs=5)
    second.fit(module, DataLoader(Numbers(20), 1), ckpt_path=path)
    assert module.table.weight.detach()[:, 0].tolist() == [5.0] * 20
    assert (second.current_epoch, second.global_step) == (5, 50)


class Late(Count):
    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.samples, self.weight = samples, None

    def configure_model(self) -> None:
        if self.weight is None:
            self.weight = nn.Parameter(torch.zeros(self.samples))


def test_configure_model_is_called_before_the_start(tmp_path: Path) -> None:
    module = Late(20)
    hogwild(tmp_path, precision="64-true").fit(module, DataLoader(Numbers(20), 1))
    assert module.weight.dtype == torch.float64
    assert module.weight.is_shared()
    assert module.by_rank.sum() == 20


class TooLate(Late):
    def configure_model(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        self.weight = nn.Parameter(torch.zeros(self.samples))


def test_parameters_made_in_the_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"weight was made in the ranks"):
        hogwild(tmp_path).fit(TooLate(20), DataLoader(Numbers(20), 1))


class Lazy(Count):
    def __init__(self) -> None:
        super().__init__(1)
        self.net = nn.LazyLinear(2)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_parameters_without_a_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"net\.weight has no shape"):
        hogwild(tmp_path).fit(Lazy(), DataLoader(Numbers(20), 1))


class Fails(Count):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 3:
            raise ValueError("no more")
        while self.global_rank == 0 and batch_idx == 5:
            time.sleep(0.001)
        return super().training_step(batch, batch_idx)


def test_a_failure_ends_a_rank_that_waits_for_nobody(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1, .*ValueError: no more"):
        hogwild(tmp_path).fit(Fails(20), DataLoader(Numbers(20), 1))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"sync_batchnorm": True}, "sync_batchnorm=True"),
        ({"nan_policy": "skip"}, "nan_policy='skip'"),
        ({"max_restarts": 1}, "max_restarts=1"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(options: Any, names: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{names} does not go with strategy='hogwild'"):
        hogwild(tmp_path, **options).fit(Count(20), DataLoader(Numbers(20), 1))


def test_ranks_of_a_launcher_are_refused() -> None:
    place = Place.__new__(Place)
    for name, value in {"world_size": 2, "rank": 0, "local_rank": 0, "local_world_size": 2, "node_rank": 0}.items():
        object.__setattr__(place, name, value)
    devices = (torch.device("cpu"),) * 2
    with pytest.raises(ConfigurationError, match="without torchrun"):
        HogwildStrategy().settle(Layout(devices, 1, place))
    with pytest.raises(ConfigurationError, match="num_nodes=2"):
        HogwildStrategy().settle(Layout(devices, 2))
    with pytest.raises(ConfigurationError, match="accelerator='cuda'"):
        HogwildStrategy().settle(Layout((torch.device("cuda", 0), torch.device("cuda", 1))))
    with pytest.raises(ConfigurationError, match="start_method='script'"):
        HogwildStrategy(start_method="script")


def test_one_device_is_one_process(tmp_path: Path) -> None:
    module = Embeds(20)
    trainer = hogwild(tmp_path, devices=1)
    trainer.fit(module, DataLoader(Numbers(20), 1))
    assert module.table.weight.detach()[:, 0].tolist() == [1.0] * 20
    assert trainer.global_step == 20
