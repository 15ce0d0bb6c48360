"""Hyperparameters: what `save_hyperparameters` collects, and how a module is built again from a checkpoint."""

from __future__ import annotations

import copy
import inspect
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from leyden.errors import CheckpointError, ConfigurationError, did_you_mean, reject

if TYPE_CHECKING:
    from leyden.loggers import Logger
    from leyden.module import LightningModule


class AttributeDict(dict[str, Any]):
    """A dict whose items are attributes as well: ``hparams.lr`` is ``hparams["lr"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"There is no hyperparameter {name!r}; there are: {', '.join(self) or 'none'}."
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __repr__(self) -> str:
        return "\n".join(f"{name!r}: {value!r}" for name, value in self.items())


class Hyperparameters:
    """What one object has saved.

    Attributes:
        values: name to value.
        name: the argument of `__init__` that held all of them as one dict or Namespace; None if they are arguments.
        omitted: arguments that are modules, by type: their weights are saved, they themselves are not.
        to_loggers: whether the loggers get them.
    """

    def __init__(self) -> None:
        self.values = AttributeDict()
        self.initial = AttributeDict()
        self.name: str | None = None
        self.omitted: dict[str, str] = {}
        self.to_loggers = False
        self._given: Mapping[str, Any] | Namespace | None = None

    def add(
        self, owner: object, frame: FrameType | None, given: tuple[Any, ...], ignore: Iterable[str], logger: bool
    ) -> None:
        """Collect the arguments that ``owner`` was made with, or those of them that are named."""
        ignored = {ignore} if isinstance(ignore, str) else set(ignore)
        arguments = init_arguments(owner, frame)
        if not given:
            if not arguments and frame is not None and frame.f_code.co_name not in ("__init__", "__post_init__"):
                raise ConfigurationError(
                    f"save_hyperparameters() in {frame.f_code.co_name} finds no arguments of {type(owner).__name__}: call it in "
                    "__init__, or give it a dict."
                )
            found = arguments
        elif all(isinstance(item, str) for item in given):
            for name in given:
                if name not in arguments:
                    raise ConfigurationError(
                        f"save_hyperparameters({name!r}): {type(owner).__name__}.__init__ has no such argument; it has "
                        f"{', '.join(arguments) or 'none'}.{did_you_mean(name, arguments)}"
                    )
            found = {name: arguments[name] for name in given}
        elif len(given) == 1 and isinstance(given[0], (Mapping, Namespace)):
            found = dict(given[0]) if isinstance(given[0], Mapping) else vars(given[0])
            self.name = next((name for name, value in arguments.items() if value is given[0]), None)
        else:
            raise ConfigurationError(
                "save_hyperparameters takes names of arguments, or one dict or Namespace; it got "
                f"{', '.join(type(item).__name__ for item in given)}."
            )
        for name, value in found.items():
            if name in ignored:
                continue
            if isinstance(value, torch.nn.Module):
                self.omitted[name] = type(value).__name__
            else:
                self.values[name] = value
        self.initial = AttributeDict(copy.deepcopy(dict(self.values)))
        self.to_loggers = self.to_loggers or logger

    def take(self, owner: object, frame: FrameType | None, given: Mapping[str, Any] | Namespace) -> None:
        """Keep a Namespace itself, or what a dict holds: what is changed in `shown` later is saved.

        Raises:
            ConfigurationError: for anything else.
        """
        if not isinstance(given, (Mapping, Namespace)):
            reject("hparams", given, "a dict or an argparse.Namespace")
        self.add(owner, frame, (given,), (), logger=True)
        self._given = given if isinstance(given, Namespace) else AttributeDict(given)

    @property
    def shown(self) -> Any:
        """What users see: ``values``, or what they have assigned."""
        return self.values if self._given is None else self._given

    def current(self) -> dict[str, Any]:
        """The hyperparameters as they are now, for a checkpoint."""
        if self._given is None:
            return dict(self.values)
        return dict(self._given) if isinstance(self._given, Mapping) else dict(vars(self._given))


def assign(module: LightningModule, given: Mapping[str, Any] | Namespace) -> None:
    """What ``self.hparams = hparams`` in a module's `__init__` means.

    Raises:
        ConfigurationError: for what holds no hyperparameters, and before ``super().__init__()``.
    """
    name = type(module).__name__
    if "_saved_hyperparameters" not in vars(module):
        raise ConfigurationError(
            f"self.hparams = … in {name}.__init__ comes before super().__init__(). Call that first."
        )
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "__init__":  # torch's own __setattr__ lies between
        frame = frame.f_back
    from leyden.compat.once import tell

    tell(f"self.hparams = hparams in {name}", "self.save_hyperparameters(hparams)")
    module._saved_hyperparameters.take(module, frame, given)


def begin_logs(loggers: Iterable[Logger], module: LightningModule, datamodule: object) -> None:
    """Give the loggers, at the beginning of `fit`, the hyperparameters of module and datamodule, and the graph."""
    params = for_loggers(module, datamodule)
    for logger in loggers:
        if params:
            logger.log_hyperparams(params)
        logger.log_graph(module)


def for_loggers(*owners: object) -> dict[str, Any]:
    """The hyperparameters that loggers get, of all owners together, as they were when they were saved.

    Raises:
        ConfigurationError: if two owners have different values under one name.
    """
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for owner in owners:
        saved = getattr(owner, "_saved_hyperparameters", None)
        for name, value in saved.initial.items() if saved is not None and saved.to_loggers else ():
            who = type(owner).__name__
            # Compared as text: tensors and arrays have no one answer to ==.
            if name in found and repr(found[name]) != repr(value):
                raise ConfigurationError(
                    f"The hyperparameter {name!r} is {found[name]!r} in {origin[name]} and {value!r} in {who}, so the loggers "
                    f"cannot show both. Rename one, or leave it out: save_hyperparameters(ignore={name!r})."
                )
            found[name], origin[name] = value, who
    return found


def init_arguments(owner: object, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of every `__init__` of ``owner`` that is running, the outermost class's first."""
    levels: list[dict[str, Any]] = []
    if frame is not None and frame.f_code.co_name == "__post_init__":  # of a dataclass, called by its __init__
        frame = frame.f_back
    while frame is not None and frame.f_code.co_name == "__init__":
        info = inspect.getargvalues(frame)
        if not info.args or info.locals.get(info.args[0]) is not owner:
            break
        names = [*info.args[1:], *inspect.getargs(frame.f_code).args[len(info.args) :]]
        code = frame.f_code
        keyword_only = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        level = {name: info.locals[name] for name in dict.fromkeys([*names, *keyword_only]) if name in info.locals}
        if info.keywords:
            level.update(info.locals.get(info.keywords, {}))
        levels.append(level)
        frame = frame.f_back
    arguments: dict[str, Any] = {}
    for level in levels:  # the outermost comes last and wins: it is what the user called
        arguments.update(level)
    return arguments


