"""Keywords that `Trainer.fit`, `validate` and `test` had in former days."""

from __future__ import annotations

from typing import Any

from leyden.compat.once import tell
from leyden.errors import ConfigurationError, UnknownArgumentError, did_you_mean

_FORMER = {"fit": "train_dataloader", "validate": "val_dataloaders", "test": "test_dataloaders"}
_TODAY = ("model", "datamodule", "ckpt_path")


def former_loaders(verb: str, name: str, loaders: Any, former: dict[str, Any]) -> Any:
    """The loaders that were given under their former name, which is told of.

    Args:
        verb: of the Trainer.
        name: what they are called today.
        loaders: what was given under that name.
        former: everything else that was given.

    Raises:
        ConfigurationError: for other names, and if loaders were given under both.
    """
    known = _FORMER[verb]
    for given, value in former.items():
        if verb == "fit" and given == "test_dataloaders":
            if value is not None:
                raise ConfigurationError(
                    "fit(test_dataloaders=…): fit tests nothing. Write test(model, dataloaders=…)."
                )
        elif given != known:
            more = ("val_dataloaders",) if verb == "fit" else ("verbose",)
            hint = did_you_mean(given, (name, known, *_TODAY, *more))
            raise UnknownArgumentError(f"{verb} has no argument {given!r}.{hint}")
    value = former.get(known)
    if value is not None and loaders is not None:
        raise ConfigurationError(f"{known} and {name} are the same argument of {verb}. Give {name} alone.")
    tell(f"trainer.{verb}({', '.join(f'{given}=…' for given in former)})", f"trainer.{verb}({name}=…)")
    return loaders if value is None else value
