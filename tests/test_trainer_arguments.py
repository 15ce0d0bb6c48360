"""Every argument of the Trainer: it is there, good values are taken, bad ones are refused by name, and it has its effect."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import leyden
from leyden.callbacks import Callback, ModelCheckpoint, ModelSummary, Preemption, RichProgressBar, Timer
from leyden.errors import ConfigurationError, LeydenWarning
from leyden.loggers import CSVLogger
from leyden.precision import PRECISIONS, Precision
from leyden.profilers import SimpleProfiler
from leyden.strategy import SingleDevice

torch.set_num_threads(1)

ARGUMENTS = """accelerator strategy devices num_nodes max_restarts precision logger callbacks fast_dev_run
max_epochs min_epochs max_steps min_steps max_time
limit_train_batches limit_val_batches limit_test_batches limit_predict_batches overfit_batches
val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing
enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm deterministic
benchmark inference_mode use_distributed_sampler profiler detect_anomaly nan_policy oom_policy barebones plugins sync_batchnorm
reload_dataloaders_every_n_epochs default_root_dir""".split()  # noqa: SIM905 forty names read better without quotes

LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")


def make(**options: Any) -> leyden.Trainer:
    """A Trainer that is quiet unless told otherwise."""
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False}
    quiet |= {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
    return leyden.Trainer(**(quiet | options))


def test_the_arguments_are_those_of_the_checklist() -> None:
    parameters = inspect.signature(leyden.Trainer).parameters
    assert list(parameters) == list(dict.fromkeys(parameters))
    assert set(ARGUMENTS) <= set(parameters), set(ARGUMENTS) - set(parameters)
    others = parameters["others"]  # of former days, for leyden.compat
    assert others.kind is inspect.Parameter.VAR_KEYWORD
    assert {each.kind for each in parameters.values() if each is not others} == {inspect.Parameter.KEYWORD_ONLY}


def test_every_argument_is_documented() -> None:
    text = inspect.getdoc(leyden.Trainer) or ""
    assert [name for name in ARGUMENTS if f"\n    {name}: " not in text] == []


GOOD: dict[str, list[Any]] = {
    "accelerator": ["auto", "cpu", "CPU"],
    "strategy": ["auto", "single_device", SingleDevice(torch.device("cpu"))],
    "devices": ["auto", 1, "1", [0], "0,", (0,), -1],
    "num_nodes": [1],
    "max_restarts": [0, 3],
    "precision": [None, 16, 32, 64, "16", "32", "64", "bf16", *PRECISIONS, PRECISIONS["bf16-mixed"]],
    "logger": [None, True, False, CSVLogger("unused"), [CSVLogger("unused")], []],
    "callbacks": [None, [], Timer(), [Timer(), Callback()], (Timer(),)],
    "fast_dev_run": [False, True, 0, 1, 3],
    "max_epochs": [None, -1, 0, 1, 10],
    "min_epochs": [None, 0, 1, 5],
    "max_steps": [-1, 0, 1, 10],
    "min_steps": [None, 0, 1, 5],
    "max_time": [None, "00:00:30:00", timedelta(minutes=5), {"hours": 1, "minutes": 30}],
    **{name: [0, 1, 10, 0.0, 0.5, 1.0] for name in LIMITS},
    "val_check_interval": [None, 1, 10, 0.25, 1.0, "00:00:30:00", timedelta(minutes=5), {"minutes": 5}],
    "check_val_every_n_epoch": [1, 5],
    "num_sanity_val_steps": [None, -1, 0, 2],
    "log_every_n_steps": [None, 0, 1, 50],
    "enable_checkpointing": [None, True, False],
    "enable_progress_bar": [None, True, False],
    "enable_model_summary": [None, True, False],
    "accumulate_grad_batches": [1, 4],
    "gradient_clip_val": [None, 0, 0.0, 1, 0.5],
    "gradient_clip_algorithm": [None, "norm", "value"],
    "deterministic": [None, True, False, "warn"],
    "benchmark": [None, True, False],
    "inference_mode": [True, False],
    "use_distributed_sampler": [True, False],
    "profiler": [None, "simple", "advanced", "pytorch", SimpleProfiler()],
    "detect_anomaly": [True, False],
    "nan_policy": [None, "raise", "skip", "rollback"],
    "oom_policy": ["raise", "halve"],
    "barebones": [False],
    "plugins": [None, [], PRECISIONS["64-true"], [PRECISIONS["64-true"]]],
    "sync_batchnorm": [False],
    "reload_dataloaders_every_n_epochs": [0, 1, 5],
    "default_root_dir": [None, "some/folder", Path("some/folder")],
}


def test_there_is_a_good_value_of_every_argument() -> None:
    assert sorted(GOOD) == sorted(ARGUMENTS)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_good_values_are_taken_and_write_nothing(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(**{name: value})
    assert list(tmp_path.iterdir()) == []


NOT_WHOLE: list[Any] = [1.5, "3", True, float("nan"), [1]]
"""What is never a number of something."""
NOT_A_SWITCH: list[Any] = ["yes", 2, 1.0, 0, 1]

# argument: (bad values, what the message says is allowed)
BAD: dict[str, tuple[list[Any], str]] = {
    "accelerator": (["tpux", 5, None, True], "'auto', 'gpu', 'cuda', 'mps', 'tpu', 'cpu'"),
    "strategy": (["ddpp", 3, None], "single_device"),
    "devices": ([0, True, "x", [], [7], -2, 1.0, None, ["a"], ""], "auto|an index from 0 to 0|indices from 0 to 0"),
    "num_nodes": ([0, -1, *NOT_WHOLE], "an integer ≥ 1"),
    "max_restarts": ([-1, *NOT_WHOLE], "an integer ≥ 0"),
    "precision": (["fp17", 8, True, "16-mixd", 1.5], "'bf16-mixed'"),
    "logger": (["tensorboard", 5, [1], CSVLogger], "True, False, a leyden.loggers.Logger"),
    "callbacks": ([5, [5], Timer, [Timer], "timer"], "a leyden.Callback"),
    "fast_dev_run": ([-1, 1.5, "yes", None], "an integer ≥ 0 or False or True"),
    "max_epochs": ([-2, *NOT_WHOLE], "an integer ≥ 0 or -1 or None"),
    "min_epochs": ([-1, *NOT_WHOLE], "an integer ≥ 0 or None"),
    "max_steps": ([-2, *NOT_WHOLE], "an integer ≥ 0 or -1"),
    "min_steps": ([-1, *NOT_WHOLE], "an integer ≥ 0 or None"),
    "max_time": (
        ["1:2", "a:b:c:d", "-1:00:00:00", 5, timedelta(-1), {"hour": 1}, {"hours": "x"}, {"hours": float("nan")}, True],
        "DD:HH:MM:SS",
    ),
    **{
        name: ([-1, 1.5, -0.5, 2.0, True, "all", float("nan"), float("inf")], "a number of batches .* or a fraction")
        for name in LIMITS
    },
    "val_check_interval": ([0, -1, 0.0, 1.5, -0.5, True, [1], float("nan")], "a number of training batches"),
    "check_val_every_n_epoch": ([0, -1, *NOT_WHOLE], "an integer ≥ 1 or None"),
    "num_sanity_val_steps": ([-2, *NOT_WHOLE], "an integer ≥ 0 or -1 or None"),
    "log_every_n_steps": ([-1, *NOT_WHOLE], "an integer ≥ 0 or None"),
    "enable_checkpointing": (NOT_A_SWITCH, "True, False or None"),
    "enable_progress_bar": (NOT_A_SWITCH, "True, False or None"),
    "enable_model_summary": (NOT_A_SWITCH, "True, False or None"),
    "accumulate_grad_batches": ([0, -1, None, *NOT_WHOLE], "an integer ≥ 1"),
    "gradient_clip_val": ([-1, "1", True, float("nan"), float("inf"), [1]], "a number ≥ 0"),
    "gradient_clip_algorithm": (["l2", "Norm", 2, True], "'norm', 'value'"),
    "deterministic": ([*NOT_A_SWITCH, "warning", []], "True, False, 'warn' or None"),
    "benchmark": (NOT_A_SWITCH, "True, False or None"),
    "inference_mode": ([None, *NOT_A_SWITCH], "True or False"),
    "use_distributed_sampler": ([None, *NOT_A_SWITCH], "True or False"),
    "profiler": (["simpel", 3, SimpleProfiler], "'simple'"),
    "detect_anomaly": ([None, *NOT_A_SWITCH], "True or False"),
    "nan_policy": (["Skip", "ignore", True, False, 0], "None, 'raise', 'skip', 'rollback'"),
    "oom_policy": ([None, "half", True, 2], "'raise', 'halve'"),
    "barebones": ([None, *NOT_A_SWITCH], "True or False"),
    "plugins": (["x", [3], 16, Precision], "a Precision"),
    "sync_batchnorm": ([None, *NOT_A_SWITCH], "True or False"),
    "reload_dataloaders_every_n_epochs": ([-1, None, *NOT_WHOLE], "an integer ≥ 0"),
    "default_root_dir": ([5, True, ["a"]], "a path"),
}


def test_there_is_a_bad_value_of_every_argument() -> None:
    assert sorted(BAD) == sorted(ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, (values, allowed) in BAD.items() for value in values],
)
def test_bad_values_are_refused_by_name_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigurationError, match=allowed) as caught:
        make(**{name: value})
    given = value[0] if name in ("plugins", "callbacks") and isinstance(value, list) else value
    assert str(caught.value).startswith(f"{name}={given!r}"), caught.value


def test_overfitting_on_nothing_in_particular_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="overfit_batches=None is not valid"):
        make(overfit_batches=None)


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("nan_policy", "rolback", "rollback"),
        ("oom_policy", "half", "halve"),
        ("accelerator", "cpuu", "cpu"),
        ("precision", "bf16-mixd", "bf16-mixed"),
        ("profiler", "simpel", "simple"),
    ],
)
def test_a_misspelt_name_is_recognised(name: str, value: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Did you mean '{meant}'"):
        make(**{name: value})


@pytest.mark.parametrize("accelerator", ["cuda", "gpu", "mps"])
def test_an_accelerator_that_is_not_here_is_refused_with_the_reason(
    accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(
        ConfigurationError, match=rf"accelerator='{accelerator}' .*is_available\(\) is False.*accelerator='auto'"
    ):
        make(accelerator=accelerator)


@pytest.mark.parametrize("devices", [[0, 1], "0,1"])
def test_the_cpu_has_no_second_index(devices: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"devices=.*indices from 0 to 0, each once, for accelerator 'cpu'"):
        make(devices=devices)


def test_machines_and_processes_are_counted() -> None:
    assert make(devices=2).world_size == 2
    assert make(devices="3", num_nodes=2).world_size == 6
    assert make(devices=2).num_devices == 2
    assert make(devices=2, max_restarts=3).max_restarts == 3


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "overfit and limit train": (
        {"overfit_batches": 2, "limit_train_batches": 3},
        "overfit_batches=2 and limit_train_batches=3 contradict .*Give one of the two",
    ),
    "overfit and limit val": (
        {"overfit_batches": 0.5, "limit_val_batches": 0.5},
        "overfit_batches=0.5 and limit_val_batches=0.5 contradict .*Give one of the two",
    ),
    "epochs": (
        {"min_epochs": 3, "max_epochs": 2},
        "min_epochs=3 is more than max_epochs=2. Lower the first or raise the second",
    ),
    "steps": ({"min_steps": 3, "max_steps": 2}, "min_steps=3 is more than max_steps=2"),
    "fraction across epochs": (
        {"val_check_interval": 0.5, "check_val_every_n_epoch": None},
        "val_check_interval=0.5 is a fraction .*check_val_every_n_epoch=None.*number of batches",
    ),
    "nothing to count": (
        {"check_val_every_n_epoch": None},
        "check_val_every_n_epoch=None .*needs val_check_interval=<batches>",
    ),
    "two precisions": (
        {"precision": "64-true", "plugins": PRECISIONS["bf16-true"]},
        "precision='64-true' and a Precision in plugins contradict",
    ),
    "three precisions": (
        {"plugins": [PRECISIONS["64-true"], PRECISIONS["bf16-true"]]},
        "a Precision in plugins contradict",
    ),
    "no checkpoints": (
        {"enable_checkpointing": False, "callbacks": ModelCheckpoint()},
        "enable_checkpointing=False contradicts the ModelCheckpoint among callbacks. Leave one of the two out",
    ),
    "no bar": (
        {"enable_progress_bar": False, "callbacks": [RichProgressBar()]},
        "enable_progress_bar=False contradicts the ProgressBar among callbacks",
    ),
    "no summary": (
        {"enable_model_summary": False, "callbacks": [ModelSummary()]},
        "enable_model_summary=False contradicts the ModelSummary among callbacks",
    ),
    "anomalies and skip": (
        {"detect_anomaly": True, "nan_policy": "skip"},
        "detect_anomaly=True stops .* nan_policy='skip' goes on. Leave one of the two out",
    ),
    "anomalies and rollback": ({"detect_anomaly": True, "nan_policy": "rollback"}, "Leave one of the two out"),
    "two of one key": (
        {"callbacks": [Timer(), Timer()]},
        "Two callbacks have the state_key 'Timer'.*override state_key",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_name_both_sides(case: str) -> None:
    options, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigurationError, match=message):
        make(**options)


BAREBONES: dict[str, Any] = {
    "logger": True,
    "enable_checkpointing": True,
    "enable_progress_bar": True,
    "enable_model_summary": True,
    "fast_dev_run": True,
    "num_sanity_val_steps": 2,
    "log_every_n_steps": 10,
    "detect_anomaly": True,
    "nan_policy": "skip",
    "oom_policy": "halve",
    "profiler": "simple",
    "callbacks": ModelCheckpoint(),
}


@pytest.mark.parametrize("name", BAREBONES)
def test_barebones_refuses_what_it_turns_off(name: str) -> None:
    # for callbacks the message is that of the argument which barebones sets
    with pytest.raises(ConfigurationError, match=f"barebones=True.*{name}|enable_checkpointing=False contradicts"):
        leyden.Trainer(accelerator="cpu", barebones=True, **{name: BAREBONES[name]})


# Effects, each seen once from inside of a run


class Model(leyden.LightningModule):
    """Notes what it sees of torch's switches, and how often each step is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.seen: list[Any] = []
        self.steps = {"train": 0, "val": 0, "test": 0, "predict": 0}

    def look(self) -> Any:
        return None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(self.look())
        self.steps["train"] += 1
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.look())
        self.steps["val"] += 1

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.steps["test"] += 1

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps["predict"] += 1
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches, 2), batch_size=1)  # type: ignore[arg-type]


