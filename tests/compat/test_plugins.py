"""What `Trainer(plugins=…)` takes, and what it refuses with a way out."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as L
from leyden.callbacks import Preemption
from leyden.demos import BoringModel
from leyden.errors import ConfigurationError
from leyden.plugins import (
    CheckpointIO,
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    XLAPrecision,
)
from leyden.plugins.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from leyden.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from quiet import make_trainer
from ranks import run_trainers

SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_NTASKS": "2",
}


def trained(folder: Path, **options: Any) -> tuple[L.Trainer, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    trainer, model = make_trainer(folder, limit_train_batches=3, limit_val_batches=0, **options), BoringModel()
    torch.manual_seed(1)
    trainer.fit(model)
    return trainer, model.state_dict()


@pytest.mark.parametrize(
    ("plugin", "name"),
    [
        (MixedPrecision("bf16-mixed", "cpu"), "bf16-mixed"),
        (HalfPrecision("bf16-true"), "bf16-true"),
        (DoublePrecision(), "64-true"),
        (FSDPPrecision("bf16-mixed"), "bf16-mixed"),
        (XLAPrecision("bf16-true"), "bf16-true"),
    ],
)
def test_a_precision_object_does_what_its_name_does(plugin: Precision, name: str, tmp_path: Path) -> None:
    by_object, weights = trained(tmp_path, plugins=[plugin])
    by_name, expected = trained(tmp_path, precision=name)
    assert (by_object.precision, by_object.precision_plugin) == (by_name.precision, plugin)
    assert isinstance(plugin, L.plugins.Precision)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_a_scaler_of_ones_own_is_taken(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer, _ = trained(tmp_path, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert trainer.scaler is scaler
    assert scaler.get_scale() == 4.0
    assert MixedPrecision("16-mixed", "cpu").grad_scaler("cpu") is not None


def test_precisions_refuse_what_they_are_not() -> None:
    with pytest.raises(ConfigurationError, match=r"precision='32' is not valid. Allowed: '16-mixed', 'bf16-mixed'"):
        MixedPrecision("32", "cpu")
    with pytest.raises(ConfigurationError, match="whose losses are not scaled"):
        MixedPrecision("bf16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigurationError, match="precision='16-mixed' is not valid"):
        HalfPrecision("16-mixed")
    with pytest.raises(ConfigurationError, match="contradict each other"):
        L.Trainer(precision="64", plugins=[DoublePrecision()], logger=False)


class Disk(CheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None: ...

    def load_checkpoint(self, path: Any, map_location: Any = None) -> dict[str, Any]:
        return {}

    def remove_checkpoint(self, path: Any) -> None: ...


def test_another_way_to_write_checkpoints_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"plugins=.*Disk.*dirpath='s3://…'"):
        make_trainer(tmp_path, plugins=[Disk()])
    with pytest.raises(ConfigurationError, match=r"a Precision, or an environment, of leyden\.plugins"):
        make_trainer(tmp_path, plugins=["slurm"])


# ------------------------------------------------------------------------------------------------------- environments


class Mine(ClusterEnvironment):
    """A launcher that leyden does not know."""

    creates_processes_externally = True
    main_address = "10.0.0.1"
    main_port = 4321

    def world_size(self) -> int:
        return 4

    def global_rank(self) -> int:
        return 3

    def local_rank(self) -> int:
        return 1

    def node_rank(self) -> int:
        return 1


def test_an_environment_of_ones_own_says_who_this_process_is(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, plugins=[Mine()], devices=2, num_nodes=2)
    found = (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank)
    assert found == (4, 3, 1, 1)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy.start_method is None
    place = Mine().place()
    assert place is not None
    assert (place.master_addr, place.master_port) == ("10.0.0.1", 4321)
    with pytest.raises(ConfigurationError, match="devices=3"):
        make_trainer(tmp_path, plugins=[Mine()], devices=3)


def test_one_that_starts_nothing_lets_the_trainer_start(tmp_path: Path) -> None:
    class Later(Mine):
        creates_processes_externally = False

    trainer = make_trainer(tmp_path, plugins=[Later()], devices=2)
    assert (trainer.world_size, trainer.strategy.start_method) == (2, "script")


def test_slurm_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    slurm = SLURMEnvironment()
    assert SLURMEnvironment.detect()
    assert (slurm.world_size(), slurm.global_rank(), slurm.local_rank(), slurm.node_rank()) == (2, 1, 1, 0)
    assert (slurm.main_address, slurm.creates_processes_externally) == ("127.0.0.1", True)
    assert (slurm.job_id(), slurm.job_name()) == (77, "train")
    trainer = make_trainer(tmp_path, plugins=[slurm], devices=2)
    assert (trainer.world_size, trainer.global_rank) == (2, 1)
    with pytest.raises(ConfigurationError, match="plugins has a MPIEnvironment, but SLURM started this process"):
        make_trainer(tmp_path, plugins=[MPIEnvironment()], devices=2)


def test_within_slurm_the_trainer_may_be_told_to_be_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(tmp_path, plugins=LightningEnvironment(), devices=1)
    assert (trainer.world_size, type(trainer.strategy)) == (1, SingleDeviceStrategy)
    trainer.fit(BoringModel())
    assert trainer.global_step == 64


def test_slurms_requeuing_is_that_of_preemption(tmp_path: Path) -> None:
    def preemption(*plugins: ClusterEnvironment) -> Preemption:
        trainer = make_trainer(tmp_path, plugins=list(plugins))
        (found,) = (each for each in trainer.callbacks if isinstance(each, Preemption))
        return found

    assert preemption().requeue == preemption(SLURMEnvironment()).requeue == "auto"
    assert preemption(SLURMEnvironment(auto_requeue=False)).requeue is False
    assert preemption(SLURMEnvironment(requeue_signal=signal.SIGHUP)).signals == ("SIGTERM", "SIGHUP")
    with pytest.raises(ConfigurationError, match="requeue_signal='SIGHUP' is not valid"):
        SLURMEnvironment(requeue_signal="SIGHUP")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", [SLURMEnvironment, TorchElasticEnvironment, MPIEnvironment, LSFEnvironment, KubeflowEnvironment]
)
def test_where_nobody_has_started_ranks_an_environment_changes_nothing(
    kind: type[ClusterEnvironment], tmp_path: Path
) -> None:
    environment = kind()
    assert not kind.detect()
    assert (environment.world_size(), environment.global_rank(), environment.main_address) == (1, 0, "127.0.0.1")
    assert make_trainer(tmp_path, plugins=[environment]).world_size == 1


def test_only_one_environment(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="at most one environment"):
        make_trainer(tmp_path, plugins=[Mine(), LightningEnvironment()])


# --------------------------------------------------------------------------------------------------------- strategies


class Block(torch.nn.Linear):
    pass


def test_strategies_take_lightnings_arguments() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.distributed.fsdp import CPUOffload, MixedPrecision, MixedPrecisionPolicy, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    ddp = DDPStrategy(
        ddp_comm_hook=fp16_compress_hook, ddp_comm_state=None, start_method="popen", find_unused_parameters=True,
        accelerator=None, parallel_devices=None,
    )  # fmt: skip
    assert (ddp.comm_hook, ddp.start_method, ddp.find_unused_parameters) == (fp16_compress_hook, "script", True)
    fsdp = FSDPStrategy(
        auto_wrap_policy={Block},
        activation_checkpointing_policy={Block},
        sharding_strategy="SHARD_GRAD_OP",
        cpu_offload=CPUOffload(offload_params=True),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        use_orig_params=True,
        state_dict_type="sharded",
    )
    assert (fsdp.reshard_after_forward, fsdp.cpu_offload) == (False, True)
    assert fsdp.mixed_precision == MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    assert fsdp.wrap_policy(Block(1, 1))
    assert not fsdp.wrap_policy(torch.nn.Linear(1, 1))
    assert fsdp.activation_checkpointing(Block(1, 1))
    by_policy = FSDPStrategy(auto_wrap_policy=ModuleWrapPolicy({Block}), sharding_strategy=ShardingStrategy.FULL_SHARD)
    assert (by_policy.wrap_policy(Block(1, 1)), by_policy.wrap_policy(torch.nn.ReLU())) == (True, False)
    assert by_policy.reshard_after_forward is True
    by_size = FSDPStrategy(auto_wrap_policy=lambda module, recurse, nonwrapped_numel: nonwrapped_numel > 10)
    assert (by_size.wrap_policy(Block(4, 4)), by_size.wrap_policy(Block(2, 2))) == (True, False)
    assert FSDPStrategy(activation_checkpointing=[Block]).activation_checkpointing(Block(1, 1))
    assert ModelParallelStrategy(tensor_parallel_size=2, save_distributed_checkpoint=True).tensor_parallel_size == 2


def test_arguments_that_a_strategy_cannot_honour_are_told() -> None:
    with pytest.raises(
        ConfigurationError, match=r"DDPStrategy\(cluster_environment=…\) is not supported. Use Trainer\(plugins"
    ):
        DDPStrategy(cluster_environment=Mine())
    with pytest.raises(ConfigurationError, match="without shards it is DDPStrategy"):
        FSDPStrategy(sharding_strategy="NO_SHARD")
    with pytest.raises(ConfigurationError, match=r"needs device_mesh=\(replicas, shards\)"):
        FSDPStrategy(sharding_strategy="HYBRID_SHARD")
    with pytest.raises(ConfigurationError, match="sharding_strategy='SOME' is not valid"):
        FSDPStrategy(sharding_strategy="SOME")
    with pytest.raises(ConfigurationError, match="auto_wrap_policy and wrap_policy are the same argument"):
        FSDPStrategy(auto_wrap_policy={Block}, wrap_policy={Block})
    with pytest.raises(TypeError, match="nonsense"):
        DDPStrategy(nonsense=1)
    with pytest.warns(L.utilities.warnings.PossibleUserWarning, match="folders of shards"):
        FSDPStrategy(state_dict_type="full")
    with pytest.warns(L.utilities.warnings.PossibleUserWarning, match="folders of shards"):
        ModelParallelStrategy(save_distributed_checkpoint=False)


def test_a_strategy_by_name_is_one_of_the_class(tmp_path: Path) -> None:
    by_name = make_trainer(tmp_path, strategy="ddp", devices=2).strategy
    assert isinstance(by_name, DDPStrategy)
    assert not isinstance(by_name, FSDPStrategy)
    assert isinstance(by_name, L.strategies.Strategy)

    class Own(DDPStrategy):
        pass

    assert not isinstance(by_name, Own)
    own = Own(static_graph=True)
    assert isinstance(own, DDPStrategy)
    trainer = make_trainer(tmp_path, strategy=own, devices=2)
    assert (trainer.strategy, own.static_graph, trainer.world_size) == (own, True, 2)


def in_a_rank(rank: int, folder: Path) -> dict[str, Any]:
    strategy = DDPStrategy(ddp_comm_hook=None, find_unused_parameters=False)
    trainer = make_trainer(folder, strategy=strategy, plugins=[TorchElasticEnvironment()], devices=2, accelerator="cpu")
    seen: list[Any] = []

    class Model(BoringModel):
        def on_train_start(self) -> None:
            strategy = self.trainer.strategy
            seen.append(strategy.reduce_boolean_decision(rank == 0))
            seen.append(strategy.reduce_boolean_decision(rank == 0, all=False))
            seen.append(strategy.broadcast(rank))
            seen.append(strategy.reduce(torch.tensor(float(rank)), reduce_op="mean").item())

    trainer.fit(Model())
    wrote = L.utilities.rank_zero_only(lambda: "wrote", default="left alone")()
    return {"seen": seen, "wrote": wrote, "status": str(trainer.state.status), "steps": trainer.global_step}


def test_two_ranks_agree_and_one_writes(tmp_path: Path) -> None:
    first, second = run_trainers(in_a_rank, 2, tmp_path)
    assert first == {"seen": [False, True, 0, 0.5], "wrote": "wrote", "status": "finished", "steps": 32}
    assert second == first | {"wrote": "left alone"}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_state_comes_back_from_processes_that_were_started(tmp_path: Path) -> None:
    strategy = DDPStrategy(start_method="fork")
    trainer = make_trainer(tmp_path, strategy=strategy, plugins=[LightningEnvironment()], devices=2)
    trainer.fit(BoringModel())
    assert (trainer.state.fn, trainer.state.stage, trainer.state.status) == ("fit", None, "finished")
    assert trainer.global_step == 32
