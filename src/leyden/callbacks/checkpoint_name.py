"""Arguments, folder and file names of `ModelCheckpoint`: checked, filled in, and compared with what is there."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch import Tensor

from leyden.checkpoint.format import read_about
from leyden.checkpoint.remote import is_remote, local_path
from leyden.checkpoint.store import exists
from leyden.errors import CheckpointError, ConfigurationError, MetricError, did_you_mean, reject

DEFAULT_FILENAME = "{epoch}-{step}"
Field = tuple[str, str | None, str]
"""A piece of a template: the text before a field, the field's key or None, its format."""


def is_former(unknown: Mapping[str, Any], mode: object, save_top_k: object) -> bool:
    """Whether arguments are those of former days: names that are not known today, ``mode="auto"``, ``save_top_k=True``."""
    return bool(unknown) or mode == "auto" or isinstance(save_top_k, bool)


def check_policy(monitor: object, mode: object, save_top_k: object, save_last: object) -> None:
    """Refuse a policy of what to keep that cannot be followed.

    Raises:
        ConfigurationError: naming the argument.
    """
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        reject("monitor", monitor, "the key of a logged metric, or None")
    if mode not in ("min", "max"):
        reject("mode", mode, "'min' (lower is better) or 'max' (higher is better)")
    if isinstance(save_top_k, bool) or not isinstance(save_top_k, int) or save_top_k < -1:
        reject("save_top_k", save_top_k, "-1 (keep all), 0 (none), or a number of checkpoints")
    if monitor is None and save_top_k > 1:
        reject("save_top_k", save_top_k, "-1, 0 or 1 without monitor; to keep the latest k: monitor='step', mode='max'")
    if save_last not in (None, True, False, "link"):
        reject("save_last", save_last, "True, 'link', or None")


def check_triggers(steps: object, interval: object, epochs: object, on_train_epoch_end: bool | None) -> None:
    """Refuse triggers that are out of range or more than one.

    Raises:
        ConfigurationError: naming the argument.
    """
    for name, value in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            reject(name, value, "a number >= 0, where 0 means never, or None")
    if interval is not None and (not isinstance(interval, timedelta) or interval <= timedelta(0)):
        reject("train_time_interval", interval, "a datetime.timedelta longer than 0, or None")
    given = {"every_n_train_steps": steps, "every_n_epochs": epochs, "train_time_interval": interval}
    given = {name: value for name, value in given.items() if value}
    if len(given) > 1:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigurationError(
            f"ModelCheckpoint has one trigger, and got {len(given)}: {shown}. Pass one of them, and add a second "
            "ModelCheckpoint for the other."
        )
    if on_train_epoch_end and given and "every_n_epochs" not in given:
        other = next(iter(given))
        reject("save_on_train_epoch_end", True, f"None with {other}; it moves the epoch trigger, which is not set")


def check_names(filename: str | None, last: str, save_last: object, ending: str) -> None:
    """Refuse templates that cannot be filled, and one that would overwrite ``last``.

    Raises:
        ConfigurationError: naming the argument.
    """
    check_template(last)
    if filename is not None:
        check_template(filename)
    if save_last and (filename or DEFAULT_FILENAME).removesuffix(ending) == last.removesuffix(ending):
        reject("filename", filename, f"another name than {last!r}, which save_last uses")


def check_template(template: str) -> list[Field]:
    """Split a template into its pieces.

    Raises:
        ConfigurationError: it cannot be filled, or leads out of its folder.
    """
    if not template or os.path.isabs(template) or ".." in re.split(r"[/\\]", template):
        reject("filename", template, "a name within dirpath, such as '{epoch}-{val_loss:.2f}'")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigurationError(f"filename={template!r} is not a valid template: {error}.") from None
    for _, key, spec, conversion in parts:
        if key is None:
            continue
        if not key or conversion or "{" in (spec or ""):
            reject("filename", template, "fields such as '{epoch:02d}' or '{val_loss:.2f}'")
        if not any(_accepts(spec or "", value) for value in (1, 1.5)):
            reject("filename", template, f"a number format after the colon in {{{key}:{spec}}}, such as .2f or 02d")
    return [(literal, key, spec or "") for literal, key, spec, _ in parts]


def fill_template(template: str, metrics: Mapping[str, Any], insert_key: bool, equals: str) -> str:
    """Fill a template with values; a ``/`` in a key becomes ``_``.

    Args:
        template: see `check_template`.
        metrics: values by key; numbers or 0-d tensors.
        insert_key: write the key before each value, unless the text there does already.
        equals: what stands between a key and its value.

    Raises:
        MetricError: the template names a key that is not in ``metrics``.
        ConfigurationError: the template is malformed, or a value does not fit its format.
    """
    name = ""
    for literal, key, spec in check_template(template):
        name += literal
        if key is None:
            continue
        if key not in metrics:
            raise MetricError(missing(f"filename={template!r} names", key, metrics))
        shown = re.sub(r"[/\\]", "_", key)
        if insert_key and not name.endswith(f"{shown}{equals}"):
            name += f"{shown}{equals}"
        try:
            value = metrics[key]
            name += format(value.item() if isinstance(value, Tensor) else value, spec)
        except ValueError as error:
            raise ConfigurationError(f"filename={template!r}: {key} is {metrics[key]!r}: {error}.") from None
    return name


def keys_of(template: str) -> list[str]:
    """The keys that a template names."""
    return [key for _, key, _ in check_template(template) if key is not None]


def folder_path(path: str | os.PathLike[str]) -> str:
    """The folder as it is kept: absolute if it is local, else the URL without a slash at its end."""
    if is_remote(path):
        return str(path).rstrip("/")
    return os.path.abspath(local_path(path).expanduser())


def lies_in(folder: str | None, path: str, ending: str) -> bool:
    """Whether ``path`` names a checkpoint in ``folder`` or below: what another folder holds is not ours to delete."""
    inside = folder is not None and path.startswith(folder) and path[len(folder.rstrip("/\\")) :][:1] in ("/", os.sep)
    return inside and path.endswith(ending) and ".." not in re.split(r"[/\\]", path)


def step_in(path: str) -> int | None:
    """The step of a checkpoint file; None if it is not there or cannot be read."""
    try:
        return read_about(path).global_step if path else None
    except CheckpointError:
        return None


def is_anothers(path: str, run_id: str | None, start_step: int, step: int) -> bool:
    """Whether a file is not one that this training wrote itself, was killed after, and comes to again.

    Args:
        path: of the file.
        run_id: of this training.
        start_step: where it began, or went on.
        step: where it is.
    """
    try:
        about = read_about(path)
    except CheckpointError:
        return exists(path)
    if about.run_id is None or about.run_id != run_id:
        return True
    return about.global_step <= start_step and about.global_step != step


def missing(who: str, key: str, metrics: Mapping[str, Any]) -> str:
    """What to say of a key that was not logged."""
    known = ", ".join(sorted(metrics)) or "none"
    return f"{who} {key!r}, which was not logged.{did_you_mean(key, metrics)} Known: {known}."


def none_saved(monitor: str | None, step: int, epoch: int) -> str:
    """What to say where training has ended before the first validation, after which it would have been saved."""
    return (
        f"ModelCheckpoint(monitor={monitor!r}) has saved nothing: it saves after validations, and training ended at "
        f"step {step}, in epoch {epoch}, before there was one. save_last=True keeps the "
        "state at the end; every_n_train_steps or the Trainer's val_check_interval give saves within an epoch."
    )


def _accepts(spec: str, value: float) -> bool:
    try:
        format(value, spec)
    except ValueError:
        return False
    return True
