"""Methods of modules and callbacks: which only have another name or other arguments today, and which need a hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import libcst as cst
from libcst import matchers

from leyden.compat.migrate.facts import Facts, code, dotted, is_method_of_super
from leyden.compat.migrate.notes import Notes
from leyden.compat.migrate.schedulers import note_plateaus

BATCH = ("batch", "batch_idx")
_PER_LOADER = {f"on_{stage}_batch_{when}" for stage in ("validation", "test", "predict") for when in ("start", "end")}
_AFTER_BATCH = {f"on_{stage}_batch_end" for stage in ("train", "validation", "test")}
OUTPUTS = ("outputs", *BATCH)


@dataclass(frozen=True)
class Former:
    """A hook as it was, without ``self``, ``trainer`` and ``pl_module``.

    Attributes:
        arguments: as they were.
        today: its name.
        today_arguments: as they are.
    """

    arguments: tuple[str, ...]
    today: str
    today_arguments: tuple[str, ...] = ()


_BOTH: dict[str, Former] = {
    "on_epoch_start": Former((), "on_train_epoch_start"),
    "on_epoch_end": Former((), "on_train_epoch_end"),
    "on_train_epoch_end": Former(("outputs",), "on_train_epoch_end"),
    "on_train_batch_start": Former((*BATCH, "dataloader_idx"), "on_train_batch_start", BATCH),
    "on_train_batch_end": Former((*OUTPUTS, "dataloader_idx"), "on_train_batch_end", OUTPUTS),
    "on_batch_end": Former((), "on_train_batch_end", OUTPUTS),
    "on_before_optimizer_step": Former(("optimizer", "optimizer_idx"), "on_before_optimizer_step", ("optimizer",)),
    "on_predict_epoch_end": Former(("results",), "on_predict_epoch_end"),
}
_CLIPPING = ("gradient_clip_val", "gradient_clip_algorithm")
FORMER: dict[str, dict[str, Former]] = {
    "module": {
        **_BOTH,
        "on_batch_start": Former(("batch",), "on_train_batch_start", BATCH),
        "tng_dataloader": Former((), "train_dataloader"),
        "on_pre_performance_check": Former((), "on_validation_start"),
        "on_post_performance_check": Former((), "on_validation_end"),
        "training_epoch_end": Former(("outputs",), "on_train_epoch_end"),
        "validation_epoch_end": Former(("outputs",), "on_validation_epoch_end"),
        "test_epoch_end": Former(("outputs",), "on_test_epoch_end"),
        "lr_scheduler_step": Former(
            ("scheduler", "optimizer_idx", "metric"), "lr_scheduler_step", ("scheduler", "metric")
        ),
        "optimizer_zero_grad": Former(
            ("epoch", "batch_idx", "optimizer", "optimizer_idx"),
            "optimizer_zero_grad",
            ("epoch", "batch_idx", "optimizer"),
        ),
        "configure_gradient_clipping": Former(
            ("optimizer", "optimizer_idx", *_CLIPPING), "configure_gradient_clipping", ("optimizer", *_CLIPPING)
        ),
        "transfer_batch_to_device": Former(
            ("batch", "device"), "transfer_batch_to_device", ("batch", "device", "dataloader_idx")
        ),
    },
    "callback": {**_BOTH, "on_batch_start": Former((), "on_train_batch_start", BATCH)},
    "data": {
        "tng_dataloader": Former((), "train_dataloader"),
        "transfer_batch_to_device": Former(
            ("batch", "device"), "transfer_batch_to_device", ("batch", "device", "dataloader_idx")
        ),
    },
}
"""Hooks whose name or arguments changed; they are rewritten where the arguments that fell away are not used."""


def _collect(name: str, function: cst.FunctionDef, loader: str | None) -> tuple[str, str]:
    """What is written for `validation_epoch_end` and the like; each stage has a list of its own, for one runs within another.

    Args:
        name: of the hook.
        function: the hook.
        loader: what the step calls the loader's number, if it is given that.
    """
    step, short = _COLLECTING[name]
    stage, kept = step.removesuffix("_step").replace("training", "train"), f"self.{short}_outputs"
    given = [each.name.value for each in function.params.params][1:2]
    empty, place, one, about = "[]", kept, "", ""
    if loader is not None:
        empty, place = f"[[] for _ in self.trainer.num_{short}_batches]", f"{kept}[{loader}]"
        one, about = ", one list per loader", "  # if there is but one loader, the first of them"
    alone = '; for a loss alone {"loss": loss.detach()}' if short == "train" else ""
    return (
        "the outputs of the steps are not collected any more.",
        f"{kept} = {empty} in on_{stage}_epoch_start{one}; {place}.append(result) in {step}, its tensors with .detach(){alone}; "
        f"and\ndef on_{stage}_epoch_end(self):\n    {given[0] if given else 'outputs'} = {kept}{about}\n"
        "    …  # self.log(name, value), and nothing is returned",
    )


_COLLECTING = {
    "training_epoch_end": ("training_step", "train"),
    **dict.fromkeys(("validation_epoch_end", "validation_end"), ("validation_step", "val")),
    **dict.fromkeys(("test_epoch_end", "test_end"), ("test_step", "test")),
}
"""Hooks that were given what the steps returned: the step, and the short name of its stage."""
_LOADER = ("dataloader_idx", "dataloader_i", "dataset_idx")


_WITHIN_STEP = ("batches are not divided within a process any more.", "its lines at the end of the step")
_MANUAL = (
    "several optimizers are stepped by hand.",
    "self.automatic_optimization = False in __init__, and\ndef training_step(self, batch, batch_idx):\n"
    "    first, second = self.optimizers()\n    loss = …  # what optimizer_idx == 0 computed\n"
    "    first.zero_grad()\n    self.manual_backward(loss)\n    first.step()\n    …  # the same for the second one",
)
PIECES = (
    "a batch is not cut along time any more.",
    "self.automatic_optimization = False, and in training_step for each piece: loss, zero_grad(), self.manual_backward(loss), "
    "step(), hiddens = hiddens.detach(); leyden still takes the former way",
)
_BAR = ("the progress bar is asked.", "a subclass of leyden.callbacks.RichProgressBar")
_NOT_RUN = "; leyden does not run a former hook that another method calls"
_STRATEGY = ("this belongs to the strategy.", 'Trainer(strategy=…), such as leyden.strategies.DDPStrategy(…) or "ddp"')
_NEEDS_A_HAND: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("training_end", "training_step_end", "validation_step_end", "test_step_end"), _WITHIN_STEP),
    "configure_apex": ("torch's own mixed precision is used.", 'Trainer(precision="16-mixed") and nothing here'),
    **dict.fromkeys(("configure_ddp", "init_ddp_connection", "configure_sync_batchnorm"), _STRATEGY),
    **dict.fromkeys(("get_progress_bar_dict", "get_tqdm_dict"), _BAR),
    "on_hpc_save": ("there is one kind of checkpoint.", "on_save_checkpoint(self, checkpoint)"),
    "on_hpc_load": ("there is one kind of checkpoint.", "on_load_checkpoint(self, checkpoint)"),
    "tbptt_split_batch": PIECES,
}
_NEEDS_A_HAND_IN_CALLBACKS: dict[str, tuple[str, str]] = {
    "on_init_start": ("a Trainer calls nothing while it is made.", "setup(self, trainer, pl_module, stage)"),
    "on_init_end": ("a Trainer calls nothing while it is made.", "setup(self, trainer, pl_module, stage)"),
    "on_keyboard_interrupt": (
        "there is one hook for whatever ends a run early.",
        "on_exception(self, trainer, pl_module, exception), and isinstance(exception, KeyboardInterrupt)",
    ),
    "on_configure_sharded_model": ("the module does that.", "configure_model(self) in the module"),
}
STEPS = frozenset(
    f"{stage}{end}"
    for stage in ("training", "validation", "test")
    for end in ("_step", "_end", "_epoch_end", "_step_end")
)


@dataclass
class Change:
    """What becomes of one method: its name, its parameters behind ``self`` if they change, a default for the last one."""

    name: str
    parameters: tuple[str, ...] | None = None
    default: str | None = None


State = Change | Literal["left"] | None
"""What may become of a hook: a change, nothing although it is a former one, or nothing because it is right as it is."""
HOOKS = frozenset(name for hooks in FORMER.values() for name in hooks) | _AFTER_BATCH
"""The names of all hooks that `state` may change."""


def state(function: cst.FunctionDef, kind: str) -> State:
    """What may become of a hook, by itself."""
    former = FORMER[kind].get(function.name.value)
    change = _changed_by_itself(function, former, kind)
    if change is not None and (change.name != function.name.value or change.parameters is not None):
        return change
    return "left" if change is None and _left(function, former, kind) is not None else None


def _changed_by_itself(function: cst.FunctionDef, former: Former | None, kind: str) -> Change | None:
    if lacks_outputs(function, kind):
        return _with_outputs(function, kind)
    return _change(function, former, kind) if former is not None else _with_default(function)


def plan_class(node: cst.ClassDef, kind: str, left: Mapping[str, str], facts: Facts, notes: Notes) -> dict[str, Change]:
    """Decide what becomes of the hooks of a class, by their former names, and note what needs a hand.

    Args:
        node: the class.
        kind: "module", "data" or "callback".
        left: hooks to leave, with the use that is in the way.
        facts: what is known of the file.
        notes: where to note what needs a hand.
    """
    functions = list(methods(node))
    names = {each.name.value for each in functions}
    loaders = {each.name.value: _loader(each) for each in functions}
    changes: dict[str, Change] = {}
    for function in functions:
        name = function.name.value
        former = FORMER[kind].get(name)
        change = _changed_by_itself(function, former, kind)
        is_left = name in left and change is not None and (change.name != name or change.parameters is not None)
        if change is not None and not is_left and (change.name == name or change.name not in names):
            changes[name] = change
            continue
        found: tuple[str, str] | None
        if change is not None and is_left:
            given = [each.name.value for each in function.params.params][1:]
            given = given if change.parameters is None else [*change.parameters]
            write = f"def {change.name}({', '.join(['self', *given])}), and the same wherever it is used"
            found = (
                f"it is used otherwise too ({left[name]}), and stays{_NOT_RUN if '.' in left[name] else ''}.",
                write,
            )
        elif kind == "module" and name in _COLLECTING:
            found = _collect(name, function, loaders.get(_COLLECTING[name][0]))
        else:
            found = _by_hand(function, kind) or _left(function, former, kind)
        if found is not None:
            notes.add(facts.line(function.name), signature(function), *found)
        if kind == "module" and name in STEPS:
            note_results(function, facts, notes)
        if kind == "module" and name == "configure_optimizers":
            note_plateaus(function, facts, notes)
    return changes


def methods(node: cst.ClassDef) -> Iterator[cst.FunctionDef]:
    """The functions of a class's body."""
    for statement in node.body.body:
        if isinstance(statement, cst.FunctionDef):
            yield statement