def build(
    cls: type, saved: Mapping[str, Any], checkpoint: Mapping[str, Any], given: Mapping[str, Any], path: str
) -> Any:
    """Make an object of ``cls`` from a checkpoint's hyperparameters and what the caller gives.

    Raises:
        CheckpointError: naming the arguments that neither has, and why one was not saved.
    """
    parameters = inspect.signature(cls).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    as_one = checkpoint.get("hparams_name")
    unknown = [name for name in given if name not in parameters]
    if unknown and not takes_all and as_one not in parameters:
        raise ConfigurationError(
            f"{cls.__name__} has no argument {unknown[0]!r}; it has {', '.join(parameters) or 'none'}."
            f"{did_you_mean(unknown[0], parameters)}"
        )
    values: dict[str, Any] = {**saved, **given}
    if isinstance(as_one, str) and as_one in parameters:
        inside: Any = AttributeDict({name: value for name, value in values.items() if name not in parameters})
        if checkpoint.get("hparams_type") == "Namespace":
            inside = Namespace(**inside)
        values = {as_one: inside, **{name: value for name, value in values.items() if name in parameters}}
    elif not takes_all:
        values = {name: value for name, value in values.items() if name in parameters}
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and name not in values
    ]
    if needed:
        omitted = checkpoint.get("hparams_omitted") or {}
        reasons = [f"{name} (a {omitted[name]}: modules are not saved)" if name in omitted else name for name in needed]
        raise CheckpointError(
            f"{path} does not hold these arguments of {cls.__name__}: {', '.join(reasons)}. Pass them, as in "
            f"{cls.__name__}.load_from_checkpoint(path, {needed[0]}=…)"
            + ("." if saved or omitted else ", or call self.save_hyperparameters() in __init__ before training.")
        )
    first = [values.pop(name) for name in _positional_only(parameters) if name in values]
    return cls(*first, **values)


def _positional_only(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.POSITIONAL_ONLY]


def load_module(
    cls: type,
    path: str,
    map_location: Any,
    strict: bool | None,
    given: Mapping[str, Any],
    hparams_file: str | os.PathLike[str] | None = None,
) -> Any:
    """Make a module of ``cls`` from a checkpoint; `LightningModule.load_from_checkpoint` documents the arguments."""
    from leyden.checkpoint.format import load_checkpoint

    if not isinstance(map_location, (str, int, torch.device)):
        from leyden.compat.map_location import device_of

        map_location = device_of(map_location)
    if hparams_file is not None or "hparam_overrides" in given or "hparams_overrides" in given:
        from leyden.compat.hparams_file import with_former_hparams

        given = with_former_hparams(cls, given, hparams_file)
    # The state of training is three times the weights, and nobody else could want it.
    wanted_by = next(base for base in cls.__mro__ if "on_load_checkpoint" in vars(base))
    weights_only = wanted_by.__module__.startswith("leyden.")
    checkpoint = load_checkpoint(path, map_location=map_location, weights_only=weights_only)
    module = build(cls, checkpoint.get("hyper_parameters", {}), checkpoint, given, path)
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {cls.__name__}: {error}") from error
    return module.to(map_location)
