"""The time account by itself: its arithmetic, its words, and a hint for each way to lose time."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from leyden.account import (
    BUSY_SHARE,
    OVERHEAD_SHARE,
    REST_SHARE,
    TINY_STEP_S,
    VALIDATION_SHARE,
    WAITING_SHARE,
    TimeAccount,
)
from leyden.data.combined import CombinedLoader
from leyden.data.prefetch import copies_for
from leyden.data.transfer import DeviceMove
from leyden.progress import Progress

CORES = 8
TOTAL, STEPS = 128.0, 64


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.account.os.cpu_count", lambda: CORES)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Images(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.ones(2)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(8))


TENSORS = TensorDataset(torch.ones(8, 2))


def begun(loader: Any = None, device: str = "meta", log_every_n_steps: int = 50) -> tuple[TimeAccount, Clock]:
    """An account of a run that reads ``loader``, just begun."""
    clock = Clock()
    account = TimeAccount(clock)
    run: Any = SimpleNamespace(
        progress=Progress(),
        source=SimpleNamespace(loader=loader if loader is not None else DataLoader(Images())),
        device=torch.device(device),
        log_every_n_steps=log_every_n_steps,
        hooks=None,
    )
    assert account.begin(run) is clock
    return account, clock


def spent(loader: Any = None, steps: int = STEPS, device: str = "meta", **seconds: float) -> TimeAccount:
    """An account of `TOTAL` seconds that were spent as told, the rest of them on forward and backward."""
    account, clock = begun(loader, device)
    clock.now += TOTAL
    account._progress.global_step = account._progress.total_batches = steps
    rest = seconds.pop("rest", 0.0)
    for name, each in seconds.items():
        setattr(account, name, each)
    account.compute_s = TOTAL - rest - sum(seconds.values())
    account.stop()
    assert sum(account.seconds().values()) == account.total == TOTAL
    assert account.seconds()["everything else"] == rest
    return account


# Arithmetic


def test_what_is_added_is_taken_out_of_what_it_interrupted() -> None:
    account, clock = begun()
    account.mark = clock()
    clock.now += 4
    with account.spent_on("validation"):
        clock.now += 8
        with account.spent_on("logging"):
            clock.now += 16
            account.add("compilation", 2)
        clock.now += 8
    clock.now += 1
    account.lap("forward and backward")
    clock.now += 32
    assert {part: each for part, each in account.seconds().items() if each} == {
        "compilation": 2,
        "forward and backward": 5,
        "validation": 16,
        "logging": 14,
        "everything else": 32,
    }
    assert account.total == 69


def test_what_happens_before_training_is_set_up_but_for_what_has_a_part_of_its_own() -> None:
    clock = Clock()
    account = TimeAccount(clock)
    clock.now += 8
    with account.spent_on("checkpoints"):
        clock.now += 1
    run: Any = SimpleNamespace(
        progress=Progress(global_step=7), source=SimpleNamespace(loader=[]), device=torch.device("cpu"),
        log_every_n_steps=1, hooks=None,
    )  # fmt: skip
    account.begin(run)
    assert (account.setup_s, account.checkpoint_s, account.steps) == (8, 1, 0)


def test_an_error_in_a_part_ends_it_as_well() -> None:
    account, clock = begun()

    def fail() -> None:
        with account.spent_on("validation"):
            clock.now += 2
            raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        fail()
    assert account.seconds()["validation"] == 2


def test_a_function_can_be_counted_wherever_it_is_called() -> None:
    account, clock = begun()

    def move(batch: int, index: int) -> int:
        clock.now += 2
        return batch + index

    counted = account.timed("host to device", move)
    account.mark = clock()
    assert counted(3, 4) == 7
    clock.now += 1
    account.lap("waiting for data")
    assert (account.transfer_s, account.data_s) == (2, 1)
    assert counted.__wrapped__ is move  # type: ignore[attr-defined]


def test_copies_that_begin_ahead_of_time_are_counted_as_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    account, clock = begun()

    class Copies:
        def __init__(self, *_: Any) -> None: ...

        def start(self, batch: Any) -> Any:
            clock.now += 2
            return lambda: batch

    monkeypatch.setattr("leyden.data.prefetch.CudaCopies", Copies)
    reader: Any = SimpleNamespace(reads_ahead=True)
    move = account.timed("host to device", DeviceMove(torch.device("cuda"), None))
    begin = copies_for(move, reader, 0)
    assert begin is not None
    assert begin(7)() == 7
    assert account.transfer_s == 2


def test_an_account_that_was_stopped_counts_nothing_more() -> None:
    account, clock = begun()
    clock.now += 1
    account.stop()
    clock.now += 1
    account.stop()
    account.add("checkpoints", 1)
    assert (account.total, account.checkpoint_s) == (1, 0)


def test_the_parts_are_in_a_fixed_order_and_all_there() -> None:
    assert list(TimeAccount().seconds()) == [
        "set-up", "compilation", "waiting for data", "host to device", "forward and backward", "training step", "optimizer",
        "validation", "checkpoints", "logging", "waiting for the device", "everything else",
    ]  # fmt: skip


# Words


def test_a_table_of_what_there_was() -> None:
    account = spent(data_s=64.0, optimizer_s=16.0, logging_s=0.5, rest=4.0, setup_s=8.0)
    assert str(account).splitlines() == [
        "2 min 08 s for 64 steps, 2 s each",
        "set-up                      8 s    6 %",
        "waiting for data           64 s   50 %",
        "forward and backward     35.5 s   28 %",
        "optimizer                  16 s   12 %",
        "logging                  500 ms    0 %",
        "everything else             4 s    3 %",
        "50 % of the time waits for data: raise num_workers (it is 0).",
    ]


def test_a_summary_of_two_lines() -> None:
    account = spent(data_s=64.0, optimizer_s=16.0, logging_s=0.5, rest=4.0, setup_s=8.0)
    assert account.summary().splitlines() == [
        "2 min 08 s for 64 steps: 50 % waiting for data, 28 % forward and backward, 12 % optimizer, 6 % set-up",
        "50 % of the time waits for data: raise num_workers (it is 0).",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (1.0, "1 s"), (59.94, "59.9 s"), (99.7, "99.7 s"), (100.0, "1 min 40 s"), (3599.6, "1 h 00 min"),
     (90000.0, "25 h 00 min")],
)  # fmt: skip
def test_durations_in_words(seconds: float, text: str) -> None:
    account, clock = begun()
    clock.now += seconds
    assert account.summary().startswith(f"{text} for 0 steps")


def test_before_the_first_fit_there_is_nothing_to_tell() -> None:
    assert str(TimeAccount()) == "no time was counted: nothing was trained yet"
    assert TimeAccount().hint() is None


def test_a_run_without_a_step_has_no_hint() -> None:
    assert spent(steps=0, data_s=100.0).hint() is None


# Hints


def workers(count: int, dataset: Any) -> Any:
    """A loader with a number of workers; torch's own would warn of more than this machine has cores."""
    loader = DataLoader(dataset)
    loader.num_workers = count
    return loader


