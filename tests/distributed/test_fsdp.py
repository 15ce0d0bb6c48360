"""FSDP: N ranks with parts of the parameters train like one process with all of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # before ranks are forked, so that each need not
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import leyden as L
from leyden.errors import ConfigurationError, RankError
from leyden.shards import is_sharded
from leyden.strategy import FSDPStrategy
from leyden.strategy.units import Settling, choose_units, post_order
from quiet import Memory, make_trainer
from ranks import run_trainers

GLOBAL_BATCH = 12


def data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 8, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


class Net(L.LightningModule):
    """Two blocks between two layers, and a parameter of the module itself, which is used after the call of `forward`."""

    def __init__(self, in_configure_model: bool = False, **options: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.options = options
        self.net: nn.Sequential | None = None
        if not in_configure_model:
            self.configure_model()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(8, 16), Block(16), Block(16), nn.Linear(16, 1))
            if self.options.get("frozen"):
                self.net[0].requires_grad_(False)
            if self.options.get("tied"):
                self.net[2].linear.weight = self.net[1].linear.weight

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.net(x)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x) * self.scale, y)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        if self.options.get("overflows") and self.global_step == 1 and self.global_rank == self.trainer.world_size - 1:
            loss = loss * float("inf")
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0]) * self.scale

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, 0.02)
        if self.options.get("scheduler"):
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
        return optimizer


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The weights, gathered from all ranks, as arrays: tensors would be sent by file descriptors."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.state_dict().items()
    }


def fitted(ranks: int, options: dict[str, Any], strategy: Any = "auto", **arguments: Any) -> dict[str, Any]:
    """Train a `Net`, and return what came of it as plain data."""
    L.seed_everything(3, verbose=False)
    memory, module = Memory(), Net(**options)
    trainer = make_trainer(
        Path(),
        logger=memory,
        strategy=strategy,
        **{"max_epochs": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 1, **arguments},
    )
    size = GLOBAL_BATCH // ranks
    trainer.fit(module, DataLoader(data(43), size, shuffle=True), DataLoader(data(31), size))
    return {
        "loss": memory.of("loss"),
        "val_loss": memory.of("val_loss"),
        "weights": {name: value.double().flatten().tolist() for name, value in whole(module).items()},
        "held": sum(getattr(each, "to_local", lambda each=each: each)().numel() for each in module.parameters()),
        "all": sum(each.numel() for each in module.parameters()),
        "steps": trainer.global_step,
        "reasons": trainer._settings.reasons,
    }


def one_of_many(rank: int, ranks: int, cases: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> list[Any]:
    return [fitted(ranks, options, FSDPStrategy(**sharding), **arguments) for options, sharding, arguments in cases]


def check_equal(many: list[Any], one: dict[str, Any], tolerance: float = 1e-5) -> None:
    for name in ("loss", "val_loss"):  # which rank 0 logs
        assert many[0][name] == pytest.approx(one[name], rel=tolerance, abs=tolerance)
    for result in many:
        assert result["weights"].keys() == one["weights"].keys()
        for name, values in one["weights"].items():
            assert result["weights"][name] == pytest.approx(values, rel=tolerance, abs=tolerance), name
    assert many[0]["weights"] == many[-1]["weights"]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one unit": ({}, {}, {}),
    "units by class": ({}, {"wrap_policy": {Block, nn.Linear}}, {}),
    "units by function": ({}, {"wrap_policy": lambda module: isinstance(module, Block)}, {}),
    "kept after forward": ({}, {"wrap_policy": {Block}, "reshard_after_forward": False}, {}),
    "accumulated and clipped": (
        {},
        {"wrap_policy": {Block}},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    ),
    "accumulated in parts": (
        {},
        {"wrap_policy": {Block}, "no_sync_accumulation": False},
        {"accumulate_grad_batches": 2},
    ),
    "clipped by value": ({}, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "scheduler": ({"scheduler": True}, {"wrap_policy": {Block}}, {}),
    "frozen": ({"frozen": True}, {"wrap_policy": {nn.Linear}}, {}),
    "tied": ({"tied": True}, {"wrap_policy": {Block}}, {}),
    "meta device": ({"in_configure_model": True}, {"wrap_policy": {Block}}, {}),
    "meta device, tied": ({"in_configure_model": True, "tied": True}, {"wrap_policy": {Block}}, {}),
    "checkpointed activations": ({}, {"wrap_policy": {Block}, "activation_checkpointing": True}, {}),
    "checkpointed classes": ({}, {"activation_checkpointing": {Block}}, {}),
    "offloaded": ({}, {"wrap_policy": {Block}, "cpu_offload": True}, {"gradient_clip_val": 0.05}),
    "looked at": ({}, {"wrap_policy": {Block}}, {"nan_policy": "raise"}),
    "detect_anomaly": ({}, {"wrap_policy": {Block}}, {"detect_anomaly": True}),
}


@pytest.mark.parametrize(
    ("ranks", "names"), [(2, tuple(CASES)), (3, ("units by class", "accumulated and clipped", "meta device"))]
)
def test_ranks_with_parts_train_like_one_process(ranks: int, names: tuple[str, ...]) -> None:
    many = run_trainers(one_of_many, ranks, ranks, [CASES[name] for name in names])
    for number, name in enumerate(names):
        options, _, arguments = CASES[name]
        one = fitted(1, options, **arguments)
        try:
            check_equal([each[number] for each in many], one)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        if name != "tied" and ranks == 2:
            held = [each[number]["held"] for each in many]
            assert sum(held) == one["all"]
            assert max(held) < 0.6 * one["all"]


def test_replicas_of_shards() -> None:
    cases: list[Any] = [({}, {"device_mesh": (2, 2), "wrap_policy": {Block}}, {"gradient_clip_val": 0.05})]
    many = [each[0] for each in run_trainers(one_of_many, 4, 4, cases)]
    check_equal(many, fitted(1, {}, gradient_clip_val=0.05))
    assert sum(each["held"] for each in many) == 2 * many[0]["all"]


def test_computing_in_16_bits() -> None:
    precisions = ["bf16-mixed", "bf16-true"]
    cases: list[Any] = [({}, {"wrap_policy": {Block}}, {"precision": each}) for each in precisions]
    many = run_trainers(one_of_many, 2, 2, cases)
    for number, precision in enumerate(precisions):
        one = fitted(1, {}, precision=precision)
        check_equal([each[number] for each in many], one, tolerance=0.03)
        exact = fitted(1, {})
        assert one["loss"] != exact["loss"]


def test_an_overflow_on_one_rank_is_skipped_by_all() -> None:
    options = {"overflows": True}
    cases: list[Any] = [(options, {"wrap_policy": {Block}}, {"precision": "16-mixed"})]
    many = [each[0] for each in run_trainers(one_of_many, 2, 2, cases)]
    check_equal(many, fitted(1, options, precision="16-mixed"), tolerance=0.03)


def skipping(rank: int) -> tuple[int, list[float]]:
    strategy = FSDPStrategy(wrap_policy={Block})
    result = fitted(2, {"overflows": True}, strategy, nan_policy="skip", max_epochs=1, log_every_n_steps=1)
    return result["steps"], [value for values in result["weights"].values() for value in values]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nan_policy_decides_alike() -> None:
    (steps, weights), other = run_trainers(skipping, 2)
    assert (steps, weights) == other
    assert steps == 1  # it stays so, and therefore each later batch overflows as well
    assert all(map(torch.isfinite, torch.tensor(weights)))


# Manual optimization


class Pair(L.LightningModule):
    """A generator and a critic, each with an optimizer of its own."""

    def __init__(self, minimizes: bool, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.minimizes, self.accumulate = minimizes, accumulate
        self.parts = nn.ModuleDict({"generator": nn.Sequential(nn.Linear(8, 8), Block(8)), "critic": nn.Linear(8, 1)})

    def training_step(self, batch: list[Tensor]) -> None:
        x, _ = batch
        generate, judge = self.optimizers()
        made = self.parts["generator"](x)
        if self.minimizes:
            options: dict[str, Any] = {"gradient_clip_val": 0.1, "accumulate_grad_batches": self.accumulate}
            generate.minimize(self.parts["critic"](made).mean(), **options)
            loss = (self.parts["critic"](made.detach()) - self.parts["critic"](x)).square().mean()
            judge.minimize(loss, **options)
        else:
            self.toggle_optimizer(generate)
            self.manual_backward(self.parts["critic"](made).mean())
            generate.step()
            generate.zero_grad()
            self.untoggle_optimizer(generate)
            judge.zero_grad()
            loss = (self.parts["critic"](made.detach()) - self.parts["critic"](x)).square().mean()
            self.manual_backward(loss)
            judge.step()
        self.log("loss", loss)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.parts["critic"](self.parts["generator"](batch[0])).mean())

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 0.02) for part in self.parts.values()]


def pairs(rank: int, ranks: int, sharded: bool) -> list[dict[str, Any]]:
    results = []
    for minimizes, accumulate, policy in ((True, 1, None), (True, 2, {Block}), (False, 1, {nn.Linear})):
        L.seed_everything(3, verbose=False)
        memory, module = Memory(), Pair(minimizes, accumulate)
        strategy = FSDPStrategy(wrap_policy=policy) if sharded else "auto"
        trainer = make_trainer(Path(), logger=memory, max_epochs=2, log_every_n_steps=1, strategy=strategy)
        trainer.fit(
            module,
            DataLoader(data(48), GLOBAL_BATCH // ranks, shuffle=True),
            DataLoader(data(31), GLOBAL_BATCH // ranks),
        )
        weights = {name: value.double().flatten().tolist() for name, value in whole(module).items()}
        results.append({"loss": memory.of("loss"), "val_loss": memory.of("val_loss"), "weights": weights})
    return results


def test_manual_optimization_with_two_optimizers() -> None:
    many, one = run_trainers(pairs, 2, 2, True), pairs(0, 1, False)
    for number in range(len(one)):
        check_equal([each[number] for each in many], one[number])


class OwnParameter(Pair):
    def __init__(self) -> None:
        super().__init__(True)
        self.scale = nn.Parameter(torch.ones(1))


def refused(rank: int) -> str:
    trainer = make_trainer(Path(), strategy=FSDPStrategy())
    with pytest.raises((ConfigurationError, RankError)) as caught:  # on the rank that comes second
        trainer.fit(OwnParameter(), DataLoader(data(48), 6), DataLoader(data(12), 6))
    return str(caught.value)


def test_manual_optimization_needs_parameters_in_submodules() -> None:
    assert "OwnParameter has parameters of its own (scale)" in run_trainers(refused, 2)[0]


# Evaluation


class Uneven(IterableDataset[Any]):
    """A stream that has another length on each rank."""

    def __init__(self, rank: int, ranks: int, lengths: list[int]) -> None:
        self.start, self.length = sum(lengths[:rank]), lengths[rank]
        if ranks == 1:
            self.start, self.length = 0, sum(lengths)

    def __iter__(self) -> Iterator[Any]:
        samples = data(sum((7, 2)))
        yield from (samples[number] for number in range(self.start, self.start + self.length))


class Measured(Net):
    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()

    def validation_step(self, batch: list[Tensor]) -> None:
        x, y = batch
        self.error(self(x) * self.scale, y)
        self.log("error", self.error)
        self.log("samples", float(len(x)), reduce_fx="sum")

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("samples", float(len(batch[0])) + 0.0 * self.loss(batch).item(), reduce_fx="sum")


def evaluated(rank: int, ranks: int, sharded: bool) -> Any:
    L.seed_everything(3, verbose=False)
    module = Measured()
    strategy = FSDPStrategy(wrap_policy={Block}) if sharded else "auto"
    trainer = make_trainer(
        Path(), strategy=strategy, use_distributed_sampler=False, max_epochs=1, num_sanity_val_steps=2
    )

    def uneven() -> DataLoader[Any]:
        return DataLoader(Uneven(rank, ranks, [7, 2]), 1)

    before = trainer.validate(module, uneven())  # before anything was trained
    trainer.fit(module, DataLoader(data(24), GLOBAL_BATCH // ranks), uneven())
    samples = float(trainer.callback_metrics["samples"])
    tested = trainer.test(module, [uneven(), uneven()])
    predicted = trainer.predict(module, DataLoader(data(7), 2))
    assert predicted is not None
    parts: list[list[float]] = [part.flatten().tolist() for part in predicted]
    return before, samples, tested, parts


def test_ranks_that_run_out_keep_up() -> None:
    many, one = run_trainers(evaluated, 2, 2, True), evaluated(0, 1, False)
    assert one[0][0]["samples"] == 9
    for result in many:
        assert result[0][0] == pytest.approx(one[0][0], rel=1e-4)
        assert result[1] == 9
        assert [each for values in result[2] for each in values.values()] == [9, 9]
        assert len(result[3]) == 2 * len(one[3])  # each rank predicts all here
        assert result[3][::2] == result[3][1::2]


# The meta device


class Table(nn.Module):
    """Has a parameter and a buffer; ``resets`` are the tensors that `reset_parameters` sets."""

    def __init__(self, resets: tuple[str, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 2))
        self.register_buffer("places", torch.empty(3))
        self.resets = resets
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name in self.resets:
            with torch.no_grad():
                getattr(self, name).fill_(0.5)


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def settled(module: nn.Module) -> None:
    settling = Settling(module, torch.device("cpu"), sends=False)
    for part in post_order(module):
        settling.settle(part)
    settling.finish(module)


def made(build: Any) -> tuple[nn.Module, int]:
    """Build twice, on the CPU and on the meta device; settle the latter, and compare."""
    torch.manual_seed(1)
    here = build()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    with torch.device("meta"):
        there = build()
    settled(there)
    for (name, one), other in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(torch.rand(1), drawn)  # the same random numbers were used
    return there, sum(1 for _ in there.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda: Net().net,
        lambda: nn.Sequential(
            nn.Embedding(7, 3, padding_idx=0), nn.LSTM(3, 4, 2), nn.Conv1d(3, 4, 2), nn.Bilinear(2, 3, 4)
        ),
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.PReLU()),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: Table(("weight", "places")),
    ],
    ids=["net", "layers", "normalizations", "attention", "own"],
)
def test_modules_on_the_meta_device_get_the_values_of_one_process(build: Any) -> None:
    made(build)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_a_module_that_resets_its_parts_does() -> None:
    with torch.device("meta"):
        module = nn.Transformer(8, 2, 1, 1, 16)
    settled(module)
    own, transformers = 8**-0.5, (6 / (8 + 16)) ** 0.5  # the bounds of what a linear layer draws, and of Xavier's
    weight = module.encoder.layers[0].linear1.weight
    assert own < weight.abs().max() < transformers


def test_tied_parameters_stay_one() -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        net[1].weight = net[0].weight
        return net

    there, parameters = made(build)
    assert parameters == 1
    assert isinstance(there, nn.Sequential)
    assert there[1].weight is there[0].weight


def lost() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (NoReset, "NoReset was made on the meta device.* has no reset_parameters method that could give weight values"),
        (lambda: nn.Sequential(Table(("weight",))), r"0 \(Table\) was made on the meta device.* does not set places"),
        (lost, r"configure_model has set weight of 0 \(Linear\).* values are lost"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"0\.weight has no shape yet"),
    ],
)
def test_what_would_have_no_values_is_refused(build: Any, message: str) -> None:
    with torch.device("meta"):
        module = build()
    with pytest.raises(ConfigurationError, match=message):
        settled(module)


def most_at_once(rank: int) -> tuple[int, int, int]:
    """The most elements that were whole at once while a module of 20 layers was made; of one layer, and of all."""
    there: Any = importlib.import_module("leyden.strategy.fsdp")
    most = 0

    class Counting(Settling):
        def finish(self, unit: nn.Module) -> None:
            nonlocal most
            super().finish(unit)
            held = [each for each in self._root.parameters() if not each.is_meta and not is_sharded(each)]
            most = max(most, sum(each.numel() for each in held))

    there.Settling = Counting

    class Deep(Net):
        def configure_model(self) -> None:
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(8, 16), *(Block(16) for _ in range(20)), nn.Linear(16, 1))

    module = Deep(in_configure_model=True)
    trainer = make_trainer(Path(), strategy=FSDPStrategy(wrap_policy={Block}), max_steps=1, limit_val_batches=0)
    trainer.fit(module, DataLoader(data(12), 6))
    return most, sum(each.numel() for each in Block(16).parameters()), sum(each.numel() for each in module.parameters())


def test_no_rank_ever_holds_the_whole_module() -> None:
    most, layer, every = run_trainers(most_at_once, 2)[0]
    assert most < 3 * layer
    assert every > 20 * layer


# Units


def test_units_are_chosen() -> None:
    net = Net(tied=True).net
    assert net is not None
    units, why_not = choose_units(net, lambda module: isinstance(module, (Block, nn.ReLU, nn.Linear)))
    assert units == [net[0], net[3]]
    assert why_not == [
        "1.linear shares a parameter with 2.linear",
        "1 shares a parameter with 2.linear",
        "2.linear shares a parameter with 1.linear",
        "2 shares a parameter with 1.linear",
    ]
    holder = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    units, why_not = choose_units(holder, lambda module: isinstance(module, nn.ModuleList))
    assert units == []
    assert why_not == ["0 is a ModuleList, which has no forward pass; choose its entries"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrap_policy": "size"}, "wrap_policy='size'"),
        ({"wrap_policy": {int}}, "wrap_policy="),
        ({"wrap_policy": nn.Linear}, "a set of module classes"),
        ({"cpu_offload": "yes"}, "cpu_offload='yes'"),
        ({"device_mesh": (2,)}, r"device_mesh=\(2,\)"),
        ({"activation_checkpointing": True}, "wrap_policy=None makes none"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FSDPStrategy(**options)


# Checkpoints


def saved(rank: int, ranks: int, how: str, folder: Path, epochs: int, ckpt_path: Any) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    memory, module = Memory(), Net()
    strategy: Any = {"fsdp": FSDPStrategy(wrap_policy={Block}), "ddp": "ddp", "one": "auto"}[how]
    keeper = L.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=1)
    trainer = make_trainer(
        folder,
        keeper,
        logger=memory,
        strategy=strategy,
        max_epochs=epochs,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    size = GLOBAL_BATCH // ranks
    trainer.fit(module, DataLoader(data(43), size, shuffle=True), DataLoader(data(31), size), ckpt_path=ckpt_path)
    optimizer = trainer.optimizers[0]
    moments = [
        (value.full_tensor() if hasattr(value, "full_tensor") else value).double().flatten().tolist()
        for state in optimizer.state.values()
        for value in state.values()
    ]
    weights = {name: value.double().flatten().tolist() for name, value in whole(module).items()}
    return {
        "loss": memory.of("loss"),
        "val_loss": memory.of("val_loss"),
        "weights": weights,
        "moments": moments,
        "best": keeper.best_model_path,
    }


@pytest.mark.parametrize(("ranks", "how"), [(2, "fsdp"), (1, "one"), (2, "ddp")])
def test_resume_on_other_ranks_and_other_strategies(ranks: int, how: str, tmp_path: Path) -> None:
    def run(ranks: int, how: str, epochs: int, ckpt_path: Any) -> list[dict[str, Any]]:
        arguments = (ranks, how, tmp_path / f"{how}{epochs}", epochs, ckpt_path)
        return [saved(0, *arguments)] if how == "one" else run_trainers(saved, ranks, *arguments)

    uninterrupted = run(1, "one", 4, None)[0]
    path = run(ranks, how, 2, None)[0]["best"]
    assert Path(path).is_dir() == (how == "fsdp")
    assert [each.name for each in (tmp_path / f"{how}2").iterdir()] == [
        Path(path).name
    ]  # of epoch 1, without epoch 0's
    targets = [(2, "fsdp"), (4, "fsdp")] if how != "fsdp" else [(2, "fsdp"), (3, "fsdp"), (1, "one"), (2, "ddp")]
    for new_ranks, other in targets:
        many = run(new_ranks, other, 4, path)
        rest = {
            **uninterrupted,
            **{name: uninterrupted[name][-8 if name == "loss" else -2 :] for name in ("loss", "val_loss")},
        }
        check_equal(many, rest)
        for here, before in zip(many[0]["moments"], uninterrupted["moments"], strict=True):
            assert here == pytest.approx(before, rel=1e-4, abs=1e-6)
