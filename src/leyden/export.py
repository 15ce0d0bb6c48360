"""How a trained module leaves for other programs: ONNX and TorchScript."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from leyden.data.transfer import move_to_device
from leyden.errors import ConfigurationError

if TYPE_CHECKING:
    from leyden.module import LightningModule


def to_onnx(module: LightningModule, file_path: Any, input_sample: Any, **kwargs: Any) -> Any:
    """See `LightningModule.to_onnx`."""
    inputs = _example(module, input_sample, "to_onnx")
    with _evaluating(module):
        return torch.onnx.export(module, inputs, file_path, **kwargs)


def to_torchscript(module: LightningModule, file_path: Any, method: str, example_inputs: Any) -> Any:
    """See `LightningModule.to_torchscript`.

    Raises:
        ConfigurationError: for other methods, and for "trace" without an input.
    """
    if method not in ("script", "trace"):
        raise ConfigurationError(f"method={method!r} is not valid. Allowed: 'script', 'trace'.")
    attached = module._trainer
    module.__dict__["_trainer"] = object()  # jit asks every property whether it is there, and only then skips it
    try:
        with _evaluating(module):
            if method == "script":
                made = torch.jit.script(module)
            else:
                made = torch.jit.trace(module, _example(module, example_inputs, "to_torchscript"))  # type: ignore[no-untyped-call]
    finally:
        module.__dict__["_trainer"] = attached
    if file_path is not None:
        torch.jit.save(made, file_path)
    return made


@contextmanager
def _evaluating(module: LightningModule) -> Iterator[None]:
    """Eval mode and no gradients; then each submodule's own mode again."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, mode in modes.items():
            each.training = mode


def _example(module: LightningModule, given: Any, who: str) -> tuple[Any, ...]:
    inputs = module.example_input_array if given is None else given
    if inputs is None:
        raise ConfigurationError(f"{who} needs an input: pass one, or set self.example_input_array in __init__.")
    inputs = move_to_device(inputs, module.device)
    return inputs if isinstance(inputs, tuple) else (inputs,)
