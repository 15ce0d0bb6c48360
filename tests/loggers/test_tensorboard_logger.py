from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leyden.errors import ConfigurationError, LeydenWarning, MetricError
from leyden.loggers import CSVLogger, TensorBoardLogger, default_logger, tensorboard

tensorboard_package = pytest.importorskip("tensorboard")


def events(log_dir: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(log_dir)
    accumulator.Reload()
    return accumulator


def scalars(log_dir: str) -> dict[str, list[tuple[int, float]]]:
    found = events(log_dir)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.example_input_array: Any = torch.zeros(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_scalars_are_read_back(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="run")
    for step in range(1, 6):
        logger.log_metrics({"loss": 1 / step, "epoch": 0.0}, step=step)
    logger.log_metrics({"val": torch.tensor(0.5)})  # type: ignore[dict-item]
    logger.finalize("success")
    found = scalars(logger.log_dir)
    assert found["run-loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert found["run-epoch"] == [(step, 0.0) for step in range(1, 6)]
    assert found["run-val"] == [(6, 0.5)]


def test_two_runs_of_one_version_are_read_as_one(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path)
    first.log_metrics({"loss": 1.0}, step=1)
    first.finalize("interrupted")
    first.log_metrics({"loss": 2.0}, step=2)
    first.finalize("success")
    second = TensorBoardLogger(tmp_path, version=first.version)
    second.log_metrics({"loss": 3.0}, step=3)
    second.finalize("success")
    assert scalars(first.log_dir)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_sub_dir_and_the_writer_underneath(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, sub_dir="fold_1", max_queue=3)
    logger.experiment.add_text("note", "hello", 1)
    logger.save()
    assert Path(logger.log_dir) == tmp_path / "lightning_logs" / "version_0" / "fold_1"
    assert events(logger.log_dir).Tags()["tensors"] == ["note/text_summary"]
    logger.finalize("success")


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_hyperparameters(tmp_path: Path, default_hp_metric: bool) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    logger = TensorBoardLogger(tmp_path, default_hp_metric=default_hp_metric)
    logger.log_hyperparams({"lr": 0.5, "net": {"depth": 3, "act": nn.ReLU}})
    logger.finalize("success")
    found = events(logger.log_dir)
    start = plugin_data_pb2.HParamsPluginData.FromString(
        found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    hparams = {
        name: value.number_value or value.string_value for name, value in start.session_start_info.hparams.items()
    }
    assert hparams == {"lr": 0.5, "net/depth": 3.0, "net/act": "torch.nn.modules.activation.ReLU"}
    assert scalars(logger.log_dir) == ({"hp_metric": [(0, -1.0)]} if default_hp_metric else {})
    written = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert written == 'lr: 0.5\nnet:\n  depth: 3\n  act: "torch.nn.modules.activation.ReLU"\n'


def test_metrics_beside_hyperparameters_replace_the_default(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.5}, {"acc": 0.25})
    logger.finalize("success")
    assert scalars(logger.log_dir) == {"acc": [(0, 0.25)]}
    # All in one event file, so that the HParams page finds one run.
    assert len(list(Path(logger.log_dir).glob("events.out*"))) == 1
    assert [path for path in Path(logger.log_dir).iterdir() if path.is_dir()] == []


def test_graph_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Net()
    model.layers[1].eval()
    with torch.no_grad():
        model.layers[0].weight.fill_(1.0)
    modes = [layer.training for layer in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    logger.log_graph(model)
    logger.finalize("success")
    assert events(logger.log_dir).Tags()["graph"]
    assert [layer.training for layer in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("example", "code"), [(None, "no-example-input"), ({"x": torch.zeros(2, 4)}, "graph-not-traced")]
)
def test_a_graph_that_cannot_be_traced_is_said(tmp_path: Path, example: Any, code: str) -> None:
    model = Net()
    model.example_input_array = example
    with pytest.warns(LeydenWarning, match=code):
        TensorBoardLogger(tmp_path, log_graph=True).log_graph(model)
    assert list(tmp_path.iterdir()) == []


def test_a_lazy_model_is_not_traced(tmp_path: Path) -> None:
    model = nn.LazyLinear(2)
    with pytest.warns(LeydenWarning, match="graph-not-traced"):
        TensorBoardLogger(tmp_path, log_graph=True).log_graph(model, torch.zeros(1, 3))
    assert model.has_uninitialized_params()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"flush_sec.*flush_secs"):
        TensorBoardLogger(tmp_path, flush_sec=3)
    with pytest.raises(MetricError, match="'loss'"):
        TensorBoardLogger(tmp_path).log_metrics({"loss": torch.zeros(3)})  # type: ignore[dict-item]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tensorboard._note_csv.cache_clear()
    with pytest.raises(ConfigurationError, match=r"pip install 'leyden\[tensorboard\]'"):
        TensorBoardLogger(tmp_path)
    with caplog.at_level(logging.INFO, logger="leyden"):
        assert isinstance(default_logger(tmp_path), CSVLogger)
        assert isinstance(default_logger(tmp_path), CSVLogger)
    assert len(caplog.records) == 1


def test_a_broken_tensorboard_is_named_at_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'leyden\[tensorboard\]'"):
        logger.log_metrics({"a": 1.0}, step=1)


def test_default_is_tensorboard_without_importing_it(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from leyden.loggers import default_logger\n"
        f"print(type(default_logger({str(tmp_path)!r})).__name__)\n"
        "print([name for name in ('tensorboard', 'rich') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["TensorBoardLogger", "[]"]
    assert list(tmp_path.iterdir()) == []


def test_first_use_survives_warnings_as_errors(tmp_path: Path) -> None:
    program = (
        "import warnings\n"
        "from leyden.loggers import TensorBoardLogger\n"
        f"logger = TensorBoardLogger({str(tmp_path)!r})\n"
        "filters = list(warnings.filters)\n"
        "logger.log_metrics({'a': 1.0}, step=1)\n"
        "logger.finalize('success')\n"
        "assert warnings.filters[-len(filters):] == filters\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_closing_leaves_no_thread(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    before = threading.active_count()
    logger.log_metrics({"a": 1.0}, step=1)
    logger.finalize("success")
    assert threading.active_count() == before
