"""What save_hyperparameters keeps, and how a module or datamodule is built again from a checkpoint."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from leyden.checkpoint.format import load_checkpoint, read_metadata
from leyden.datamodule import LightningDataModule
from leyden.errors import CheckpointError, ConfigurationError
from leyden.module import LightningModule
from leyden.trainer import Trainer

torch.set_num_threads(1)


class Base(LightningModule):
    """What every module here needs to be fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def saved(module: LightningModule, folder: Path, datamodule: LightningDataModule | None = None) -> str:
    """Fit for a step, and return the path of a checkpoint."""
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=1, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, None if datamodule is not None else loader(), datamodule=datamodule)
    path = str(folder / "saved.ckpt")
    trainer.save_checkpoint(path)
    return path


def loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(2, 2))  # type: ignore[arg-type]


# which arguments are kept


class Kinds(Base):
    def __init__(
        self, first: int, /, second: str = "b", *rest: int, third: float, fourth: Any = None, **more: Any
    ) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_every_kind_of_argument_is_kept_but_unnamed_ones() -> None:
    module = Kinds(1, "x", 7, 8, third=0.5, extra={"a": [1]}, other=None)
    assert module.hparams == {
        "first": 1, "second": "x", "third": 0.5, "fourth": None, "extra": {"a": [1]}, "other": None,
    }  # fmt: skip


def test_every_kind_of_argument_is_passed_again(tmp_path: Path) -> None:
    again = Kinds.load_from_checkpoint(saved(Kinds(1, "x", third=0.5, extra=[1]), tmp_path), third=0.75)
    assert again.hparams == {"first": 1, "second": "x", "third": 0.75, "fourth": None, "extra": [1]}


def test_defaults_are_kept() -> None:
    assert Kinds(1, third=2.0).hparams == {"first": 1, "second": "b", "third": 2.0, "fourth": None}


class Outer(Base):
    """Does not save: a class below does, or this one's does it for those below."""

    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.width = width


class SavesItself(Outer):
    def __init__(self, lr: float, width: int = 3, **kwargs: Any) -> None:
        super().__init__(width, **kwargs)
        self.save_hyperparameters()


class SavesEarly(Outer):
    def __init__(self, lr: float, width: int = 3) -> None:
        super().__init__(width * 10)
        self.save_hyperparameters()


class SavingBase(Base):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()


class Below(SavingBase):
    def __init__(self, lr: float, width: int = 3) -> None:
        super().__init__(width * 10)


class BelowWithKwargs(SavingBase):
    def __init__(self, lr: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class SavesTwice(SavingBase):
    def __init__(self, lr: float, width: int = 3) -> None:
        super().__init__(width)
        self.save_hyperparameters()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SavesItself(0.5, depth=4), {"lr": 0.5, "width": 3, "depth": 4}),
        (lambda: SavesEarly(0.5), {"lr": 0.5, "width": 3}),
        # what the user called the outermost class with is what counts
        (lambda: Below(0.5), {"lr": 0.5, "width": 3, "depth": 2}),
        (lambda: BelowWithKwargs(width=5), {"lr": 0.1, "width": 5, "depth": 2}),
        (lambda: SavesTwice(0.5), {"lr": 0.5, "width": 3, "depth": 2}),
    ],
)
def test_a_chain_of_classes_keeps_what_the_user_wrote(make: Any, expected: dict[str, Any]) -> None:
    assert make().hparams == expected


@pytest.mark.parametrize("kind", [SavesItself, SavesEarly, Below, SavesTwice])
def test_a_chain_of_classes_is_built_again(kind: Any, tmp_path: Path) -> None:
    module = kind(0.5, width=6)
    again = kind.load_from_checkpoint(saved(module, tmp_path))
    assert again.hparams == module.hparams
    assert torch.equal(again.weight, module.weight)


@dataclass(eq=False)
class AsDataclass(LightningModule):
    lr: float
    width: int = 3

    def __post_init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, self.width)


def test_a_dataclass_keeps_its_fields() -> None:
    assert AsDataclass(0.5).hparams == {"lr": 0.5, "width": 3}


class Chosen(Base):
    def __init__(self, a: int = 1, b: int = 2, c: int = 3, **options: Any) -> None:
        super().__init__()
        options = dict(options)
        self.save_hyperparameters(*options.pop("names", ()), **options.pop("how", {}))