def signature(function: cst.FunctionDef) -> str:
    """``name(a, b)`` without ``self``."""
    given = [each.name.value for each in function.params.params]
    return f"{function.name.value}({', '.join(given[1:])})"


def _given(function: cst.FunctionDef, kind: str) -> list[str] | None:
    """The positional parameters behind ``self``, or behind ``trainer, pl_module``; None if there are others, or not so many."""
    parameters = function.params
    if isinstance(parameters.star_arg, cst.Param) or parameters.star_kwarg or parameters.kwonly_params:
        return None
    if parameters.posonly_params:
        return None
    first = 3 if kind == "callback" else 1
    return [each.name.value for each in parameters.params][first:] if len(parameters.params) >= first else None


def _change(function: cst.FunctionDef, former: Former, kind: str) -> Change | None:
    """How the parameters become today's; None if nothing can be or need be done."""
    given = _given(function, kind)
    if given is None:
        return None
    name, today = function.name.value, former.today
    if name.endswith("_epoch_end") and name != today and returns_something(function):
        return None
    if len(given) != len(former.arguments) or any(
        each.default for each in function.params.params[-len(given) :] if given
    ):
        return Change(today) if name != today and given == list(former.today_arguments) else None
    if former.arguments == former.today_arguments:
        return Change(today)
    users = dict(zip(former.arguments, given, strict=True))
    used = names_in(function.body)
    gone = {users[each] for each in former.arguments if each not in former.today_arguments}
    come = {each for each in former.today_arguments if each not in users}
    if (gone | come) & used:
        return None
    front = [each.name.value for each in function.params.params][1 : 3 if kind == "callback" else 1]
    return Change(today, (*front, *(users.get(each, each) for each in former.today_arguments)))


