"""The lifecycle as pseudocode: one text, from which the docs' page and `Trainer.explain` are made.

A test compares the text with recorded runs. Each line is ``text | parts``; a part is a note, or begins with

- ``?name``: the line, and what is indented below it, is there only if the condition ``name`` holds; with ``?name<`` what is
  below it is there in any case, one level less deep if the line is not.
- ``=text``: what happens if nobody overrides the hook. Without it such a hook is left out.
- ``&name``: which of an event's hooks: those that run ``early`` or ``late``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import indent
from typing import Any

from leyden.run import Mode

_TRANSFER = """\
on_before_batch_transfer(batch, dataloader_idx)
transfer_batch_to_device(batch, device, dataloader_idx) | ={move}
on_after_batch_transfer(batch, dataloader_idx)
"""

_FORWARD_BACKWARD = """\
training_step(batch, batch_idx) -> loss | None skips the batch
if this is the first batch of a step: | ?accumulates<
    on_before_zero_grad(optimizer)
    optimizer_zero_grad(epoch, batch_idx, optimizer) | =optimizer.zero_grad()
loss = loss / {accumulate} | ?accumulates | or fewer: by the batches that the step has
on_before_backward(loss)
backward(loss) | =loss.backward(){scaled}
on_after_backward()
"""

_STEP = """\
are losses and gradients finite? If not, {nan} | ?guards | nan_policy only
bring the gradients to their real size | ?scales | fp16 autocast only
on_before_optimizer_step(optimizer) | the place to look at gradients
configure_gradient_clipping(optimizer, value, algorithm) | ={clip}
optimizer.step()
"""

_SCHEDULERS = """\
step the schedulers with interval="step"
    lr_scheduler_step(scheduler, metric)
"""

_BATCH = {
    Mode.AUTOMATIC: (
        _FORWARD_BACKWARD
        + "if this is the last batch of a step: | ?accumulates<\n"
        + indent(_STEP + _SCHEDULERS, "    ")
    ),
    Mode.CLOSURE: (
        "in all but the last batch of a step: forward and backward, as in the closure | ?accumulates\n"
        "optimizer_step(epoch, batch_idx, optimizer, closure) | =optimizer.step(closure)\n"
        "    closure():\n" + indent(_FORWARD_BACKWARD, "        ") + indent(_STEP, "    ") + _SCHEDULERS
    ),
    Mode.MANUAL: """\
training_step(batch, batch_idx), which calls:
    self.manual_backward(loss):
        on_before_backward(loss)
        backward(loss) | =loss.backward(){scaled}
        on_after_backward()
    optimizer.step(): | a step for every batch in which an optimizer stepped
        are losses and gradients finite? If not, {nan} | ?guards | nan_policy only
        on_before_optimizer_step(optimizer)
""",
}

_EVALUATION = (
    """\
on_<stage>_model_eval() | =eval mode and no gradients for every submodule
on_<stage>_start()
on_<stage>_epoch_start()
for each batch of each loader:
"""
    + indent(_TRANSFER, "    ")
    + """\
    on_<stage>_batch_start(batch, batch_idx) | with dataloader_idx, if there are several
    <stage>_step(batch, batch_idx)
    on_<stage>_batch_end(outputs, batch, batch_idx)
on_<stage>_epoch_end() | the last place to log
on_<stage>_end() | every value is in trainer.callback_metrics
on_<stage>_model_train() | =every submodule's own mode again
"""
)

_SETUP = """\
configure_callbacks() | replace the Trainer's of the same class
check the names and signatures of all hooks
prepare_data() | datamodule, module
setup({verb}) | datamodule, callbacks, module
configure_model()
bring the module to {device} in {precision}
if ckpt_path is given: | ?resumes
    on_load_checkpoint(checkpoint) | before the weights are loaded
"""

_FIT = (
    _SETUP
    + """\
configure_optimizers() | then the checkpoint's other state is applied
on_fit_start()
sanity check{if_validation}: | ?sanity | not if it goes on from a checkpoint
    on_sanity_check_start()
    val_dataloader()
    validate {sanity} batches of each loader, as below | leaves no trace
    on_sanity_check_end()
train_dataloader()
val_dataloader() | ?asks_now
on_train_start()
for each epoch, until {end}:
    every {reload} epochs: ask train_dataloader() and val_dataloader() again | ?reloads
    on_train_epoch_start()
    for each batch:
"""
    + indent(_TRANSFER, " " * 8)
    + """\
        on_train_batch_start(batch, batch_idx) | if one returns -1, the epoch ends here
<batch>
        after the last batch: step the schedulers with interval="epoch" | ?automatic
            lr_scheduler_step(scheduler, metric)
        on_train_batch_end(outputs, batch, batch_idx)
        step boundary, if the step is complete: | ?accumulates<
            step values to the loggers, every {log_every_n_steps} steps | ?logs
            {validation}: | ?validates
                on_validation_model_zero_grad() | ?automatic
