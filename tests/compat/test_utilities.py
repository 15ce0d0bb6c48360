"""What stands behind the names of `leyden.utilities`, `leyden.accelerators`, `leyden.demos` and the datamodule's constructors."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, RandomSampler, SequentialSampler

import leyden as L
from leyden.accelerators import CPUAccelerator, CUDAAccelerator, find_usable_cuda_devices
from leyden.demos.boring_classes import (
    BoringDataModule,
    BoringModel,
    DemoModel,
    ManualOptimBoringModel,
    RandomDataset,
    RandomDictDataset,
    RandomIterableDataset,
    RandomIterableDatasetWithLen,
)
from leyden.errors import ConfigurationError, warn
from leyden.loggers.logger import Logger, rank_zero_experiment
from leyden.utilities import (
    GradClipAlgorithmType,
    disable_possible_user_warnings,
    grad_norm,
    measure_flops,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
    suggested_max_num_workers,
)
from leyden.utilities.model_helpers import is_overridden
from leyden.utilities.model_summary import ModelSummary, get_human_readable_count, summarize
from leyden.utilities.rank_zero import LightningDeprecationWarning, WarningCache, rank_prefixed_message, rank_zero_debug
from leyden.utilities.seed import isolate_rng
from leyden.utilities.types import LRSchedulerConfig
from quiet import make_trainer


@pytest.fixture
def second() -> Iterator[None]:
    """As in the second process of several."""
    rank_zero_only.rank = 1
    yield
    rank_zero_only.rank = None


@rank_zero_only
def answer(value: int) -> int:
    """Doubled."""
    return 2 * value


def test_rank_zero_only_calls_in_the_first_process() -> None:
    assert (answer(21), answer.__name__, answer.__doc__) == (42, "answer", "Doubled.")
    assert rank_zero_only.rank == 0


@pytest.mark.usefixtures("second")
def test_rank_zero_only_returns_a_default_in_others() -> None:
    assert answer(21) is None
    assert rank_zero_only(lambda: 1, default=7)() == 7


def test_rank_zero_only_works_on_methods() -> None:
    class Counter:
        n = 0

        @rank_zero_only
        def up(self, by: int = 1) -> None:
            self.n += by

    counter = Counter()
    counter.up(by=2)
    assert counter.n == 2


def test_the_rank_is_the_launchers_before_there_is_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (rank_zero_only.rank, answer(1)) == (1, None)


def test_messages_and_warnings_of_the_first_process(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "leyden"):
        rank_zero_info("%d steps", 3)
        rank_zero_debug("detail")
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("INFO", "3 steps"),
        ("DEBUG", "detail"),
    ]
    with pytest.warns(UserWarning, match="careful") as caught:
        rank_zero_warn("careful")
    assert caught[0].filename == __file__
    with pytest.warns(LightningDeprecationWarning, match="old"):
        rank_zero_deprecation("old")
    assert (rank_prefixed_message("x", 2), rank_prefixed_message("x", None)) == ("[rank: 2] x", "x")


@pytest.mark.usefixtures("second")
def test_other_processes_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "leyden"):
        rank_zero_info("x")
        rank_zero_debug("x")
        rank_zero_warn("x")  # would be an error here
        rank_zero_deprecation("x")
    assert not caplog.records


def test_messages_are_seen_where_nobody_has_set_logging_up() -> None:
    code = "from leyden.utilities import rank_zero_info; rank_zero_info('hello')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == "hello\n"


def test_a_warning_cache_says_each_message_once() -> None:
    cache = WarningCache()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("a", "b", "a"):
            cache.warn(text)
    assert [str(each.message) for each in caught] == ["a", "b"]
    with pytest.warns(DeprecationWarning, match="c"):
        cache.deprecation("c")
    assert cache == {"a", "b", "c"}


def test_possible_user_warnings_can_be_muted() -> None:
    with warnings.catch_warnings():
        disable_possible_user_warnings()
        warn("some-code", "muted")
    with pytest.warns(L.utilities.warnings.PossibleUserWarning):
        warn("some-code", "seen")


class Experiment(Logger):
    name = "mine"
    version = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> str:
        """What the library underneath gives."""
        return "real"

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None) -> None: ...


def test_an_experiment_of_the_first_process() -> None:
    assert Experiment().experiment == "real"


@pytest.mark.usefixtures("second")
def test_an_experiment_of_others_accepts_everything() -> None:
    found: Any = Experiment().experiment
    assert found.add_scalar("x", 1).more[3] is found


@pytest.mark.parametrize("power", [1, 2.0, "inf"])
def test_grad_norm_is_the_norm_of_all_gradients_as_one_vector(power: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[1].bias.requires_grad_(False)
    module(torch.randn(5, 3)).square().sum().backward()
    norms = grad_norm(module, power)
    p = float(power)
    flat = torch.cat([each.grad.flatten() for each in module.parameters() if each.grad is not None])
    assert norms.keys() == {
        *(f"grad_{p}_norm/{name}" for name in ("0.weight", "0.bias", "1.weight")),
        f"grad_{p}_norm_total",
    }
    torch.testing.assert_close(norms[f"grad_{p}_norm_total"], flat.norm(p))
    torch.testing.assert_close(norms[f"grad_{p}_norm/0.weight"], module[0].weight.grad.norm(p))
    lightning = pytest.importorskip("lightning.pytorch.utilities")
    torch.testing.assert_close(norms, lightning.grad_norm(module, power))
    assert "grad_2.0_norm|0.bias" in grad_norm(module, 2, group_separator="|")


def test_grad_norm_without_gradients_and_with_a_wrong_power() -> None:
    assert grad_norm(nn.Linear(1, 1), 2) == {}
    with pytest.raises(ConfigurationError, match="norm_type=0 is not valid"):
        grad_norm(nn.Linear(1, 1), 0)


def test_measure_flops_counts_a_multiplication_and_an_addition_as_two() -> None:
    with torch.device("meta"):
        model, batch = nn.Linear(3, 4, bias=False), torch.randn(5, 3)
    forward = 2 * 5 * 3 * 4
    assert measure_flops(model, lambda: model(batch)) == forward
    assert (
        measure_flops(model, lambda: model(batch), lambda out: out.sum()) == 2 * forward
    )  # of the weight; not of the batch


def test_workers_leave_a_core_for_each_process() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert suggested_max_num_workers(1) == max(1, cores - 1)
    assert suggested_max_num_workers(1000) == 1
    with pytest.raises(ConfigurationError, match="local_world_size=0"):
        suggested_max_num_workers(0)


def test_isolate_rng_leaves_no_trace() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with isolate_rng():
        torch.rand(3)
    assert torch.equal(torch.rand(1), expected)


def test_words_are_strings_that_the_trainer_takes(tmp_path: Path) -> None:
    assert GradClipAlgorithmType.VALUE == "value"
    trainer = make_trainer(tmp_path, gradient_clip_val=1.0, gradient_clip_algorithm=GradClipAlgorithmType.VALUE)
    trainer.fit(BoringModel())
    assert trainer.gradient_clip_algorithm == "value"


def test_is_overridden_looks_at_class_and_instance() -> None:
    model = BoringModel()
    assert is_overridden("training_step", model)
    assert not is_overridden("predict_step", model)
    model.predict_step = lambda batch, batch_idx: batch  # type: ignore[method-assign]
    assert is_overridden("predict_step", model)
    assert not is_overridden("on_fit_start", L.Callback())
    assert is_overridden("setup", BoringDataModule())
    assert is_overridden("extra_repr", nn.Linear(1, 1), nn.Module)
    assert not is_overridden("setup", None)
    with pytest.raises(ConfigurationError, match="parent=None"):
        is_overridden("forward", nn.Linear(1, 1))


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.head = nn.BatchNorm1d(2)
        self.head.requires_grad_(False)
        self.example_input_array = torch.zeros(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("depth", [0, 1, -1])
def test_a_model_summary_counts_what_lightnings_counts(depth: int) -> None:
    summary = ModelSummary(Net(), depth)
    theirs_of = pytest.importorskip("lightning.pytorch.utilities.model_summary").ModelSummary
    pl = pytest.importorskip("lightning.pytorch")
    twin = type("Twin", (pl.LightningModule,), {"forward": Net.forward})()
    for name, part in Net().named_children():
        setattr(twin, name, part)
    twin.example_input_array = torch.zeros(3, 4)
    theirs = theirs_of(twin, depth)
    for name in (
        "total_parameters",
        "trainable_parameters",
        "layer_names",
        "layer_types",
        "param_nums",
        "training_modes",
    ):
        assert getattr(summary, name) == getattr(theirs, name), name
    if depth:
        assert summary.in_sizes == theirs.in_sizes
        assert summary.out_sizes == theirs.out_sizes
    assert summary.max_depth == depth
    assert summarize(Net(), depth) == summary
    assert "Trainable params" in str(summary)


def test_numbers_for_people() -> None:
    assert [get_human_readable_count(number) for number in (123, 1234, 2_000_000, 3_000_000_000)] == [
        "123",
        "1.2 K",
        "2.0 M",
        "3.0 B",
    ]


def test_scheduler_configs_are_of_the_type_that_is_imported() -> None:
    class Model(BoringModel):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

    trainer = L.Trainer(
        accelerator="cpu", logger=False, fast_dev_run=2, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(Model())
    (config,) = trainer.lr_scheduler_configs
    assert (type(config), config.interval) == (LRSchedulerConfig, "step")
    assert math.isclose(trainer.optimizers[0].param_groups[0]["lr"], 0.1 * 0.1**2)


def test_accelerators_say_what_is_here() -> None:
    assert (CPUAccelerator.is_available(), CPUAccelerator.auto_device_count(), CPUAccelerator.name()) == (
        True,
        1,
        "cpu",
    )
    assert CUDAAccelerator.auto_device_count() == torch.cuda.device_count()
    assert CUDAAccelerator.is_available() == torch.cuda.is_available()
    assert CPUAccelerator().get_parallel_devices(3) == [torch.device("cpu")] * 3
    assert CPUAccelerator().get_device_stats("cpu") == {}
    assert find_usable_cuda_devices(0) == []
    with pytest.raises(ConfigurationError, match="num_devices=99 is not valid"):
        find_usable_cuda_devices(99)


# ------------------------------------------------------------------------------------------------------ demos and data


@pytest.mark.parametrize("model", [BoringModel, ManualOptimBoringModel])
def test_boring_models_learn_to_give_ones(model: type[BoringModel], tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, fixed = model(), torch.randn(100, 32)
    before = made.loss(made(fixed)).item()
    trainer = make_trainer(tmp_path, num_sanity_val_steps=2)
    trainer.fit(made)
    assert trainer.global_step == 64
    assert made.loss(made(fixed)).item() < before
    assert trainer.validate(made) == [{}]
    assert trainer.test(made) == [{}]
    predictions = trainer.predict(made)
    assert predictions is not None
    assert (len(predictions), predictions[0].shape) == (64, (1, 2))


def test_the_boring_datamodule_has_a_loader_for_each_verb(tmp_path: Path) -> None:
    data, trainer, model = BoringDataModule(), make_trainer(tmp_path), BoringModel()
    trainer.fit(model, datamodule=data)
    trainer.validate(model, datamodule=data)
    trainer.test(model, datamodule=data)
    assert len(trainer.predict(model, datamodule=data) or ()) == 64
    subsets = (data.random_train, data.random_val, data.random_test, data.random_predict)
    assert sorted(index for subset in subsets for index in subset.indices) == list(range(256))


def test_the_demo_model_keeps_its_hyperparameters(tmp_path: Path) -> None:
    model = DemoModel(out_dim=3)
    make_trainer(tmp_path).fit(model)
    assert model.hparams == {"out_dim": 3, "learning_rate": 0.02}


def test_random_datasets() -> None:
    assert (len(RandomDataset(3, 5)), RandomDataset(3, 5)[0].shape) == (5, (3,))
    sample = RandomDictDataset(3, 5)[4]
    assert torch.equal(sample["a"] + 1, sample["b"])
    assert [each.shape for each in RandomIterableDataset(3, 2)] == [(3,)] * 2
    assert len(RandomIterableDatasetWithLen(3, 2)) == len(list(RandomIterableDatasetWithLen(3, 2))) == 2
    with pytest.raises(TypeError):
        len(RandomIterableDataset(3, 2))  # type: ignore[arg-type]


class Numbers(Dataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((32,), float(index))


def test_from_datasets_makes_loaders_of_one_and_of_several(tmp_path: Path) -> None:
    data = L.LightningDataModule.from_datasets(
        Numbers(8), [Numbers(3), Numbers(5)], predict_dataset={"a": Numbers(2)}, batch_size=2, num_workers=0
    )
    train = data.train_dataloader()
    assert (type(train.sampler), train.batch_size, len(train)) == (RandomSampler, 2, 4)
    first, second = data.val_dataloader()
    assert (type(first.sampler), len(first), len(second)) == (SequentialSampler, 2, 3)
    assert len(data.predict_dataloader()["a"]) == 1
    with pytest.raises(NotImplementedError, match="has no test_dataloader"):
        data.test_dataloader()
    trainer = make_trainer(tmp_path)

    class Model(BoringModel):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("n", batch.mean())

        train_dataloader = val_dataloader = L.LightningModule.train_dataloader

    trainer.fit(Model(), datamodule=data)
    assert (trainer.num_training_batches, trainer.num_val_batches) == (4, [2, 3])
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert values == {"n/dataloader_idx_0": 1.0, "n/dataloader_idx_1": 2.0}


def test_from_datasets_passes_on_what_the_class_takes() -> None:
    class Own(L.LightningDataModule):
        def __init__(self, name: str, batch_size: int = 7) -> None:
            super().__init__()
            self.given = (name, batch_size)

    class Any_(L.LightningDataModule):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.given = options

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.zeros(1)

    assert Own.from_datasets(Numbers(1), name="x", batch_size=3).given == ("x", 3)
    assert Any_.from_datasets(batch_size=3).given == {"batch_size": 3, "num_workers": 0}
    assert list(L.LightningDataModule.from_datasets(Stream()).train_dataloader()) == [torch.zeros(1, 1)]


def test_a_datamodule_is_loaded_with_the_arguments_that_programs_pass(tmp_path: Path) -> None:
    class Data(BoringDataModule):
        def __init__(self, size: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.size = size

        def state_dict(self) -> dict[str, Any]:
            return {"seen": 5}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.seen = state_dict["seen"]

    trainer, path = make_trainer(tmp_path, limit_train_batches=1), tmp_path / "a.ckpt"
    trainer.fit(BoringModel(), datamodule=Data(size=9))
    trainer.save_checkpoint(path)
    loaded = Data.load_from_checkpoint(str(path), map_location="cpu", weights_only=False)
    assert (loaded.size, loaded.seen, loaded.hparams) == (9, 5, {"size": 9})
    assert L.load_checkpoint(path)[Data.CHECKPOINT_HYPER_PARAMS_KEY] == {"size": 9}
    with pytest.raises(ConfigurationError, match="hparams_file is not supported"):
        Data.load_from_checkpoint(str(path), hparams_file="x.yaml")  # type: ignore[arg-type]


def test_a_bar_of_tqdms_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from leyden.callbacks import RichModelSummary, TQDMProgressBar

    bar = TQDMProgressBar(refresh_rate=0)
    trainer = make_trainer(
        tmp_path, bar, RichModelSummary(max_depth=0), enable_progress_bar=True, enable_model_summary=True
    )
    trainer.fit(BoringModel())
    assert (trainer.progress_bar_callback, bar.is_enabled) == (bar, False)
    assert "epoch" not in capsys.readouterr().out
    assert TQDMProgressBar(refresh_rate=10, leave=True).is_enabled
    with pytest.raises(ConfigurationError, match="refresh_rate=-1"):
        TQDMProgressBar(refresh_rate=-1)