def _loader(function: cst.FunctionDef) -> str | None:
    """What a step calls the number of the loader."""
    given = [each.name.value for each in function.params.params]
    return next((name for name in given if name in _LOADER), None)


def lacks_outputs(function: cst.FunctionDef, kind: str) -> bool:
    """Whether this is called after a batch, and was written while it was not given the outputs: 0.8 and 0.9."""
    given = _given(function, kind)
    if function.name.value not in _AFTER_BATCH or given is None or len(given) != 3:
        return False
    return given[-1] in _LOADER and not given[0].startswith("out")


def _with_outputs(function: cst.FunctionDef, kind: str) -> Change | None:
    """``outputs`` at its place; None if its name, or a number that is not given any more, is used."""
    given, used = _given(function, kind) or [], names_in(function.body)
    front = [each.name.value for each in function.params.params][1 : 3 if kind == "callback" else 1]
    kept = given if function.name.value in _PER_LOADER else given[:-1]
    if "outputs" in used or set(given) - set(kept) & used:
        return None
    return Change(function.name.value, (*front, "outputs", *kept), "0" if kept is given else None)


def _with_default(function: cst.FunctionDef) -> Change | None:
    """``dataloader_idx`` was always given to these hooks; today only where there are several loaders."""
    given = function.params.params
    if (
        given
        and function.name.value in _PER_LOADER
        and given[-1].name.value == "dataloader_idx"
        and given[-1].default is None
    ):
        return Change(function.name.value, None, "0")
    return None


