"""Which functions: Python's own profiler, by action."""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import re
from pathlib import Path

from leyden.errors import reject
from leyden.profilers.profiler import Profiler, not_started


class AdvancedProfiler(Profiler):
    """Runs `cProfile` for each action and lists the functions that took the time. Slows every call down.

    Python profiles one thing at a time: while an action inside of another one runs, the outer one's profile
    pauses, so no function is counted twice. The threads of autograd and of loaders are not seen.

    Args:
        dirpath: see `Profiler`.
        filename: see `Profiler`.
        functions: how many functions are listed per action.
        dump_stats: also write each action's profile to ``{verb}-{filename}.{action}.prof``, in the folder of the report or else
            of the run's logs, for `pstats` and viewers such as snakeviz. Nothing is written in a ``fast_dev_run``.

    Attributes:
        dumps: the files written when the verb ended.

    Raises:
        ConfigurationError: if ``functions`` is not an integer above 0.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        functions: int = 20,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        if type(functions) is not int or functions < 1:
            reject("functions", functions, "an integer ≥ 1")
        self._functions = functions
        self._dump_stats = dump_stats
        self.dumps: list[Path] = []
        self._profiles: dict[str, cProfile.Profile] = {}
        self._open: list[str] = []

    def setup(self, stage: str, log_dir: str | None) -> None:
        """Start with empty profiles."""
        super().setup(stage, log_dir)
        self._profiles, self._open, self.dumps = {}, [], []

    def teardown(self, stage: str) -> None:
        """Switch off what an error left running; write the profiles, if they were asked for."""
        if self._open:
            self._profiles[self._open[-1]].disable()
            self._open = []
        folder = self._dirpath if self._dirpath is not None else self._log_dir
        if not self._dump_stats or folder is None:
            return
        for action, profile in self._profiles.items():
            # "[LightningModule]Net.training_step" without what file systems and shells mind
            name = re.sub(r"[^\w.-]+", "_", action).strip("_")
            path = Path(folder, self._file(f"{name}.prof"))
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.dump_stats(path)
            self.dumps.append(path)

    def start(self, action: str) -> None:
        """Pause the outer action's profile and go on with this one's."""
        if self._open:
            self._profiles[self._open[-1]].disable()
        self._open.append(action)
        self._profiles.setdefault(action, cProfile.Profile()).enable()

    def stop(self, action: str) -> None:
        """Pause this action's profile and go on with the outer one's."""
        if action not in self._open:
            raise not_started(action)
        self._profiles[self._open[-1]].disable()
        # Actions that an error left open inside of this one end with it.
        while self._open.pop() != action:
            pass
        if self._open:
            self._profiles[self._open[-1]].enable()

    def summary(self) -> str:
        """Return the functions of each action, by cumulative time."""
        parts = []
        for action, profile in self._profiles.items():
            stream = io.StringIO()
            pstats.Stats(profile, stream=stream).strip_dirs().sort_stats("cumulative").print_stats(self._functions)
            parts.append(f"{action}\n{'-' * len(action)}\n{stream.getvalue().strip()}")
        if self._open:
            self._profiles[self._open[-1]].enable()  # reading has stopped it
        return "\n\n".join(parts)
