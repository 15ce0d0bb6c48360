"""Plans: closed forms exactly, and bytes of real steps on the CPU, on one rank and on several."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import leyden as L
from leyden.errors import ConfigurationError
from leyden.planner import MemoryPlan, RankPlan, plan_memory
from leyden.planner.plan import GIB, gib
from planned import GPT, LAYERS, LENGTH, WIDTH, WORDS, Block, Measured, tokens, train, train_any
from ranks import run_ranks

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BLOCK = 12 * WIDTH**2 + 13 * WIDTH  # elements of one block
ALL = LAYERS * BLOCK + (WORDS + LENGTH + 2) * WIDTH


def plan(model: nn.Module, **options: Any) -> MemoryPlan:
    return plan_memory(model, **({"verbose": False, "device_type": "cpu"} | options))


def single(model: nn.Module, **options: Any) -> RankPlan:
    return plan(model, strategies=("single",), **options).rows[0]


def on_meta(make: Any = GPT) -> Any:
    with torch.device("meta"):
        return make()


class TestClosedForms:
    def test_one_rank(self) -> None:
        row = single(nn.Linear(10, 5))
        assert (row.parameters, row.gradients) == (220, 220)
        assert row.optimizer_state == 2 * 220 + 2 * 4  # two moments; one counter for each of two parameters
        assert row.total == 220 + 220 + 448 + 2 * 200  # a step on the weights has two tensors on the way
        assert row.communication == 0
        assert row.activations is None

    def test_tied_weights_count_once(self) -> None:
        assert single(on_meta()).parameters == 4 * ALL

    def test_frozen_parameters_have_no_gradient_and_no_state(self) -> None:
        model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1, bias=False))
        model[0].requires_grad_(False)
        row = single(model, batch=(4, 10))
        assert (row.parameters, row.gradients, row.optimizer_state) == (480, 40, 84)
        ddp = plan(model, strategies=("ddp",), devices=2).rows[0]
        assert ddp.communication == 40

    def test_buffers_count_as_parameters(self) -> None:
        assert single(nn.BatchNorm1d(8)).parameters == 4 * 8 * 4 + 8  # and the counter of batches

    @pytest.mark.parametrize(
        ("optimizer", "per_element", "per_tensor"),
        [
            ("AdamW", 8, 4),
            ("adam", 8, 4),
            ("sgd", 0, 0),
            ("adagrad", 4, 4),
            ("rmsprop", 4, 4),
            ("lion", None, None),
            (lambda parameters: torch.optim.SGD(parameters, momentum=0.9), 4, 0),
            (lambda parameters: torch.optim.Adam(parameters, amsgrad=True), 12, 4),
            (torch.optim.NAdam, 8, 8),
        ],
    )
    def test_states_of_optimizers(self, optimizer: Any, per_element: int | None, per_tensor: int) -> None:
        if per_element is None:
            with pytest.raises(ConfigurationError, match=r"optimizer='lion' is not valid. Allowed: adadelta, .*adamw"):
                single(nn.Linear(10, 5), optimizer=optimizer)
        else:
            assert single(nn.Linear(10, 5), optimizer=optimizer).optimizer_state == 55 * per_element + 2 * per_tensor

    def test_factored_state(self) -> None:
        row = single(nn.Linear(256, 512, bias=False), optimizer="adafactor")
        assert row.optimizer_state == 4 * (256 + 512 + 1)

    @pytest.mark.parametrize(
        ("precision", "size"), [("32-true", 4), ("64-true", 8), ("bf16-true", 2), ("16-true", 2), ("bf16-mixed", 4)]
    )
    def test_precision(self, precision: str, size: int) -> None:
        row = single(nn.Linear(10, 5), precision=precision)
        assert (row.parameters, row.gradients) == (55 * size, 55 * size)
        assert row.optimizer_state == 2 * 55 * size + 8

    def test_activations_of_layers_by_hand(self) -> None:
        # Kept for the backward pass: the batch and the outputs of six ReLUs. At the fullest moment the last of these is gone,
        # and the gradients before and after a layer are there.
        model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(64, 64, bias=False), nn.ReLU())))
        row = single(model, batch=(1024, 64), optimizer="sgd")
        assert row.activations is not None
        one = 1024 * 64 * 4
        weight = 64 * 64 * 4  # whose gradient is on its way at that moment; and the loss, with its gradient
        assert row.activations == 8 * one + weight + 2 * 4

    @pytest.mark.parametrize("size", [2, 3, 8])
    def test_ddp(self, size: int) -> None:
        model = nn.Linear(10, 5)
        viewed, torchs = (
            plan(model, strategies=("ddp",), devices=size, gradient_as_bucket_view=view).rows[0]
            for view in (True, False)
        )
        assert viewed.total == single(model).total
        assert torchs.total == viewed.total + 220
        assert (viewed.buffers, torchs.buffers) == (0, 220)
        assert viewed.communication == math.ceil(2 * (size - 1) / size * 220)

    @pytest.mark.parametrize(("size", "rows"), [(2, 5), (3, 4), (4, 3), (16, 1)])
    def test_fsdp_rounds_shards_up(self, size: int, rows: int) -> None:
        row = plan(nn.Linear(7, 10, bias=False), strategies=("fsdp",), devices=size).rows[0]
        assert row.parameters == row.gradients == rows * 7 * 4
        assert row.optimizer_state == 2 * rows * 7 * 4 + 4

    def test_fsdp_sends_parameters_twice_and_gradients_once(self) -> None:
        options: dict[str, Any] = {"strategies": ("fsdp",), "devices": 4, "units": (Block,)}
        row = plan(on_meta(), **options).rows[0]
        root = ALL - LAYERS * BLOCK  # gathered once: it stays until the backward pass
        gathered = 2 * LAYERS * BLOCK + root
        assert row.communication == 3 / 4 * 4 * (gathered + ALL)
        mixed = plan(on_meta(), precision="bf16-mixed", **options).rows[0]
        norms = 2 * 2 * LAYERS * 2 * WIDTH + 2 * WIDTH  # stay in fp32
        assert mixed.communication == 3 / 4 * (2 * gathered + 2 * norms + 4 * ALL)
        narrow = plan(on_meta(), precision="bf16-mixed", reduce_dtype=torch.bfloat16, **options).rows[0]
        assert narrow.communication == mixed.communication - 3 / 4 * 2 * ALL
        half = plan(on_meta(), precision="bf16-true", **options).rows[0]
        assert half.communication == 3 / 4 * (2 * gathered + 4 * ALL)

    def test_tensor_parallel_sends_activations_four_times_a_block(self) -> None:
        found = plan(on_meta(), batch=tokens(2), strategies=("tensor_parallel",), devices=4)
        row = found.rows[0]
        assert row.communication == 2 * 3 / 4 * LAYERS * 4 * (2 * LENGTH * WIDTH * 4)
        assert {name.split(".")[-1] for name in found.columns} == {"qkv", "up"}
        assert {name.split(".")[-1] for name in found.row_wise} == {"proj", "down"}

    def test_seconds(self) -> None:
        rows = plan(nn.Linear(10, 5), devices=2, bandwidth_gb_per_s=1e-9).rows  # one byte a second
        assert [row.seconds for row in rows] == [0, 220, row_of(rows, "fsdp").communication, None]


def row_of(rows: list[RankPlan], strategy: str) -> RankPlan:
    return next(row for row in rows if row.strategy == strategy)


class TestTensorParallel:
    @pytest.mark.parametrize("size", [2, 4])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_is_the_model_that_a_rank_would_hold(self, size: int, precision: str) -> None:
        """A model divided by hand, planned for one rank, takes what the whole one takes on each of several."""
        options: dict[str, Any] = {"batch": tokens(8), "precision": precision}
        row = plan(on_meta(), strategies=("tensor_parallel",), devices=size, **options).rows[0]
        part = single(on_meta(lambda: GPT(parts=size)), **options)
        for name in ("parameters", "gradients", "optimizer_state", "casts", "activations", "total"):
            assert getattr(row, name) == getattr(part, name), name

    def test_of_separate_projections(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))

            def forward(self, x: Tensor) -> Tensor:
                return x + self.o(F.softmax(self.q(x) * self.k(x), -1) * self.v(x))

        model = nn.Sequential(Attention(), Attention())
        found = plan(model, batch=(3, 16), strategies=("tensor_parallel",), devices=2)
        assert [name[2:] for name in found.columns] == ["q", "k", "v"] * 2
        assert [name[2:] for name in found.row_wise] == ["o"] * 2
        assert found.rows[0].parameters == 4 * 2 * 4 * 16 * 8
        # The batch needs no gradient: one sum less in the backward pass of the first one.
        assert found.rows[0].communication == 3 * 3 * 16 * 4

    def test_by_a_plan(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        found = plan(
            model, strategies=("tensor_parallel",), devices=2, tensor_parallel_plan={"0": "columns", "1": "rows"}
        )
        assert (found.columns, found.row_wise) == (["0"], ["1"])
        assert found.rows[0].parameters == 4 * (8 * 4 + 4 + 8 * 4 + 8)
        assert "(asked for)" in str(found)

    def test_bad_plans(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        with pytest.raises(ConfigurationError, match="'columns' or 'rows'"):
            plan(model, tensor_parallel_plan={"0": "colwise"})
        with pytest.raises(ConfigurationError, match="called '1'"):
            plan(model, tensor_parallel_plan={"1": "rows"})

    def test_says_where_nothing_is_divided(self) -> None:
        assert "nothing is divided" in str(plan(nn.Linear(3, 3), devices=2))


# One step of each, by hand-written torch, and what torch's own allocator was asked for.
CASES = [
    pytest.param(1, "single", 1, "32-true", False, id="single-small-batch"),
    pytest.param(1, "single", 16, "32-true", False, id="single"),
    pytest.param(1, "single", 16, "bf16-mixed", False, id="single-mixed"),
    pytest.param(1, "single", 16, "32-true", True, id="single-checkpointing"),
    pytest.param(2, "ddp", 1, "32-true", False, id="ddp-2-small-batch"),
    pytest.param(2, "ddp", 16, "bf16-mixed", True, id="ddp-2-mixed-checkpointing"),
    pytest.param(2, "fsdp", 1, "32-true", False, id="fsdp-2-small-batch"),
    pytest.param(2, "fsdp", 16, "bf16-mixed", False, id="fsdp-2-mixed"),
    pytest.param(4, "ddp", 4, "32-true", False, id="ddp-4"),
    pytest.param(4, "fsdp", 4, "32-true", True, id="fsdp-4-checkpointing"),
]


OTHERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, groups=2),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        ),
        (32, 3, 32, 32),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, batch_first=True), 3, enable_nested_tensor=False
        ),
        (16, 64, 64),
    ),
    "perceptron": (lambda: nn.Sequential(nn.Linear(10, 99), nn.Mish(), nn.Linear(99, 10), nn.Softmax(-1)), (64, 10)),
}


class TestMeasured:
    @pytest.mark.parametrize(("size", "strategy", "batch_size", "precision", "recompute"), CASES)
    def test_bytes(self, size: int, strategy: str, batch_size: int, precision: str, recompute: bool) -> None:
        batch = tokens(batch_size)
        row = plan(
            on_meta(),
            batch=batch,
            precision=precision,
            devices=size,
            strategies=(strategy,),
            units=(Block,),
            activation_checkpointing=recompute,
        ).rows[0]
        found: Measured = run_ranks(train, max(size, 1), strategy, size, batch_size, precision, recompute)[0]
        self.compare(row, found, sum(each.nbytes for each in batch[:1]), strategy, precision == "bf16-mixed")
        share = (size - 1) / size
        if strategy == "ddp":
            assert row.communication == 2 * share * found.reduced
        if strategy == "fsdp":
            # Mixed precision gathers the last normalization, which is in no unit, twice.
            twice = 2 * WIDTH * 4 if precision == "bf16-mixed" else 0
            assert row.communication == share * (found.gathered + found.reduced - twice)

    @staticmethod
    def compare(row: RankPlan, found: Measured, batch: int, strategy: str, mixed: bool = False) -> None:
        assert row.optimizer_state is not None
        kept = row.parameters + row.gradients + row.optimizer_state + (row.buffers if strategy == "ddp" else 0)
        if strategy != "single":
            kept += batch  # a storage like others to that measurement; torch's allocator gave it out before
        else:
            batch = -batch
        # DDP, FSDP and gloo keep some counters.
        assert abs(found.kept - kept) < 2048
        # leyden's mixed precision gathers normalization layers by themselves, which the plan does not follow.
        exact = not (strategy == "fsdp" and mixed)
        assert found.peak == pytest.approx(row.total + min(batch, 0), rel=1e-3 if exact else 1e-2)

    @pytest.mark.parametrize(("make", "shape"), OTHERS.values(), ids=OTHERS)
    def test_other_layers(self, make: Any, shape: tuple[int, ...]) -> None:
        model, x = make(), torch.zeros(shape)
        row = single(model, batch=x)
        most, gradients = train_any(model, x)
        assert row.optimizer_state is not None
        assert row.gradients == gradients
        assert row.total - row.parameters - row.optimizer_state == pytest.approx(most + x.nbytes, rel=1e-3)

    def test_recurrent_layers_are_told_of(self) -> None:
        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.LSTM(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x)[0]

        assert "recurrent layers keep is not known" in str(plan(Recurrent(), batch=(5, 3, 8)))

    def test_buckets_of_their_own(self) -> None:
        row = plan(on_meta(), batch=tokens(4), devices=2, strategies=("ddp",), gradient_as_bucket_view=False).rows[0]
        found: Measured = run_ranks(train, 2, "ddp", 2, 4, "32-true", False, False)[0]
        self.compare(row, found, tokens(4)[0].nbytes, "ddp")

    @gpu
    @needs_cuda
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_on_a_gpu(self, precision: str) -> None:
        batch = tuple(each.cuda() for each in tokens(16))
        row = plan_memory(
            on_meta(), batch=batch, precision=precision, strategies=("single",), device_type="cuda", verbose=False
        ).rows[0]
        model = GPT().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = model(*batch)
            loss.backward()
            optimizer.step()
        # The allocator rounds each tensor up to 512 bytes, and cuBLAS takes a workspace of its own.
        assert torch.cuda.max_memory_allocated() == pytest.approx(row.total, rel=0.1, abs=40 * 2**20)


class Module(L.LightningModule):
    """As users write it: layers made late, a loss that is logged, optimizers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module | None = None

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = nn.Linear(10, 5)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.layer is not None
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class TestModels:
    def test_a_lightning_module(self) -> None:
        module = Module()
        found = plan(module, batch=(4, 10))
        row = found.row("single")
        assert (row.parameters, row.gradients, row.optimizer_state) == (220, 220, 220)
        assert row.activations is not None
        assert "configure_model was called" in str(found)
        assert "SGD" in found.title
        assert module.layer is None

    def test_a_real_model_is_not_changed(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        random = torch.get_rng_state()
        plan(model, batch=(8, 4))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not model.training
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
        assert torch.equal(random, torch.get_rng_state())

    def test_an_optimizer_of_the_model(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = torch.optim.Adam(
            [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[1].parameters(), "amsgrad": True}]
        )
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        assert single(model, optimizer=optimizer).optimizer_state == 20 * 8 + 20 * 12 + 4 * 4
        assert not optimizer.state
        some = torch.optim.SGD(model[0].parameters(), momentum=0.9)
        assert single(model, optimizer=[some]).optimizer_state == 80
        with pytest.raises(ConfigurationError, match="has parameters that Linear has not"):
            plan(nn.Linear(1, 1), optimizer=optimizer)

    def test_batches_in_all_forms(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
                return {"a": self.layer(a), "b": self.layer(b)}

        real = torch.zeros(3, 4)
        rows = [
            single(Named(), batch=batch)
            for batch in ([(3, 4), (3, 4)], (real, real.clone()), {"a": real, "b": real.to("meta")})
        ]
        assert rows[0] == rows[1] == rows[2]
        assert rows[0].activations

    def test_a_loss_of_ones_own(self) -> None:
        row = single(
            nn.Linear(4, 1),
            batch=(torch.zeros(8, 4), torch.zeros(8, 1)),
            loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        )
        assert row.activations

    def test_a_step_that_needs_numbers_is_told_of(self) -> None:
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x[x.sum(1) > 0])

        found = plan(Reads(), batch=(3, 4))
        assert "Activations are not in the peak: the step could not be run without numbers" in str(found)
        assert found.rows[0].activations is None
        assert found.cells()[0][found.headings().index("peak")].startswith(">")

    def test_numbers_that_are_read(self) -> None:
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                assert (x > 0).any()
                return self.layer(x) * (2.0 if x.sum().item() > 0 else 1.0)

        found = plan(Reads(), batch=(3, 4))
        assert found.rows[0].activations
        assert "taken for 1" in str(found)
        assert "taken for 1" not in str(plan(nn.Linear(4, 4), batch=(3, 4)))

    def test_an_optimizer_that_needs_a_closure_is_told_of(self) -> None:
        found = plan(nn.Linear(4, 4), optimizer="lbfgs")
        assert found.rows[0].optimizer_state is None
        assert "The optimizer's state is not in the peak: TypeError" in str(found)

    def test_more_memory_than_any_machine_has(self) -> None:
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(2**17, 2**17, bias=False) for _ in range(4)))
        row = plan(model, batch=(2**20, 2**17), devices=1024, strategies=("fsdp",)).rows[0]
        assert row.parameters == 4 * 2**34 * 4 // 1024
        assert row.activations is not None
        assert row.activations > 4 * 2**37 * 4

    def test_units(self) -> None:
        model = nn.Sequential(Block(), nn.Sequential(Block(), nn.LayerNorm(WIDTH)))
        assert "fsdp: 0 units" in str(plan(model, devices=2))  # none is large
        assert "fsdp: 2 units" in str(plan(model, devices=2, units=(Block,)))
        large = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(3)), nn.Linear(998, 1000))
        assert "fsdp: 3 units" in str(plan(large, devices=2))  # a million and more
        with pytest.raises(ConfigurationError, match="units="):
            plan(model, units=(nn.Conv2d,))

    def test_checkpointing_keeps_one_input_for_each_unit(self) -> None:
        whole, less = (single(on_meta(), batch=tokens(16), activation_checkpointing=again) for again in (False, True))
        assert whole.activations is not None
        assert less.activations is not None
        assert less.activations < whole.activations / 2
        flops = [plan(on_meta(), batch=tokens(16), activation_checkpointing=again).flops for again in (False, True)]
        assert flops[0] is not None
        assert flops[1] is not None
        # The forward pass of the blocks once more, less what the last product of each would give: 1/3 of blocks at most.
        assert 1.2 < flops[1] / flops[0] < 4 / 3

    def test_flops(self) -> None:
        found = plan(nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5)), batch=(4, 10))
        assert found.flops == 2 * 4 * (10 * 20 + 20 * 5) * 3 - 2 * 4 * 10 * 20  # the batch needs no gradient


