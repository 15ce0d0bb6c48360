"""N processes with the same global batch are one process: the same losses, weights, metrics, predictions, stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import leyden as L
from leyden.callbacks import EarlyStopping
from leyden.errors import ConfigurationError, NonFiniteError, RankError
from leyden.precision import Precision
from leyden.strategy import DDPStrategy
from quiet import Memory, make_trainer
from ranks import run_trainers

GLOBAL_BATCH = 12
SEED = 5


def data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


class Regression(L.LightningModule):
    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.kind = optimizer
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        error = (self.net(batch[0]) - batch[1]).abs()
        self.log("val_error", error.mean())
        self.log("val_worst", error.max(), reduce_fx="max")
        self.log("val_samples", float(len(error)), reduce_fx="sum")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        if self.kind == "adam":
            return torch.optim.Adam(self.parameters(), 1e-2)
        if self.kind == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        if self.kind == "steps":
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
        if self.kind == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.05)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_error"}
        return optimizer


class Manual(Regression):
    """Two optimizers, each with its own backward pass, as a GAN has them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        out = self.net(batch[0])
        first.minimize(F.mse_loss(out, batch[1]), gradient_clip_val=0.5)
        loss = F.mse_loss(self.critic(out.detach()), batch[1])
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.log("loss", loss, on_step=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 1e-2), torch.optim.SGD(self.critic.parameters(), 0.1)


class Partly(Regression):
    """A part of the module is left out of the loss in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx % 2 else loss + self.extra(batch[0]).square().mean()


def train(
    rank: int,
    ranks: int,
    folder: Path,
    make: Any,
    samples: int = 5 * GLOBAL_BATCH,
    loader: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Two epochs, with everything that is to be equal."""
    L.seed_everything(SEED + 100 * rank, verbose=False)  # DDP sends rank 0's weights, and the order is rank 0's
    module, memory = make(), Memory()
    dataset = data(samples)
    arguments = {"batch_size": GLOBAL_BATCH // ranks, "shuffle": True} | (loader or {})
    if arguments.pop("weighted", False):
        arguments |= {"shuffle": False, "sampler": WeightedRandomSampler(dataset.tensors[1].flatten().exp(), samples)}
    settings: dict[str, Any] = {"max_epochs": 2, "logger": memory, "log_every_n_steps": 1} | options
    callbacks = settings.pop("callbacks", list)()
    trainer = make_trainer(folder, *callbacks, **settings)
    validation = DataLoader(data(103), batch_size=GLOBAL_BATCH // ranks)
    trainer.fit(module, DataLoader(dataset, **arguments), validation)
    return {
        "losses": memory.of("loss_step") or memory.of("loss"),
        "epoch losses": memory.of("loss_epoch"),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "world": (trainer.global_rank, trainer.world_size),
    }


class Gentle(Precision):
    """A loss scale at which nothing overflows: a rank's gradients are those of fewer samples, and overflow sooner."""

    def grad_scaler(self, device_type: str) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device_type, init_scale=128.0)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Regression, {}),
    "Adam": (lambda: Regression("adam"), {}),
    "accumulated": (Regression, {"accumulate_grad_batches": 3}),
    "clipped by norm": (Regression, {"gradient_clip_val": 0.1}),
    "clipped by value": (Regression, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulated and clipped": (Regression, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "scheduled by steps": (lambda: Regression("steps"), {}),
    "scheduled by a metric": (lambda: Regression("plateau"), {"max_epochs": 4}),
    "LBFGS": (lambda: Regression("lbfgs"), {}),
    "manual": (Manual, {}),
    "short last batch": (Regression, {"samples": 5 * GLOBAL_BATCH + 7}),
    "last batch of one sample": (Regression, {"samples": 5 * GLOBAL_BATCH + 1}),
    "short last batch, accumulated": (Regression, {"samples": 5 * GLOBAL_BATCH + 7, "accumulate_grad_batches": 4}),
    "dropped last batch": (Regression, {"samples": 5 * GLOBAL_BATCH + 7, "loader": {"drop_last": True}}),
    "weighted sampler": (Regression, {"loader": {"weighted": True}}),
    "stopped early": (
        lambda: Regression("steps"),
        {
            "max_epochs": 50,
            "callbacks": lambda: [EarlyStopping("val_error", patience=1, min_delta=0.02, verbose=False)],
        },
    ),
    "limited": (Regression, {"limit_train_batches": 3, "limit_val_batches": 2, "val_check_interval": 2}),
    "unused parameters": (Partly, {"strategy": "ddp_find_unused_parameters_true"}),
    "fp16": (Regression, {"plugins": Gentle("16-mixed", compute_dtype=torch.float16, scales_loss=True)}),
    "bf16": (Regression, {"precision": "bf16-mixed"}),
    "fp64": (Regression, {"precision": "64-true"}),
    "nan policy": (Regression, {"nan_policy": "skip"}),
}


