"""What leyden does otherwise than Lightning on purpose, place by place: given Lightning's value, what leyden's must be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

ROUNDING = 1e-5  # torch's fused optimizer kernels, and means whose sums are taken in another order, round elsewhere


@dataclass(frozen=True, eq=False)
class Difference:
    """One deliberate difference.

    Attributes:
        where: the place among the results, a pattern for the whole of it: "p03_gan/global_step".
        leyden: leyden's value, or a function of Lightning's that gives it.
        why: the reason.
    """

    where: str
    leyden: Any | Callable[[Any], Any]
    why: str

    def expected(self, lightning: Any) -> Any:
        return self.leyden(lightning) if callable(self.leyden) else self.leyden


def _one_later(steps: list[int]) -> list[int]:
    return [step + 1 for step in steps]


def _without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda shown: {name: value for name, value in shown.items() if not name.startswith(names)}


def _with(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda shown: shown | values


def _repeats_once(entries: list[Any]) -> list[Any]:
    return [entry for number, entry in enumerate(entries) if number == 0 or entry != entries[number - 1]]


X_AXIS = "the x axis of logged values is trainer.global_step, the steps that are done; Lightning's is the number of the last one"
LAST = "last.ckpt is written at every trigger; Lightning writes it only if that checkpoint is among the best"
RATES = "a rate logged by epoch is in callback_metrics from the epoch's end on; Lightning shows it from the beginning"
STEPS = "global_step counts a batch window once, however many optimizers stepped; Lightning counts each optimizer"
FREQUENCY = "the frequency of a scheduler with interval='step' counts steps from the beginning; Lightning's, batches of an epoch"
UNDIVIDED = "on_train_batch_end gets the loss as training_step returned it, not divided by the batches of a step"
EPOCHS = "current_epoch counts whole epochs; Lightning counts one that was cut short as well"
SAVED_ONCE = "a state that goes to two files is captured once, so on_save_checkpoint is called once"
METRICS_TOO = "going on from a checkpoint restores the metrics that were shown"
WITHIN = "going on within an epoch, the batches after the checkpoint's come next; Lightning begins at the first"
TEARDOWN = "teardown is called after an error too"
SKIPPED = "a batch whose training_step returns None is skipped; Lightning makes a step of it, without gradients"
SLASH = "a slash in the name of a metric does not make a folder in a file's name"
NO_MONITOR = "without monitor there is no k-th best value, and the only file is the k-th best"
EVALUATION_STEPS = "step values of an evaluation stay in callback_metrics after it, under the name with _step"
OLDEST = {
    "default": "epoch=7-step=16.ckpt",
    "all": "epoch=2-step=6.ckpt",
    "steps": "at-step=3.ckpt",
    "after_validation": "epoch=0-step=2.ckpt",
    "last_only": "",
}
NAMED_AFTER = (
    "a file is named at the step boundary, after that step's validation; a metric without a value is nan, not 0"
)

DIFFERENCES: tuple[Difference, ...] = (
    Difference(r"p\d\d_.*/csv/(?!lr-|test_|val_step_step).*/steps", _one_later, X_AXIS),
    Difference(r"p01_.*/validations/0/2", _without("lr-SGD"), RATES),
    Difference(r"p01_.*/validations/[24]/2/lr-SGD", lambda rate: 2 * rate, RATES),
    Difference(r"p01_.*/last_epoch", 4, LAST),
    Difference(r"p03_[a-z]+/steps", lambda steps: [step // 2 for step in steps], STEPS),
    Difference(r"p03_[a-z]+/global_step", lambda steps: steps // 2, STEPS),
    Difference(r"p03_.*/limited/batches", lambda batches: 2 * batches, STEPS),
    Difference(r"p04_.*/(2|plateau_by_step|groups|plain)/csv/lr-.*/steps", _one_later, X_AXIS),
    Difference(r"p04_.*/plateau/validations/0/2", _without("lr-"), RATES),
    Difference(
        r"p04_.*/plain/lrs",
        {"lr-AdamW": [0.02] * 8, "lr-AdamW/pg1": [0.02] * 8, "lr-AdamW/pg2": [0.001] * 8},
        "rates keep the name under which they were logged when a parameter group is added; Lightning names the earlier ones anew",
    ),
    Difference(r"p04_.*/every_third", [[0.02 * 0.5 ** ((step + 1) // 3)] for step in range(16)], FREQUENCY),
    Difference(r"p05_.*/accumulate/losses", lambda losses: [4 * loss for loss in losses], UNDIVIDED),
    Difference(r"p05_.*/(norm|max_steps_accumulated)/losses", lambda losses: [2 * loss for loss in losses], UNDIVIDED),
    Difference(
        r"p05_.*/scheduled/losses",
        lambda losses: [loss * batches for loss, batches in zip(losses, [1] * 8 + [2] * 16 + [4] * 8, strict=True)],
        UNDIVIDED,
    ),
    Difference(
        r"p05_.*/scheduled/estimated", 18, "batches per step that change are counted; Lightning takes those of now"
    ),
    Difference(
        r"p05_.*/short/last", lambda norm: 2 * norm, "the last step of an epoch divides by the batches that it has"
    ),
    Difference(r"p05_.*/max_steps/end/0", 1, EPOCHS),
    Difference(r"p07_.*/order", _repeats_once, SAVED_ONCE),
    Difference(r"p07_.*/second_half/validations/0/2", _with(loss_epoch=0.6236265897750854), METRICS_TOO),
    Difference(r"p07_.*/by_last/validations/0/2", _with(loss_epoch=0.20942723751068115), METRICS_TOO),
    Difference(r"p07_.*/goes_on_within_an_epoch", True, WITHIN),
    Difference(
        r"p07_.*/within/rest/files",
        lambda names: [name for name in names if "-v1" not in name],
        "files that the same training wrote beyond the step it goes on from are written anew",
    ),
    Difference(
        r"p08_.*/resumed/[78]",
        lambda hook: f"{'callback' if hook.startswith('module') else 'module'}.on_load_checkpoint",
        "callbacks come before the module at each place, also where a checkpoint is loaded",
    ),
    Difference(
        r"p08_.*/broken_.*/0", lambda tape: [*tape, "data.teardown", "callback.teardown", "module.teardown"], TEARDOWN
    ),
    Difference(
        r"p08_.*/counts/sanity_check/0",
        [math.inf, [1], [1]],
        "the batches of validation are known in the sanity check; Lightning counts them after it",
    ),
    Difference(
        r"p11_.*/report/0", False, "the actions are the hooks and parts of the loop; an epoch as a whole is not one"
    ),
    Difference(r"p11_.*/stopped(_late)?/current_epoch", lambda epochs: epochs - 1, EPOCHS),
    *(Difference(rf"p12_.*/{name}/kth", [[file], None], NO_MONITOR) for name, file in OLDEST.items()),
    Difference(r"p12_.*/slash/files", ["epoch=6-val_loss=0.3.ckpt"], SLASH),
    Difference(r"p12_.*/slash/best", "epoch=6-val_loss=0.3.ckpt", SLASH),
    Difference(r"p12_.*/slash/k_best", lambda scores: {"epoch=6-val_loss=0.3.ckpt": scores["loss=0.3.ckpt"]}, SLASH),
    Difference(r"p12_.*/slash/kth/0", ["epoch=6-val_loss=0.3.ckpt"], SLASH),
    Difference(r"p12_.*/slash/format", "epoch=3-val_loss=0.2.ckpt", SLASH),
    Difference(
        r"p12_.*/before_validation/files", ["step=1-val_loss=nan.ckpt", "step=2-val_loss=0.90.ckpt"], NAMED_AFTER
    ),
    Difference(r"p12_.*/before_validation/best", "step=1-val_loss=nan.ckpt", NAMED_AFTER),
    Difference(
        r"p12_.*/before_validation/k_best",
        {"step=1-val_loss=nan.ckpt": 0.0, "step=2-val_loss=0.90.ckpt": 1.0},
        NAMED_AFTER,
    ),
    Difference(r"p12_.*/before_validation/kth/0", ["step=2-val_loss=0.90.ckpt"], NAMED_AFTER),
    Difference(r"p12_.*/before_validation/format", "step=7-val_loss=0.25.ckpt", SLASH),
    Difference(
        r"p12_.*/stopped/threshold/4", 0.4000000059604645, "the value that reaches the threshold is the best one"
    ),
    Difference(
        r"p12_.*/missing_metric",
        "caught as ValueError",
        "a metric in a file's name that is never logged is an error, not 0.00",
    ),
    Difference(r"p13_.*/skipped/outputs/[14]", "NoneType", SKIPPED),
    Difference(
        r"p13_.*/skipped/counters",
        [[epoch, batch, 2 * epoch + (1, 1, 2)[batch], batch == 2] for epoch in range(2) for batch in range(3)],
        SKIPPED,
    ),
    Difference(r"p13_.*/skipped/epochs/[01]/1", lambda steps: steps * 2 // 3, SKIPPED),
    Difference(r"p13_.*/skipped/norms", lambda norms: [norm for norm in norms if norm], SKIPPED),
    Difference(
        r"p13_.*/ddp_keeps_the_order",
        True,
        "a loader that does not shuffle keeps its order over ranks; Lightning's sampler for training shuffles in any case",
    ),
    Difference(
        r"p14_.*/attributes/max_epochs", 1000, "the default is known at once; Lightning fills it in when fit begins"
    ),
    Difference(r"p14_.*/attributes.*/fast_dev_run", 0, "it is the number of batches"),
    Difference(r"p14_.*/attributes_after/min_epochs", "None", "what was not asked for stays None"),
    Difference(r"p14_.*/fits/1/0", 12, "every fit starts anew; under Lightning the epochs of one Trainer are used up"),
    Difference(
        r"p14_.*/longer", "caught as AttributeError", "there is no fit_loop; the error says how to train for longer"
    ),
    Difference(r"p15_.*/stepping", "inf", "an epoch without an end makes steps without an end; Lightning says -1"),
    Difference(
        r"p11_.*/profiled", "not caught as ValueError", "SimpleProfiler keeps sums, and not the seconds of each call"
    ),
    Difference(
        r"p13_.*/log_files",
        lambda found: [name for name in found if "hparams" not in name],
        "TensorBoardLogger writes no empty hparams.yaml",
    ),
    Difference(
        r"p06_.*/test_metrics",
        lambda shown: shown | {name.replace("_epoch", "_step"): shown[name] for name in shown if "_epoch" in name},
        EVALUATION_STEPS,
    ),
    Difference(r"p09_.*/epochs/0", _with(val_step_step=1.0), EVALUATION_STEPS),
    Difference(r"p09_.*/(batches/[23]|epochs/[1-9]|callback_metrics)", _with(val_step_step=3.0), EVALUATION_STEPS),
    Difference(
        r"p11_.*/stopped(_late)?/validations",
        lambda found: found[:-1],
        "a stop within an epoch does not validate first: a run that goes on from there would have validated once more",
    ),
)
"""On purpose."""


def compare(place: str, lightning: Any, leyden: Any, met: set[Difference]) -> Iterator[str]:
    """Say where the results differ and should not, or do not and should.

    Args:
        place: where among the results the two stand.
        lightning: what Lightning gave.
        leyden: what leyden gave.
        met: the differences that were come by are added here.
    """
    for difference in DIFFERENCES:
        if re.fullmatch(difference.where, place):
            met.add(difference)
            expected = difference.expected(lightning)
            if not list(_unequal(place, lightning, expected)):
                yield f"{place}: both give {lightning!r}, but it should differ: {difference.why}"
            for line in _unequal(place, expected, leyden):
                yield f"{line} (under Lightning it is {lightning!r}; it should differ: {difference.why})"
            return
    if isinstance(lightning, dict) and isinstance(leyden, dict) and lightning.keys() == leyden.keys():
        for key in lightning:
            yield from compare(f"{place}/{key}", lightning[key], leyden[key], met)
    elif isinstance(lightning, list) and isinstance(leyden, list) and len(lightning) == len(leyden):
        for number, (first, second) in enumerate(zip(lightning, leyden, strict=True)):
            yield from compare(f"{place}/{number}", first, second, met)
    else:
        yield from _unequal(place, lightning, leyden)


def _unequal(place: str, expected: Any, found: Any) -> Iterator[str]:
    """The same without differences on purpose."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        for key in expected:
            yield from _unequal(f"{place}/{key}", expected[key], found[key])
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (first, second) in enumerate(zip(expected, found, strict=True)):
            yield from _unequal(f"{place}/{number}", first, second)
    elif isinstance(expected, float) and isinstance(found, float):
        both_nan = math.isnan(expected) and math.isnan(found)
        if not both_nan and not math.isclose(expected, found, rel_tol=ROUNDING, abs_tol=1e-7):
            yield f"{place}: expected {expected!r}, found {found!r}"
    elif type(expected) is not type(found) or expected != found:
        yield f"{place}: expected {expected!r:.700}, found {found!r:.700}"
