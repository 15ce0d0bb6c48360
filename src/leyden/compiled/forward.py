"""Where the whole step cannot be one graph: `training_step` in as many graphs as it needs, checked against eager."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from leyden.compiled.backend import Compiler, reason_of
from leyden.compiled.graph import Recorder
from leyden.run import Run


class ForwardStep:
    """A compiled `training_step`: the forward pass and its backward pass in graphs, all else in eager.

    Args:
        run: whose `training_step` it stands for.
        compiler: makes the graphs.
        give_up: is told why it cannot be compiled, and puts the eager step back.
    """

    def __init__(self, run: Run, compiler: Compiler, give_up: Callable[[str], None]) -> None:
        self._run = run
        self._compiler = compiler
        self._give_up = give_up
        self._recorder = Recorder()
        self._eager = run.training_step
        self._step: Callable[..., Any] = compiler.compile_in_parts(run.training_step)

    def __call__(self, *arguments: Any) -> Any:
        """Compute the loss."""
        attributes, graphs = self._run.module.__dict__, self._compiler.graphs
        metrics, self._recorder.calls = attributes["_metrics"], []
        attributes["_metrics"] = None if metrics is None else self._recorder
        start = time.perf_counter()
        try:
            output = self._step(*arguments)
        except self._compiler.errors as error:
            attributes["_metrics"] = metrics
            self._give_up(reason_of(error))
            return self._eager(*arguments)
        finally:
            attributes["_metrics"] = metrics
        if self._compiler.failure is not None:
            self._give_up(self._compiler.failure)
        if self._compiler.graphs != graphs:
            self._compiler.note_seconds(time.perf_counter() - start)
            self._compiler.look_at_recompilation()
        for call in self._recorder.calls:
            metrics.log(*call)
        return output
