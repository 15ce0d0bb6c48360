"""Where the whole step cannot be one graph: `training_step` in as many graphs as it needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from leyden.compiled.backend import Compiler, reason_of
from leyden.compiled.graph import Recorder
from leyden.compiled.shapes import Shape, Shapes
from leyden.run import Run


class ForwardStep:
    """A compiled `training_step`: the forward pass and its backward pass in graphs, all else in eager.

    Args:
        run: whose `training_step` it stands for.
        compiler: makes the graphs.
        shapes: says which batches share one.
        give_up: is told why it cannot be compiled, and puts the eager step back.
    """

    def __init__(self, run: Run, compiler: Compiler, shapes: Shapes, give_up: Callable[[str], None]) -> None:
        self._compiler = compiler
        self._give_up = give_up
        self._recorder = Recorder(run.module)
        self._eager = run.training_step
        self._shapes = shapes
        self._steps: dict[Shape, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Compute the loss."""
        graphs = self._compiler.graphs
        shape = self._shapes.of(arguments[0] if arguments else None)
        if shape not in self._steps:
            self._steps[shape] = self._compiler.compile_in_parts(self._eager)
        start, reason = time.perf_counter(), None
        try:
            with self._recorder:
                output = self._steps[shape](*arguments)
        except self._compiler.errors as error:
            reason = reason_of(error)
        if reason is not None:
            self._give_up(reason)
            # out here, so that an error of the user's own is not shown as one of torch's
            return self._eager(*arguments)
        if self._compiler.failure is not None:
            self._give_up(self._compiler.failure)
        if self._compiler.graphs != graphs:
            self._compiler.note_seconds(time.perf_counter() - start)
            self._compiler.look_at_recompilation()
        self._recorder.pass_on()
        return output