def fit(model: Model, **options: Any) -> leyden.Trainer:
    trainer = make(**({"max_epochs": 1, "num_sanity_val_steps": 0} | options))
    trainer.fit(model, loader(), loader())
    return trainer


@pytest.fixture
def switches() -> Iterator[None]:
    """Torch's global switches are as they were, whatever a test does to them."""
    kept = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(kept[0])
    torch.backends.cudnn.benchmark = kept[1]
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    ("deterministic", "inside"), [(True, (True, False)), ("warn", (True, True)), (False, (False, False)), (None, None)]
)
@pytest.mark.parametrize("before", [False, True])
def test_deterministic_holds_during_fit_only(deterministic: Any, inside: Any, before: bool, tmp_path: Path) -> None:
    def look() -> Any:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    torch.use_deterministic_algorithms(before)
    model = Model()
    model.look = look  # type: ignore[method-assign]
    fit(model, deterministic=deterministic)
    assert set(model.seen) == {inside if inside is not None else (before, False)}
    assert look() == (before, False)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    ("benchmark", "deterministic", "before", "inside"),
    [
        (True, None, False, True),
        (False, None, True, False),
        (None, None, True, True),
        (None, True, True, False),  # measuring may choose another algorithm each time
        (True, True, False, True),
    ],
)
def test_benchmark_holds_during_fit_only(benchmark: Any, deterministic: Any, before: bool, inside: bool) -> None:
    torch.backends.cudnn.benchmark = before
    model = Model()
    model.look = lambda: torch.backends.cudnn.benchmark  # type: ignore[method-assign]
    fit(model, benchmark=benchmark, deterministic=deterministic)
    assert set(model.seen) == {inside}
    assert torch.backends.cudnn.benchmark is before