@pytest.mark.parametrize(
    ("names", "how", "expected"),
    [
        (("a",), {}, {"a": 1}),
        (("a", "c"), {}, {"a": 1, "c": 3}),
        (("a", "c"), {"ignore": "a"}, {"c": 3}),
        (("a", "b", "c"), {"ignore": ["a", "b"]}, {"c": 3}),
        (({"x": 1, "y": [2]},), {}, {"x": 1, "y": [2]}),
        ((Namespace(x=1, y=None),), {}, {"x": 1, "y": None}),
        (({"x": 1, "y": 2},), {"ignore": "x"}, {"y": 2}),
    ],
)
def test_names_a_dict_or_a_namespace_may_be_given(names: Any, how: Any, expected: dict[str, Any]) -> None:
    assert Chosen(names=names, how=how).hparams == expected


def test_ignore_leaves_names_out() -> None:
    assert set(Chosen(how={"ignore": ("a", "how", "no_such")}).hparams) == {"b", "c"}


def test_a_name_that_is_no_argument_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigurationError, match=r"'aa'.*no such argument; it has a, b, c.*Did you mean 'a'"):
        Chosen(names=("aa",))


def test_two_dicts_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="one dict or Namespace; it got dict, dict"):
        Chosen(names=({}, {}))


def test_outside_of_init_there_is_nothing_to_keep_and_that_is_said() -> None:
    class Late(Base):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()

        def setup(self, stage: str) -> None:
            self.save_hyperparameters()

    with pytest.raises(ConfigurationError, match=r"save_hyperparameters\(\).*setup.*call it in __init__"):
        Late().setup("fit")


def test_dicts_may_be_added_later() -> None:
    module = Base()
    module.save_hyperparameters({"found": 3})
    module.save_hyperparameters({"more": 4})
    assert module.hparams == {"found": 3, "more": 4}


# how they are read


def test_hyperparameters_are_attributes_and_items() -> None:
    module = Chosen(names=("a", "b"))
    assert (module.hparams.a, module.hparams["b"]) == (1, 2)
    module.hparams.a = 5
    module.hparams["b"] = 6
    assert module.hparams == {"a": 5, "b": 6}
    assert module.hparams_initial == {"a": 1, "b": 2}
    assert repr(module.hparams) == "'a': 5\n'b': 6"
    assert not hasattr(module.hparams, "c")
    with pytest.raises(AttributeError, match=r"no hyperparameter 'aa'; there are: a, b"):
        module.hparams.aa  # noqa: B018


def test_the_initial_ones_do_not_change_with_nested_values() -> None:
    module = Chosen(names=({"nested": {"a": [1]}},))
    module.hparams.nested["a"].append(2)
    assert module.hparams_initial.nested == {"a": [1]}


def test_a_module_that_saved_nothing_has_none() -> None:
    assert Base().hparams == {}
    assert Base().hparams_initial == {}


# from checkpoints


class Model(Base):
    def __init__(self, width: int, lr: float = 0.1, names: tuple[str, ...] = ("a",)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)


def test_load_from_checkpoint_gives_the_same_module(tmp_path: Path) -> None:
    module = Model(3, names=("x", "y"))
    again = Model.load_from_checkpoint(saved(module, tmp_path))
    assert again.hparams == {"width": 3, "lr": 0.1, "names": ("x", "y")}
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_arguments_replace_those_of_the_checkpoint(tmp_path: Path) -> None:
    assert Model.load_from_checkpoint(saved(Model(3), tmp_path), lr=0.7).hparams == {
        "width": 3,
        "lr": 0.7,
        "names": ("a",),
    }


def test_an_argument_that_changes_the_shapes_is_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)saved\.ckpt does not fit Model: .*size mismatch for layer\.weight"):
        Model.load_from_checkpoint(saved(Model(3), tmp_path), width=4)


