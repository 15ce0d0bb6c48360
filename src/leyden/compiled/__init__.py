"""`Trainer(compile=...)`: the whole training step as one graph."""

from leyden.compiled.compilation import Compilation, MeasuredCompilation, make_compilation

__all__ = ["Compilation", "MeasuredCompilation", "make_compilation"]