def test_switches_are_set_back_after_an_error() -> None:
    model = Model()
    model.look = lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        fit(model, benchmark=True, detect_anomaly=True, precision="64-true")
    assert not torch.backends.cudnn.benchmark
    assert not torch.is_anomaly_enabled()
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("detect", [True, False])
def test_detect_anomaly_holds_during_fit_only(detect: bool) -> None:
    model = Model()
    model.look = torch.is_anomaly_enabled  # type: ignore[method-assign]
    fit(model, detect_anomaly=detect)
    assert set(model.seen) == {detect}
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode_chooses_how_evaluation_does_without_gradients(inference_mode: bool) -> None:
    model = Model()
    model.look = lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())  # type: ignore[method-assign]
    make(inference_mode=inference_mode).validate(model, loader())
    assert set(model.seen) == {(False, inference_mode)}


def test_default_root_dir_is_where_everything_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    trainer = fit(Model(), default_root_dir=root, logger=None, enable_checkpointing=True, log_every_n_steps=1)
    files = {path.relative_to(root).parts[:2] for path in root.rglob("*") if path.is_file()}
    assert files == {("lightning_logs", "version_0")}
    assert list((root / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt"))
    assert trainer.default_root_dir == str(root)
    assert list(elsewhere.iterdir()) == []


def test_default_root_dir_is_the_working_directory_if_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make().default_root_dir == str(tmp_path)


def test_max_time_stops_training_without_another_limit() -> None:
    model = Model()
    trainer = fit(model, max_time="00:00:00:00", max_epochs=None)
    assert trainer.max_epochs == -1
    assert (trainer.global_step, model.steps["train"]) == (0, 0)
    assert fit(Model(), max_time={"days": 1}, max_epochs=1).global_step == 4


def gradients(model: Model) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # the layer's output is 2 + 2 + 1 = 5, so the gradient of its square is 2 * 5 * (1, 1, 1)
        ({}, [10.0, 10.0, 10.0]),
        ({"gradient_clip_val": 0}, [10.0, 10.0, 10.0]),
        ({"gradient_clip_val": 1.0}, [3**-0.5] * 3),
        ({"gradient_clip_val": 100.0}, [10.0, 10.0, 10.0]),
        ({"gradient_clip_val": 3, "gradient_clip_algorithm": "norm"}, [3**0.5] * 3),
        ({"gradient_clip_val": 4.0, "gradient_clip_algorithm": "value"}, [4.0, 4.0, 4.0]),
    ],
)
def test_gradient_clipping_bounds_what_the_optimizer_sees(options: dict[str, Any], expected: list[float]) -> None:
    model = Model()
    torch.nn.init.constant_(model.layer.weight, 2.0)
    torch.nn.init.constant_(model.layer.bias, 1.0)
    fit(model, max_steps=1, limit_val_batches=0, **options)
    torch.testing.assert_close(gradients(model), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert make(**options).gradient_clip_val == (options.get("gradient_clip_val") or None)


@pytest.mark.parametrize("wrap", [lambda plugin: plugin, lambda plugin: [plugin]])
def test_a_precision_of_ones_own_comes_by_plugins(wrap: Any) -> None:
    own = Precision("own", parameter_dtype=torch.float64)
    model = Model()
    trainer = fit(model, plugins=wrap(own))
    assert trainer.precision == "own"
    assert model.layer.weight.dtype is torch.float64


def test_barebones_runs_training_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Model()
    trainer = leyden.Trainer(accelerator="cpu", barebones=True, max_epochs=2)
    trainer.fit(model, loader(), loader())
    assert (trainer.callbacks, trainer.loggers, trainer.log_every_n_steps) == ([], [], 0)
    assert model.steps == {"train": 8, "val": 8, "test": 0, "predict": 0}  # no sanity check
    assert trainer.callback_metrics == {}
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("fast_dev_run", "batches"), [(True, 1), (1, 1), (3, 3)])
def test_fast_dev_run_runs_a_few_batches_of_everything_and_writes_nothing(
    fast_dev_run: Any, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Model()
    trainer = leyden.Trainer(
        accelerator="cpu",
        fast_dev_run=fast_dev_run,
        max_epochs=7,
        callbacks=[ModelCheckpoint()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader(), loader())
    trainer.test(model, loader())
    trainer.predict(model, loader())
    assert model.steps == dict.fromkeys(("train", "val", "test", "predict"), batches)
    assert trainer.checkpoint_callback is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "batches"), [(0, 0), (1, 1), (3, 3), (99, 4), (0.0, 0), (0.5, 2), (1.0, 4)])
