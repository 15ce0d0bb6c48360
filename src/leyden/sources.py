"""Where a verb's loaders come from: what was passed, else the datamodule's hook, else the module's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from leyden.data.combined import CombinedLoader
from leyden.data.loader import Source, make_source, without_shuffle
from leyden.data.shares import Share
from leyden.datamodule import LightningDataModule
from leyden.errors import DataError, warn
from leyden.hooks import overridden
from leyden.module import LightningModule
from leyden.settings import Settings


class Sources:
    """The loaders of one verb, asked for once and kept until they are to be reloaded.

    Args:
        module: whose hooks may give loaders.
        datamodule: whose hooks go before.
        passed: what the verb was given, by kind.
        settings: limits, and whether loaders are divided among ranks.
        around: what iterators are wrapped in when a profiler watches.
        share: which of the ranks this one is; None for one process. With it, asking for loaders is a collective.
    """

    def __init__(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        passed: dict[str, Any],
        settings: Settings,
        around: Callable[[Iterator[Any]], Iterator[Any]] | None = None,
        share: Share | None = None,
    ) -> None:
        self.module = module
        self.datamodule = datamodule
        self.passed = passed
        self.settings = settings
        self.around = around
        self.share = None if share is None or share.of == 1 else share
        self._raw: dict[str, Any] = {}
        self._train: Source | None = None
        self._validation: list[Source] | None = None
        self._validates: bool | None = None
        self._made: list[Source] = []
        self._described: set[tuple[str, int]] = set()

    def has(self, kind: str) -> bool:
        """Whether there is a loader of ``kind``: train, val, test or predict."""
        return self.passed.get(kind) is not None or self._owner(kind) is not None

    def raw(self, kind: str) -> Any:
        """The loaders of ``kind`` as the user gave them; None before they were asked for."""
        return self._raw.get(kind)

    def train(self) -> Source:
        """The training loader; several in a list or dict are read together, shorter ones again and again."""
        if self._train is None:
            given, name = self._ask("train")
            loader = CombinedLoader(given, "max_size_cycle") if isinstance(given, (list, tuple, dict)) else given
            limit, limit_name = self.settings.limit_train_batches, "limit_train_batches"
            if self.settings.overfit_batches:
                limit_name, loader = "overfit_batches", without_shuffle(loader, name)
            self._train = self._make(loader, name, 1.0 if limit is None else limit, limit_name, True)
        return self._train

    def validation(self) -> list[Source]:
        """The validation loaders; none if there are none or they are limited to nothing."""
        if self._validation is None:
            self._validation = self.evaluation("val") if self.validates() else []
        return self._validation

    def validates(self) -> bool:
        """Whether `fit` validates: there is a step and a loader for it, and the limit is not 0."""
        if self._validates is None:  # asked more than once, but announced once
            self._validates = self.settings.limit_val_batches != 0 and self._can_validate()
        return self._validates

    def _can_validate(self) -> bool:
        has_step, has_loader = overridden(self.module, "validation_step", LightningModule), self.has("val")
        name = type(self.module).__name__
        if has_step and not has_loader:
            warn(
                "no-val-loader", f"{name} has a validation_step but there is no val_dataloader: fit does not validate."
            )
        if has_loader and not has_step:
            warn(
                "no-validation-step",
                f"There is a val_dataloader but {name} has no validation_step: fit does not validate.",
            )
        return has_step and has_loader

    def evaluation(self, kind: str) -> list[Source]:
        """The loaders of ``kind``, read one after the other.

        Raises:
            DataError: if there are none.
        """
        given, name = self._ask(kind)
        if isinstance(given, CombinedLoader) and given.mode == "sequential":
            given = given.flattened
        loaders = list(given.values()) if isinstance(given, dict) else given
        limit_name = f"limit_{kind}_batches"
        limit = getattr(self.settings, limit_name)
        if not isinstance(loaders, (list, tuple)):
            loaders = [loaders]
        if self.settings.overfit_batches and kind == "val":
            loaders = [without_shuffle(loader, name) for loader in loaders]
            limit_name = "overfit_batches"
        return [self._make(loader, name, limit, limit_name, number=n) for n, loader in enumerate(loaders)]

    def reload(self) -> None:
        """Forget the loaders, so that the hooks are asked again."""
        self.shut_down()
        self._train = self._validation = None

    def shut_down(self) -> None:
        """End the processes of persistent workers."""
        for source in self._made:
            source.shut_down()
        self._made.clear()

    def estimated_steps(self, accumulate: Callable[[int], int]) -> float:
        """Optimizer steps of the whole training, inf if it has no end.

        Args:
            accumulate: gives an epoch's number of batches per step.
        """
        settings, batches = self.settings, self.train().total
        limit = math.inf if settings.max_steps == -1 else settings.max_steps
        if batches == math.inf or settings.max_epochs in (None, -1):
            return limit
        assert settings.max_epochs is not None
        return min(limit, sum(math.ceil(batches / accumulate(epoch)) for epoch in range(settings.max_epochs)))

    def _make(
        self, loader: Any, name: str, limit: int | float, limit_name: str, training: bool = False, number: int = 0
    ) -> Source:
        share, divides = self.share, self.settings.use_distributed_sampler
        made = make_source(loader, name, limit, limit_name, share, training, divides)
        if share is not None and (name, number) not in self._described:
            from leyden.data.announce import describe_division  # only ranks need it

            self._described.add((name, number))
            self._say(name, describe_division(loader, name, share, training, divides), training and share.rank == 0)
        self._made.append(replace(made, around=self.around))
        return self._made[-1]

    def _say(self, name: str, division: str, aloud: bool) -> None:
        """Note a reason for `Trainer.explain`, unless an earlier verb has; and print it where it is said aloud."""
        if (name, division) not in self.settings.reasons:
            self.settings.reasons.append((name, division))
            if aloud:
                print(f"{name}: {division}.")

    def _owner(self, kind: str) -> LightningModule | LightningDataModule | None:
        hook = f"{kind}_dataloader"
        if self.datamodule is not None and overridden(self.datamodule, hook, LightningDataModule):
            return self.datamodule
        return self.module if overridden(self.module, hook, LightningModule) else None

    def _ask(self, kind: str) -> tuple[Any, str]:
        name = f"{kind}_dataloader"
        owner = self._owner(kind)
        if self.passed.get(kind) is not None:
            given, name = self.passed[kind], f"{kind}_dataloaders"
        elif owner is not None:
            given = getattr(owner, name)()
        else:
            raise DataError(
                f"There is no {name}. Pass one to the Trainer's method, or define {name} in "
                f"{type(self.datamodule or self.module).__name__}."
            )
        if given is None:
            raise DataError(f"{name} returned None. Return a DataLoader, or any other iterable of batches.")
        if isinstance(given, LightningDataModule):
            raise DataError(f"{name} is a LightningDataModule. Pass it as datamodule=…")
        self._raw[kind] = given
        return given, name
