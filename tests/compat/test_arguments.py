"""Arguments of former days, of the Trainer and of callbacks: what each becomes, what is told of it, what effect it has."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
)
from leyden.compat import once
from leyden.compat.arguments import FORMER_NAMES, Modern, modernise
from leyden.compat.translation import DEFAULTS
from leyden.compat.watchers import GPUMemory, GradientNorms, NaNGradients, ValLossIfLogged
from leyden.errors import ConfigurationError, LeydenWarning, MetricError
from quiet import Memory

torch.set_num_threads(1)

ASKED = {
    name: each.default
    for name, each in inspect.signature(L.Trainer.__init__).parameters.items()
    if each.kind is each.KEYWORD_ONLY
}
STOP, KEEP = EarlyStopping("loss"), ModelCheckpoint(monitor="loss")
OPEN = ModelCheckpoint()


@pytest.fixture(autouse=True)
def say_everything_again() -> Iterator[None]:
    once.forget()
    yield
    once.forget()


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with GPUs, as far as arguments are translated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def heard(make: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, and the former spellings that it tells of, without their code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = make()
    return result, [str(each.message).removeprefix("[LEY-former-name] ") for each in caught]


def translated(given: dict[str, Any]) -> tuple[Modern, list[str]]:
    asked = ASKED | {name: value for name, value in given.items() if name in ASKED}
    found: tuple[Modern, list[str]] = heard(
        lambda: modernise(asked, {name: value for name, value in given.items() if name not in ASKED})
    )
    return found


def seen(callback: Any) -> Any:
    """A callback by what matters of it."""
    names = {
        EarlyStopping: ("monitor", "patience", "mode", "strict", "verbose"),
        ModelCheckpoint: ("dirpath", "monitor", "mode"),
        ModelSummary: ("max_depth",),
        GradientAccumulationScheduler: ("scheduling",),
        GradientNorms: ("norm_type",),
        GPUMemory: ("mode",),
    }.get(type(callback), ())
    return (type(callback).__name__, *(getattr(callback, name) for name in names))


ALL = {"limit_train_batches": 0.1, "limit_val_batches": 0.1, "limit_test_batches": 0.1}
LEAVE = "leave it out"
# What was written; today's arguments that differ from their defaults, callbacks as `seen`; a part of what is told.
ROWS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # devices
    ({"gpus": 0}, {"accelerator": "cpu"}, "Trainer(accelerator='cpu')"),
    ({"gpus": None}, {"accelerator": "cpu"}, "Trainer(accelerator='cpu')"),
    ({"gpus": []}, {"accelerator": "cpu"}, "Trainer(accelerator='cpu')"),
    ({"gpus": None, "accelerator": "gpu"}, {"accelerator": "gpu"}, "leave it out, accelerator says it"),
    ({"gpus": 1}, {"accelerator": "gpu", "devices": 1}, "Trainer(accelerator='gpu', devices=1)"),
    ({"gpus": 8}, {"accelerator": "gpu", "devices": 8}, "Trainer(accelerator='gpu', devices=8)"),
    ({"gpus": -1}, {"accelerator": "gpu", "devices": -1}, "Trainer(accelerator='gpu', devices=-1)"),
    ({"gpus": "-1"}, {"accelerator": "gpu", "devices": -1}, "Trainer(accelerator='gpu', devices=-1)"),
    ({"gpus": "0,1"}, {"accelerator": "gpu", "devices": [0, 1]}, "Trainer(accelerator='gpu', devices=[0, 1])"),
    ({"gpus": "3"}, {"accelerator": "gpu", "devices": [3]}, "devices=[3]"),
    ({"gpus": [0, 1]}, {"accelerator": "gpu", "devices": [0, 1]}, "devices=[0, 1]"),
    ({"gpus": 2, "accelerator": "cuda"}, {"accelerator": "cuda", "devices": 2}, "accelerator='cuda', devices=2"),
    ({"gpus": 2, "devices": 2}, {"accelerator": "gpu", "devices": 2}, "accelerator='gpu', devices=2"),
    ({"nb_gpu_nodes": 4}, {"num_nodes": 4}, "Trainer(num_nodes=4)"),
    ({"num_tpu_cores": 8}, {"accelerator": "tpu", "devices": 8}, "Trainer(accelerator='tpu', devices=8)"),
    ({"tpu_cores": [5]}, {"accelerator": "tpu", "devices": [4]}, "Trainer(accelerator='tpu', devices=[4])"),
    ({"tpu_cores": "1", "gpus": None}, {"accelerator": "tpu", "devices": 1}, "devices=1"),
    ({"tpu_cores": None}, {}, ""),
    ({"tpu_cores": 0, "gpus": 1}, {"accelerator": "gpu", "devices": 1}, "devices=1"),
    ({"num_processes": 2}, {"accelerator": "cpu", "devices": 2}, "Trainer(accelerator='cpu', devices=2)"),
    ({"num_processes": 1}, {}, LEAVE),
    ({"num_processes": 2, "gpus": 2}, {"accelerator": "gpu", "devices": 2}, "one process for each device"),
    ({"distributed_backend": None}, {}, ""),
    ({"distributed_backend": "dp"}, {}, "leave it out: dp was for several GPUs"),
    ({"distributed_backend": "dp", "gpus": None}, {"accelerator": "cpu"}, "leave it out: dp was for several GPUs"),
    (
        {"distributed_backend": "dp", "gpus": 2},
        {"accelerator": "gpu", "devices": 2, "strategy": "ddp"},
        "strategy='ddp', accelerator='gpu', devices=2); distributed_backend='dp': dp divided each batch",
    ),
    ({"distributed_backend": "ddp", "gpus": 2}, {"accelerator": "gpu", "devices": 2, "strategy": "ddp"}, "'ddp'"),
    ({"distributed_backend": "ddp2", "gpus": -1}, {"accelerator": "gpu", "devices": -1, "strategy": "ddp"}, "divide"),
    ({"distributed_backend": "ddp_spawn"}, {"strategy": "ddp_spawn"}, "Trainer(strategy='ddp_spawn')"),
    (
        {"distributed_backend": "ddp_cpu", "num_processes": 2},
        {"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"},
        "Trainer(accelerator='cpu', devices=2, strategy='ddp_spawn')",
    ),
    (
        {"distributed_backend": "ddp_cpu"},
        {"accelerator": "cpu", "devices": 1, "strategy": "ddp_spawn"},
        "Trainer(accelerator='cpu', devices=1, strategy='ddp_spawn')",
    ),
    (
        {"distributed_backend": "ddp", "num_processes": 2},
        {"accelerator": "cpu", "devices": 2, "strategy": "ddp"},
        "Trainer(strategy='ddp', accelerator='cpu', devices=2)",
    ),
    ({"accelerator": "ddp", "gpus": 2}, {"accelerator": "gpu", "devices": 2, "strategy": "ddp"}, "strategy='ddp'"),
    ({"strategy": "dp", "gpus": 2}, {"accelerator": "gpu", "devices": 2, "strategy": "ddp"}, "batch_size"),
    ({"strategy": "fsdp", "gpus": 2}, {"accelerator": "gpu", "devices": 2, "strategy": "fsdp"}, "devices=2"),
    ({"auto_select_gpus": True}, {}, "CUDA_VISIBLE_DEVICES"),
    # precision
    ({"use_amp": True}, {"precision": "16-mixed"}, "Trainer(precision='16-mixed')"),
    ({"use_amp": True, "precision": 16}, {"precision": 16}, "Trainer(precision='16-mixed')"),
    ({"use_amp": False}, {}, LEAVE),
    ({"amp_level": "O2"}, {}, "has no levels"),
    ({"amp_backend": "native"}, {}, LEAVE),
    # callbacks that were arguments
    (
        {"early_stop_callback": True},
        {"callbacks": [("EarlyStopping", "val_loss", 3, "min", True, True)]},
        "EarlyStopping('val_loss', patience=3, verbose=True)",
    ),
    ({"early_stop_callback": False}, {}, LEAVE),
    ({"early_stop_callback": None}, {}, LEAVE),
    (
        {"early_stop_callback": STOP},
        {"callbacks": [("EarlyStopping", "loss", 3, "min", True, False)]},
        "Trainer(callbacks=[EarlyStopping(…)])",
    ),
    ({"early_stop_callback": STOP, "callbacks": STOP}, {"callbacks": [seen(STOP)]}, "callbacks=[EarlyStopping(…)]"),
    (
        {"checkpoint_callback": True},
        {"enable_checkpointing": True, "callbacks": [("ModelCheckpoint", None, None, "min"), ("ValLossIfLogged",)]},
        "Trainer(callbacks=[ModelCheckpoint(monitor='val_loss')])",
    ),
    (
        {"checkpoint_callback": True, "callbacks": KEEP},
        {"enable_checkpointing": True, "callbacks": [seen(KEEP)]},
        "=True)",
    ),
    ({"checkpoint_callback": False}, {"enable_checkpointing": False}, "Trainer(enable_checkpointing=False)"),
    ({"checkpoint_callback": None}, {}, ""),
    ({"checkpoint_callback": KEEP}, {"callbacks": [seen(KEEP)]}, "Trainer(callbacks=[ModelCheckpoint(…)])"),
    ({"checkpoint_callback": OPEN}, {"callbacks": [seen(OPEN), ("ValLossIfLogged",)]}, "with monitor='val_loss'"),
    (
        {"weights_save_path": "/w"},
        {"callbacks": [("ModelCheckpoint", "/w", None, "min")]},
        "ModelCheckpoint(dirpath='/w')",
    ),
    (
        {"weights_save_path": "/w", "callbacks": [ModelCheckpoint("/own")]},
        {"callbacks": [("ModelCheckpoint", "/own", None, "min")]},
        "leave it out: dirpath of ModelCheckpoint decides",
    ),
    (
        {"weights_save_path": "/w", "callbacks": [ModelCheckpoint()]},
        {"callbacks": [("ModelCheckpoint", "/w", None, "min")]},
        "ModelCheckpoint(dirpath='/w')",
    ),
    (
        {"weights_save_path": "/w", "checkpoint_callback": False},
        {"enable_checkpointing": False},
        "leave it out: there are no checkpoints",
    ),
    (
        {"weights_summary": "full"},
        {"enable_model_summary": True, "callbacks": [("ModelSummary", -1)]},
        "Trainer(callbacks=[ModelSummary(max_depth=-1)])",
    ),
    ({"weights_summary": "top"}, {"enable_model_summary": True, "callbacks": [("ModelSummary", 1)]}, "max_depth=1"),
    ({"weights_summary": None}, {"enable_model_summary": False}, "Trainer(enable_model_summary=False)"),
    ({"track_grad_norm": 2}, {"callbacks": [("GradientNorms", 2.0)]}, "leyden.utilities.grad_norm(self, 2.0)"),
    ({"track_grad_norm": "inf"}, {"callbacks": [("GradientNorms", float("inf"))]}, "grad_norm(self, inf)"),
    ({"track_grad_norm": -1}, {}, LEAVE),
    ({"print_nan_grads": True}, {"callbacks": [("NaNGradients",)]}, "Trainer(nan_policy='raise')"),
    ({"print_nan_grads": False}, {}, LEAVE),
    ({"log_gpu_memory": "all"}, {"callbacks": [("GPUMemory", "all")]}, "which logs on CUDA devices only"),
    ({"log_gpu_memory": "min_max"}, {"callbacks": [("GPUMemory", "min_max")]}, "GPUMemory('min_max')"),
    ({"log_gpu_memory": True}, {"callbacks": [("GPUMemory", "all")]}, "GPUMemory('all')"),
    ({"log_gpu_memory": None}, {}, LEAVE),
    (
        {"accumulate_grad_batches": {4: 2}},
        {"callbacks": [("GradientAccumulationScheduler", {0: 1, 4: 2})]},
        "GradientAccumulationScheduler({4: 2})",
    ),
    # how long, and how much
    ({"max_nb_epochs": 3}, {"max_epochs": 3}, "Trainer(max_epochs=3)"),
    ({"max_nb_epochs": None}, {}, ""),
    ({"min_nb_epochs": 2}, {"min_epochs": 2}, "Trainer(min_epochs=2)"),
    ({"max_steps": None}, {"max_steps": -1}, "Trainer(max_steps=-1)"),
    ({"overfit_pct": 0.1}, ALL, "Trainer(limit_train_batches=0.1, limit_val_batches=0.1, limit_test_batches=0.1)"),
    ({"overfit_pct": 0.0}, {}, LEAVE),
    ({"overfit_pct": None}, {}, LEAVE),
    ({"overfit_pct": 0.1, "train_percent_check": 0.5}, ALL, "leave it out: overfit_pct=0.1 decides"),
    ({"train_percent_check": 0.5}, {"limit_train_batches": 0.5}, "Trainer(limit_train_batches=0.5)"),
    ({"train_percent_check": 1}, {"limit_train_batches": 1.0}, "Trainer(limit_train_batches=1.0)"),
    ({"val_percent_check": 0}, {"limit_val_batches": 0.0}, "Trainer(limit_val_batches=0.0)"),
    ({"test_percent_check": 0.25}, {"limit_test_batches": 0.25}, "Trainer(limit_test_batches=0.25)"),
    ({"nb_sanity_val_steps": 5}, {"num_sanity_val_steps": 5}, "Trainer(num_sanity_val_steps=5)"),
    ({"gradient_clip": 0.5}, {"gradient_clip_val": 0.5}, "Trainer(gradient_clip_val=0.5)"),
    # what is shown and written
    ({"default_save_path": "/d"}, {"default_root_dir": "/d"}, "Trainer(default_root_dir='/d')"),
    ({"show_progress_bar": False}, {"enable_progress_bar": False}, "Trainer(enable_progress_bar=False)"),
    ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}, "Trainer(enable_progress_bar=False)"),
    ({"progress_bar_refresh_rate": 20}, {"enable_progress_bar": True}, "RichProgressBar(refresh_rate_s=…)"),
    ({"process_position": 1}, {}, LEAVE),
    ({"row_log_interval": 10}, {"log_every_n_steps": 10}, "Trainer(log_every_n_steps=10)"),
    ({"add_row_log_interval": 10}, {"log_every_n_steps": 10}, "Trainer(log_every_n_steps=10)"),
    ({"log_save_interval": 100}, {}, LEAVE),
    ({"flush_logs_every_n_steps": 100}, {}, LEAVE),
    ({"profiler": True}, {"profiler": "simple"}, "Trainer(profiler='simple')"),
    ({"profiler": False}, {}, LEAVE),
    # loaders and state
    ({"reload_dataloaders_every_epoch": True}, {"reload_dataloaders_every_n_epochs": 1}, "every_n_epochs=1"),
    ({"reload_dataloaders_every_epoch": False}, {}, LEAVE),
    ({"replace_sampler_ddp": False}, {"use_distributed_sampler": False}, "Trainer(use_distributed_sampler=False)"),
    ({"multiple_trainloader_mode": "max_size_cycle"}, {}, LEAVE),
    ({"prepare_data_per_node": True}, {}, LEAVE),
    ({"automatic_optimization": True}, {}, LEAVE),
    ({"resume_from_checkpoint": "/c"}, {"ckpt_path": "/c"}, "trainer.fit(model, ckpt_path='/c')"),
    ({"resume_from_checkpoint": None}, {}, ""),
    ({"truncated_bptt_steps": 5}, {"truncated_bptt_steps": 5}, "automatic_optimization = False"),
    ({"terminate_on_nan": True}, {"nan_policy": "raise"}, "Trainer(nan_policy='raise')"),
    ({"terminate_on_nan": False}, {}, LEAVE),
    ({"move_metrics_to_cpu": True}, {}, LEAVE),
    ({"enable_pl_optimizer": True}, {}, LEAVE),
    # what Lightning 2 has elsewhere, where nothing is asked for
    ({"auto_lr_find": False}, {}, LEAVE),
    ({"auto_scale_batch_size": None}, {}, ""),
    ({"stochastic_weight_avg": False}, {}, LEAVE),
    ({"ipus": None}, {}, ""),
    ({"hpus": 0}, {}, LEAVE),
]


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(("given", "expected", "told"), ROWS, ids=[str(sorted(row[0])) for row in ROWS])
def test_what_each_becomes(given: dict[str, Any], expected: dict[str, Any], told: str) -> None:
    modern, messages = translated(given)
    assert modern.arguments.keys() == ASKED.keys()
    found = {name: value for name, value in modern.arguments.items() if value != ASKED[name]}
    found = {name: value for name, value in found.items() if name not in given or name in expected}
    if "callbacks" in found:
        found["callbacks"] = [seen(callback) for callback in found["callbacks"]]
    for name in ("ckpt_path", "truncated_bptt_steps"):
        if getattr(modern, name) is not None:
            found[name] = getattr(modern, name)
    assert found == {name: value for name, value in expected.items() if value != ASKED.get(name, ...)}
    assert any(told in message for message in messages) if told else not messages, messages
    for message in messages:
        assert " is a former spelling. Today: " in message or " has former spellings. Today: " in message


def test_floats_stay_floats() -> None:
    modern, _ = translated({"train_percent_check": 1, "val_percent_check": 0})
    assert type(modern.arguments["limit_train_batches"]) is float  # 1 would be one batch
    assert type(modern.arguments["limit_val_batches"]) is float


def test_every_former_name_has_a_row() -> None:
    assert set(FORMER_NAMES) == {name for given, _, _ in ROWS for name in given} - ASKED.keys()
    assert not set(FORMER_NAMES) & ASKED.keys()


def test_the_list_of_2020_is_whole() -> None:
    names = """gpus num_tpu_cores distributed_backend use_amp amp_level early_stop_callback checkpoint_callback
    resume_from_checkpoint default_save_path show_progress_bar progress_bar_refresh_rate overfit_pct train_percent_check
    val_percent_check test_percent_check row_log_interval log_save_interval track_grad_norm print_nan_grads weights_summary
    weights_save_path truncated_bptt_steps reload_dataloaders_every_epoch log_gpu_memory process_position max_nb_epochs
    min_nb_epochs nb_gpu_nodes gradient_clip nb_sanity_val_steps add_row_log_interval"""
    assert set(names.split()) <= set(FORMER_NAMES)


def test_defaults_are_the_trainers() -> None:
    assert {name: ASKED[name] for name in DEFAULTS} == DEFAULTS


def test_one_call_is_told_of_once_where_it_was_written() -> None:
    def make(epochs: int, **more: Any) -> None:
        L.Trainer(max_nb_epochs=epochs, gpus=0, logger=False, **more)

    with pytest.warns(LeydenWarning) as caught:
        make(1)
    assert [str(each.message) for each in caught] == [
        "[LEY-former-name] Trainer(max_nb_epochs=1, gpus=0) has former spellings. "
        "Today: Trainer(max_epochs=1, accelerator='cpu')."
    ]
    assert {each.filename for each in caught} == {__file__}
    assert not heard(lambda: make(1))[1]
    assert not heard(lambda: make(2))[1]  # the same names
    assert len(heard(lambda: make(2, show_progress_bar=False))[1]) == 1


@pytest.mark.usefixtures("eight_gpus")
def test_the_whole_call_of_today_is_told_and_what_has_no_effect() -> None:
    former = {
        "gpus": 2,
        "distributed_backend": "ddp",
        "amp_level": "O2",
        "use_amp": True,
        "max_nb_epochs": 3,
        "early_stop_callback": True,
        "weights_summary": "full",
        "train_percent_check": 0.5,
        "resume_from_checkpoint": "a.ckpt",
        "max_steps": None,
    }
    _, messages = translated(former)
    assert messages == [
        "Trainer(gpus=2, distributed_backend='ddp', amp_level='O2', use_amp=True, max_nb_epochs=3, early_stop_callback=True, "
        "weights_summary='full', train_percent_check=0.5, resume_from_checkpoint='a.ckpt', max_steps=None) has former spellings. "
        "Today: Trainer(accelerator='gpu', devices=2, strategy='ddp', precision='16-mixed', max_epochs=3, "
        "limit_train_batches=0.5, max_steps=-1, callbacks=[EarlyStopping('val_loss', patience=3, verbose=True), "
        "ModelSummary(max_depth=-1)]); amp_level='O2': leave it out: torch's own mixed precision, "
        "Trainer(precision='16-mixed'), has no levels; resume_from_checkpoint='a.ckpt': "
        "trainer.fit(model, ckpt_path='a.ckpt'), or test(model, ckpt_path='a.ckpt')."
    ]


CONTRADICTIONS = [
    ({"gpus": 2, "devices": 4}, "gpus=2 and devices=4 contradict"),
    ({"gpus": 0, "accelerator": "gpu"}, "gpus=0 and accelerator='gpu' contradict"),
    ({"gpus": 2, "num_tpu_cores": 8}, "num_tpu_cores=8 and gpus=2 contradict"),
    ({"gpus": 2, "distributed_backend": "ddp_cpu"}, "gpus=2 and distributed_backend='ddp_cpu' contradict"),
    ({"distributed_backend": "ddp", "strategy": "fsdp"}, "distributed_backend='ddp' and strategy='fsdp' contradict"),
    ({"distributed_backend": "ddp", "strategy": "dp"}, "distributed_backend='ddp' and strategy='dp' contradict"),
    ({"max_nb_epochs": 3, "max_epochs": 4}, "max_nb_epochs=3 and max_epochs=4 contradict.*Trainer\\(max_epochs=3\\)"),
    (
        {"train_percent_check": 1, "limit_train_batches": 1},
        "train_percent_check=1 and limit_train_batches=1 contradict",
    ),
    ({"overfit_pct": 0.1, "limit_val_batches": 5}, "overfit_pct=0.1 and limit_val_batches=5 contradict"),
    ({"row_log_interval": 1, "add_row_log_interval": 2}, "add_row_log_interval=2 and row_log_interval=1 contradict"),
    (
        {"show_progress_bar": True, "progress_bar_refresh_rate": 0},
        "refresh_rate=0 and show_progress_bar=True contradict",
    ),
    ({"use_amp": True, "precision": 32}, "use_amp=True and precision=32 contradict"),
    (
        {"early_stop_callback": True, "callbacks": [EarlyStopping("val_loss", mode="max")]},
        "early_stop_callback=True and the EarlyStopping\\('val_loss'\\) among callbacks contradict",
    ),
    ({"weights_summary": "full", "callbacks": ModelSummary()}, "weights_summary='full' and the ModelSummary"),
    ({"weights_summary": None, "enable_model_summary": True}, "weights_summary=None and enable_model_summary=True"),
    (
        {"checkpoint_callback": False, "enable_checkpointing": True},
        "checkpoint_callback=False and enable_checkpointing=True",
    ),
    (
        {"accumulate_grad_batches": {2: 2}, "callbacks": [GradientAccumulationScheduler({1: 2})]},
        "accumulate_grad_batches={2: 2} and the GradientAccumulationScheduler",
    ),
]


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(("given", "message"), CONTRADICTIONS)
def test_contradictions_name_both(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        translated(given)


BAD = [
    ({"max_epoch": 3}, "Trainer has no argument 'max_epoch'. Did you mean 'max_epochs'\\?"),
    ({"gpu": 1}, "Trainer has no argument 'gpu'. Did you mean 'gpus'\\?"),
    ({"train_percent_chek": 1}, "Did you mean 'train_percent_check'\\?"),
    ({"zzz": 1}, "Trainer has no argument 'zzz'.$"),
    ({"gpus": "all"}, "gpus='all' is not valid.*-1 for all"),
    ({"gpus": True}, "gpus=True is not valid"),
    ({"gpus": 1.5}, "gpus=1.5 is not valid"),
    ({"tpu_cores": 3}, "tpu_cores=3 is not valid.*1 or 8"),
    ({"num_processes": 0}, "num_processes=0 is not valid"),
    ({"distributed_backend": "horovod"}, "distributed_backend='horovod' is not valid"),
    ({"distributed_backend": "ddp_cpus"}, "Did you mean 'ddp_cpu'\\?"),
    ({"overfit_pct": 5}, "overfit_pct=5 is not valid. Allowed: a fraction from 0.0 to 1.0"),
    ({"val_percent_check": True}, "val_percent_check=True is not valid"),
    ({"early_stop_callback": EarlyStopping}, "early_stop_callback=.*is not valid"),
    ({"checkpoint_callback": [STOP]}, "checkpoint_callback=.*is not valid"),
    ({"weights_summary": "all"}, "weights_summary='all' is not valid"),
    ({"progress_bar_refresh_rate": -1}, "progress_bar_refresh_rate=-1 is not valid"),
    ({"track_grad_norm": 0}, "track_grad_norm=0 is not valid"),
    ({"track_grad_norm": "two"}, "track_grad_norm='two' is not valid"),
    ({"log_gpu_memory": "max"}, "log_gpu_memory='max' is not valid"),
    ({"truncated_bptt_steps": 0}, "truncated_bptt_steps=0 is not valid"),
    ({"auto_lr_find": True}, "Write instead: the learning rate"),
    ({"auto_scale_batch_size": "power"}, "Write instead: the batch size"),
    ({"stochastic_weight_avg": True}, "WeightAveraging"),
    ({"ipus": 4}, "no support for IPUs"),
    ({"multiple_trainloader_mode": "min_size"}, "CombinedLoader\\(loaders, mode='min_size'\\)"),
    ({"prepare_data_per_node": False}, "self.prepare_data_per_node = False"),
    ({"automatic_optimization": False}, "self.automatic_optimization = False in __init__ of the module"),
    ({"resume_from_checkpoint": ""}, "resume_from_checkpoint='' is empty"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_was_never_right_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):  # and nothing is told, which would raise another error
        L.Trainer(logger=False, **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
@pytest.mark.parametrize("gpus", [1, -1, "0,1"])
def test_gpus_where_there_are_none(gpus: Any) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("an MPS device is a GPU as well")
    with pytest.raises(ConfigurationError, match=f"gpus={gpus!r}: accelerator='gpu' was asked for, but.*gpus=0"):
        L.Trainer(gpus=gpus)


# The arguments of callbacks


CHECKPOINTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"filepath": "/w/{epoch}-{val_loss:.2f}"}, {"dirpath": "/w", "filename": "{epoch}-{val_loss:.2f}"}),
    ({"filepath": "/w/sub/"}, {"dirpath": "/w/sub", "filename": "{epoch}"}),
    ({"filepath": "/tmp"}, {"dirpath": "/tmp", "filename": "{epoch}"}),
    ({"filepath": Path("/w/best")}, {"dirpath": "/w", "filename": "best"}),
    ({"filepath": "best"}, {"dirpath": str(Path.cwd()), "filename": "best"}),
    ({"filepath": None}, {"dirpath": None, "filename": None}),
    ({"filepath": "/w/{epoch}", "prefix": "my_"}, {"dirpath": "/w", "filename": "my_{epoch}"}),
    ({"prefix": "my_"}, {"dirpath": None, "filename": "my_{epoch}"}),
    ({"period": 3}, {"every_n_epochs": 3}),
    ({"period": 0}, {"every_n_epochs": 1}),
    ({"every_n_val_epochs": 2}, {"every_n_epochs": 2}),
    ({"mode": "auto", "monitor": "val_acc"}, {"mode": "max", "monitor": "val_acc"}),
    ({"mode": "auto", "monitor": "fmeasure/x"}, {"mode": "max"}),
    ({"mode": "auto", "monitor": "val_loss"}, {"mode": "min"}),
    ({"mode": "auto"}, {"mode": "min", "monitor": None}),
    ({"filepath": "/w/{epoch}", "monitor": "val_acc"}, {"mode": "max"}),
    ({"filepath": "/w/{epoch}", "save_top_k": 3}, {"monitor": "val_loss", "save_top_k": 3}),
    ({"save_top_k": True, "monitor": "val_loss"}, {"save_top_k": 1}),
    ({"save_top_k": False}, {"save_top_k": 0}),
]


@pytest.mark.parametrize(("given", "expected"), CHECKPOINTS, ids=[str(row[0]) for row in CHECKPOINTS])
def test_arguments_of_model_checkpoint(given: dict[str, Any], expected: dict[str, Any]) -> None:
    checkpoint, messages = heard(lambda: ModelCheckpoint(**given))
    assert {name: getattr(checkpoint, name) for name in expected} == expected
    assert len(messages) == 1
    assert messages[0].startswith("ModelCheckpoint(")
    assert not heard(lambda: ModelCheckpoint(**given))[1]
    assert pickle.loads(pickle.dumps(checkpoint)).monitor == checkpoint.monitor


STOPPINGS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({}, ("val_loss", "min")),
    ({"patience": 5}, ("val_loss", "min")),
    ({"mode": "auto"}, ("val_loss", "min")),
    ({"monitor": "val_acc", "mode": "auto"}, ("val_acc", "max")),
    ({"monitor": "fmeasure", "mode": "auto"}, ("fmeasure", "max")),
]


@pytest.mark.parametrize(("given", "expected"), STOPPINGS)
def test_arguments_of_early_stopping(given: dict[str, Any], expected: tuple[str, str]) -> None:
    stopping, messages = heard(lambda: EarlyStopping(**given))
    assert (stopping.monitor, stopping.mode) == expected
    assert stopping.best_score == (torch.inf if expected[1] == "min" else -torch.inf)
    assert len(messages) == 1
    assert f"{expected[1] if 'monitor' in given else expected[0]!r}" in messages[0].split("Today: ")[1]


@pytest.mark.parametrize("make", [lambda: EarlyStopping(), lambda: ModelCheckpoint(period=2)])
def test_callbacks_tell_where_they_were_made(make: Callable[[], Any]) -> None:
    with pytest.warns(LeydenWarning, match="is a former spelling") as caught:
        make()
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ModelCheckpoint(file_path="/w"),
            "ModelCheckpoint has no argument 'file_path'. Did you mean 'filepath'",
        ),
        (lambda: ModelCheckpoint(save_topk=1), "Did you mean 'save_top_k'"),
        (lambda: ModelCheckpoint(save_best_only=True), "no argument 'save_best_only'. Write save_top_k=1, which keeps"),
        (lambda: EarlyStopping("x", patience_=1), "EarlyStopping has no argument 'patience_'. Did you mean 'patience'"),
        (lambda: ModelCheckpoint("/d", filepath="/w/x"), "filepath='/w/x' and dirpath='/d' contradict"),
        (lambda: ModelCheckpoint(period=2, every_n_epochs=3), "period=2 and every_n_epochs=3 contradict"),
        (lambda: ModelCheckpoint(period="2"), "period='2' is not valid"),
        (lambda: ModelCheckpoint(filepath=3), "filepath=3 is not valid"),
    ],
)
def test_arguments_of_callbacks_that_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(("monitor", "mode"), [("val_acc", "max"), ("fmeasure", "max"), ("val_loss", "min")])
def test_the_mode_that_was_the_default_of_a_callback_that_is_an_argument(monitor: str, mode: str) -> None:
    stopping, checkpoint = EarlyStopping(monitor), ModelCheckpoint(monitor=monitor)
    _, messages = translated({"early_stop_callback": stopping, "checkpoint_callback": checkpoint})
    assert stopping.mode == checkpoint.mode == mode
    assert stopping.best_score == (torch.inf if mode == "min" else -torch.inf)
    assert len(messages) == 1
    said = f"mode='max', which was the default for {monitor!r}"
    assert messages[0].count(said) == (2 if mode == "max" else 0)


def test_former_classes_and_places_of_loggers(tmp_path: Path) -> None:
    with pytest.warns(LeydenWarning, match="LearningRateLogger is a former spelling.*LearningRateMonitor") as caught:
        former = L.callbacks.LearningRateLogger
    assert former is LearningRateMonitor
    assert [each.filename for each in caught] == [__file__]
    assert L.callbacks.LearningRateLogger is LearningRateMonitor
    logger = L.loggers.TensorBoardLogger(str(tmp_path), "name")
    assert logger.log_dir == str(tmp_path / "name" / "version_0")


def test_nothing_of_it_is_loaded_for_todays_spelling() -> None:
    code = """