def test_limits_are_batches_or_a_fraction_of_them(limit: Any, batches: int) -> None:
    model = Model()
    trainer = fit(model, **{f"limit_{kind}_batches": limit for kind in ("train", "val", "test", "predict")})
    trainer.test(model, loader())
    trainer.predict(model, loader())
    # validation is due after a training epoch, and there is none without training batches
    assert model.steps == dict.fromkeys(("train", "val", "test", "predict"), batches)


def test_overfit_batches_limits_training_and_validation() -> None:
    model = Model()
    fit(model, overfit_batches=2)
    assert model.steps == {"train": 2, "val": 2, "test": 0, "predict": 0}


def test_overfit_batches_goes_with_validation_turned_off() -> None:
    model = Model()
    fit(model, overfit_batches=2, limit_val_batches=0)
    assert model.steps == {"train": 2, "val": 0, "test": 0, "predict": 0}


def test_overfit_batches_reads_in_order_and_says_so() -> None:
    model = Model()
    shuffled: DataLoader[Any] = DataLoader(torch.arange(8.0).reshape(4, 2), shuffle=True)  # type: ignore[arg-type]
    order: list[float] = []
    own = model.training_step

    def training_step(batch: Tensor, batch_idx: int) -> Tensor:
        order.append(batch[0, 0].item())
        return own(batch, batch_idx)

    model.training_step = training_step  # type: ignore[method-assign]
    with pytest.warns(LeydenWarning, match="overfit-shuffle.*read in order"):
        make(overfit_batches=3, max_epochs=2, limit_val_batches=0).fit(model, shuffled)
    assert order == [0.0, 2.0, 4.0, 0.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_steps": 5, "max_epochs": None}, 5),
        ({"max_steps": 5, "max_epochs": -1}, 5),
        ({"max_steps": 5, "max_epochs": 1}, 4),
        ({"max_steps": 0}, 0),
        ({"max_epochs": 0}, 0),
    ],
)
def test_the_first_limit_that_is_reached_ends_training(options: dict[str, Any], steps: int) -> None:
    assert fit(Model(), **options).global_step == steps


