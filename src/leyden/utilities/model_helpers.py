"""Whether a hook is overridden."""

from __future__ import annotations

from leyden.callbacks.callback import Callback
from leyden.datamodule import LightningDataModule
from leyden.errors import reject
from leyden.hooks import overridden
from leyden.module import LightningModule

__all__ = ["is_overridden"]


def is_overridden(method_name: str, instance: object | None = None, parent: type | None = None) -> bool:
    """Whether an object has its own method, by its class or patched onto it.

    Args:
        method_name: the method.
        instance: a module, a datamodule or a callback; nothing is overridden in None.
        parent: the class whose method counts as not overridden; needed for other objects.

    Raises:
        ConfigurationError: if ``parent`` is needed and not given.
    """
    if instance is None:
        return False
    kinds = (LightningModule, LightningDataModule, Callback)
    parent = parent or next((kind for kind in kinds if isinstance(instance, kind)), None)
    if parent is None:
        reject("parent", parent, f"the class that {type(instance).__name__} is compared with")
    return overridden(instance, method_name, parent)
