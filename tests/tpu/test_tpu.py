"""Training through torch_xla, on its CPU device where there is no TPU: the same module gives what it gives with torch on the CPU.

To run it, in an environment of its own: ``PJRT_DEVICE=CPU python -m pytest tests/tpu``; docs/tpu.md says what has to be in it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from quiet import Memory, make_trainer

os.environ.setdefault("PJRT_DEVICE", "CPU")
torch_xla = pytest.importorskip("torch_xla", reason="torch_xla is not installed")

import leyden as L  # noqa: E402  after torch_xla: backward passes before its import would break those on its device
from leyden import xla  # noqa: E402
from leyden.callbacks import ModelCheckpoint, WeightAveraging  # noqa: E402
from leyden.errors import ConfigurationError  # noqa: E402

counters = pytest.importorskip("torch_xla.debug.metrics", reason="torch_xla is not installed")
xla_model = pytest.importorskip("torch_xla.core.xla_model", reason="torch_xla is not installed")

BATCHES = 12


class Net(L.LightningModule):
    """A classifier, with what its steps were given and gave."""

    def __init__(self, optimizer: str = "sgd", dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))
        self.optimizer = optimizer
        self.seen: list[Tensor] = []

    @property
    def losses(self) -> Tensor:
        return torch.stack(self.seen).float().cpu()

    def loss(self, batch: Any) -> Tensor:
        samples, classes = batch
        assert samples.device == self.device
        return F.cross_entropy(self.layers(samples), classes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.seen.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        found: Tensor = self.layers(batch[0])
        return found

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(batches: int = BATCHES, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(4 * batches, 8, generator=generator)
    classes = torch.randint(0, 3, (4 * batches,), generator=generator)
    return DataLoader(TensorDataset(samples, classes), batch_size=4, shuffle=shuffle)


def trained(folder: Path, *callbacks: L.Callback, net: Any = None, batches: int = BATCHES, **options: Any) -> Any:
    """A module after a fit with seed 1."""
    ckpt_path = options.pop("ckpt_path", None)
    L.seed_everything(1, verbose=False)
    module = (net or Net)()
    trainer = make_trainer(folder, *callbacks, **({"accelerator": "tpu"} | options))
    trainer.fit(module, loader(batches), loader(3, shuffle=False), ckpt_path=ckpt_path)
    return module


def graphs() -> dict[str, int]:
    """How many graphs were compiled, and how many were run, since the start of the process."""
    xla_model.wait_device_ops()  # a graph counts as run when a thread has come to it
    return {name: counters.counter_value(name) or 0 for name in ("UncachedCompile", "ExecuteComputation")}


@pytest.fixture(autouse=True)
def keep_seed() -> Iterator[None]:
    """`seed_everything` leaves a variable in the environment."""
    before = os.environ.get("PL_GLOBAL_SEED")
    yield
    if before is None:
        os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 5},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"nan_policy": "skip"},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_losses_and_weights_are_those_of_torch_on_the_cpu(
    optimizer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    def net() -> Net:
        return Net(optimizer)

    here = trained(tmp_path, net=net, max_epochs=2, **options)
    there = trained(tmp_path, net=net, max_epochs=2, accelerator="cpu", **options)
    assert here.device == torch.device("xla", 0)
    assert len(here.losses) == 2 * BATCHES
    torch.testing.assert_close(here.losses, there.losses, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(mine.detach().cpu(), theirs.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        here.trainer.callback_metrics["val"].cpu().double(), there.trainer.callback_metrics["val"].double()
    )


def test_logged_values_are_those_of_torch_on_the_cpu(tmp_path: Path) -> None:
    rows = []
    for accelerator in ("tpu", "cpu"):
        memory = Memory()
        trained(tmp_path, accelerator=accelerator, max_epochs=2, logger=memory, log_every_n_steps=5)
        rows.append(memory)
    assert [step for step, _ in rows[0].rows] == [step for step, _ in rows[1].rows]
    for name, count in (("loss_step", 4), ("loss_epoch", 2), ("val", 2)):
        assert len(rows[0].of(name)) == count
        assert rows[0].of(name) == pytest.approx(rows[1].of(name), rel=1e-5)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 40), (4, 10)])
def test_each_step_is_one_graph_and_no_later_one_is_compiled(accumulate: int, steps: int, tmp_path: Path) -> None:
    options = {"limit_val_batches": 0, "accumulate_grad_batches": accumulate}
    trained(tmp_path, batches=40, max_epochs=2, **options)
    counts = []
    for epochs in (2, 3, 5):
        gc.collect()  # a former run's module that dies in the middle would take what is recorded of it along
        before = graphs()
        trained(tmp_path, batches=40, max_epochs=epochs, **options)
        counts.append({name: count - before[name] for name, count in graphs().items()})
    executed = [count["ExecuteComputation"] for count in counts]
    # besides the steps of an epoch: its mean, and where 32 values were logged their sum
    sums = 40 // 32
    assert executed[1] - executed[0] == steps + 1 + sums
    assert executed[2] - executed[1] == 2 * (steps + 1 + sums)
    assert [count["UncachedCompile"] for count in counts] == [0, 0, 0]


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    class Watch(L.Callback):
        def __init__(self) -> None:
            self.reads: list[int] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            transfers = counters.metric_data("TransferFromDeviceTime")
            scalars = counters.counter_value("aten::_local_scalar_dense") or 0
            self.reads.append((transfers[0] if transfers else 0) + scalars)

    watch = Watch()
    module = trained(tmp_path, watch, gradient_clip_val=1.0, limit_val_batches=0)
    assert len(set(watch.reads)) == 1
    assert len(watch.reads) == BATCHES
    before = watch.reads[-1]
    float(module.seen[-1])  # what is counted is counted
    watch.on_train_batch_end(None, None, None, None, 0)
    assert watch.reads[-1] > before


def test_compilation_has_a_part_of_its_own_in_the_account(tmp_path: Path) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 23), nn.Tanh(), nn.Linear(23, 3))

    account = trained(tmp_path, net=Wider).trainer.time_account
    assert 0 < account.seconds()["compilation"] < account.total
    assert account.seconds()["training step"] > 0
    again = trained(tmp_path, net=Wider).trainer.time_account
    assert again.seconds()["compilation"] == 0


@pytest.mark.parametrize("at", [5, BATCHES, BATCHES + 7])
def test_a_run_that_goes_on_is_the_same_to_the_last_bit(at: int, tmp_path: Path) -> None:
    def net() -> Net:
        return Net("adamw", dropout=0.3)

    class SaveAt(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == at:
                trainer.at_step_boundary(lambda: trainer.save_checkpoint(tmp_path / "at.ckpt"))

    whole = trained(tmp_path, SaveAt(), net=net, max_epochs=3)
    rest = trained(tmp_path, net=net, max_epochs=3, ckpt_path=tmp_path / "at.ckpt")
    assert len(whole.losses) == 3 * BATCHES
    assert torch.equal(rest.losses, whole.losses[at:])
    for mine, theirs in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine.cpu(), theirs.cpu())


@pytest.mark.parametrize("way", [("tpu", "cpu"), ("cpu", "tpu")], ids=str)
def test_a_checkpoint_goes_from_one_kind_of_device_to_the_other(way: tuple[str, str], tmp_path: Path) -> None:
    def net() -> Net:
        return Net("adamw")

    first, second = way
    whole = trained(tmp_path, net=net, max_epochs=2, accelerator="cpu")
    ckpt_path = None
    for epochs, accelerator in ((1, first), (2, second)):
        saving = ModelCheckpoint(dirpath=tmp_path, filename=accelerator)
        options = {"max_epochs": epochs, "accelerator": accelerator, "enable_checkpointing": True}
        rest = trained(tmp_path, saving, net=net, ckpt_path=ckpt_path, **options)
        ckpt_path = tmp_path / f"{accelerator}.ckpt"
    assert rest.device.type == {"tpu": "xla", "cpu": "cpu"}[second]
    torch.testing.assert_close(rest.losses, whole.losses[BATCHES:], rtol=1e-5, atol=1e-6)


def test_random_numbers_of_the_device_follow_the_seed(tmp_path: Path) -> None:
    def net() -> Net:
        return Net(dropout=0.5)

    first, second, plain = trained(tmp_path, net=net), trained(tmp_path, net=net), trained(tmp_path)
    assert torch.equal(first.losses, second.losses)
    assert not torch.equal(first.losses, plain.losses)
    L.seed_everything(2, verbose=False)
    state = xla.random_state()
    drawn = torch.rand(3, device="xla").cpu()
    assert not torch.equal(drawn, torch.rand(3, device="xla").cpu())
    xla.set_random_state(state)
    assert torch.equal(drawn, torch.rand(3, device="xla").cpu())


def test_shared_weights_stay_shared_and_parameters_the_same_objects(tmp_path: Path) -> None:
    made: list[Any] = []

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
            self.layers[2].weight = self.layers[0].weight
            made.append(list(self.parameters()))
            self.made_before = torch.optim.SGD(self.parameters(), lr=0.2)

        def configure_optimizers(self) -> Any:
            return self.made_before

    here, there = trained(tmp_path, net=Tied), trained(tmp_path, net=Tied, accelerator="cpu")
    assert here.layers[0].weight is here.layers[2].weight
    assert all(mine is before for mine, before in zip(here.parameters(), made[0], strict=True))
    assert not torch.equal(here.losses[:1], here.losses[-1:])
    torch.testing.assert_close(here.losses, there.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "parameters", "computed"),
    [("bf16-mixed", torch.float32, torch.bfloat16), ("bf16-true", torch.bfloat16, torch.bfloat16)],
)
def test_bf16(precision: str, parameters: torch.dtype, computed: torch.dtype, tmp_path: Path) -> None:
    dtypes: set[torch.dtype] = set()

    class Looking(Net):
        def loss(self, batch: Any) -> Tensor:
            samples, classes = batch
            found = self.layers(samples)
            dtypes.add(found.dtype)
            return F.cross_entropy(found, classes)

    here = trained(tmp_path, net=Looking, precision=precision, max_epochs=3)
    full = trained(tmp_path, max_epochs=3, accelerator="cpu")
    assert dtypes == {computed}
    assert {parameter.dtype for parameter in here.parameters()} == {parameters}
    torch.testing.assert_close(here.losses, full.losses, rtol=0.05, atol=0.05)
    assert not torch.equal(here.losses, full.losses)


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    module = trained(tmp_path)
    trainer = make_trainer(tmp_path, accelerator="tpu")
    data = loader(70, shuffle=False)
    trainer.validate(module, data)
    before = graphs()
    result = trainer.validate(module, data)
    found = trainer.predict(module, data)
    executed = graphs()["ExecuteComputation"] - before["ExecuteComputation"]
    # one for each batch; sums of what was logged, twice; the mean, and its way to the host
    assert 140 <= executed <= 140 + 6
    assert found is not None
    assert {each.device.type for each in found} == {"xla"}
    predictions = torch.cat([each.cpu() for each in found])
    other = Net()
    other.load_state_dict({name: tensor.cpu() for name, tensor in module.state_dict().items()})
    samples, classes = data.dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        by_hand = other.layers(samples)
    torch.testing.assert_close(predictions, by_hand, rtol=1e-5, atol=1e-6)
    assert result == [{"val": pytest.approx(float(F.cross_entropy(by_hand, classes)), rel=1e-5)}]


def test_manual_optimization_and_an_optimizer_step_of_the_users(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.optimizers().minimize(loss)
            self.lr_schedulers().step()
            self.seen.append(loss.detach())

    class Own(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer.step(closure=optimizer_closure)

    plain = trained(tmp_path)
    for kind in (Manual, Own):
        trained(tmp_path, net=kind, limit_val_batches=0)
        before = graphs()
        module = trained(tmp_path, net=kind, limit_val_batches=0)
        executed = graphs()["ExecuteComputation"] - before["ExecuteComputation"]
        assert BATCHES <= executed <= BATCHES + 2
        torch.testing.assert_close(module.losses, plain.losses, rtol=1e-5, atol=1e-6)


def test_averaged_weights_and_the_best_checkpoint(tmp_path: Path) -> None:
    class Frozen(Net):
        """With buffers of the shapes of parameters, which are not averaged."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.full((16, 8), 3.0))
            self.register_buffer("also", torch.full((16,), 4.0))

    averaged = []
    for accelerator in ("tpu", "cpu"):
        best = ModelCheckpoint(dirpath=tmp_path / accelerator, monitor="val")
        module = trained(tmp_path, WeightAveraging(), best, net=Frozen, accelerator=accelerator, max_epochs=3,
                         enable_checkpointing=True)  # fmt: skip
        averaged.append([parameter.detach().cpu() for parameter in module.parameters()])
        restored = Frozen.load_from_checkpoint(best.best_model_path)
        assert restored.device == torch.device("cpu")
        assert torch.equal(restored.kept, torch.full((16, 8), 3.0))
        assert torch.equal(restored.also, torch.full((16,), 4.0))
        averaged[-1] += [parameter.detach() for parameter in restored.parameters()]
    for mine, theirs in zip(*averaged, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(r"ignore:\[LEY-nan-skipped\]")
def test_a_step_that_is_skipped_leaves_everything_as_it_was(tmp_path: Path) -> None:
    class Broken(Net):
        """One of its batches gives no finite loss, after BatchNorm has seen it."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 3))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 5 else loss

    modules = [
        trained(tmp_path, net=Broken, nan_policy="skip", accelerator=accelerator) for accelerator in ("tpu", "cpu")
    ]
    assert [module.trainer.skipped_batches for module in modules] == [1, 1]
    torch.testing.assert_close(modules[0].losses, modules[1].losses, rtol=1e-4, atol=1e-5)
    means = [module.layers[1].running_mean.cpu() for module in modules]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, r"compile=True and accelerator='tpu' contradict.*Leave compile out"),
        ({"compile": "auto"}, r"compile='auto' and accelerator='tpu' contradict"),
        ({"precision": "16-mixed"}, r"precision='16-mixed' computes in fp16.*'bf16-mixed'"),
        ({"precision": "16-true"}, r"precision='16-true' computes in fp16"),
        ({"devices": 2}, r"devices=2.*one process drives one TPU core"),
        ({"devices": [1]}, r"devices=\[1\]"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_batch(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = Net()
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path, accelerator="tpu", **options).fit(module, loader())
    assert module.seen == []


@pytest.mark.parametrize("devices", ["auto", 1, "1", [0], -1])
def test_one_device_in_every_form(devices: Any, tmp_path: Path) -> None:
    assert make_trainer(tmp_path, accelerator="TPU", devices=devices).device == torch.device("xla", 0)


@pytest.mark.skipif(os.environ["PJRT_DEVICE"] == "TPU", reason="there is a TPU")
def test_a_device_that_is_left_open_is_not_a_cpu_through_torch_xla(tmp_path: Path) -> None:
    assert xla.runtime() == "CPU"
    assert make_trainer(tmp_path, accelerator="auto").device.type != "xla"