class TestTable:
    def test_plain(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = plan_memory(
            nn.Linear(1024, 1024, bias=False), devices=(1, 2), device_memory_gib=3, bandwidth_gb_per_s=10
        )
        assert capsys.readouterr().out == f"{found}\n"
        lines = str(found).splitlines()
        assert lines[0] == "Linear: 1.0 M parameters, 32-true, AdamW (default); GiB per rank"
        assert [each.strip() for each in lines[1].split("|")] == found.headings()
        assert found.headings()[-4:] == ["peak", "fits", "sent", "seconds"]
        assert lines[3].split(" | ")[0].strip() == "single"
        assert [row.world_size for row in found.rows] == [1, 2, 2, 2]
        assert "?" in lines[3]  # what is not counted may not fit
        assert repr(found) == f"<MemoryPlan of 4 rows: {found.title}>"

    def test_rich(self) -> None:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=200).print(plan(nn.Linear(4, 4), devices=2, device_memory_gib=1))
        assert "tensor_parallel" in out.getvalue()
        assert "no" in out.getvalue()

    def test_what_fits(self) -> None:
        model = on_meta(lambda: nn.Linear(2**14, 2**14, bias=False))  # 1 GiB, four times
        rows = plan(
            model, batch=(1, 2**14), devices=2, strategies=("single", "fsdp"), device_memory_gib=5, reserve_gib=1
        ).rows
        assert [row.fits for row in rows] == [False, True] or rows[1].total > 4 * GIB
        assert rows[0].fits is False

    def test_rows_by_name(self) -> None:
        found = plan(nn.Linear(4, 4), devices=(2, 4))
        assert found.row("ddp").world_size == 2
        assert found.row("ddp", 4).world_size == 4
        with pytest.raises(KeyError, match="ddp on 8 ranks"):
            found.row("ddp", 8)

    @pytest.mark.parametrize(
        ("count", "text"),
        [(None, "-"), (0, "0"), (1, "<0.001"), (GIB, "1.000"), (10 * GIB, "10.0"), (2000 * GIB, "2,000.0")],
    )
    def test_figures(self, count: int | None, text: str) -> None:
        assert gib(count) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices=0"),
        ({"devices": True}, "devices=True"),
        ({"devices": ()}, r"devices=\(\)"),
        ({"strategies": ("dpp",)}, "Did you mean 'ddp'"),
        ({"strategies": "ddp"}, "in a list or tuple"),
        ({"precision": "bf17"}, "precision="),
        ({"optimizer": 3}, "optimizer=3"),
        ({"optimizer": lambda parameters: 3}, "this gave int"),
        ({"device_type": "mps"}, "'cpu' or 'cuda'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan(nn.Linear(2, 2), **options)


def test_parameters_without_a_shape() -> None:
    model = nn.LazyLinear(4)
    with pytest.raises(ConfigurationError, match="weight has no shape yet"):
        plan(model)
