"""What a datamodule of 0.9 had: transforms, dimensions, and what was done with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leyden.compat.once import tell

if TYPE_CHECKING:
    from leyden.datamodule import LightningDataModule


def keep(datamodule: LightningDataModule, train: Any, val: Any, test: Any, dims: Any) -> None:
    """Keep arguments of then as attributes; told once."""
    given = {"train_transforms": train, "val_transforms": val, "test_transforms": test, "dims": dims}
    given = {name: value for name, value in given.items() if value is not None}
    vars(datamodule).update(given)
    former = ", ".join(f"{name}=…" for name in given)
    tell(f"LightningDataModule({former})", f"{', '.join(f'self.{name} = …' for name in given)} in __init__")


def datamodule_attribute(datamodule: LightningDataModule, name: str) -> Any:
    """What an attribute of then is, where the user has not set it; methods and flags are told of once.

    A flag such as ``has_setup_fit`` is about what a Trainer does, or did last, and not about calls of your own.
    """
    if name == "dims":
        return ()
    if name.endswith("_transforms"):
        return None
    if name == "size":
        tell("datamodule.size()", "datamodule.dims, an attribute of your own")
        return lambda dim=None: datamodule.dims if dim is None else datamodule.dims[dim]  # type: ignore[attr-defined]
    tell(f"datamodule.{name}", f"an attribute of your own, set in {'setup' if 'setup' in name else 'prepare_data'}")
    trainer = vars(datamodule).get("trainer")
    if trainer is None:
        return False
    return name == "has_prepared_data" or trainer.state.fn == name.removeprefix("has_setup_")