class Impatient(Callback):
    """Asks to stop after every batch."""

    def on_train_batch_end(self, trainer: leyden.Trainer, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 1), ({"min_steps": 3}, 3), ({"min_steps": 6}, 6), ({"min_epochs": 2}, 8)]
)
def test_a_stop_is_heeded_once_the_minima_are_reached(options: dict[str, Any], steps: int) -> None:
    assert fit(Model(), callbacks=Impatient(), max_epochs=5, **options).global_step == steps


def test_num_sanity_val_steps_comes_before_training() -> None:
    for given, expected in ((0, 0), (3, 3), (-1, 4), (None, 2)):
        model = Model()
        make(num_sanity_val_steps=given, max_steps=0).fit(model, loader(), loader())
        assert model.steps["val"] == expected


def test_the_default_callbacks_are_those_that_are_enabled() -> None:
    trainer = leyden.Trainer(accelerator="cpu", logger=False, callbacks=Timer())
    kinds = [Timer, ModelSummary, RichProgressBar, Preemption, ModelCheckpoint]
    assert [type(callback) for callback in trainer.callbacks] == kinds
    assert [type(callback) for callback in make(callbacks=Timer()).callbacks] == [Timer, Preemption]
    own = ModelCheckpoint()
    assert make(enable_checkpointing=True, callbacks=[own, Timer()]).callbacks[-1] is own


def test_max_epochs_is_1000_if_there_is_no_limit() -> None:
    assert make().max_epochs == 1000
    assert make(max_steps=3).max_epochs == -1
