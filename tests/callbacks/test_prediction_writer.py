from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from leyden.callbacks import BasePredictionWriter
from leyden.errors import ConfigurationError, HookError


class Writer(BasePredictionWriter):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[Any] = []

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.calls.append((prediction, batch_indices, batch, batch_idx, dataloader_idx))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.calls.append((predictions, batch_indices))


def predict(writer: BasePredictionWriter, indices: Any = True) -> Any:
    trainer: Any = SimpleNamespace(predictions=[], epoch_batch_indices=[])
    writer.setup(trainer, None, "predict")  # type: ignore[arg-type]
    for batch_idx, batch in enumerate([[0, 1], [2]]):
        trainer.predict_batch_indices = batch if indices else None
        trainer.predictions.append(f"p{batch_idx}")
        trainer.epoch_batch_indices.append(trainer.predict_batch_indices)
        writer.on_predict_batch_end(trainer, None, f"p{batch_idx}", batch, batch_idx)  # type: ignore[arg-type]
    writer.on_predict_epoch_end(trainer, None)  # type: ignore[arg-type]
    return writer


BATCHES = [("p0", [0, 1], [0, 1], 0, 0), ("p1", [2], [2], 1, 0)]
EPOCH = [(["p0", "p1"], [[0, 1], [2]])]


@pytest.mark.parametrize(
    ("interval", "calls"), [("batch", BATCHES), ("epoch", EPOCH), ("batch_and_epoch", BATCHES + EPOCH)]
)
def test_what_is_called(interval: str, calls: list[Any]) -> None:
    assert predict(Writer(interval)).calls == calls


def test_batch_is_the_default_and_indices_may_be_unknown() -> None:
    assert [call[1] for call in predict(Writer(), indices=False).calls] == [None, None]


def test_missing_method_is_found_before_predicting() -> None:
    class Half(BasePredictionWriter):
        write_on_batch_end = Writer.write_on_batch_end

    Half("batch").setup(None, None, "predict")  # type: ignore[arg-type]
    Half("batch_and_epoch").setup(None, None, "fit")  # type: ignore[arg-type]
    with pytest.raises(HookError, match=r"Half\(write_interval='batch_and_epoch'\) calls write_on_epoch_end"):
        Half("batch_and_epoch").setup(None, None, "predict")  # type: ignore[arg-type]
    with pytest.raises(HookError, match="write_on_batch_end"):
        BasePredictionWriter().setup(None, None, "predict")  # type: ignore[arg-type]


def test_method_on_the_instance() -> None:
    writer, calls = BasePredictionWriter("epoch"), []
    writer.write_on_epoch_end = lambda *args: calls.append(args[2])  # type: ignore[method-assign, assignment]
    predict(writer)
    assert calls == [["p0", "p1"]]


@pytest.mark.parametrize(("interval", "wants"), [("batch", False), ("epoch", True), ("batch_and_epoch", True)])
def test_predictions_are_kept_for_those_who_write_them_all(interval: Any, wants: bool) -> None:
    assert Writer(interval).wants_all is wants


def test_nothing_was_to_be_predicted() -> None:
    trainer: Any = SimpleNamespace(predictions=[], epoch_batch_indices=[])
    writer = Writer("epoch")
    writer.on_predict_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert writer.calls == [([], [])]


def test_bad_interval() -> None:
    with pytest.raises(ConfigurationError, match="write_interval='step'"):
        BasePredictionWriter("step")  # type: ignore[arg-type]
