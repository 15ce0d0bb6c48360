"""`Trainer(compile=...)`: the whole training step as one graph."""

from leyden.compiled.step import CompiledStep

__all__ = ["CompiledStep"]
