"""Tensor parallel and 2-D: the user's `configure_model` divides the module over a mesh of devices, by torch's own functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from leyden.errors import ConfigurationError, reject
from leyden.seed import capture_random_state, restore_random_state
from leyden.shards import is_sharded
from leyden.strategy.base import Layout
from leyden.strategy.sharding import ShardedStrategy, make_mesh, send_from_first, shard_rest
from leyden.strategy.sync_batchnorm import synchronise_batchnorm
from leyden.strategy.units import Settling, post_order

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from leyden.module import LightningModule
    from leyden.settings import Settings

DATA, TENSOR = "data_parallel", "tensor_parallel"


class ModelParallelStrategy(ShardedStrategy):
    """A mesh of ``data_parallel`` x ``tensor_parallel`` ranks, on which `configure_model` calls torch's ``parallelize_module``.

    The mesh is ``self.device_mesh`` there, and ``trainer.strategy.device_mesh``. Ranks of one tensor-parallel group are
    neighbours, read the same data and draw the same random numbers. What `configure_model` does not divide over the
    data-parallel ranks, by ``fully_shard``, is divided afterwards, as one unit, so that gradients are averaged over them.

    Args:
        data_parallel_size: over how many groups of ranks the data is divided; "auto": as many as are left, or machines.
        tensor_parallel_size: ranks of a group; "auto": those of a machine.
        **options: of `DistributedStrategy`.

    Raises:
        ConfigurationError: an argument is not one of the above; or the sizes do not make up the number of ranks.

    Source: https://docs.pytorch.org/docs/stable/distributed.tensor.parallel.html
    """

    def __init__(
        self, *, data_parallel_size: int | str = "auto", tensor_parallel_size: int | str = "auto", **options: Any
    ) -> None:
        super().__init__(**options)
        for name, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            if size != "auto" and (type(size) is not int or size < 1):
                reject(name, size, "an integer ≥ 1, or 'auto'")
        self.data_parallel_size: Any = data_parallel_size
        self.tensor_parallel_size: Any = tensor_parallel_size
        self._mesh: DeviceMesh | None = None

    def settle(self, layout: Layout) -> None:
        """See `Strategy.settle`."""
        super().settle(layout)
        data, tensor, ranks = self.data_parallel_size, self.tensor_parallel_size, self.world_size
        if tensor == "auto" and data != "auto":
            tensor = ranks // data
        elif tensor == "auto":
            here = layout.place.local_world_size if layout.place is not None else None
            tensor = here or len(layout.devices)
        data = ranks // tensor if data == "auto" else data
        if data * tensor != ranks:
            raise ConfigurationError(
                f"ModelParallelStrategy: data_parallel_size={data} x tensor_parallel_size={tensor} is {data * tensor} ranks, and "
                f"there are {ranks}."
            )
        self._sizes: tuple[int, int] = (data, tensor)

    def build(self) -> None:
        """Make the device mesh."""
        self._mesh = make_mesh(self.device, self._sizes, (DATA, TENSOR))

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh, with the dimensions "data_parallel" and "tensor_parallel"; there is one as soon as a verb begins."""
        if self._mesh is None:
            raise ConfigurationError("There is no device mesh yet: it is made when fit, or another verb, begins.")
        return self._mesh

    @property
    def data_world_size(self) -> int:
        """See `Strategy.data_world_size`."""
        return self._sizes[0]

    @property
    def data_rank(self) -> int:
        """See `Strategy.data_rank`."""
        return self.global_rank // self._sizes[1]

    # The module

    def model_context(self, module: LightningModule) -> AbstractContextManager[Any]:
        """All ranks begin with the weights and the random numbers of rank 0, so that they divide the same tensors."""
        return self._alike(module)

    @contextmanager
    def _alike(self, module: LightningModule) -> Iterator[None]:
        restore_random_state(self.broadcast(capture_random_state(self.device)), self.device)
        whole = [*module.parameters(), *module.buffers()]
        for each in whole:
            if not is_sharded(each) and not each.is_meta:
                each.data = each.data.to(self.device)
        send_from_first([each for each in whole if not is_sharded(each) and not each.is_meta])
        yield

    def prepare_module(self, module: LightningModule, settings: Settings) -> None:
        """Bring what is left to the device, from the meta device too, and divide it over the data-parallel ranks.

        Raises:
            ConfigurationError: for a module that nobody has divided, or that cannot be.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = self.device_mesh
        if self._sizes[1] > 1 and not any(is_sharded(each) for each in module.parameters()):
            raise ConfigurationError(
                f"ModelParallelStrategy: no parameter of {type(module).__name__} is divided. Call parallelize_module(…, "
                "self.device_mesh['tensor_parallel'], …) in configure_model, or use strategy='fsdp'."
            )
        synchronise_batchnorm(module, settings, self._sizes[0], self.device, mesh.get_group(DATA))
        settling = Settling(module, self.device, sends=False)
        for part in post_order(module):
            settling.settle(part)
        settling.finish(module)
        send_from_first(module.buffers())
        if self._sizes[0] > 1 and any(not _covers_data(each) for each in module.parameters()):

            def shard(unit: nn.Module) -> None:
                if not isinstance(unit, FSDPModule):
                    fully_shard(unit, mesh=mesh[DATA])

            shard_rest(module, shard, _covers_data)
        _refuse_mixture(module, settings)


def _covers_data(parameter: nn.Parameter) -> bool:
    """Whether a parameter is divided over the data-parallel ranks, so that its gradients are averaged there."""
    return is_sharded(parameter) and DATA in (parameter.device_mesh.mesh_dim_names or ())


def _refuse_mixture(module: nn.Module, settings: Settings) -> None:
    if not settings.precision.scales_loss:
        return
    forms = {parameter.device_mesh if is_sharded(parameter) else None for parameter in module.parameters()}
    if len(forms) > 1:
        raise ConfigurationError(
            f"precision={settings.precision.name!r} scales the loss, and torch's scaler cannot look for overflows in gradients "
            "that are divided in different ways. Use 'bf16-mixed'."
        )
