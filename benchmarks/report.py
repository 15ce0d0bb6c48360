"""What was measured, as tables, as plain data, and as a picture."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from contestants import BY_HAND, DEFAULT
from measure import Result

LIGHTNING = "Lightning, default"
PACKAGES = ("torch", "leyden", "lightning", "accelerate", "pytorch-ignite", "skorch", "keras")
# Okabe and Ito's colours, which people who do not tell red from green can tell apart
COLOURS = {"by hand": "#999999", "leyden": "#0072B2", "peer": "#E69F00"}
Results = dict[str, Result]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratios(results: Results, name: str, base: str = BY_HAND) -> list[float]:
    """How much faster ``name`` was than ``base``, round by round, in ascending order; empty if one of them failed."""
    if results[name].failed or results[base].failed:
        return []
    return sorted(own / other for own, other in zip(results[name].steps_per_s, results[base].steps_per_s, strict=True))


def ratio_text(found: list[float]) -> str:
    return f"{statistics.median(found):.2f}" if found else "–"


def speed_table(title: str, results: Results) -> str:
    """One workload: speed, ratio to the hand-written loop with its range, and set-up."""
    rows = []
    for name, result in results.items():
        if result.failed:
            rows.append([name, "failed", "", "", result.failed.replace("|", "/")])
            continue
        found = ratios(results, name)
        rate = statistics.median(result.steps_per_s)
        limits = f"{found[0]:.2f} to {found[-1]:.2f}" if found else ""
        rows.append([name, f"{rate:.{0 if rate >= 100 else 1}f}", ratio_text(found), limits, f"{result.set_up_s:.2f}"])
    return table([title, "steps/s", "ratio", "lowest and highest", "set-up and compiling, s"], rows)


def ratio_table(by_workload: dict[str, Results]) -> str:
    """All workloads: medians of the ratios to the hand-written loop."""
    names = list(next(iter(by_workload.values())))
    rows = [[name, *(ratio_text(ratios(results, name)) for results in by_workload.values())] for name in names]
    return table(["times the hand-written loop", *by_workload], rows)


def fastest_peer(results: Results, peers: list[str]) -> str | None:
    """The peer with the highest median."""
    ran = {name: statistics.median(results[name].steps_per_s) for name in peers if not results[name].failed}
    return max(ran, key=lambda name: ran[name]) if ran else None


def standing_table(by_workload: dict[str, Results], peers: list[str]) -> str:
    """leyden's default settings against the hand-written loop and against the peers."""
    rows = []
    for kind, results in by_workload.items():
        row = [kind, ratio_text(ratios(results, DEFAULT, BY_HAND))]
        if peers:
            fastest = fastest_peer(results, peers)
            row.append(f"{ratio_text(ratios(results, DEFAULT, fastest))} ({fastest})" if fastest else "–")
        if LIGHTNING in peers:
            row.append(ratio_text(ratios(results, DEFAULT, LIGHTNING)))
        rows.append(row)
    head = [f"{DEFAULT}, against", "by hand"]
    return table(head + ["the fastest peer"] * bool(peers) + [LIGHTNING] * (LIGHTNING in peers), rows)


def count_table(counts: dict[str, tuple[float, int]]) -> str:
    """Calls of Python functions in a step, and frames between the trainer's call and the user's step."""
    base = counts[BY_HAND][0]
    rows = [[name, f"{calls:.0f}", f"{calls - base:+.0f}", str(deep)] for name, (calls, deep) in counts.items()]
    return table(["", "Python calls per step", "more than by hand", "frames to the step"], rows)


def versions() -> dict[str, str]:
    """Of Python and of everything that takes part."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"cores": os.cpu_count(), "processor": processor(), "system": platform.system(), "threads": 1}


def as_data(
    by_workload: dict[str, Results], counts: dict[str, tuple[float, int]], groups: dict[str, str], command: str
) -> dict[str, Any]:
    """Everything that was measured, for a JSON file."""
    return {
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "groups": groups,
        "counts": {name: {"calls_per_step": calls, "frames": deep} for name, (calls, deep) in counts.items()},
        "workloads": {
            kind: {name: {**vars(result), "ratios": ratios(results, name)} for name, result in results.items()}
            for kind, results in by_workload.items()
        },
    }


def plot(data: dict[str, Any], titles: dict[str, str], path: Path) -> None:
    """Draw the ratios of `as_data`: a panel for each workload, a bar for each contestant, whiskers for the range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    kinds, names = list(data["workloads"]), list(data["groups"])
    names = [name for name in names if name != BY_HAND]
    figure, panels = pyplot.subplots(
        1, len(kinds), sharey=True, squeeze=False, layout="constrained",
        figsize=(2.6 + 2.3 * len(kinds), 1.6 + 0.3 * len(names)),
    )  # fmt: skip
    for axes, kind in zip(panels[0], kinds, strict=True):
        _panel(axes, data, kind, names)
        axes.set_title(titles[kind].replace(", ", "\n", 1), fontsize=10)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    figure.supxlabel(
        "steps per second, relative to the hand-written loop (line at 1); whiskers: lowest and highest round",
        fontsize=10,
    )
    labels = {"by hand": "by hand", "leyden": "leyden", "peer": "other trainers"}
    figure.legend(
        handles=[Patch(color=COLOURS[group], label=label) for group, label in labels.items()],
        loc="outside upper left", ncols=3, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, data: dict[str, Any], kind: str, names: list[str]) -> None:
    longest = 1.0
    for place, name in enumerate(names):
        found = data["workloads"][kind][name]["ratios"]
        if not found:
            axes.text(0.02, place, "failed", va="center", fontsize=8, color="#444444")
            continue
        middle = statistics.median(found)
        longest = max(longest, found[-1])
        axes.barh(place, middle, color=COLOURS[data["groups"][name]], height=0.72)
        axes.errorbar(
            middle, place, xerr=[[middle - found[0]], [found[-1] - middle]],
            color="black", linewidth=0.9, capsize=2, fmt="none",
        )  # fmt: skip
    for place, name in enumerate(names):
        found = data["workloads"][kind][name]["ratios"]
        if found:
            axes.text(1.32 * longest, place, f"{statistics.median(found):.2f}", va="center", ha="right", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_xlim(0, 1.35 * longest)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
