"""Calls of other things than the Trainer itself: the callbacks' constructors, and what is called on a Trainer."""

from __future__ import annotations

import libcst as cst

from leyden.compat.migrate.calls import Arguments, is_unknown
from leyden.compat.migrate.facts import TRAINERS, Facts, code, literal
from leyden.compat.migrate.names import ADVICE
from leyden.compat.migrate.notes import Notes

_LOADERS = {
    "fit": {"train_dataloader": "train_dataloaders", "val_dataloader": "val_dataloaders"},
    "validate": {"val_dataloaders": "dataloaders", "val_dataloader": "dataloaders"},
    "test": {"test_dataloaders": "dataloaders", "test_dataloader": "dataloaders"},
    "predict": {"predict_dataloaders": "dataloaders"},
}
VERBS = frozenset(_LOADERS)
TRAINER_ATTRIBUTES = {
    "running_sanity_check": "sanity_checking",
    "progress_bar_dict": "progress_bar_metrics",
    "proc_rank": "global_rank",
    "num_gpus": "num_devices",
    "early_stop_callback": "early_stopping_callback",
}
"""What is read of a Trainer, former and today."""

_CALLED_ON_TRAINER = {
    "tune": ("the Trainer does not tune.", ADVICE["Tuner"]),
    "lr_find": ("the Trainer does not tune.", ADVICE["Tuner"]),
    "scale_batch_size": ("the Trainer does not tune.", ADVICE["Tuner"]),
}
_OF_THE_CLASS = {
    "from_argparse_args": "Trainer(max_epochs=args.max_epochs, …), naming what the program lets people choose",
    "add_argparse_args": 'parser.add_argument("--max_epochs", type=int, default=…), for what people may choose',
    "parse_argparser": "Trainer(max_epochs=args.max_epochs, …), naming what the program lets people choose",
    "default_attributes": "inspect.signature(Trainer).parameters",
}


def rewrite_verb(call: Arguments, ckpt_path: str | None) -> None:
    """Former names of loaders in ``fit``, ``validate``, ``test`` and ``predict``; ``ckpt_path`` where the Trainer had it."""
    assert isinstance(call.original.func, cst.Attribute)
    for former, today in _LOADERS[call.original.func.attr.value].items():
        if former in call.given:
            call.rename(former, today)
    if ckpt_path is not None:
        call.append("ckpt_path", ckpt_path)


def note_method(call: Arguments, method: str, on_trainer: bool, of_the_class: bool) -> None:
    """Note what a Trainer cannot be asked any more."""
    function = code(call.original.func)
    if on_trainer and method in _CALLED_ON_TRAINER:
        call.note_at(call.original, f"{function}(…)", *_CALLED_ON_TRAINER[method])
    if of_the_class and method in _OF_THE_CLASS:
        call.note_at(
            call.original,
            f"{function}(…)",
            "options are the program's own today; leyden still takes this.",
            _OF_THE_CLASS[method],
        )
    if method in ("load_from_checkpoint", "load_from_metrics"):
        _loading(call)
    if method == "load_from_metrics":
        call.note_at(
            call.original,
            f"{function}(…)",
            "hyperparameters are in the checkpoint; leyden still takes this.",
            "load_from_checkpoint(path, hparams…)",
        )
    if method == "manual_backward" and len(call.positional) > 1 and "opt" in code(call.positional[1]):
        call.note_at(
            call.original, f"{function}(…)", "it takes the loss alone.", f"{function}({code(call.positional[0])})"
        )


def _loading(call: Arguments) -> None:
    """Arguments of `load_from_checkpoint`: where to, and hyperparameters that replace those of the file."""
    if "map_location" in call.given:
        value = call.original_value("map_location")
        if isinstance(value, cst.Lambda) and _is_first_parameter(value):
            call.rename("map_location", "map_location", '"cpu"')  # where storages are read to
        elif isinstance(value, (cst.Lambda, cst.Dict)):
            call.note(
                "map_location", "it is one device; leyden still takes this.", 'map_location="cpu", or another device'
            )
    for name in ("hparam_overrides", "hparams_overrides"):
        if name in call.given:
            known, write = call.literal(name), f"**{call.text(name)}"
            if isinstance(known, dict) and all(isinstance(key, str) and key.isidentifier() for key in known):
                write = ", ".join(f"{key}={value!r}" for key, value in known.items())
            call.note(name, "each hyperparameter is an argument; leyden still takes this.", write)