<evaluation>
                values to the loggers | ?loggers
            step ReduceLROnPlateau, if its interval="step" | ?automatic
            do what callbacks asked for, such as save; after the last batch the epoch's end does it | ?saves
            stop, if {stop}
    on_train_epoch_end() | &early | callbacks, module
    epoch values to the loggers | ?loggers
    on_train_epoch_end() | &late | EarlyStopping, ModelCheckpoint
    step ReduceLROnPlateau, if its interval="epoch" | ?automatic
        lr_scheduler_step(scheduler, metric)
    do what callbacks asked for, such as save | ?saves
        on_save_checkpoint(checkpoint)
on_train_end() | then what callbacks still asked for
on_fit_end()
close the loggers | ?loggers
teardown({verb}) | datamodule, callbacks, module; after errors too
"""
)

_EVALUATE = (
    _SETUP
    + "<kind>_dataloader()\n"
    + _EVALUATION
    + """\
values to the loggers | ?loggers
teardown({verb}) | datamodule, callbacks, module; after errors too
"""
)

_WORDS = {
    "verb": "stage",
    "if_validation": ", if there is a validation",
    "move": "batch.to(device)",
    "accumulate": "accumulate_grad_batches",
    "scaled": "",
    "clip": "clip to gradient_clip_val",
    "nan": "raise, skip or roll back",
    "device": "the device",
    "precision": "its precision",
    "sanity": "a few",
    "end": "max_epochs, max_steps, max_time or should_stop",
    "reload": "n",
    "log_every_n_steps": "log_every_n_steps",
    "validation": "validate, if it is due",
    "stop": "max_steps are done or trainer.should_stop is set",
}
"""What stands in the docs where `explain` has a value."""

_KINDS = {"validate": ("validation", "val"), "test": ("test", "test"), "predict": ("predict", "predict")}
_NOTE_COLUMN = 64


@dataclass(frozen=True)
class Line:
    """One line of a template.

    Attributes:
        depth: how far it is indented.
        text: what stands there.
        hook: the hook that it calls, or None.
        note: for the docs.
        default: what stands there if nobody overrides the hook.
        when: the condition under which it is there.
        flattens: whether what is indented below it stays if the condition does not hold.
        group: which of an event's hooks are meant.
    """

    depth: int
    text: str
    hook: str | None
    note: str = ""
    default: str = ""
    when: str = ""
    flattens: bool = False
    group: str = ""


def lines_of(verb: str, mode: Mode = Mode.AUTOMATIC) -> list[Line]:
    """The template of ``fit``, ``validate``, ``test`` or ``predict``, line by line."""
    if verb == "fit":
        text = _FIT.replace("<batch>\n", indent(_BATCH[mode], " " * 8))
        text = text.replace("<evaluation>\n", indent(_EVALUATION.replace("<stage>", "validation"), " " * 16))
    else:
        stage, kind = _KINDS[verb]
        text = _EVALUATE.replace("<stage>", stage).replace("<kind>", kind)
    return [_parse(line) for line in text.splitlines()]


def _parse(line: str) -> Line:
    text, *parts = (part.strip() for part in line.split(" | "))
    found: dict[str, Any] = {}
    for part in parts:
        if part[0] == "?":
            found.update(when=part[1:].rstrip("<"), flattens=part.endswith("<"))
        else:
            found[{"=": "default", "&": "group"}.get(part[0], "note")] = part.lstrip("=&")
    match = re.match(r"(\w+)\(.*\)( -> loss|, which calls:)?:?$", text)
    name = match[1] if match else None
    return Line((len(line) - len(line.lstrip())) // 4, text, None if name == "closure" else name, **found)


def listing(verb: str, mode: Mode = Mode.AUTOMATIC) -> str:
    """The lifecycle of ``verb`` as the docs show it: every hook, with notes."""
    return _shown(lines_of(verb, mode))


def batch_listing(mode: Mode) -> str:
    """What happens to a training batch between `on_train_batch_start` and `on_train_batch_end`, as the docs show it."""
    return _shown(map(_parse, _BATCH[mode].splitlines()))


def _shown(lines: Iterable[Line]) -> str:
    shown = []
    for line in lines:
        default = line.default.format_map(_WORDS)
        note = line.note or (f"default: {default}" if default else "")
        shown.append(row("    " * line.depth + line.text.format_map(_WORDS), f"# {note}" if note else ""))
    return "\n".join(shown)


def row(text: str, note: str) -> str:
    """A line of two columns."""
    return f"{text:<{_NOTE_COLUMN}}  {note}".rstrip()
