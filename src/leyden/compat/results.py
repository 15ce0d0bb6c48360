"""What the hooks of 2020 return: dicts whose "log" goes to the loggers, "progress_bar" to the bar, and all can be monitored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leyden.compat.once import tell
from leyden.errors import MetricError

if TYPE_CHECKING:
    from leyden.module import LightningModule

_NO_VALUES = frozenset({"log", "progress_bar", "hiddens"})


class Results:
    """Logs what the hooks of one module return.

    Args:
        module: whose hooks.
        everything: whether numbers that stand beside "log" and "progress_bar" are published in any case; else only if one of
            the two is there, because a dict of today may hold anything.
    """

    def __init__(self, module: LightningModule, everything: bool) -> None:
        self._module, self._everything = module, everything
        self._flags: dict[tuple[str, str], tuple[bool, bool]] = {}

    def publish(self, output: Any, hook: str) -> None:
        """Log what a hook returned: values of a step in training, of an epoch elsewhere.

        Args:
            output: a dict; anything else is left alone.
            hook: its name, for messages.
        """
        metrics = self._module._metrics
        if not isinstance(output, Mapping) or metrics is None:
            return
        logged, shown = _flat(output.get("log")), _flat(output.get("progress_bar"))
        if logged or shown:
            tell(f"'log' and 'progress_bar' in what {hook} returns", "self.log(name, value, prog_bar=True) in the hook")
        elif not self._everything:
            return
        for name, value in {**shown, **logged}.items():
            self._log(hook, name, value, name in shown, name in logged)
        for name, value in output.items():
            known = name in shown or name in logged or name in _NO_VALUES
            by_user = (
                name in metrics._active and (hook, name) not in self._flags
            )  # logged by hand as well: their flags count
            if isinstance(name, str) and not known and not by_user and _is_one_number(value):
                self._log(hook, name, value, name == "loss", False)

    def _log(self, hook: str, name: str, value: Any, prog_bar: bool, logger: bool) -> None:
        # What a name was used for first holds: an epoch has one series for each.
        metrics = self._module._metrics
        series = metrics._active.get(name) if metrics is not None and hook == "training_epoch_end" else None
        if series is not None and series.on_step:
            name = f"{name}_epoch"  # as self.log names the two
        prog_bar, logger = self._flags.setdefault((hook, name), (prog_bar, logger))
        try:
            self._module.log(name, value, prog_bar=prog_bar, logger=logger)
        except MetricError as error:
            raise MetricError(f"{name!r} in the dict that {hook} returned cannot be logged: {error}") from error


def _is_one_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))


def _flat(values: Any) -> dict[str, Any]:
    """The values of a dict by name; those of dicts in it as ``outer/inner``."""
    return dict(_items(values, "")) if isinstance(values, Mapping) else {}


def _items(values: Mapping[Any, Any], before: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{before}{name}/")
        else:
            yield f"{before}{name}", value


def kept(output: Any) -> Any:
    """An output as it is collected for the end of an epoch: tensors detached, in dicts and lists too."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return {name: kept(value) for name, value in output.items()}
    if isinstance(output, list):
        return [kept(value) for value in output]
    return output