def _is_first_parameter(function: cst.Lambda) -> bool:
    given = function.params.params
    return len(given) == 2 and isinstance(function.body, cst.Name) and function.body.value == given[0].name.value


_NAMES_OF = {16: "16-mixed", 32: "32-true", 64: "64-true", "16": "16-mixed", "32": "32-true", "64": "64-true"}
_NAMES_OF |= {"bf16": "bf16-mixed"}


def note_precision(node: cst.Comparison, facts: Facts, notes: Notes) -> None:
    """``trainer.precision == 16``: it answers a name."""
    sides = [node.left, *(each.comparator for each in node.comparisons)]
    asked = [
        side
        for side in sides
        if isinstance(side, cst.Attribute) and side.attr.value == "precision" and facts.is_trainer(side.value)
    ]
    if not asked:
        return
    found: list[str] = []
    for side in sides:
        value = literal(side)
        for each in value if isinstance(value, (list, tuple, set)) else [value]:
            if isinstance(each, (int, str)) and each in _NAMES_OF:
                found.append(f'"{_NAMES_OF[each]}"')
    if found:
        write = f"{code(asked[0])} compared with {' and '.join(dict.fromkeys(found))}"
        notes.add(facts.line(node), " ".join(code(node).split()), "the Trainer's precision is a name.", write)


def note_super(call: Arguments, method: str) -> None:
    """``super().optimizer_step(…)`` with arguments of then."""
    values = [code(each.value) for each in call.original.args]
    if method == "optimizer_step" and (len(values) > 4 or {"optimizer_idx", "optimizer_i"} & {*values, *call.given}):
        write = "super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)"
        call.note_at(call.original, f"{code(call.original.func)}(…)", "it takes four arguments.", write)


def plan_callbacks(facts: Facts, calls: list[cst.Call]) -> set[cst.Call]:
    """The calls that make what the Trainer is given as ``early_stop_callback`` and ``checkpoint_callback``."""
    made: set[cst.Call] = set()
    for call in calls:
        if facts.meaning(call.func) not in TRAINERS:
            continue
        for argument in call.args:
            if argument.keyword is None or argument.keyword.value not in ("early_stop_callback", "checkpoint_callback"):
                continue
            either = argument.value
            given = [either.body, either.orelse] if isinstance(either, cst.IfExp) else [either]
            made |= {held for each in given if isinstance(held := facts.held(each), cst.Call)}
    return made


def rewrite_checkpoint(call: Arguments, of_then: bool) -> None:
    """``ModelCheckpoint``: ``filepath``, ``prefix``, ``period``, ``mode="auto"``, ``save_best_only``.

    Args:
        call: its arguments.
        of_then: whether the Trainer is given it in a former way, and so the defaults of then hold.
    """
    given = call.given
    of_then |= "filepath" in given and call.literal("filepath") is not None
    for former in ("period", "every_n_val_epochs"):
        if former in given:
            call.rename(former, "every_n_epochs")
    if "save_top_k" in given and isinstance(call.literal("save_top_k"), bool):
        call.rename("save_top_k", "save_top_k", "1" if call.literal("save_top_k") else "0")
    if "save_best_only" in given:
        value = call.literal("save_best_only")
        if isinstance(value, bool):
            call.rename("save_best_only", "save_top_k", "1" if value else "-1")
        else:
            call.note("save_best_only", "its value is not seen here.", "save_top_k=1 for True, -1 for False")
    if "filepath" in given:
        _filepath(call)
    if "prefix" in given:
        _prefix(call)
    if of_then and _seen(call, 1) and "monitor" not in call.given:
        call.note_at(
            call.original,
            "ModelCheckpoint(…) without monitor",
            "until 0.9 it watched val_loss by itself.",
            'monitor="val_loss", if the best file is to stay and not the newest',
        )
    _mode(call, of_then and _seen(call, 1) and "monitor" in call.given)