LOADERS: dict[str, tuple[Any, str]] = {
    "no workers": (workers(0, Images()), "raise num_workers (it is 0)"),
    "fewer workers than cores": (workers(CORES - 1, Images()), f"raise num_workers (it is {CORES - 1})"),
    "a worker for each core": (
        workers(CORES, Images()),
        f"{CORES} workers keep all {CORES} cores busy, so make the samples cheaper (smaller, cached)",
    ),
    "a stream": (workers(0, Stream()), "raise num_workers (it is 0)"),
    "tensors and workers": (
        workers(4, TENSORS),
        "num_workers=4 for tensors in memory costs more than it saves, use 0",
    ),
    "a part of tensors and workers": (
        workers(1, random_split(random_split(TENSORS, [6, 2])[0], [4, 2])[0]),
        "num_workers=1 for tensors in memory costs more than it saves, use 0",
    ),
    "tensors": (workers(0, TENSORS), "its samples are tensors in memory, so a larger batch_size saves the most"),
    "no DataLoader": ([torch.ones(2)], "give a DataLoader, whose num_workers prepare batches beside the training"),
    "two loaders": (
        CombinedLoader([workers(CORES, Images()), workers(0, TENSORS)], "min_size"),
        "raise num_workers (it is 0)",
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_hint_when_data_is_waited_for(name: str) -> None:
    loader, mend = LOADERS[name]
    assert spent(loader, data_s=80.0).hint() == f"62 % of the time waits for data: {mend}."


PINNED = DataLoader(Images(), pin_memory=True)
MENDS: dict[str, tuple[str, float, Any, str]] = {
    "host to device": ("transfer_s", OVERHEAD_SHARE, None, "set pin_memory=True in the DataLoader"),
    "host to device, pinned": (
        "transfer_s", OVERHEAD_SHARE, PINNED, "move smaller batches (uint8 instead of float32), and convert them on the device",
    ),
    "validation": (
        "validation_s", VALIDATION_SHARE, None,
        "validate less often (val_check_interval, check_val_every_n_epoch) or less (limit_val_batches)",
    ),
    "checkpoints": ("checkpoint_s", OVERHEAD_SHARE, None, "save less often (ModelCheckpoint(every_n_train_steps=…))"),
    "logging": ("logging_s", OVERHEAD_SHARE, None, "raise log_every_n_steps (it is 50), or log fewer values"),
    "everything else": ("rest", REST_SHARE, None, 'Trainer(profiler="simple") says into which'),
    "data": ("data_s", WAITING_SHARE, None, "raise num_workers (it is 0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDS)
def test_the_hint_begins_at_a_share_of_the_time(name: str) -> None:
    part, share, loader, mend = MENDS[name]
    below, above = (round(TOTAL * share) + more for more in (-1, 1))
    seconds: dict[str, Any] = {part: float(below)}
    assert spent(loader, **seconds).hint() is None
    seconds[part] = float(above)
    hint = spent(loader, **seconds).hint()
    assert hint is not None
    assert hint.startswith(f"{100 * above / TOTAL:.0f} % of the time ")
    assert hint.endswith(f": {mend}.")


def test_the_hint_for_slow_transfer_hooks_on_the_cpu() -> None:
    hint = spent(device="cpu", transfer_s=40.0).hint()
    assert hint is not None
    assert hint.endswith(": do what the transfer hooks do in the dataset, whose workers run beside the training.")


def test_the_hint_is_about_the_largest_part_that_can_be_mended() -> None:
    hint = spent(data_s=30.0, logging_s=40.0).hint()
    assert hint is not None
    assert "logging" in hint
    assert "data" in (spent(data_s=42.0, logging_s=40.0).hint() or "")


def test_steps_of_less_than_a_millisecond_may_be_worth_compiling() -> None:
    tiny = int(TOTAL / TINY_STEP_S)
    assert spent(steps=tiny // 2).hint() is None
    account = spent(steps=2 * tiny)
    assert account.hint() == "A step takes 0.5 ms, much of it Python and launching operations: compile=True may help."
    account.compiles = True
    assert account.hint() is None
    assert spent(steps=2 * tiny, setup_s=80.0).hint() is None, "steps are the lesser part of this run"


class Device:
    """What the device's samples came to."""

    batches = 1

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def estimate(self, batches: int, steps: int) -> float:
        return steps * self.step_s

    def __str__(self) -> str:
        return "on the device: as told"


def on_a_device(account: TimeAccount, step_s: float) -> TimeAccount:
    account.device = Device(step_s)  # type: ignore[assignment]
    return account


def test_a_device_that_is_busy_waits_for_nothing() -> None:
    busy_s = BUSY_SHARE * TOTAL / STEPS
    assert on_a_device(spent(data_s=100.0), busy_s * 1.01).hint() is None
    assert "waits for data" in (on_a_device(spent(data_s=100.0), busy_s * 0.99).hint() or "")


def test_steps_that_a_gpu_waits_for_the_host_with_may_be_worth_compiling() -> None:
    steps = int(TOTAL / 8e-3)  # 8 ms of the host
    assert on_a_device(spent(steps=steps), 6e-3).hint() is not None, "the host is slower than the device"
    # waits of another kind are none of the step's: here the host is done with it long before the device
    ahead = spent(steps=steps, device_s=TOTAL * 0.4, data_s=0.0)
    assert on_a_device(ahead, 7e-3).hint() is None
    assert on_a_device(spent(steps=int(TOTAL / 40e-3)), 30e-3).hint() is None, "too long for launching to matter"
    assert on_a_device(spent(steps=steps), 0.0).hint() is None, "nothing is known about the device"


def test_the_table_tells_of_the_device() -> None:
    assert "on the device: as told" in str(on_a_device(spent(), 1.0)).splitlines()


def test_the_page_explains_every_part() -> None:
    page = Path(__file__).parents[1].joinpath("docs", "speed.md").read_text(encoding="utf-8")
    section = page[page.index("## Where the time goes") :]
    rows = re.findall(r"^\| ([a-z][a-z -]*) \|", section[: section.index("### ")], flags=re.MULTILINE)
    assert [row for row in rows if row != "part"] == list(TimeAccount().seconds())


def test_the_page_states_the_thresholds() -> None:
    page = Path(__file__).parents[1].joinpath("docs", "speed.md").read_text(encoding="utf-8")
    shares = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) % \|", page, flags=re.MULTILINE))
    assert shares == {
        "waiting for data": f"{100 * WAITING_SHARE:.0f}",
        "host to device": f"{100 * OVERHEAD_SHARE:.0f}",
        "validation": f"{100 * VALIDATION_SHARE:.0f}",
        "checkpoints": f"{100 * OVERHEAD_SHARE:.0f}",
        "logging": f"{100 * OVERHEAD_SHARE:.0f}",
        "everything else": f"{100 * REST_SHARE:.0f}",
    }