def _left(function: cst.FunctionDef, former: Former | None, kind: str) -> tuple[str, str] | None:
    """What is said of a hook that changed and cannot be rewritten by itself."""
    if lacks_outputs(function, kind):
        front = ["self", "trainer", "pl_module"] if kind == "callback" else ["self"]
        last = ["dataloader_idx=0"] if function.name.value in _PER_LOADER else []
        return "it is given the outputs first.", f"def {function.name.value}({', '.join([*front, *OUTPUTS, *last])})"
    if former is None:
        return None
    if former.today == function.name.value:  # the name is right; are the arguments former ones?
        given = _given(function, kind)
        if given is None or len(given) != len(former.arguments) or any(each.default for each in function.params.params):
            return None
    front = ["self", "trainer", "pl_module"] if kind == "callback" else ["self"]
    return "its name or arguments changed.", f"def {former.today}({', '.join([*front, *former.today_arguments])})"


def _by_hand(function: cst.FunctionDef, kind: str) -> tuple[str, str] | None:
    name = function.name.value
    given = [each.name.value for each in function.params.params][1:]
    if kind == "callback":
        if name in ("on_save_checkpoint", "on_load_checkpoint") and _is_about_state(function, given):
            return "a callback's state has hooks of its own.", "state_dict(self) and load_state_dict(self, state)"
        return _NEEDS_A_HAND_IN_CALLBACKS.get(name)
    if kind != "module":
        return None
    if name == "training_step" and {"optimizer_idx", "optimizer_i"} & set(given):
        return _MANUAL
    if name == "training_step" and "hiddens" in given:
        return PIECES
    if name == "backward" and len(given) > 1:
        return "it is given the loss alone.", "def backward(self, loss)"
    if name == "optimizer_step" and ("optimizer_idx" in given or len(given) > 4):
        return (
            "it is given other arguments.",
            "def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure), which calls "
            "optimizer.step(closure=optimizer_closure)",
        )
    return _NEEDS_A_HAND.get(name)


def _is_about_state(function: cst.FunctionDef, given: list[str]) -> bool:
    """Whether it returns or takes the callback's own state; today's is given the whole checkpoint."""
    starred = isinstance(function.params.star_arg, cst.Param) or function.params.star_kwarg is not None
    if (len(given) < 3 and not starred) or given[-1:] == ["callback_state"]:
        return True
    return function.name.value == "on_save_checkpoint" and returns_something(function)


