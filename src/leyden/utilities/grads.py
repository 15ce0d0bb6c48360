"""`grad_norm`: how large the gradients of a module are."""

from __future__ import annotations

from leyden.gradients import grad_norm

__all__ = ["grad_norm"]