def test_strict_decides_about_missing_and_additional_weights(tmp_path: Path) -> None:
    class Larger(Model):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.head = nn.Linear(1, 1)

    path = saved(Model(3), tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit Larger: .*head\.weight"):
        Larger.load_from_checkpoint(path, width=3)
    assert Larger.load_from_checkpoint(path, width=3, strict=False).layer.weight.shape == (1, 3)

    class Lenient(Larger):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.strict_loading = False

    assert Lenient.load_from_checkpoint(path, width=3).layer.weight.shape == (1, 3)


def test_changed_hyperparameters_are_what_a_checkpoint_holds(tmp_path: Path) -> None:
    module = Model(3)
    module.hparams.lr = 0.9
    assert Model.load_from_checkpoint(saved(module, tmp_path)).hparams.lr == 0.9


class WithBackbone(Base):
    def __init__(self, backbone: nn.Module, lr: float = 0.1, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = backbone


def test_modules_are_not_saved_twice_and_must_be_passed_again(tmp_path: Path) -> None:
    module = WithBackbone(nn.Linear(3, 3), lr=0.2)
    assert module.hparams == {"lr": 0.2, "loss": None}
    path = saved(module, tmp_path)
    assert "backbone" not in json.loads(read_metadata(path)["leyden_checkpoint"])["hyper_parameters"]
    with pytest.raises(
        CheckpointError, match=r"backbone \(a Linear: modules are not saved\).*load_from_checkpoint\(path, backbone=…\)"
    ):
        WithBackbone.load_from_checkpoint(path)
    again = WithBackbone.load_from_checkpoint(path, backbone=nn.Linear(3, 3))
    assert again.hparams.lr == 0.2
    assert torch.equal(again.backbone.weight, module.backbone.weight)


@pytest.mark.parametrize("make", [dict, Namespace])
def test_one_argument_may_hold_them_all(make: Any, tmp_path: Path) -> None:
    class Old(Base):
        def __init__(self, hparams: Any, extra: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters(hparams)
            self.layer = nn.Linear(self.hparams.width, extra)

    module = Old(make(width=2, lr=0.1))
    assert module.hparams == {"width": 2, "lr": 0.1}
    path = saved(module, tmp_path)
    assert Old.load_from_checkpoint(path).hparams == {"width": 2, "lr": 0.1}
    assert Old.load_from_checkpoint(path, lr=0.5).hparams == {"width": 2, "lr": 0.5}


def test_a_namespace_saved_among_other_arguments_comes_back_as_it_was(tmp_path: Path) -> None:
    class Args(Base):
        def __init__(self, args: Any, width: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.lr = args.lr

    path = saved(Args(Namespace(lr=0.3, names=["a"])), tmp_path)
    again = Args.load_from_checkpoint(path)
    assert (again.lr, again.hparams.args.names, again.hparams.width) == (0.3, ["a"], 1)


def test_without_saved_hyperparameters_the_error_says_what_to_do(tmp_path: Path) -> None:
    class Forgot(Base):
        def __init__(self, width: int) -> None:
            super().__init__()

    path = saved(Forgot(3), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"arguments of Forgot: width\. Pass them.*or call self\.save_hyperparameters\(\)"
    ):
        Forgot.load_from_checkpoint(path)
    assert torch.equal(Forgot.load_from_checkpoint(path, width=3).weight, load_checkpoint(path)["state_dict"]["weight"])


def test_an_argument_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Model.*no argument 'widht'.*Did you mean 'width'"):
        Model.load_from_checkpoint(saved(Model(3), tmp_path), widht=3)


def test_what_cannot_be_stored_is_refused_with_its_key(tmp_path: Path) -> None:
    class Function(Base):
        def __init__(self, fn: Any = lambda x: x) -> None:
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(CheckpointError, match=r"hyper_parameters\.fn: the function"):
        saved(Function(), tmp_path)


def test_load_hook_sees_the_checkpoint(tmp_path: Path) -> None:
    class Hooked(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["vocabulary"] = ["a", "b"]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.vocabulary = checkpoint["vocabulary"]

    assert Hooked.load_from_checkpoint(saved(Hooked(3), tmp_path)).vocabulary == ["a", "b"]


def test_configure_model_makes_the_layers_before_weights_are_loaded(tmp_path: Path) -> None:
    class Later(Base):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer: nn.Linear | None = None

        def configure_model(self) -> None:
            if self.layer is None:
                self.layer = nn.Linear(self.hparams.width, 1)

    module = Later(3)
    again = Later.load_from_checkpoint(saved(module, tmp_path))
    assert module.layer is not None
    assert again.layer is not None
    assert torch.equal(again.layer.weight, module.layer.weight)


# datamodules


class Data(LightningDataModule):
    def __init__(self, batch_size: int, folder: str = "data") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen = 0

    def train_dataloader(self) -> Any:
        return loader()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def test_a_datamodule_is_built_again_with_its_state(tmp_path: Path) -> None:
    data = Data(4)
    data.seen = 9
    path = saved(Model(3), tmp_path, data)
    again = Data.load_from_checkpoint(path)
    assert (again.hparams, again.seen) == ({"batch_size": 4, "folder": "data"}, 9)
    assert Data.load_from_checkpoint(path, folder="other").hparams.folder == "other"
    assert Model.load_from_checkpoint(path).hparams.width == 3


def test_a_datamodule_need_not_call_its_base() -> None:
    class Forgetful(LightningDataModule):
        def __init__(self, a: int) -> None:
            self.save_hyperparameters()

    assert Forgetful(3).hparams == {"a": 3}
    assert Forgetful(3).hparams_initial == {"a": 3}