def _seen(call: Arguments, positional: int) -> bool:
    """Whether all arguments are seen, and no more than so many have no name."""
    return len(call.positional) <= positional and not any(each.star for each in call.original.args)


def rewrite_early_stopping(call: Arguments, of_then: bool) -> None:
    """``EarlyStopping``: what is watched is named, ``mode`` as well; ``of_then`` as for `rewrite_checkpoint`."""
    _mode(call, of_then and _seen(call, 4))
    if not call.positional and "monitor" not in call.given and not any(each.star for each in call.original.args):
        call.append("monitor", '"val_loss"')


def _mode(call: Arguments, of_then: bool) -> None:
    """``mode="auto"``, which went by the name of what is watched, and was the default of then."""
    missing = "mode" not in call.given
    if not of_then if missing else call.literal("mode") != "auto":
        return
    monitor: object = "val_loss"
    if "monitor" in call.given:
        monitor = call.literal("monitor")
    elif call.positional and (call.facts.meaning(call.original.func) or "").endswith("EarlyStopping"):
        monitor = literal(call.positional[0])
    if isinstance(monitor, str):
        mode = '"max"' if "acc" in monitor or monitor.startswith("fmeasure") else '"min"'
        if not missing:
            call.rename("mode", "mode", mode)
        elif mode == '"max"':
            call.append("mode", mode)
    else:
        write = 'mode="min", or "max" for what grows, as an accuracy'
        if missing:
            why = "until 0.9 it went by the name of what is watched, which is not seen here."
            call.note_at(call.original, f"{code(call.original.func)}(…) without mode", why, write)
        else:
            call.note("mode", "what is watched is not seen here.", write)


def _filepath(call: Arguments) -> None:
    value, node = call.literal("filepath"), call.value("filepath")
    parts = _split_f_string(node) if isinstance(node, cst.FormattedString) else _joined_path(node)
    if value is None:
        call.drop("filepath")
        return
    if isinstance(value, str):
        folder, _, name = value.rpartition("/")
        if not name:
            call.rename("filepath", "dirpath", repr_like(node, folder or "/"))
        elif "{" in name:
            call.add("filepath", "filename", repr_like(node, name))
            if folder:
                call.rename("filepath", "dirpath", repr_like(node, folder))
            else:
                call.drop("filepath")
        else:
            write = f"dirpath={value!r} if it is a folder; else dirpath={folder or '.'!r}, filename={name!r}"
            call.note("filepath", "it is two arguments now.", write)
            return
    elif parts is not None:
        folder, name = parts  # as code
        call.add("filepath", "filename", name)
        call.rename("filepath", "dirpath", folder)
    elif code(node) in ("os.getcwd()", "Path.cwd()"):
        call.rename("filepath", "dirpath")
    else:
        write = f"dirpath={call.text('filepath')} if it is a folder; else its folder as dirpath=…, its last part as filename=…"
        call.note("filepath", "it is two arguments now.", write)


def _split_f_string(node: cst.FormattedString) -> tuple[str, str] | None:
    """Folder and name of ``f"a/{b}/{{epoch}}"``, as code, by its last slash; None if that is not a template's."""
    if node.prefix.lower() != "f" or "\\" in code(node):
        return None
    parts = [each.value if isinstance(each, cst.FormattedStringText) else code(each) for each in node.parts]
    is_text = [isinstance(each, cst.FormattedStringText) for each in node.parts]
    last = max((number for number, part in enumerate(parts) if is_text[number] and "/" in part), default=None)
    if last is None:
        return None
    before, _, after = parts[last].rpartition("/")
    folder, name = [*parts[:last], before], [after, *parts[last + 1 :]]
    if not "".join(folder) or "{{" not in after + "".join(parts[last + 1 :]) or "{{" in "".join(folder):
        return None

    def text(pieces: list[str], plain: bool) -> str:
        found = "".join(pieces)
        if plain:
            return f"{node.end}{found.replace('{{', '{').replace('}}', '}')}{node.end}"
        return f"{node.start}{found}{node.end}"

    return text(folder, all(is_text[:last])), text(name, all(is_text[last + 1 :]))