import sys, leyden
from leyden.callbacks import EarlyStopping, ModelCheckpoint, GradientAccumulationScheduler
callbacks = [EarlyStopping("x", mode="max"), ModelCheckpoint("d", monitor="x", mode="max", save_top_k=2)]
leyden.Trainer(accelerator="cpu", callbacks=callbacks, logger=False, max_epochs=3)
assert not [name for name in sys.modules if name.startswith("leyden.compat")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Their effect


class Model(L.LightningModule):
    """A line through points; what it logs as val_loss is given."""

    def __init__(self, val_losses: tuple[float, ...] = (), name: str = "val_loss") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)
        self.val_losses, self.name = val_losses, name
        self.batches = {"train": [], "val": [], "test": []}  # type: dict[str, list[int]]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches["train"].append(self.trainer.current_epoch)
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.batches["val"].append(self.trainer.current_epoch)
        if self.val_losses:
            self.log(self.name, self.val_losses[self.trainer.current_epoch])

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.batches["test"].append(batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def loader(self) -> DataLoader[Any]:
        data = torch.arange(40.0).reshape(20, 2) / 40
        return DataLoader(data, batch_size=2)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = loader


def old_trainer(folder: Path, **former: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "gpus": 0,
        "show_progress_bar": False,
        "weights_summary": None,
        "default_save_path": folder,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeydenWarning)
        return L.Trainer(**({"max_nb_epochs": 1, "nb_sanity_val_steps": 0, **quiet} | former))


def test_parts_of_the_data(tmp_path: Path) -> None:
    model = Model()
    trainer = old_trainer(
        tmp_path, train_percent_check=0.5, val_percent_check=0.3, test_percent_check=1, checkpoint_callback=False
    )
    trainer.fit(model)
    trainer.test(model)
    assert {name: len(batches) for name, batches in model.batches.items()} == {"train": 5, "val": 3, "test": 10}


def test_overfit_pct_is_a_part_of_each_kind(tmp_path: Path) -> None:
    model = Model()
    trainer = old_trainer(tmp_path, overfit_pct=0.2, checkpoint_callback=False)
    trainer.fit(model)
    trainer.test(model)
    assert {name: len(batches) for name, batches in model.batches.items()} == {"train": 2, "val": 2, "test": 2}


def test_early_stop_callback_waits_for_three(tmp_path: Path) -> None:
    model = Model((3.0, 2.0, 2.5, 2.5, 2.0, 1.0, 0.0))
    trainer = old_trainer(tmp_path, early_stop_callback=True, max_nb_epochs=7, checkpoint_callback=False)
    trainer.fit(model)
    assert sorted(set(model.batches["train"])) == [
        0,
        1,
        2,
        3,
        4,
    ]  # the best is that of epoch 1, three did not improve on it


def test_early_stop_callback_needs_val_loss(tmp_path: Path) -> None:
    trainer = old_trainer(tmp_path, early_stop_callback=True, checkpoint_callback=False)
    with pytest.raises(MetricError, match=r"monitor='val_loss'.*no such metric"):
        trainer.fit(Model())


def test_the_best_by_val_loss_is_kept_and_tested(tmp_path: Path) -> None:
    model = Model((3.0, 1.0, 2.0))
    trainer = old_trainer(tmp_path, checkpoint_callback=True, max_nb_epochs=3, weights_save_path=tmp_path / "w")
    trainer.fit(model)
    checkpoint = trainer.checkpoint_callback
    assert checkpoint is not None
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["epoch=1-step=20.ckpt"]
    assert checkpoint.best_model_path == str(tmp_path / "w" / "epoch=1-step=20.ckpt")
    assert checkpoint.best_model_score == 1.0


def test_without_val_loss_the_latest_is_kept(tmp_path: Path) -> None:
    trainer = old_trainer(tmp_path, checkpoint_callback=True, max_nb_epochs=3)
    trainer.fit(Model((3.0, 1.0, 2.0), name="other"))
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=2-step=30.ckpt"]


def test_what_was_watched_is_watched_after_a_restart(tmp_path: Path) -> None:
    model = Model((3.0, 1.0, 2.0, 4.0))
    trainer = old_trainer(tmp_path, checkpoint_callback=True, max_nb_epochs=2)
    trainer.fit(model)
    assert trainer.checkpoint_callback is not None
    path = trainer.checkpoint_callback.best_model_path
    again = old_trainer(tmp_path, checkpoint_callback=True, max_nb_epochs=4, resume_from_checkpoint=path)
    again.fit(model)
    assert again.checkpoint_callback is not None
    assert (again.checkpoint_callback.best_model_path, again.checkpoint_callback.monitor) == (path, "val_loss")
    other = Model((), name="")
    again._ckpt_path = None
    again.fit(other)  # of which it knows nothing yet
    assert again.checkpoint_callback.monitor is None


def test_former_filepath_and_period(tmp_path: Path) -> None:
    checkpoint, _ = heard(
        lambda: ModelCheckpoint(filepath=tmp_path / "w" / "{epoch}_{val_loss:.1f}", period=2, save_top_k=-1)
    )
    trainer = old_trainer(tmp_path, checkpoint_callback=checkpoint, max_nb_epochs=4)
    trainer.fit(Model((3.0, 1.0, 2.0, 4.0)))
    names = sorted(path.name for path in (tmp_path / "w").iterdir())
    assert names == ["epoch=1_val_loss=1.0.ckpt", "epoch=3_val_loss=4.0.ckpt"]
    assert checkpoint.best_model_path.endswith("epoch=1_val_loss=1.0.ckpt")


def test_accumulation_by_epoch(tmp_path: Path) -> None:
    model, steps = Model(), []

    class Steps(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            steps.append(trainer.global_step)

    trainer = old_trainer(
        tmp_path,
        accumulate_grad_batches={0: 1, 1: 2, 2: 5},
        max_nb_epochs=3,
        callbacks=[Steps()],
        checkpoint_callback=False,
    )
    trainer.fit(model)
    assert steps == [10, 15, 17]
    weights = torch.nn.Linear(2, 1)
    torch.manual_seed(0)
    weights.reset_parameters()
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
    for window in (1, 2, 5):
        batches = list(model.loader())
        for start in range(0, 10, window):
            optimizer.zero_grad()
            for batch in batches[start : start + window]:
                (weights(batch).square().mean() / window).backward()
            optimizer.step()
    torch.testing.assert_close(model.layer.state_dict(), weights.state_dict(), rtol=0, atol=0)


def test_resume_from_checkpoint_goes_on_and_tests(tmp_path: Path) -> None:
    first = Model()
    old_trainer(tmp_path, weights_save_path=tmp_path / "w").fit(first)
    path = tmp_path / "w" / "epoch=0-step=10.ckpt"
    second = Model()
    trainer = old_trainer(tmp_path, resume_from_checkpoint=path, max_nb_epochs=2)
    trainer.fit(second)
    assert sorted(set(second.batches["train"])) == [1]
    assert trainer.global_step == 20
    third = Model()
    old_trainer(tmp_path, resume_from_checkpoint=path, checkpoint_callback=False).test(third)
    torch.testing.assert_close(third.layer.state_dict(), first.layer.state_dict(), rtol=0, atol=0)


def test_row_log_interval(tmp_path: Path) -> None:
    memory = Memory()
    old_trainer(tmp_path, row_log_interval=4, logger=memory, checkpoint_callback=False).fit(Model())
    assert [step for step, row in memory.rows if "loss" in row] == [4, 8]


@pytest.mark.parametrize("norm", [1, 2, 3.0, "inf"])
def test_norms_of_gradients(norm: Any, tmp_path: Path) -> None:
    memory, model = Memory(), Model()
    old_trainer(
        tmp_path, track_grad_norm=norm, row_log_interval=3, gradient_clip=1e-3, logger=memory, checkpoint_callback=False
    ).fit(model)
    p, twin, expected = float(norm), Model(), []
    optimizer = twin.configure_optimizers()
    for number, batch in enumerate(twin.loader(), start=1):
        optimizer.zero_grad()
        twin.layer(batch).square().mean().backward()
        gradients = {name: each.grad for name, each in twin.named_parameters() if each.grad is not None}
        if number % 3 == 0:
            every = torch.cat([each.flatten() for each in gradients.values()])
            norms = {f"grad_{p}_norm_{name}": each.flatten().norm(p) for name, each in gradients.items()}
            expected.append((number, norms | {f"grad_{p}_norm_total": every.norm(p)}))
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e-3)
        optimizer.step()
    rows = [(step, {k: v for k, v in row.items() if k.startswith("grad_")}) for step, row in memory.rows]
    rows = [(step, row) for step, row in rows if row]
    assert [step for step, _ in rows] == [3, 6, 9]
    for (_, row), (_, hand) in zip(rows, expected, strict=True):
        assert row == pytest.approx({name: float(value) for name, value in hand.items()}, rel=1e-6)


def test_nan_gradients_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = (self.layer.weight.sum() - self.layer.weight.sum()).sqrt()  # 0, and its gradient is inf - inf
            return (loss if batch_idx == 1 else 0.0 * self.layer.weight.sum()) + self.layer.bias.sum()

    old_trainer(tmp_path, print_nan_grads=True, train_percent_check=0.3, checkpoint_callback=False).fit(Broken())
    out = capsys.readouterr().out.splitlines()
    # from the second step on the weight itself is NaN
    assert out[0] == "NaN in the gradients of layer.weight, in step 2"
    assert all(line.startswith("NaN in the gradients of layer.weight") for line in out)


def test_fast_dev_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Model((1.0,))
    trainer = old_trainer(
        tmp_path,
        fast_dev_run=True,
        logger=True,
        checkpoint_callback=True,
        early_stop_callback=True,
        weights_save_path="w",
    )
    trainer.fit(model)
    trainer.test(model)
    assert {name: len(batches) for name, batches in model.batches.items()} == {"train": 1, "val": 1, "test": 1}
    assert not list(tmp_path.iterdir())


def test_progress_bar_and_summary(tmp_path: Path) -> None:
    shown = old_trainer(tmp_path, show_progress_bar=None, progress_bar_refresh_rate=5, weights_summary="full")
    assert [type(each) for each in shown.callbacks if isinstance(each, RichProgressBar | ModelSummary)] == [
        ModelSummary,
        RichProgressBar,
    ]
    hidden = old_trainer(tmp_path, show_progress_bar=None, progress_bar_refresh_rate=0)
    assert not [each for each in hidden.callbacks if isinstance(each, RichProgressBar | ModelSummary)]


def test_memory_is_logged_on_gpus_only(tmp_path: Path) -> None:
    memory = Memory()
    old_trainer(tmp_path, log_gpu_memory="all", row_log_interval=1, logger=memory, checkpoint_callback=False).fit(
        Model()
    )
    assert not [name for _, row in memory.rows for name in row if "gpu" in name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("mode", "names"), [("all", {"gpu_0"}), ("min_max", {"min_gpu_mem", "max_gpu_mem"})])
def test_memory_of_a_gpu(mode: str, names: set[str], tmp_path: Path) -> None:
    memory, held = Memory(), torch.empty(2**28, device="cuda")  # 1 GiB
    old_trainer(
        tmp_path, log_gpu_memory=mode, row_log_interval=5, logger=memory, checkpoint_callback=False, gpus=1
    ).fit(Model())
    rows = [(step, {k: v for k, v in row.items() if "gpu" in k}) for step, row in memory.rows]
    assert [step for step, row in rows if row] == [5, 10]
    for _, row in filter(lambda each: each[1], rows):
        assert row.keys() == names
        assert all(held.nbytes / 2**20 <= value <= torch.cuda.mem_get_info()[1] / 2**20 for value in row.values())


def test_watchers_can_be_sent_to_other_processes() -> None:
    checkpoint = ModelCheckpoint()
    watchers = [GradientNorms("inf"), NaNGradients(), GPUMemory("all"), ValLossIfLogged([checkpoint]), checkpoint]
    back = pickle.loads(pickle.dumps(watchers))
    back[3]._watch(True)
    assert back[4].monitor == "val_loss"
    assert checkpoint.monitor is None
