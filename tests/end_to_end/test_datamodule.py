"""Where loaders come from: the call, the datamodule, the module; and how batches get to the device."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import leyden as L
from leyden.data import CombinedLoader
from leyden.errors import ConfigurationError, DataError, LeydenWarning
from quiet import make_trainer

torch.set_num_threads(1)


class Noting(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(("train", plain(batch)))
        return self.layer.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(("val", plain(batch)))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(("test", plain(batch)))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.seen.append(("predict", plain(batch)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(value) for value in batch]
    return batch.flatten().tolist() if isinstance(batch, torch.Tensor) else batch


def data(*values: float, **options: Any) -> Any:
    return DataLoader(torch.tensor(values, dtype=torch.float).unsqueeze(1), **({"batch_size": 1} | options))  # type: ignore[arg-type]


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(("setup", stage))

    def teardown(self, stage: str) -> None:
        self.calls.append(("teardown", stage))

    def loader(self, kind: str, value: float) -> Any:
        self.calls.append(kind)
        return data(value)

    def train_dataloader(self) -> Any:
        return self.loader("train", 1)

    def val_dataloader(self) -> Any:
        return self.loader("val", 2)

    def test_dataloader(self) -> Any:
        return self.loader("test", 3)

    def predict_dataloader(self) -> Any:
        return self.loader("predict", 4)


# Once per verb


@pytest.mark.parametrize(
    ("verb", "loaders", "seen"),
    [
        ("fit", ["train", "val"], [("train", [1]), ("val", [2])]),
        ("validate", ["val"], [("val", [2])]),
        ("test", ["test"], [("test", [3])]),
        ("predict", ["predict"], [("predict", [4])]),
    ],
)
def test_a_verb_calls_each_hook_once_with_itself_as_stage(tmp_path: Path, verb: str, loaders: Any, seen: Any) -> None:
    module, datamodule = Noting(), Data()
    getattr(make_trainer(tmp_path), verb)(module, datamodule=datamodule)
    assert datamodule.calls == ["prepare_data", ("setup", verb), *loaders, ("teardown", verb)]
    assert module.seen == seen


def test_loaders_are_asked_for_once_in_a_fit_of_many_validations(tmp_path: Path) -> None:
    datamodule = Data()
    make_trainer(tmp_path, max_epochs=4, num_sanity_val_steps=2).fit(Noting(), datamodule=datamodule)
    assert datamodule.calls == ["prepare_data", ("setup", "fit"), "val", "train", ("teardown", "fit")]


def test_the_datamodule_knows_its_trainer(tmp_path: Path) -> None:
    class Knowing(Data):
        def setup(self, stage: str) -> None:
            assert self.trainer is trainer
            assert trainer.datamodule is self
            assert trainer.lightning_module is module

    trainer, module = make_trainer(tmp_path), Noting()
    trainer.fit(module, datamodule=Knowing())


def test_a_datamodule_without_super_init_works(tmp_path: Path) -> None:
    class Forgetful(L.LightningDataModule):
        def __init__(self) -> None:
            pass

        def train_dataloader(self) -> Any:
            return data(1)

        def val_dataloader(self) -> Any:
            return data(2)

    module = Noting()
    make_trainer(tmp_path).fit(module, datamodule=Forgetful())
    assert module.seen == [("train", [1]), ("val", [2])]


def test_test_after_fit_takes_the_datamodule_again(tmp_path: Path) -> None:
    trainer, module, datamodule = make_trainer(tmp_path), Noting(), Data()
    trainer.fit(module, datamodule=datamodule)
    datamodule.calls.clear()
    trainer.test()
    assert datamodule.calls == ["prepare_data", ("setup", "test"), "test", ("teardown", "test")]


# As people pass it


def test_the_datamodule_may_come_second_and_by_position(tmp_path: Path) -> None:
    module = Noting()
    trainer = make_trainer(tmp_path)
    trainer.fit(module, Data())
    trainer.validate(module, Data())
    trainer.test(module, Data())
    trainer.predict(module, Data())
    assert [stage for stage, _ in module.seen] == ["train", "val", "val", "test", "predict"]


def test_loaders_and_a_datamodule_together_are_refused(tmp_path: Path) -> None:
    trainer, module = make_trainer(tmp_path), Noting()
    both = "both dataloaders and a datamodule"
    with pytest.raises(ConfigurationError, match=f"fit got {both}"):
        trainer.fit(module, data(1), datamodule=Data())
    with pytest.raises(ConfigurationError, match=f"fit got {both}"):
        trainer.fit(module, val_dataloaders=data(1), datamodule=Data())
    with pytest.raises(ConfigurationError, match=f"fit got {both}"):
        trainer.fit(module, Data(), data(1))
    with pytest.raises(ConfigurationError, match=f"fit got {both}"):
        trainer.fit(module, Data(), datamodule=Data())
    for verb in ("validate", "test", "predict"):
        with pytest.raises(ConfigurationError, match=f"{verb} got {both}"):
            getattr(trainer, verb)(module, data(1), datamodule=Data())
    assert module.seen == []


def test_a_datamodule_in_the_place_of_validation_loaders_is_refused(tmp_path: Path) -> None:
    with pytest.raises((DataError, ConfigurationError), match="datamodule"):
        make_trainer(tmp_path).fit(Noting(), data(1), Data())


# Who is asked


class Own(Noting):
    def train_dataloader(self) -> Any:
        return data(10)

    def val_dataloader(self) -> Any:
        return data(20)

    def test_dataloader(self) -> Any:
        return [data(30), data(31)]

    def predict_dataloader(self) -> Any:
        return data(40)


def test_the_module_s_own_loaders_are_taken(tmp_path: Path) -> None:
    trainer, module = make_trainer(tmp_path), Own()
    trainer.fit(module)
    trainer.validate(module)
    trainer.test(module)
    trainer.predict(module)
    found = [("train", [10]), ("val", [20]), ("val", [20]), ("test", [30]), ("test", [31]), ("predict", [40])]
    assert module.seen == found


def test_what_is_passed_wins_over_the_module_s_and_the_datamodule_s_over_both(tmp_path: Path) -> None:
    module = Own()
    make_trainer(tmp_path).fit(module, data(5), data(6))
    make_trainer(tmp_path).fit(module, data(5))
    make_trainer(tmp_path).fit(module, datamodule=Data())
    assert module.seen == [
        ("train", [5]), ("val", [6]), ("train", [5]), ("val", [20]), ("train", [1]), ("val", [2]),
    ]  # fmt: skip


def test_a_hook_that_the_datamodule_lacks_is_the_module_s(tmp_path: Path) -> None:
    class OnlyTrain(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return data(1)

    module = Own()
    make_trainer(tmp_path).fit(module, datamodule=OnlyTrain())
    assert module.seen == [("train", [1]), ("val", [20])]


def test_a_loader_hook_patched_onto_the_instance_is_asked(tmp_path: Path) -> None:
    datamodule, module = L.LightningDataModule(), Noting()
    datamodule.train_dataloader = lambda: data(7)  # type: ignore[method-assign]
    module.val_dataloader = lambda: data(8)  # type: ignore[method-assign]
    make_trainer(tmp_path).fit(module, datamodule=datamodule)
    assert module.seen == [("train", [7]), ("val", [8])]


def test_without_a_training_loader_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no train_dataloader.*in Noting"):
        make_trainer(tmp_path).fit(Noting(), val_dataloaders=data(1))
    with pytest.raises(DataError, match=r"There is no test_dataloader.*in LightningDataModule"):
        make_trainer(tmp_path).test(Noting(), datamodule=L.LightningDataModule())


def test_half_of_a_validation_is_announced(tmp_path: Path) -> None:
    class NoStep(Noting):
        validation_step = L.LightningModule.validation_step  # type: ignore[assignment]

    with pytest.warns(LeydenWarning, match=r"\[LEY-no-val-loader\] Noting has a validation_step but there is no"):
        make_trainer(tmp_path).fit(Noting(), data(1))
    with pytest.warns(LeydenWarning, match=r"\[LEY-no-validation-step\] .* but NoStep has no validation_step"):
        make_trainer(tmp_path).fit(NoStep(), data(1), data(2))


@pytest.mark.parametrize("sanity", [0, 2])
def test_half_of_a_validation_is_announced_once(tmp_path: Path, sanity: int) -> None:
    with pytest.warns(LeydenWarning, match="LEY-no-val-loader") as caught:
        make_trainer(tmp_path, num_sanity_val_steps=sanity).fit(Noting(), data(1))
    assert len(caught) == 1


# Transfer hooks


class Transferring:
    """The three hooks, each adding its own digit."""

    factor = 1

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 10 + 1 * self.factor + dataloader_idx * 1000

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        assert device == torch.device("cpu")
        return batch * 10 + 2 * self.factor

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 10 + 3 * self.factor


class TransferringModule(Transferring, Noting):
    pass


class TransferringData(Transferring, Data):
    factor = 3


def test_transfer_hooks_of_the_module_run_in_order_in_every_stage(tmp_path: Path) -> None:
    trainer, module = make_trainer(tmp_path), TransferringModule()
    trainer.fit(module, data(4), data(5))
    trainer.test(module, [data(6), data(7)])
    trainer.predict(module, data(8))
    assert module.seen == [
        ("train", [4123]), ("val", [5123]), ("test", [6123]), ("test", [107123]), ("predict", [8123]),
    ]  # fmt: skip


def test_transfer_hooks_of_the_datamodule_win_over_the_module_s(tmp_path: Path) -> None:
    module = TransferringModule()
    make_trainer(tmp_path).fit(module, datamodule=TransferringData())
    assert module.seen == [("train", [1369]), ("val", [2369])]


def test_each_transfer_hook_is_looked_up_by_itself(tmp_path: Path) -> None:
    class Partly(Data):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return -batch

    module = TransferringModule()
    make_trainer(tmp_path).fit(module, datamodule=Partly())
    assert module.seen == [("train", [-112]), ("val", [-212])]


def test_batch_hooks_see_the_transferred_batch(tmp_path: Path) -> None:
    class Looking(TransferringModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert batch.item() == 4123

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert batch.item() == 4123
            self.seen.append(("end", batch_idx))

    module = Looking()
    make_trainer(tmp_path, limit_val_batches=0).fit(module, data(4))
    assert module.seen[-1] == ("end", 0)


def test_a_batch_without_tensors_goes_through_untouched(tmp_path: Path) -> None:
    batches = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    got: list[Any] = []

    class Raw(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            got.append(batch)
            return self.layer.weight.sum()

    make_trainer(tmp_path, limit_val_batches=0).fit(Raw(), iter(batches))
    assert all(one is other for one, other in zip(got, batches, strict=True))


# Several training loaders


def test_training_loaders_in_a_dict_are_read_together_the_shorter_again_and_again(tmp_path: Path) -> None:
    module = Noting()
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    loaders = {"a": data(1, 2, 3, 4, 5), "b": data(10, 20)}
    trainer.fit(module, loaders)
    epoch = [("train", {"a": [a], "b": [b]}) for a, b in [(1, 10), (2, 20), (3, 10), (4, 20), (5, 10)]]
    assert module.seen == epoch * 2
    assert trainer.num_training_batches == 5
    assert trainer.train_dataloader is loaders


@pytest.mark.parametrize("collection", [list, tuple])
def test_training_loaders_in_a_sequence_give_sequences(tmp_path: Path, collection: Any) -> None:
    module = Noting()
    make_trainer(tmp_path, limit_val_batches=0).fit(module, collection([data(1, 2), data(10)]))
    assert module.seen == [("train", [[1], [10]]), ("train", [[2], [10]])]


def test_training_loaders_may_be_nested(tmp_path: Path) -> None:
    module = Noting()
    make_trainer(tmp_path, limit_val_batches=0).fit(module, {"x": [data(1, 2), data(3)], "y": data(4, 5)})
    assert module.seen == [("train", {"x": [[1], [3]], "y": [4]}), ("train", {"x": [[2], [3]], "y": [5]})]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [[1, 10], [2, 20]]),
        ("max_size", [[1, 10], [2, 20], [3, None]]),
        ("max_size_cycle", [[1, 10], [2, 20], [3, 10]]),
        ("sequential", [1, 2, 3, 10, 20]),
    ],
)
def test_a_combined_loader_trains_in_its_own_mode(tmp_path: Path, mode: str, expected: Any) -> None:
    module = Noting()
    trainer = make_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(module, CombinedLoader([data(1, 2, 3), data(10, 20)], mode))

    def squeeze(batch: Any) -> Any:
        return batch[0] if mode == "sequential" else [part[0] if part else None for part in batch]

    assert [squeeze(batch) for _, batch in module.seen] == expected
    assert trainer.num_training_batches == len(expected)
    assert trainer.global_step == len(expected)


def test_a_limit_cuts_loaders_that_are_read_together(tmp_path: Path) -> None:
    module = Noting()
    make_trainer(tmp_path, limit_val_batches=0, limit_train_batches=3).fit(module, [data(1, 2, 3, 4), data(10, 20)])
    assert [batch for _, batch in module.seen] == [[[1], [10]], [[2], [20]], [[3], [10]]]


# The user's own objects


class Remembering(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), float(seeded)])


seeded = 0


def set_seeded(worker: int) -> None:
    global seeded
    seeded = 100 + worker


def test_a_loader_is_used_as_it_is_and_its_worker_init_fn_is_called(tmp_path: Path) -> None:
    loaders = {
        kind: DataLoader(Remembering(), batch_size=2, num_workers=1, worker_init_fn=set_seeded)
        for kind in ("train", "val")
    }
    before = {kind: dict(vars(loader)) for kind, loader in loaders.items()}
    trainer, module = make_trainer(tmp_path), Noting()
    trainer.fit(module, loaders["train"], loaders["val"])
    assert trainer.train_dataloader is loaders["train"]
    assert trainer.val_dataloaders is loaders["val"]
    assert {kind: dict(vars(loader)) for kind, loader in loaders.items()} == before
    assert module.seen == [
        ("train", [0, 100, 1, 100]), ("train", [2, 100, 3, 100]), ("val", [0, 100, 1, 100]), ("val", [2, 100, 3, 100]),
    ]  # fmt: skip


def test_the_very_loader_that_was_given_is_iterated(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            asked.append(self)
            return super().__iter__()

    train, val = (Own(torch.ones(2, 1), batch_size=1) for _ in range(2))  # type: ignore[arg-type]
    make_trainer(tmp_path, max_epochs=2).fit(Noting(), train, val)
    assert [id(loader) for loader in asked] == [id(train), id(val)] * 2


def test_persistent_workers_live_through_the_epochs_and_end_with_the_verb(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counting(Noting):
        def on_train_epoch_end(self) -> None:
            alive.append(len(multiprocessing.active_children()))

    loader = data(1, 2, 3, num_workers=1, persistent_workers=True)
    make_trainer(tmp_path, max_epochs=2, limit_val_batches=0, limit_train_batches=2).fit(Counting(), loader)
    assert alive == [1, 1]
    assert multiprocessing.active_children() == []
    assert [batch.item() for batch in loader] == [1, 2, 3]  # and can be started again
    loader._iterator._shutdown_workers()


def test_the_sampler_is_told_the_epoch(tmp_path: Path) -> None:
    samples = torch.arange(8.0).unsqueeze(1)
    sampler: Any = DistributedSampler(samples, num_replicas=1, rank=0, shuffle=True, seed=3)  # type: ignore[arg-type]
    loader = DataLoader(samples, batch_size=8, sampler=sampler)  # type: ignore[arg-type]
    module = Noting()
    make_trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(module, loader)
    expected = []
    for epoch in range(2):
        generator = torch.Generator().manual_seed(3 + epoch)
        expected.append(("train", torch.randperm(8, generator=generator).tolist()))
    assert module.seen == expected
    assert expected[0] != expected[1]