class _Names(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.returns = False

    def visit_Name(self, node: cst.Name) -> None:  # noqa: N802 (libcst's names)
        self.found.add(node.value)

    def visit_Attribute(self, node: cst.Attribute) -> bool:  # noqa: N802
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:  # noqa: N802
        node.value.visit(self)
        return False

    def visit_Return(self, node: cst.Return) -> None:  # noqa: N802
        if node.value is not None and code(node.value) != "None":
            self.returns = True


def names_in(node: cst.CSTNode) -> set[str]:
    """Every name that is written in a node, without the names of attributes and arguments."""
    visitor = _Names()
    node.visit(visitor)
    return visitor.found


def returns_something(function: cst.FunctionDef) -> bool:
    """Whether a function returns more than None."""
    visitor = _Names()
    function.body.visit(visitor)
    return visitor.returns


class _Results(cst.CSTVisitor):
    """Finds dicts with ``log`` or ``progress_bar``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[cst.CSTNode] = []

    def visit_DictElement(self, node: cst.DictElement) -> None:  # noqa: N802
        if code(node.key).strip("'\"") in ("log", "progress_bar"):
            self.found.append(node)

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:  # noqa: N802
        if isinstance(node.target, cst.Subscript) and code(node.target).endswith(
            ("['log']", '["log"]', "bar']", 'bar"]')
        ):
            self.found.append(node)


def note_results(function: cst.FunctionDef, facts: Facts, notes: Notes) -> None:
    """Note results of 2020: dicts that name what is logged."""
    visitor = _Results()
    function.body.visit(visitor)
    if visitor.found:
        name = function.name.value
        returned = "the two are left out of what is returned" if name.endswith("_step") else "nothing is returned"
        notes.add(
            facts.line(visitor.found[0]),
            f"{name} returns a dict with log or progress_bar",
            "values are logged where they are computed.",
            "self.log(name, value), with prog_bar=True for the progress bar, and "
            + ("return the loss" if name in ("training_step", "training_end", "training_step_end") else returned),
        )


def changed(function: cst.FunctionDef, change: Change) -> cst.FunctionDef:
    """Give a method its name and parameters of today."""
    new = function.with_changes(name=function.name.with_changes(value=change.name))
    parameters = list(function.params.params) if change.parameters is None else _parameters(function, change.parameters)
    if change.default is not None and parameters[-1].default is None:
        last = parameters[-1]
        equal = cst.AssignEqual() if last.annotation is not None else cst.AssignEqual(*[cst.SimpleWhitespace("")] * 2)
        parameters[-1] = last.with_changes(default=cst.parse_expression(change.default), equal=equal)
    return new.with_changes(params=function.params.with_changes(params=parameters))


def _parameters(function: cst.FunctionDef, names: tuple[str, ...]) -> list[cst.Param]:
    """``self`` and these: those that are there with all that they have."""
    before = function.params.params
    kept = {each.name.value: each for each in before[1:]}
    comma = next((each.comma for each in before if isinstance(each.comma, cst.Comma)), None)
    comma = comma or cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    parameters = [before[0], *(kept.get(each, cst.Param(cst.Name(each))) for each in names)]
    *others, last = parameters
    return [*(each.with_changes(comma=comma) for each in others), last.with_changes(comma=before[-1].comma)]


def changed_super(call: cst.Call, change: Change) -> cst.Call:
    """A call of the same hook of ``super()``, with the arguments of today."""
    assert is_method_of_super(call.func)
    if change.parameters is None:
        return call
    apart = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    given = [cst.Arg(cst.Name(each), comma=apart) for each in change.parameters]
    given[-1:] = [each.with_changes(comma=cst.MaybeSentinel.DEFAULT) for each in given[-1:]]
    return call.with_changes(args=given, whitespace_before_args=cst.SimpleWhitespace(""))


def saved_hparams(node: cst.Assign, function: cst.FunctionDef | None, facts: Facts) -> str | None:
    """The argument of ``__init__`` in ``self.hparams = argument``; None for another target.

    Empty for another expression, and before ``super().__init__()``, where `save_hyperparameters` cannot be called.
    """
    targets = [each for target in node.targets for each in _parts(target.target)]
    if "self.hparams" not in targets:
        return None
    if len(targets) > 1 or not isinstance(node.targets[0].target, cst.Attribute):
        return ""
    given = {each.name.value for each in function.params.params[1:]} if function is not None else set()
    if function is None or function.name.value != "__init__" or not isinstance(node.value, cst.Name):
        return ""
    made = matchers.findall(function, matchers.Call(func=matchers.Attribute(attr=matchers.Name("__init__"))))
    if made and all(facts.line(node) < facts.line(each) for each in made):
        return ""
    return node.value.value if node.value.value in given else ""


def _parts(target: cst.BaseExpression) -> list[str]:
    """What is assigned to: the names in ``a, (b.c, *d) = …``."""
    if isinstance(target, (cst.Tuple, cst.List)):
        return [name for each in target.elements for name in _parts(each.value)]
    return [dotted(target) or ""]