def _joined_path(node: cst.BaseExpression) -> tuple[str, str] | None:
    """Folder and name of ``os.path.join(folder, …, "{epoch}")``."""
    if not isinstance(node, cst.Call) or not code(node.func).endswith("path.join") or len(node.args) < 2:
        return None
    if any(each.star or each.keyword for each in node.args):
        return None
    name = literal(node.args[-1].value)
    if not isinstance(name, str) or "{" not in name or "/" in name:
        return None
    before = [code(each.value) for each in node.args[:-1]]
    folder = before[0] if len(before) == 1 else f"{code(node.func)}({', '.join(before)})"
    return folder, code(node.args[-1].value)


def _prefix(call: Arguments) -> None:
    prefix = call.literal("prefix")
    if prefix in ("", None):
        call.drop("prefix")
        return
    name = call.literal("filename") if "filename" in call.given else UNSEEN
    if isinstance(prefix, str) and isinstance(name, str):
        call.rename("filename", "filename", repr_like(call.value("filename"), f"{prefix}{name}"))
        call.drop("prefix")
    else:
        call.note("prefix", "it is a part of the file's name now.", f"filename={call.text('prefix')} + '{{epoch}}'")


UNSEEN = object()


def repr_like(node: cst.BaseExpression, value: str) -> str:
    """A string literal with the quotes that another one has."""
    single = code(node).lstrip("rRuUbB").startswith("'")
    text = repr(value)
    return text if single or '"' in value else '"' + text[1:-1] + '"' if text[0] == "'" else text


def plan_resumes(facts: Facts, calls: list[cst.Call]) -> tuple[dict[cst.Call, str], set[cst.Call]]:
    """Find for each ``Trainer(resume_from_checkpoint=X)`` the one ``fit`` that X can go to.

    Returns:
        The text of X by the call of ``fit``, and the calls of the Trainer that lose the argument.
    """
    moved: dict[cst.Call, str] = {}
    emptied: set[cst.Call] = set()
    for call in calls:
        if facts.meaning(call.func) not in TRAINERS:
            continue
        for argument in call.args:
            if argument.keyword is None or argument.keyword.value != "resume_from_checkpoint":
                continue
            if literal(argument.value) is None:
                emptied.add(call)
                continue
            fit = _only_fit(facts, call)
            if fit is not None and _stays_the_same(facts, argument.value):
                moved[fit] = code(argument.value)
                emptied.add(call)
    return moved, emptied


def _only_fit(facts: Facts, call: cst.Call) -> cst.Call | None:
    variable = facts.variable(call)
    fits = [
        each
        for each in (facts.method_calls.get(variable, []) if variable is not None else [])
        if isinstance(each.func, cst.Attribute) and each.func.attr.value == "fit"
    ]
    if len(fits) != 1:
        return None
    given = [each.keyword.value for each in fits[0].args if each.keyword is not None]
    starred = any(each.star for each in fits[0].args)
    return None if starred or "ckpt_path" in given or len(fits[0].args) - len(given) > 4 else fits[0]


def _stays_the_same(facts: Facts, value: cst.BaseExpression) -> bool:
    """Whether an expression means the same a few lines later: literals, attributes, names that are assigned once."""
    if not is_unknown(literal(value)):
        return True
    while isinstance(value, cst.Attribute):
        value = value.value
    scope = facts.scopes.get(value)
    return isinstance(value, cst.Name) and scope is not None and len(list(scope[value.value])) <= 1