def assert_same(several: dict[str, Any], one: dict[str, Any], tolerance: float) -> None:
    assert several["steps"] == one["steps"]
    assert several["epochs"] == one["epochs"]
    assert several["rates"] == pytest.approx(one["rates"])
    assert several["metrics"] == pytest.approx(one["metrics"], rel=tolerance, abs=tolerance)
    for name, value in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    alone = {name: value for name, value in options.items() if name != "strategy"}
    one = train(0, 1, tmp_path, make, **alone)
    several = run_trainers(lambda rank: train(rank, 2, tmp_path, make, **options), 2)
    tolerance = {"fp16": 2e-2, "bf16": 2e-2, "fp64": 1e-7, "LBFGS": 1e-3}.get(case, 2e-5)
    for rank, result in enumerate(several):
        assert result["world"] == (rank, 2)
        assert_same(result, one, tolerance)
    assert several[0]["losses"] == pytest.approx(one["losses"], rel=tolerance, abs=tolerance)
    assert several[0]["epoch losses"] == pytest.approx(one["epoch losses"], rel=tolerance, abs=tolerance)
    assert len(one["losses"]) == one["steps"] > 0
    assert several[1]["losses"] == [], "a second rank writes no logs"
    for name, value in several[0]["weights"].items():
        assert torch.equal(several[1]["weights"][name], value), "ranks have equal weights, to the last bit"


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_are_one_process(ranks: int, tmp_path: Path) -> None:
    samples = 5 * GLOBAL_BATCH + 2  # fewer in the last batch than ranks
    one = train(0, 1, tmp_path, Regression, samples=samples)
    for result in run_trainers(lambda rank: train(rank, ranks, tmp_path, Regression, samples=samples), ranks):
        assert_same(result, one, 2e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_evaluation_counts_each_of_103_samples_once(ranks: int, tmp_path: Path) -> None:
    def evaluate(rank: int) -> tuple[Any, ...]:
        L.seed_everything(SEED, verbose=False)
        module, trainer = Regression(), make_trainer(tmp_path)
        loader = DataLoader(data(103), batch_size=10)
        validated, tested = trainer.validate(module, loader), trainer.test(module, loader)
        return validated, tested, trainer.predict(module, loader), module.net(data(103).tensors[0]).detach()

    for validated, tested, predicted, expected in run_trainers(evaluate, ranks):
        error = (expected - data(103).tensors[1]).abs()
        assert validated[0]["val_samples"] == 103
        assert validated[0]["val_error"] == pytest.approx(float(error.mean()), rel=1e-6)
        assert validated[0]["val_worst"] == pytest.approx(float(error.max()), rel=1e-6)
        assert tested[0]["test_loss"] == pytest.approx(float(error.square().mean()), rel=1e-6)
        torch.testing.assert_close(torch.cat(predicted), expected)


def test_predictions_of_several_loaders_come_in_order(tmp_path: Path) -> None:
    def predict(rank: int) -> Any:
        L.seed_everything(SEED, verbose=False)
        module, trainer = Regression(), make_trainer(tmp_path)
        loaders = [DataLoader(data(17), batch_size=4), DataLoader(data(3), batch_size=4)]
        return trainer.predict(module, loaders), module.net(data(17).tensors[0]).detach()

    for (first, second), expected in run_trainers(predict, 2):
        torch.testing.assert_close(torch.cat(first), expected)
        assert len(torch.cat(second)) == 3


class Normed(Regression):
    """Statistics of batches differ by rank."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))


def test_what_is_validated_is_what_is_saved(tmp_path: Path) -> None:
    def fit(rank: int) -> tuple[Any, ...]:
        L.seed_everything(SEED + rank, verbose=False)
        module = Normed()
        untrained = make_trainer(tmp_path).validate(module, DataLoader(data(50), batch_size=5))[0]["val_error"]
        before = {name: value.clone() for name, value in module.state_dict().items()}
        trainer = make_trainer(tmp_path, enable_checkpointing=True, max_epochs=2)
        trainer.fit(module, DataLoader(data(48), batch_size=6), DataLoader(data(50), batch_size=5))
        value = float(trainer.callback_metrics["val_error"])
        return untrained, before, value, trainer.checkpoint_callback.best_model_path

    first, second = run_trainers(fit, 2)
    alone = make_trainer(tmp_path)
    loader = DataLoader(data(50), batch_size=10)
    module = Normed()
    for untrained, weights, value, path in (first, second):
        module.load_state_dict(weights)
        assert untrained == pytest.approx(alone.validate(module, loader)[0]["val_error"], rel=1e-5)
        assert value == pytest.approx(alone.validate(module, loader, ckpt_path=path)[0]["val_error"], rel=1e-5)
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1]), "rank 0's, though seeds differ"


class Quiet(L.LightningModule):
    """Nothing but a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Noisy(Quiet):
    """Draws random numbers in its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append(torch.rand(()).item())
        return super().training_step(batch, batch_idx)


def test_ranks_draw_other_random_numbers_and_rank_zero_those_of_one_process(tmp_path: Path) -> None:
    def drawn(rank: int, ranks: int) -> list[float]:
        L.seed_everything(SEED, verbose=False)
        module = Noisy()
        make_trainer(tmp_path).fit(module, DataLoader(data(48), batch_size=GLOBAL_BATCH // ranks))
        return module.drawn

    one = drawn(0, 1)
    first, second = run_trainers(lambda rank: drawn(rank, 2), 2)
    assert first == one
    assert len(second) == len(one)
    assert not set(second) & set(one)


class Counted(Regression):
    """Counts what must happen once."""

    prepared = 0

    def prepare_data(self) -> None:
        self.prepared += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.print(f"batch {batch_idx}")
        return super().training_step(batch, batch_idx)


def test_one_rank_prepares_prints_and_writes(tmp_path: Path) -> None:
    def fit(rank: int) -> tuple[Any, ...]:
        module = Counted()
        trainer = make_trainer(tmp_path, logger=True, enable_checkpointing=True, limit_train_batches=2)
        trainer.fit(module, DataLoader(data(48), batch_size=6), DataLoader(data(48), batch_size=6))
        return module.prepared, trainer.log_dir, trainer.checkpoint_callback.best_model_path, trainer.is_global_zero

    first, second = run_trainers(fit, 2)
    assert (first[0], second[0]) == (1, 0)
    assert first[1] == second[1]
    assert first[2] == second[2]
    assert (first[3], second[3]) == (True, False)
    logs = sorted(path.name for path in (tmp_path / "lightning_logs").iterdir())
    assert logs == ["version_0"]
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1
    assert len(list(tmp_path.rglob("events*"))) + len(list(tmp_path.rglob("metrics.csv"))) == 1


def test_collectives_of_module_and_trainer(tmp_path: Path) -> None:
    class Talks(Quiet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            rank = self.global_rank
            mine = torch.tensor([float(rank), 1.0])
            seen = {
                "gathered": self.all_gather({"a": mine, "b": [mine, "text"]}),
                "broadcast": self.broadcast({"from": rank}, src=1),
                "reduced": [self.reduce(mine, op).tolist() for op in ("mean", "sum", "min", "max")],
                "whole numbers": self.reduce(torch.tensor([rank, 3])).tolist(),
                "trainer": self.trainer.all_gather(mine).tolist(),
            }
            self.barrier()
            self.seen = seen
            out = self.net(batch[0])
            everything = self.all_gather(out, sync_grads=True)
            # as a contrastive loss: each rank's output has a part in every rank's loss
            return (everything * (1.0 + rank)).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    def talk(rank: int) -> tuple[Any, ...]:
        L.seed_everything(SEED, verbose=False)
        module = Talks()
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(module, DataLoader(data(8), batch_size=4))
        return module.seen, module.net[2].bias.grad.clone()

    for seen, gradient in run_trainers(talk, 2):
        assert seen["gathered"]["a"].tolist() == [[0.0, 1.0], [1.0, 1.0]]
        assert seen["gathered"]["b"][0].tolist() == [[0.0, 1.0], [1.0, 1.0]]
        assert seen["gathered"]["b"][1] == "text"
        assert seen["broadcast"] == {"from": 1}
        assert seen["reduced"] == [[0.5, 1.0], [1.0, 2.0], [0.0, 1.0], [1.0, 1.0]]
        assert seen["whole numbers"] == [0.5, 3.0]
        assert seen["trainer"] == [[0.0, 1.0], [1.0, 1.0]]
        # d/d bias of rank r's own 4 outputs in both losses, (1 + 2) * 4 each, averaged over ranks by DDP
        assert gradient.tolist() == [12.0]


def test_options_reach_ddp(tmp_path: Path) -> None:
    def fit(rank: int) -> list[Tensor]:
        L.seed_everything(SEED, verbose=False)
        module = Quiet()
        strategy = DDPStrategy(
            static_graph=True, gradient_as_bucket_view=False, bucket_cap_mb=1, comm_hook="bf16_compress"
        )
        trainer = make_trainer(tmp_path, strategy=strategy, max_steps=1)
        trainer.fit(module, DataLoader(data(12), batch_size=6))
        return [parameter.grad.clone() for parameter in module.parameters()]

    gradients = run_trainers(fit, 2)
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, first.bfloat16().float()), "what was sent had 16 bits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"comm_hook": "bf16_compres"}, r"comm_hook='bf16_compres' is not valid.*Did you mean 'bf16_compress'"),
        ({"start_method": "exec"}, r"start_method='exec' is not valid.*'script', 'spawn', 'fork'"),
        ({"timeout": 30}, r"timeout=30 is not valid.*timedelta"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DDPStrategy(**arguments)


def test_unknown_strategies_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"strategy='dpp' is not valid.*'single_device', 'ddp'.*Did you mean 'ddp'"
    ):
        make_trainer(tmp_path, strategy="dpp")


def test_one_device_cannot_have_two_ranks(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"strategy='single_device'.*one for several ranks"):
        make_trainer(tmp_path, strategy="single_device", devices=2)


class Sparse(L.LightningModule):
    """Steps by hand; each rank looks up other rows, and rank 1 none in the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.table = nn.Embedding(8, 2, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if batch_idx == 0 or self.global_rank == 0:
            self.manual_backward(self.table(batch[0]).sum())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0)


def test_sparse_gradients_are_averaged_in_manual_optimization(tmp_path: Path) -> None:
    def fit(rank: int) -> tuple[Tensor, Tensor]:
        L.seed_everything(SEED, verbose=False)
        module = Sparse()
        before = module.table.weight.detach().clone()
        make_trainer(tmp_path).fit(module, DataLoader(TensorDataset(torch.arange(8)), batch_size=2))
        return before, module.table.weight.detach()

    for before, after in run_trainers(fit, 2):
        moved = (before - after)[:, 0]
        # one process reads 0..3 and then 4..7; of the second batch only rank 0's half has a gradient
        torch.testing.assert_close(moved, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]))


class Poisoned(Quiet):
    """The loss of rank 1 is NaN, which makes NaNs of every rank's gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and batch_idx == 1 else loss


def test_a_loss_that_is_not_finite_is_told_of_the_rank_that_had_it(tmp_path: Path) -> None:
    def fit(rank: int) -> str:
        trainer = make_trainer(tmp_path, nan_policy="raise")
        with pytest.raises((NonFiniteError, RankError)) as caught:
            trainer.fit(Poisoned(), DataLoader(data(48), batch_size=6))
        return str(caught.value)

    for said in run_trainers(fit, 2):
        assert "On rank 1: The loss is nan in epoch 0, batch_idx 1" in said
