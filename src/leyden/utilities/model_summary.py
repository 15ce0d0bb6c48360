"""What a module consists of; see `leyden.summary`."""

from __future__ import annotations

from typing import Any

from torch import nn

from leyden.errors import no_such_name
from leyden.summary import LayerSummary, human_number
from leyden.summary import ModelSummary as Summary
from leyden.summary import summarize as _summarize

__all__ = ["LayerSummary", "ModelSummary", "get_human_readable_count", "summarize"]

_ABSENT = {
    "DeepSpeedSummary": "ModelSummary counts the parameters that a rank holds",
    "get_formatted_model_size": "write f'{summary.model_size:,.3f}'",
    "parse_batch_shape": "shapes are in summary.in_sizes and summary.out_sizes",
}


def __getattr__(name: str) -> object:
    return no_such_name(__name__, name, _ABSENT)


class ModelSummary(Summary):
    """The layers of a module as columns; ``print`` shows them as a table.

    Args:
        model: the module; with an ``example_input_array`` it is run once, for sizes and operations.
        max_depth: how many levels of submodules have a row; 0 for totals only, -1 for all.

    Raises:
        ConfigurationError: if ``max_depth`` is below -1.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        super().__init__(**vars(_summarize(model, max_depth)))
        object.__setattr__(self, "max_depth", max_depth)  # the base is frozen

    max_depth: int

    @property
    def layer_names(self) -> list[str]:
        """The qualified name of each row."""
        return [row.name for row in self.rows]

    @property
    def layer_types(self) -> list[str]:
        """The class of each row."""
        return [row.type for row in self.rows]

    @property
    def param_nums(self) -> list[int]:
        """The number of parameter elements of each row."""
        return [row.params for row in self.rows]

    @property
    def in_sizes(self) -> list[Any]:
        """The shapes of each row's inputs; None where nothing was run."""
        return [row.in_size for row in self.rows]

    @property
    def out_sizes(self) -> list[Any]:
        """The shapes of each row's outputs; None where nothing was run."""
        return [row.out_size for row in self.rows]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each row is in train mode."""
        return [row.is_training for row in self.rows]


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """Summarize a module; see `ModelSummary`."""
    return ModelSummary(lightning_module, max_depth)


def get_human_readable_count(number: int) -> str:
    """``1.2 M`` for 1234567."""
    return human_number(number)
