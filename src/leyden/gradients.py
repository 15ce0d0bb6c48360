"""How large gradients are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leyden.errors import reject


def grad_norm(module: nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, Tensor]:
    """The norm of each parameter's gradient, and that of all of them as one vector.

    Values stay on their device, so that logging them waits for nothing.

    Args:
        module: whose parameters; those without a gradient are left out.
        norm_type: p of the p-norm; "inf" for the largest element.
        group_separator: between ``grad_<p>_norm`` and the parameter's name.

    Returns:
        By ``grad_<p>_norm/<name>``, and ``grad_<p>_norm_total`` if there is any.

    Raises:
        ConfigurationError: if ``norm_type`` is not positive.
    """
    power = float(norm_type)
    if not power > 0:
        reject("norm_type", norm_type, "a number above 0, or 'inf'")
    gradients = {name: each.grad.detach() for name, each in module.named_parameters() if each.grad is not None}
    norms = {
        f"grad_{power}_norm{group_separator}{name}": torch.linalg.vector_norm(gradient, power)
        for name, gradient in gradients.items()
    }
    if norms:
        first = next(iter(norms.values()))
        parts = torch.stack([norm.to(first.device, first.dtype) for norm in norms.values()])
        norms[f"grad_{power}_norm_total"] = torch.linalg.vector_norm(parts, power)
    return norms
