"""Rewriting programs for Lightning: pairs of what is given and what comes of it, what is left alone, what is listed."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import leyden
from leyden.compat import once
from leyden.compat.arguments import FORMER_NAMES, modernise
from leyden.compat.migrate import files
from leyden.compat.migrate.__main__ import main
from leyden.compat.migrate.facts import Base, derived
from leyden.compat.migrate.names import ADVICE, HAS, RENAMED
from leyden.compat.migrate.notes import Note
from leyden.compat.migrate.objects import TRAINER_ATTRIBUTES
from leyden.compat.migrate.rewriting import rewrite
from leyden.compat.migrate.trainer_arguments import FORMER, STRATEGIES, TODAY
from leyden.demos.boring_classes import BoringModel
from leyden.errors import ConfigurationError
from leyden.strategy import STRATEGIES as LEYDENS_STRATEGIES
from quiet import make_trainer

PROGRAMS = Path(__file__).parent / "migrate"
ROOT = Path(__file__).resolve().parents[2]


def text(code: str) -> str:
    return dedent(code).lstrip("\n")


def again(code: str) -> str:
    """Rewrite, and see that a second time changes nothing and that it is Python."""
    new = rewrite(code).text
    ast.parse(new)
    assert rewrite(new).text == new
    return new


def trainer(arguments: str, imports: str = "import pytorch_lightning as pl\n") -> str:
    """The arguments of ``pl.Trainer(…)`` after the rewriting."""
    new = again(f"{imports}pl.Trainer({arguments})\n")
    found = re.search(r"pl\.Trainer\((.*)\)\n$", new, re.DOTALL)
    assert found is not None
    return found[1]


def notes(code: str) -> tuple[Note, ...]:
    return rewrite(text(code)).notes


# Whole programs


@pytest.mark.parametrize("name", ["today", "lightning_1", "year_2020"])
def test_a_program(name: str) -> None:
    before = (PROGRAMS / f"{name}_before.txt").read_text("utf-8")
    after = (PROGRAMS / f"{name}_after.txt").read_text("utf-8")
    listed = (PROGRAMS / f"{name}_notes.txt").read_text("utf-8").splitlines()
    done = rewrite(before)
    assert done.text == after
    assert again(before) == after
    assert [f"{note.line}: {note.what}" for note in done.notes] == listed
    for note, later in zip(done.notes, done.later, strict=True):  # the same places, in the new text
        assert (note.what, note.write) == (later.what, later.write)
        assert before.splitlines()[note.line - 1] == after.splitlines()[later.line - 1]


@pytest.mark.parametrize("name", ["today", "lightning_1"])
def test_a_rewritten_program_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text((PROGRAMS / f"{name}_before.txt").read_text("utf-8"), encoding="utf-8")
    assert main(["--write", str(program)]) == 0
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(program), run_name="__main__")
    run = names["trainer"]
    assert isinstance(run, leyden.Trainer)
    assert run.global_step == 1
    assert "test_loss" in names["results"][0]


def test_the_program_of_2020_runs_when_its_list_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is listed is done here as the list says; the rest is as it was rewritten.
    code = (PROGRAMS / "year_2020_after.txt").read_text("utf-8")
    by_hand = {
        "return {'loss': loss, 'progress_bar': {'train_loss': loss}, 'log': {'train_loss': loss}}": (
            "self.log('train_loss', loss, prog_bar=True)\n        return loss"
        ),
        "        return {'val_loss': self.loss(batch)}\n": "        self.log('val_loss', self.loss(batch))\n",
        "gpus=hparams.gpus,": "accelerator='gpu' if hparams.gpus else 'cpu',",
    }
    for former, new in by_hand.items():
        assert code.count(former) == 1
        code = code.replace(former, new)
    code = re.sub(r"    def validation_epoch_end\(self, outputs\):\n(        .*\n)+", "", code)
    assert not [note for note in rewrite(code).notes if "without monitor" not in note.what]
    program = tmp_path / "program.py"
    program.write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py", "--epochs", "2"])
    names = runpy.run_path(str(program), run_name="__main__")
    assert names["trainer"].current_epoch == 2
    assert names["system"].hparams.epochs == 2
    assert [path.name for path in (tmp_path / "kept").glob("*.ckpt")]


def test_the_rewritten_program_of_2020_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (PROGRAMS / "year_2020_before.txt").read_text("utf-8")
    moved = {"pytorch_lightning.logging": "leyden.loggers", "pytorch_lightning": "leyden", "RateLogger": "RateMonitor"}
    for former, today in moved.items():
        before = before.replace(former, today)
    results = []
    for name, code in (("before", before), ("after", (PROGRAMS / "year_2020_after.txt").read_text("utf-8"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program.py").write_text(code, encoding="utf-8")
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(sys, "argv", ["program.py", "--epochs", "3"])
        leyden.seed_everything(5)
        once.forget()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\[LEY-former-name\]")
            names = runpy.run_path("program.py", run_name="__main__")
        files_ = sorted(each.relative_to(tmp_path / name).as_posix() for each in (tmp_path / name).rglob("*.ckpt"))
        values = {key: float(value) for key, value in names["trainer"].callback_metrics.items()}
        results.append((values, names["trainer"].global_step, files_, names["system"].state_dict()))
    (values, steps, files_, weights), (new_values, new_steps, new_files, new_weights) = results
    assert (values, steps, files_) == (new_values, new_steps, new_files)
    assert steps == 5 + 3 + 3  # the second epoch on two batches a step
    assert files_
    assert all(weights[key].equal(new_weights[key]) for key in weights)


def test_a_package_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "package"
    parts = {
        "__init__.py": "from .systems import Large\n",
        "base.py": "from pytorch_lightning import LightningModule\n\n\nclass Base(LightningModule):\n    pass\n",
        "systems.py": text("""
            from .base import Base


            class Middle(Base):
                def on_epoch_end(self):
                    pass


            class Large(Middle):
                def on_epoch_end(self):
                    super().on_epoch_end()

                def validation_end(self, outputs):
                    return {"val_loss": outputs[0]}
            """),
        "plain.py": "class Counter:\n    def on_epoch_end(self):\n        return 1   # nobody's hook\n",
        "notes.txt": "import pytorch_lightning\n",
        ".venv/lib/site.py": "import pytorch_lightning\n",
    }
    for name, code in parts.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(code, encoding="utf-8")
    assert main(["--write", str(package)]) == 0
    out = capsys.readouterr().out
    assert (package / "base.py").read_text("utf-8").startswith("from leyden import LightningModule\n")
    new = (package / "systems.py").read_text("utf-8")
    assert new == parts["systems.py"].replace("on_epoch_end", "on_train_epoch_end")
    for name in ("__init__.py", "plain.py", "notes.txt", ".venv/lib/site.py"):
        assert (package / name).read_text("utf-8") == parts[name]
    assert f"{package / 'systems.py'}:13: validation_end(outputs)" in out
    assert out.endswith("Rewritten: 2 files.\n")


def test_classes_are_followed_through_others() -> None:
    classes: dict[str, list[Base]] = {"C": [(None, "B")], "B": [(None, "A")], "A": [("module", "")], "D": [(None, "X")]}
    assert derived(classes) == {"A": "module", "B": "module", "C": "module"}


# Imports and names

IMPORTS = {
    "import lightning as L": "import leyden as L",
    "import lightning.pytorch as pl": "import leyden as pl",
    "import pytorch_lightning as ptl, torch": "import leyden as ptl, torch",
    "import pytorch_lightning.callbacks as cb\ncb.EarlyStopping('a')": "import leyden.callbacks as cb\ncb.EarlyStopping('a')",
    "import lightning\nlightning.Trainer()": "import leyden\nleyden.Trainer()",
    "import lightning\nlightning.pytorch.callbacks.Timer()": "import leyden\nleyden.callbacks.Timer()",
    "import lightning.pytorch\nx: lightning.pytorch.Trainer": "import leyden\nx: leyden.Trainer",
    "import pytorch_lightning.callbacks\npytorch_lightning.callbacks.Timer()": (
        "import leyden.callbacks\nleyden.callbacks.Timer()"
    ),
    "import lightning as L\nL.pytorch.loggers.CSVLogger('.')": "import leyden as L\nL.loggers.CSVLogger('.')",
    "import pytorch_lightning as pl\npl.logging.TensorBoardLogger('.')": "import leyden as pl\npl.loggers.TensorBoardLogger('.')",
    "import pytorch_lightning as pl\npl.core.lightning.LightningModule": "import leyden as pl\npl.LightningModule",
    "import pytorch_lightning as pl\nf(pl.callbacks.LearningRateLogger)": (
        "import leyden as pl\nf(pl.callbacks.LearningRateMonitor)"
    ),
    "from pytorch_lightning import Trainer as T": "from leyden import Trainer as T",
    "from pytorch_lightning import Trainer, seed_everything  # both": "from leyden import Trainer, seed_everything  # both",
    "from lightning.pytorch import callbacks, loggers as lg": "from leyden import callbacks, loggers as lg",
    "from lightning.pytorch.callbacks.early_stopping import EarlyStopping": "from leyden.callbacks import EarlyStopping",
    "from lightning.pytorch.utilities.rank_zero import rank_zero_only": "from leyden.utilities.rank_zero import rank_zero_only",
    "from lightning.fabric.utilities.rank_zero import rank_zero_only": "from leyden.utilities.rank_zero import rank_zero_only",
    "from lightning.pytorch.trainer.states import TrainerFn": "from leyden.trainer.states import TrainerFn",
    "from pytorch_lightning.profiler import BaseProfiler": "from leyden.profilers import Profiler",
    "from pytorch_lightning.profiler import BaseProfiler as P\nP()": "from leyden.profilers import Profiler as P\nP()",
    "from pytorch_lightning.callbacks import LearningRateLogger\nx = LearningRateLogger()": (
        "from leyden.callbacks import LearningRateMonitor\nx = LearningRateMonitor()"
    ),
    "from pytorch_lightning.utilities.seed import seed_everything": "from leyden.utilities.seed import seed_everything",
    "from pytorch_lightning.core import LightningModule, LightningDataModule": (
        "from leyden import LightningModule, LightningDataModule"
    ),
    "from pytorch_lightning.callbacks import (\n    Timer,  # a\n    Callback,\n)": (
        "from leyden.callbacks import (\n    Timer,  # a\n    Callback,\n)"
    ),
    "try:\n    import lightning.pytorch as pl\nexcept ImportError:\n    import pytorch_lightning as pl\npl.Trainer(gpus=0)": (
        "try:\n    import leyden as pl\nexcept ImportError:\n    import leyden as pl\npl.Trainer(accelerator=\"cpu\")"
    ),
    "def f():\n    from pytorch_lightning import Trainer; return Trainer(gpus=0)": (
        "def f():\n    from leyden import Trainer; return Trainer(accelerator=\"cpu\")"
    ),
    "import sys\nif sys: from pytorch_lightning import Trainer\nTrainer(gpus=0)": (
        "import sys\nif sys: from leyden import Trainer\nTrainer(accelerator=\"cpu\")"
    ),
    "if x: from pytorch_lightning import data_loader": "if x: pass",
    "import pytorch_lightning\nframework = pytorch_lightning\nframework.__name__": (
        "import leyden\nframework = leyden\nframework.__name__"
    ),
    "import pytorch_lightning\nx = [pytorch_lightning]\nf(pytorch_lightning=pytorch_lightning)\ndel pytorch_lightning": (
        "import leyden\nx = [leyden]\nf(pytorch_lightning=leyden)\ndel leyden"
    ),
    "import lightning.pytorch\nclass K: pl = lightning\nx: lightning = lightning.pytorch.Trainer": (
        "import leyden\nclass K: pl = leyden\nx: leyden = leyden.Trainer"
    ),
    # a name that is not only the package stays, for what else uses it
    "try:\n    import pytorch_lightning\nexcept ImportError:\n    pytorch_lightning = None\nif pytorch_lightning: pass": (
        "try:\n    import leyden as pytorch_lightning\nexcept ImportError:\n    pytorch_lightning = None\n"
        "if pytorch_lightning: pass"
    ),
    "import pytorch_lightning.callbacks\ndef f(lightning, *, pytorch_lightning): pytorch_lightning.logging.CSVLogger('.')": (
        "import leyden.callbacks, leyden as pytorch_lightning\n"
        "def f(lightning, *, pytorch_lightning): pytorch_lightning.logging.CSVLogger('.')"
    ),
    "import lightning\ndef f():\n    global lightning\n    import lightning\nlightning.pytorch.Trainer": (
        "import leyden as lightning\ndef f():\n    global lightning\n    import leyden as lightning\nlightning.Trainer"
    ),
    "import lightning\ndef f(x: 'list[lightning.Trainer]'): pass": (
        "import leyden as lightning\ndef f(x: 'list[lightning.Trainer]'): pass"
    ),
    "import lightning.pytorch as lightning\nlightning.Trainer": "import leyden as lightning\nlightning.Trainer",
}  # fmt: skip


@pytest.mark.parametrize("before", IMPORTS)
def test_imports(before: str) -> None:
    assert again(before) == IMPORTS[before]
    assert not rewrite(before).notes


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        (
            "from lightning.pytorch.loggers import CSVLogger, WandbLogger",
            "from leyden.loggers import CSVLogger\nfrom lightning.pytorch.loggers import WandbLogger",
            "from lightning.pytorch.loggers import WandbLogger",
        ),
        (
            "import lightning as L\nL.pytorch.loggers.WandbLogger()",
            "import leyden as L\nL.pytorch.loggers.WandbLogger()",
            "L.pytorch.loggers.WandbLogger",
        ),
        (
            "import lightning\nlightning.Trainer()\nlightning.fabric.Fabric()",
            "import leyden, lightning\nleyden.Trainer()\nlightning.fabric.Fabric()",
            "lightning.fabric.Fabric",
        ),
        ("import lightning\nlightning.Fabric()", "import lightning\nlightning.Fabric()", "lightning.Fabric"),
        (
            "from lightning.fabric import Fabric",
            "from lightning.fabric import Fabric",
            "from lightning.fabric import Fabric",
        ),
        (
            "from lightning.fabric.loggers import CSVLogger",  # another class
            "from lightning.fabric.loggers import CSVLogger",
            "from lightning.fabric.loggers import CSVLogger",
        ),
        (
            "import pytorch_lightning.metrics as M\nM.Accuracy()",
            "import pytorch_lightning.metrics as M\nM.Accuracy()",
            "import pytorch_lightning.metrics",
        ),
        (
            "from pytorch_lightning.loggers import (\n    WandbLogger,  # w\n    CSVLogger,  # c\n)",
            "from pytorch_lightning.loggers import (\n    WandbLogger,  # w\n)\n"
            "from leyden.loggers import (\n    CSVLogger,  # c\n)",
            "from pytorch_lightning.loggers import WandbLogger",
        ),
        (
            "from pytorch_lightning.metrics import Accuracy",
            "from pytorch_lightning.metrics import Accuracy",
            "from pytorch_lightning.metrics import Accuracy",
        ),
        ("import pl_bolts", "import pl_bolts", "import pl_bolts"),
        (
            "from pytorch_lightning.core.decorators import auto_move_data\n@auto_move_data\ndef f(x): pass",
            "from pytorch_lightning.core.decorators import auto_move_data\n@auto_move_data\ndef f(x): pass",
            "from pytorch_lightning.core.decorators import auto_move_data",
        ),
        (
            "from pytorch_lightning.utilities.cloud_io import load as pl_load\npl_load(path)",
            "from pytorch_lightning.utilities.cloud_io import load as pl_load\npl_load(path)",
            "from pytorch_lightning.utilities.cloud_io import load",
        ),
        (
            "from pytorch_lightning.core import grads",
            "from pytorch_lightning.core import grads",
            "from pytorch_lightning.core import grads",
        ),
        ("from pytorch_lightning import *", "from leyden import *", "from pytorch_lightning import *"),
        (
            "from pytorch_lightning.tuner.tuning import Tuner",
            "from pytorch_lightning.tuner.tuning import Tuner",
            "from pytorch_lightning.tuner.tuning import Tuner",
        ),
        (
            "import lightning as L\npatch('lightning.pytorch.Trainer.fit')",
            "import leyden as L\npatch('lightning.pytorch.Trainer.fit')",
            "'lightning.pytorch.Trainer.fit'",
        ),
    ],
)
def test_what_leyden_has_not_is_listed_and_stays(before: str, after: str, what: str) -> None:
    assert again(before) == after
    (note,) = rewrite(before).notes
    assert note.what == what
    assert note.write
    assert [each.write for each in rewrite(after).notes][:1] in ([note.write], []) or "*" in what


def test_what_is_said_of_functions_that_are_gone() -> None:
    found = notes("""
        from pytorch_lightning.core.decorators import auto_move_data
        from pytorch_lightning.utilities import cloud_io
        import pytorch_lightning as pl
        pl.utilities.cloud_io.load(path)
        from pytorch_lightning.core import grads
        from leyden.core.decorators import auto_move_data
        """)
    assert [note.line for note in found] == [1, 2, 4, 5, 6]
    moved, loaded, again_, inside, once_more = (note.write for note in found)
    assert "batch, self.device, 0" in moved
    assert "trainer.predict" in moved
    assert moved == once_more
    assert loaded == again_
    assert loaded.startswith("leyden.load_checkpoint(path) for load")
    assert callable(leyden.load_checkpoint)
    assert "has no grads" in inside


def test_the_table_of_names_is_leydens() -> None:
    pytest.importorskip("lightning.pytorch", reason="lightning's names are compared with")
    for module, names in HAS.items():
        ours = import_module(f"leyden.{module}".rstrip("."))
        assert not [name for name in names if not hasattr(ours, name)], module
        public = set(getattr(ours, "__all__", ()))
        name = f"lightning.pytorch.{module}".rstrip(".")
        theirs = dir(import_module(name)) if find_spec(name) else []  # some are of 1.x
        assert not public & set(theirs) - names, f"leyden.{module} has these as well; add them to HAS"
    everywhere = set().union(*HAS.values())
    assert not everywhere & set(ADVICE), "leyden has these; there is nothing to advise"
    assert set(RENAMED.values()) <= everywhere
    assert not [name for name in TRAINER_ATTRIBUTES.values() if not hasattr(leyden.Trainer, name)]


# Arguments of the Trainer

ARGUMENTS = {
    "gpus=2": 'accelerator="gpu", devices=2',
    "gpus=-1": 'accelerator="gpu", devices=-1',
    "gpus=[0, 3]": 'accelerator="gpu", devices=[0, 3]',
    "gpus='0, 1'": 'accelerator="gpu", devices=[0, 1]',
    "gpus='3'": 'accelerator="gpu", devices=[3]',
    "gpus=0": 'accelerator="cpu"',
    "gpus=None": 'accelerator="cpu"',
    "gpus=None, tpu_cores=8": 'accelerator="tpu", devices=8',
    "gpus=2, accelerator='ddp'": "accelerator=\"gpu\", devices=2, strategy='ddp'",
    "accelerator='gpu', gpus=2": "accelerator='gpu', devices=2",
    "num_tpu_cores=1": 'accelerator="tpu", devices=1',
    "distributed_backend='ddp'": "strategy='ddp'",
    "distributed_backend=None": "",
    "distributed_backend='ddp_cpu', num_processes=2": 'accelerator="cpu", strategy="ddp_spawn", devices=2',
    "num_processes=2, gpus=0": 'devices=2, accelerator="cpu"',
    "num_processes=2, gpus=1": 'accelerator="gpu", devices=1',
    "gpus=1, distributed_backend='dp'": 'accelerator="gpu", devices=1',
    "max_nb_epochs=n, min_nb_epochs=1": "max_epochs=n, min_epochs=1",
    "nb_gpu_nodes=2, nb_sanity_val_steps=5": "num_nodes=2, num_sanity_val_steps=5",
    "gradient_clip=0.5, default_save_path=p": "gradient_clip_val=0.5, default_root_dir=p",
    "row_log_interval=10, log_save_interval=100": "log_every_n_steps=10",
    "show_progress_bar=False": "enable_progress_bar=False",
    "progress_bar_refresh_rate=0": "enable_progress_bar=False",
    "progress_bar_refresh_rate=n": "enable_progress_bar=bool(n)",
    "progress_bar_refresh_rate=20, max_epochs=1": "max_epochs=1",
    "early_stop_callback=True": 'callbacks=[pl.callbacks.EarlyStopping("val_loss", patience=3)]',
    "early_stop_callback=False": "",
    "callbacks=[a], early_stop_callback=True": 'callbacks=[a, pl.callbacks.EarlyStopping("val_loss", patience=3)]',
    "callbacks=None, early_stop_callback=True": 'callbacks=[pl.callbacks.EarlyStopping("val_loss", patience=3)]',
    "checkpoint_callback=False": "enable_checkpointing=False",
    "checkpoint_callback=pl.callbacks.ModelCheckpoint(monitor='a')": "callbacks=[pl.callbacks.ModelCheckpoint(monitor='a')]",
    "checkpoint_callback=pl.callbacks.ModelCheckpoint(monitor='val_acc')": (
        "callbacks=[pl.callbacks.ModelCheckpoint(monitor='val_acc', mode=\"max\")]"
    ),
    "early_stop_callback=pl.callbacks.EarlyStopping('val_acc')": (
        "callbacks=[pl.callbacks.EarlyStopping('val_acc', mode=\"max\")]"
    ),
    "early_stop_callback=pl.callbacks.EarlyStopping('val_acc', mode='min')": (
        "callbacks=[pl.callbacks.EarlyStopping('val_acc', mode='min')]"
    ),
    "callbacks=[pl.callbacks.EarlyStopping('val_acc')]": "callbacks=[pl.callbacks.EarlyStopping('val_acc')]",
    "checkpoint_callback=True, callbacks=[pl.callbacks.ModelCheckpoint()]": (
        "enable_checkpointing=True, callbacks=[pl.callbacks.ModelCheckpoint()]"
    ),
    "overfit_pct=0.1": "limit_train_batches=0.1, limit_val_batches=0.1, limit_test_batches=0.1",
    "overfit_pct=0": "",
    "train_percent_check=1, val_percent_check=0.5": "limit_train_batches=1.0, limit_val_batches=0.5",
    "test_percent_check=part": "limit_test_batches=float(part)",
    "weights_summary=None": "enable_model_summary=False",
    "weights_summary='full'": "callbacks=[pl.callbacks.ModelSummary(max_depth=-1)]",
    "accumulate_grad_batches={4: 2}": "callbacks=[pl.callbacks.GradientAccumulationScheduler({4: 2})]",
    "accumulate_grad_batches=4": "accumulate_grad_batches=4",
    "profiler=True": 'profiler="simple"',
    "profiler=False": "",
    "profiler='advanced'": "profiler='advanced'",
    "use_amp=True, amp_level='O2'": 'precision="16-mixed"',
    "use_amp=args.amp": 'precision="16-mixed" if args.amp else "32-true"',
    "precision=16, use_amp=True": 'precision="16-mixed"',
    "precision='bf16'": 'precision="bf16-mixed"',
    "precision=32": "precision=32",
    "replace_sampler_ddp=x": "use_distributed_sampler=x",
    "reload_dataloaders_every_epoch=True": "reload_dataloaders_every_n_epochs=1",
    "terminate_on_nan=True": 'nan_policy="raise"',
    "track_grad_norm=-1, max_steps=None": "",
    "resume_from_checkpoint=None": "",
    "stochastic_weight_avg=False, auto_lr_find=False, truncated_bptt_steps=None": "",
    "\n    gpus=2,  # both\n    max_epochs=3,  # three\n": (
        '\n    accelerator="gpu", devices=2,  # both\n    max_epochs=3,  # three\n'
    ),
    "\n    max_epochs=3,\n    early_stop_callback=False,\n": "\n    max_epochs=3,\n",
    "\n    max_epochs=3,\n    use_amp=False\n": "\n    max_epochs=3\n",
    "\n    max_epochs=3,  # a\n    use_amp=False,  # b\n": "\n    max_epochs=3,  # a\n",
    "\n    log_save_interval=1,\n    max_epochs=3, use_amp=False,  # b\n    logger=x,\n": "\n    max_epochs=3,\n    logger=x,\n",
    "\n    use_amp=False,\n    # one\n    max_epochs=1,\n    # none\n    profiler=False,\n    # two\n    logger=x,\n": (
        "\n    # one\n    max_epochs=1,\n    # none\n    # two\n    logger=x,\n"
    ),
    "max_epochs=3, logger=False": "max_epochs=3, logger=False",
    "**options": "**options",
}  # fmt: skip


@pytest.mark.parametrize("before", ARGUMENTS)
def test_arguments(before: str) -> None:
    assert trainer(before) == ARGUMENTS[before]
    assert not rewrite(f"import pytorch_lightning as pl\npl.Trainer({before})\n").notes


LISTED = {
    "gpus=args.gpus": 'accelerator="gpu", devices=args.gpus',
    "distributed_backend='horovod'": "strategy=…, one of",
    "strategy='deepspeed_stage_2'": "strategy=…, one of",
    "checkpoint_callback=make()": "callbacks=[make()]",
    "checkpoint_callback=True": 'callbacks=[ModelCheckpoint(monitor="val_loss")]; if val_loss is not logged, enable',
    "callbacks=[a], checkpoint_callback=True": 'callbacks=[…, ModelCheckpoint(monitor="val_loss")]',
    "checkpoint_callback=pl.callbacks.ModelCheckpoint()": 'monitor="val_loss"',
    "early_stop_callback=pl.callbacks.EarlyStopping(name)": 'mode="min", or "max"',
    "early_stop_callback=flag": "callbacks=[flag]; callbacks=[EarlyStopping(",
    "early_stop_callback=es if c else None": "callbacks=[es] if c else []",
    "early_stop_callback=None if c else es": "callbacks=[] if c else [es]",
    "early_stop_callback=es if c else False, callbacks=[a]": "callbacks=[…, *([es] if c else [])]",
    "checkpoint_callback=ck if c else False": "callbacks=[ck] if c else [], enable_checkpointing=bool(c)",
    "checkpoint_callback=False if c else ck": "callbacks=[] if c else [ck], enable_checkpointing=not (c)",
    "checkpoint_callback=ck if c else None": "callbacks=[ck] if c else []",
    "resume_from_checkpoint=path": "trainer.fit(model, ckpt_path=path)",
    "track_grad_norm=2": "self.log_dict(leyden.utilities.grad_norm(self, 2))",
    "truncated_bptt_steps=5": "self.automatic_optimization = False",
    "auto_lr_find=True": "by hand",
    "weights_save_path='w'": "ModelCheckpoint(dirpath=…)",
    "log_gpu_memory='all'": "GPUMemory('all')",
    "log_gpu_memory='min_max'": "GPUMemory('min_max')",
    "log_gpu_memory=True": 'GPUMemory("all")',
    "print_nan_grads=True": 'nan_policy="raise"',
    "weights_summary=level": "enable_model_summary=False",
    "multiple_trainloader_mode='min_size'": "CombinedLoader",
    "callbacks=make(), early_stop_callback=True": "callbacks=[…, pl.callbacks.EarlyStopping",
    "model_registry='m'": "logger",
    "what_is_this=1": "nothing",
    "True, gpus=0": "a name for each",
}


@pytest.mark.parametrize("arguments", LISTED)
def test_arguments_that_need_a_hand(arguments: str) -> None:
    (note,) = rewrite(f"import leyden as pl\n\npl.Trainer({arguments})\n").notes
    assert note.line == 3
    assert LISTED[arguments] in note.write


def test_dp_becomes_ddp_and_is_listed() -> None:
    assert trainer("gpus=2, distributed_backend='dp'") == 'accelerator="gpu", devices=2, strategy="ddp"'
    (note,) = notes("import pytorch_lightning as pl\npl.Trainer(gpus=2, distributed_backend='dp')")
    assert "batch_size" in note.write


def test_every_argument_is_known() -> None:
    ours = {
        name for name, each in inspect.signature(leyden.Trainer).parameters.items() if each.kind is not each.VAR_KEYWORD
    }
    assert ours == TODAY
    assert set(FORMER_NAMES) <= FORMER, "leyden.compat.arguments knows these as well"
    # what is still an argument of Lightning's, or never was one of 2020
    assert FORMER - set(FORMER_NAMES) == {
        "num_gpu_nodes",
        "enable_autolog_hparams",
        "model_registry",
    }
    assert {"auto", *LEYDENS_STRATEGIES} == STRATEGIES


DEFAULTS = {
    name: each.default
    for name, each in inspect.signature(leyden.Trainer).parameters.items()
    if each.kind is not each.VAR_KEYWORD
}
VALUES: dict[str, list[Any]] = {
    "gpus": [0, None],
    "num_processes": [1, 2],
    "distributed_backend": [None, "ddp", "ddp_cpu", "ddp_spawn"],
    "max_nb_epochs": [3],
    "min_nb_epochs": [2],
    "nb_sanity_val_steps": [0, 5],
    "nb_gpu_nodes": [1],
    "gradient_clip": [0.5],
    "default_save_path": ["somewhere"],
    "row_log_interval": [7],
    "log_save_interval": [100],
    "show_progress_bar": [False, True],
    "progress_bar_refresh_rate": [0, 5],
    "early_stop_callback": [True, False, None],
    "checkpoint_callback": [False, None],
    "overfit_pct": [0.0, 0.25, 1],
    "val_percent_check": [0.5, 1],
    "use_amp": [True, False],
    "amp_level": ["O1"],
    "weights_summary": [None],
    "accumulate_grad_batches": [4, {2: 3}],
    "profiler": [True, False, "simple", None],
    "replace_sampler_ddp": [False, True],
    "reload_dataloaders_every_epoch": [True, False],
    "terminate_on_nan": [True, False],
    "process_position": [1],
    "max_steps": [None, 5],
}


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VALUES.items()}))
def test_arguments_mean_the_same_as_when_they_are_translated(asked: dict[str, Any]) -> None:
    if asked.get("distributed_backend") == "ddp_cpu":
        asked.setdefault("num_processes", 2)
    if asked.get("overfit_pct"):
        asked.pop("val_percent_check", None)
    call = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    new = ast.parse(f"f({trainer(call)})", mode="eval").body
    assert isinstance(new, ast.Call)
    callbacks = [each.value for each in new.keywords if each.arg == "callbacks"]
    made = {each.arg: ast.literal_eval(each.value) for each in new.keywords if each.arg != "callbacks"}
    once.forget()
    try:
        with warnings.catch_warnings(action="ignore"):
            theirs = modernise(
                DEFAULTS | {name: value for name, value in asked.items() if name in DEFAULTS},
                {name: value for name, value in asked.items() if name not in DEFAULTS},
            ).arguments
    except ConfigurationError:
        reject()  # two that contradict each other, which is said when the program runs
    kinds = [ast.unparse(each.func).rpartition(".")[2] for each in (callbacks[0].elts if callbacks else [])]
    assert sorted(kinds) == sorted(type(each).__name__ for each in theirs.pop("callbacks") or [])
    ours = DEFAULTS | made
    ours.pop("callbacks")
    usual = {"enable_progress_bar": True, "enable_checkpointing": True, "devices": 1}  # what the default is on a CPU
    differ = {name for name, value in ours.items() if value != theirs[name] and usual.get(name, 0) != theirs[name]}
    assert not differ


def test_callbacks_that_are_put_in_are_imported() -> None:
    before = text("""
        '''A script.'''
        from pytorch_lightning import Trainer
        import torch

        rates = []
        Trainer(early_stop_callback=True, weights_summary="full", callbacks=rates)
        """)
    after = text("""
        '''A script.'''
        from leyden import Trainer
        from leyden.callbacks import EarlyStopping, ModelSummary
        import torch

        rates = []
        Trainer(callbacks=[*rates, EarlyStopping("val_loss", patience=3), ModelSummary(max_depth=-1)])
        """)
    assert again(before) == after
    before = "from pytorch_lightning import Trainer\nfrom pytorch_lightning.callbacks import Timer\n"
    new = again(f"{before}Trainer(early_stop_callback=True)\n")
    assert "from leyden.callbacks import Timer, EarlyStopping\n" in new


# Calls


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ModelCheckpoint(filepath='a/b/{epoch}')", "ModelCheckpoint(dirpath='a/b', filename='{epoch}')"),
        ("ModelCheckpoint(filepath='a/')", "ModelCheckpoint(dirpath='a')"),
        ('ModelCheckpoint(filepath="{epoch}")', 'ModelCheckpoint(filename="{epoch}")'),
        (
            "ModelCheckpoint(filepath=os.path.join(d, '{epoch}'), prefix='m_')",
            "ModelCheckpoint(dirpath=d, filename='m_{epoch}')",
        ),
        ("ModelCheckpoint(filepath=None, prefix='', period=2)", "ModelCheckpoint(every_n_epochs=2)"),
        ("ModelCheckpoint(monitor='val_acc', mode='auto')", "ModelCheckpoint(monitor='val_acc', mode=\"max\")"),
        ("ModelCheckpoint('folder', '{epoch}', 'loss')", "ModelCheckpoint('folder', '{epoch}', 'loss')"),
        ("ModelCheckpoint(save_best_only=False)", "ModelCheckpoint(save_top_k=-1)"),
        (
            "ModelCheckpoint(filepath=f'a/{x}/{{epoch:02d}}_{{val_loss:.2f}}', monitor='b')",
            "ModelCheckpoint(dirpath=f'a/{x}', filename='{epoch:02d}_{val_loss:.2f}', monitor='b')",
        ),
        (
            'ModelCheckpoint(filepath=f"kept/{{epoch}}_{x}", monitor="val_acc")',
            'ModelCheckpoint(dirpath="kept", filename=f"{{epoch}}_{x}", monitor="val_acc", mode="max")',
        ),
        ("EarlyStopping('val_loss', mode='auto')", "EarlyStopping('val_loss', mode=\"min\")"),
        ("EarlyStopping(patience=5)", 'EarlyStopping(patience=5, monitor="val_loss")'),
        ("EarlyStopping()", 'EarlyStopping(monitor="val_loss")'),
        ("EarlyStopping(monitor='a', mode='max')", "EarlyStopping(monitor='a', mode='max')"),
    ],
)
def test_callbacks(before: str, after: str) -> None:
    head = "import os\nfrom {}.callbacks import EarlyStopping, ModelCheckpoint\nx = {}\n"
    assert again(head.format("pytorch_lightning", before)) == head.format("leyden", after)


def test_callbacks_that_need_a_hand() -> None:
    found = notes("""
        from pytorch_lightning.callbacks import ModelCheckpoint
        ModelCheckpoint(filepath="kept", monitor="a")
        ModelCheckpoint(filepath=f"{folder}/x", monitor="a")
        ModelCheckpoint(filepath="a/{epoch}")
        ModelCheckpoint(prefix="x")
        ModelCheckpoint(monitor=name, mode="auto")
        ModelCheckpoint(filepath=f"{folder}{{epoch}}", monitor="a")
        ModelCheckpoint(filepath=f"/{{epoch}}", monitor="a")
        ModelCheckpoint(filepath=f"a{{epoch}}/{{epoch}}", monitor="a")
        ModelCheckpoint(filepath=fr"a\\b/{{epoch}}", monitor="a")
        """)
    assert [(note.line, note.what.split("=")[0]) for note in found] == [
        (2, "filepath"), (3, "filepath"), (4, "ModelCheckpoint(…) without monitor"), (5, "prefix"), (6, "mode"),
        (7, "filepath"), (8, "filepath"), (9, "filepath"), (10, "filepath"),
    ]  # fmt: skip
    assert "if it is a folder; else its folder as dirpath=…" in found[1].write


def test_what_is_called_on_a_trainer() -> None:
    before = text("""
        from pytorch_lightning import Trainer

        def go(model, loader, path, trainer):
            mine = Trainer(resume_from_checkpoint=path)
            mine.fit(model, train_dataloader=loader, val_dataloaders=loader)
            mine.test(test_dataloaders=loader)
            mine.test(model)
            trainer.validate(model, val_dataloaders=loader)
            if trainer.proc_rank == 0 and not trainer.running_sanity_check:
                other.fit(train_dataloader=loader)
        """)
    after = text("""
        from leyden import Trainer

        def go(model, loader, path, trainer):
            mine = Trainer()
            mine.fit(model, train_dataloaders=loader, val_dataloaders=loader, ckpt_path=path)
            mine.test(dataloaders=loader)
            mine.test(model)
            trainer.validate(model, dataloaders=loader)
            if trainer.global_rank == 0 and not trainer.sanity_checking:
                other.fit(train_dataloader=loader)
        """)
    assert again(before) == after
    assert not notes(before)


@pytest.mark.parametrize(
    "code",
    [
        "t = Trainer(resume_from_checkpoint=p)\nt.fit(a)\nt.fit(b)",  # which of them?
        "t = Trainer(resume_from_checkpoint=p)\nt.fit(a, ckpt_path=q)",
        "p = 'a'\nt = Trainer(resume_from_checkpoint=p)\np = 'b'\nt.fit(a)",
        "t = Trainer(resume_from_checkpoint=newest())\nt.fit(a)",
        "self.t = Trainer(resume_from_checkpoint=p)\nself.t.fit(a)",
        "t = Trainer(resume_from_checkpoint=p)\nt.test(a)",
    ],
)
def test_resuming_stays_where_it_is_not_plain(code: str) -> None:
    before = f"from leyden import Trainer\n{code}\n"
    assert again(before) == before
    assert [note.what.split("=")[0] for note in rewrite(before).notes] == ["resume_from_checkpoint"]


def test_methods_that_need_a_hand() -> None:
    found = notes("""
        import argparse
        import pytorch_lightning as pl
        parser = pl.Trainer.add_argparse_args(argparse.ArgumentParser())
        trainer = pl.Trainer.from_argparse_args(parser.parse_args())
        trainer.lr_find(model)
        trainer.tune(model)
        Net.load_from_metrics("w.ckpt", "meta.csv")
        tuner.tune(model)
        """)
    assert [note.line for note in found] == [3, 4, 5, 6, 7]


def test_what_a_checkpoint_is_loaded_with() -> None:
    before = text("""
        from leyden import LightningModule
        LightningModule.load_from_checkpoint(p, map_location=lambda storage, loc: storage)
        LightningModule.load_from_checkpoint(p, map_location=lambda storage, loc: storage.cuda())
        LightningModule.load_from_checkpoint(p, map_location={"cuda:1": "cuda:0"})
        LightningModule.load_from_checkpoint(p, map_location=device)
        LightningModule.load_from_checkpoint(p, hparam_overrides={"lr": 0.1, "n": 3})
        LightningModule.load_from_checkpoint(p, hparams_overrides=more)
        torch.load(p, map_location=lambda storage, loc: storage.cuda())
        """)
    assert again(before) == before.replace("lambda storage, loc: storage)", '"cpu")', 1)
    found = notes(before)
    assert [(note.line, note.what.split("=")[0]) for note in found] == [
        (3, "map_location"), (4, "map_location"), (6, "hparam_overrides"), (7, "hparams_overrides"),
    ]  # fmt: skip
    assert [note.write for note in found[2:]] == ["lr=0.1, n=3", "**more"]


def test_a_precision_that_is_compared() -> None:
    found = notes("""
        import leyden as pl
        def f(self, trainer, other):
            if trainer.precision == 16 and self.trainer.precision != "bf16": pass
            if trainer.precision in (16, 64): pass
            if 32 == trainer.precision: pass
            if trainer.precision == "16-mixed" or other.precision == 16 or trainer.max_epochs == 16: pass
        """)
    assert [(note.line, note.what, note.write) for note in found] == [
        (3, 'self.trainer.precision != "bf16"', 'self.trainer.precision compared with "bf16-mixed"'),
        (3, "trainer.precision == 16", 'trainer.precision compared with "16-mixed"'),
        (4, "trainer.precision in (16, 64)", 'trainer.precision compared with "16-mixed" and "64-true"'),
        (5, "32 == trainer.precision", 'trainer.precision compared with "32-true"'),
    ]


@pytest.mark.parametrize(
    ("returned", "lines"),
    [
        ("[o], [ReduceLROnPlateau(o)]", [6]),
        ("[o], [s]", [6]),
        ("[o], [{'scheduler': s, 'interval': 'epoch'}]", [6]),
        ("{'optimizer': o, 'lr_scheduler': torch.optim.lr_scheduler.ReduceLROnPlateau(o)}", [6]),
        ("[o], [{'scheduler': s, 'monitor': 'a'}]", []),
        ("{'optimizer': o, 'lr_scheduler': s, 'monitor': 'a'}", []),
        ("{'optimizer': o, 'lr_scheduler': {'scheduler': s}, 'monitor': 'a'}", []),
        ("{'optimizer': o, 'lr_scheduler': {'scheduler': s, **more}}", []),
        ("[o], [{'scheduler': StepLR(o, 1)}]", []),
        ("o", []),
    ],
)
def test_a_plateau_without_monitor(returned: str, lines: list[int]) -> None:
    head = "import leyden as L\nclass Net(L.LightningModule):\n    def configure_optimizers(self):\n"
    body = f"        o = make()\n        s = ReduceLROnPlateau(o)\n        return {returned}\n"
    assert [note.line for note in rewrite(head + body).notes] == lines
    watched = body.replace("        return", "        d['monitor'] = 'a'\n        return")
    assert [note.line for note in rewrite(head + watched).notes] == [line + 1 for line in lines if "{" not in returned]


# Hooks

HOOKS = {
    "def on_epoch_start(self):\n        pass": "def on_train_epoch_start(self):\n        pass",
    "def on_epoch_end(self):\n        super().on_epoch_end()": (
        "def on_train_epoch_end(self):\n        super().on_train_epoch_end()"
    ),
    "def on_batch_start(self, b):\n        return -1": "def on_train_batch_start(self, b, batch_idx):\n        return -1",
    "def on_batch_end(self):\n        self.batch = 1": (
        "def on_train_batch_end(self, outputs, batch, batch_idx):\n        self.batch = 1"
    ),
    "def tng_dataloader(self):\n        return self.tng_dataloader": (
        "def train_dataloader(self):\n        return self.train_dataloader"
    ),
    "def on_train_batch_start(self, x, i, dataloader_idx):\n        x": "def on_train_batch_start(self, x, i):\n        x",
    "def on_train_epoch_end(self, outputs):\n        pass": "def on_train_epoch_end(self):\n        pass",
    "def on_train_epoch_end(self, unused=None):\n        pass": "def on_train_epoch_end(self, unused=None):\n        pass",
    "def validation_epoch_end(self, outputs):\n        self.n += 1": (
        "def on_validation_epoch_end(self):\n        self.n += 1"
    ),
    "def optimizer_zero_grad(self, e, b, o, opt_idx):\n        o.zero_grad(set_to_none=True)": (
        "def optimizer_zero_grad(self, e, b, o):\n        o.zero_grad(set_to_none=True)"
    ),
    "def lr_scheduler_step(self, s, optimizer_idx, metric):\n        s.step(metric)": (
        "def lr_scheduler_step(self, s, metric):\n        s.step(metric)"
    ),
    "def transfer_batch_to_device(self, batch, device):\n        return super().transfer_batch_to_device(batch, device)": (
        "def transfer_batch_to_device(self, batch, device, dataloader_idx):\n"
        "        return super().transfer_batch_to_device(batch, device, dataloader_idx)"
    ),
    "def on_validation_batch_end(self, o, b, i, dataloader_idx):\n        pass": (
        "def on_validation_batch_end(self, o, b, i, dataloader_idx=0):\n        pass"
    ),
    "def on_validation_batch_end(self, batch, batch_idx, dataloader_idx: int):\n        batch": (
        "def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx: int = 0):\n        batch"
    ),
    "def on_train_batch_end(self, batch, batch_idx, dataloader_idx):\n        batch": (
        "def on_train_batch_end(self, outputs, batch, batch_idx):\n        batch"
    ),
    "# loads\n    @pl.data_loader  # 2019\n    def val_dataloader(self):\n        pass": (
        "# loads\n    # 2019\n    def val_dataloader(self):\n        pass"
    ),
    "def __init__(self, hparams):\n        super().__init__()\n        self.hparams = hparams; self.x = 1": (
        "def __init__(self, hparams):\n        super().__init__()\n        self.save_hyperparameters(hparams); self.x = 1"
    ),
    "def on_sanity_check_start(self):\n        pass": "def on_sanity_check_start(self):\n        pass",
    "def backward(self, loss):\n        loss.backward()": "def backward(self, loss):\n        loss.backward()",
    "def training_step(self, batch, batch_idx):\n        return {'loss': 1}": (
        "def training_step(self, batch, batch_idx):\n        return {'loss': 1}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("before", HOOKS)
def test_hooks_of_modules(before: str) -> None:
    head = "import {} as pl\n\n\nclass Net(pl.LightningModule):\n    {}\n"
    assert again(head.format("pytorch_lightning", before)) == head.format("leyden", HOOKS[before])
    assert not rewrite(head.format("leyden", before)).notes


def test_hooks_of_callbacks() -> None:
    before = text("""
        from pytorch_lightning.callbacks import Callback, EarlyStopping

        class Mine(EarlyStopping):
            def on_batch_end(self, trainer, pl_module):
                pass

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx):
                pass

        class Other(Callback):
            def on_epoch_start(self, t, m):
                pass

            def on_batch_end(self, t, m):
                pass
        """)
    new = again(before)
    assert "def on_batch_end(self, trainer, pl_module)" in new  # there is one already
    assert "def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):" in new
    assert "def on_train_epoch_start(self, t, m):" in new
    assert "def on_train_batch_end(self, t, m, outputs, batch, batch_idx):" in new
    assert [(note.line, note.what) for note in rewrite(before).notes] == [(4, "on_batch_end(trainer, pl_module)")]


BATCH_ENDS = """
from {} import Callback

class Seen(Callback):
    def on_train_batch_end(self, trainer, pl_module, {}):
        self.batches.append((batch_idx, len(batch)))

    def on_validation_batch_end(self, trainer, pl_module, {}):
        super().on_validation_batch_end(trainer, pl_module, {})
        self.batches.append((batch_idx, len(batch)))
"""


def test_batch_ends_of_callbacks_that_were_not_given_outputs(tmp_path: Path) -> None:
    then = "batch, batch_idx, dataloader_idx"
    after = again(BATCH_ENDS.format("pytorch_lightning", then, then, then))
    today = "outputs, batch, batch_idx"
    assert after == BATCH_ENDS.format(
        "leyden", today, f"{today}, dataloader_idx=0", "outputs, batch, batch_idx, dataloader_idx"
    )
    (tmp_path / "seen.py").write_text(after, encoding="utf-8")
    seen = runpy.run_path(str(tmp_path / "seen.py"))["Seen"]()
    seen.batches = []
    runner = make_trainer(tmp_path, seen, limit_train_batches=2, limit_val_batches=1)
    runner.fit(BoringModel())
    assert [index for index, _ in seen.batches] == [0, 1, 0]


def test_batch_ends_that_need_a_hand() -> None:
    found = notes("""
        from leyden import Callback
        class A(Callback):
            def on_train_batch_end(self, trainer, pl_module, batch, batch_idx, dataloader_idx): print(dataloader_idx)
            def on_test_batch_end(self, trainer, pl_module, batch, batch_idx, dataloader_idx): print(outputs)
        class B(Callback):
            def on_train_batch_end(self, trainer, pl_module, a, b, c): pass
            def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx): pass
        """)
    assert [(note.line, note.write) for note in found] == [
        (3, "def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx)"),
        (4, "def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0)"),
    ]


def test_the_state_of_callbacks() -> None:
    found = notes("""
        from leyden import Callback
        class A(Callback):
            def on_save_checkpoint(self, trainer, pl_module): return {}
            def on_load_checkpoint(self, state): pass
        class B(Callback):
            def on_save_checkpoint(self, trainer, pl_module, checkpoint): return {"n": 1}
            def on_load_checkpoint(self, trainer, pl_module, callback_state): pass
        class C(Callback):
            def on_save_checkpoint(self, trainer, pl_module, checkpoint): checkpoint["n"] = 1
            def on_load_checkpoint(self, *given): pass
        """)
    assert [note.line for note in found] == [3, 4, 6, 7]
    assert {note.write for note in found} == {"state_dict(self) and load_state_dict(self, state)"}


def test_a_step_that_is_passed_on() -> None:
    found = notes("""
        from leyden import LightningModule
        class Net(LightningModule):
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, closure):
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_idx, closure)
        class Other(LightningModule):
            def optimizer_step(self, *args, **kwargs):
                super().optimizer_step(*args, **kwargs)
        class Third(LightningModule):
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure=optimizer_closure)
        """)
    assert [(note.line, note.what.split("(")[0]) for note in found] == [(3, "optimizer_step"), (4, "super")]
    assert found[1].write == "super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)"


EPOCH_ENDS = (PROGRAMS / "epoch_ends_before.txt").read_text("utf-8")


def done_by_the_list(code: str) -> str:
    """What is listed of the ends of epochs, done to the letter: the list is made, filled in the step, and used."""
    hint = re.compile(
        r"(self\.\w+ = .+) in (on_\w+?)(?:, one list per loader)?; (self\..+\.append\(result\)) in (\w+), .*; and\n(.*)\n    …",
        re.DOTALL,
    )
    for note in rewrite(code).notes:
        found = hint.match(note.write)
        assert found is not None, note
        made, start, kept, step, head = found.groups()
        former = f"    def {note.what.replace('(', '(self, ')}:\n"
        assert code.count(former) == 1
        hook = head.replace("\n", "\n    ")
        code = code.replace(former, f"    def {start}(self):\n        {made}\n\n    {hook}\n")
        before, body = code.split(f"    def {step}(")
        detached = kept.replace("result", "{name: value.detach() for name, value in result.items()}")
        body = body.replace("        return result", f"        {detached}\n        return result", 1)
        code = f"{before}    def {step}({body}"
    return code


def test_the_list_of_epoch_ends_is_right_to_the_letter(tmp_path: Path) -> None:
    values = []
    for name, code in (("before", EPOCH_ENDS), ("after", done_by_the_list(again(EPOCH_ENDS)))):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        leyden.seed_everything(3)
        once.forget()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\[LEY-former-name\]")
            net = runpy.run_path(str(tmp_path / f"{name}.py"))["Net"]()
            runner = make_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=2, val_check_interval=0.5)
            runner.fit(net)
            found = dict(runner.callback_metrics)
            values.append({**found, **runner.test(net, verbose=False)[0]})
    then, now = ({key: float(value) for key, value in each.items()} for each in values)
    del then["loss"]  # what else is in the dicts is logged in the former way alone
    assert {"train_mean", "train_batches", "val_mean", "val_loaders", "test_mean"} <= set(then)
    assert then == now
    assert now["train_batches"] == 6
    assert now["val_loaders"] == 2
    assert not rewrite((tmp_path / "after.py").read_text("utf-8")).notes


def test_hooks_that_need_a_hand() -> None:
    code = """
        import pytorch_lightning as pl

        class Net(pl.LightningModule):
            truncated_bptt_steps = 5
            def __init__(self, hparams):
                self.hparams = hparams
                super().__init__()
            def training_step(self, batch, batch_idx, optimizer_idx):
                out = {"loss": 1}
                out["log"] = {}
                return out
            def validation_epoch_end(self, outputs):
                return {"val_loss": 1}
            def backward(self, trainer, loss, optimizer, idx):
                loss.backward()
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, closure):
                optimizer.step()
            def configure_apex(self, amp, model, optimizers, level):
                return model, optimizers
            def on_train_epoch_end(self, outputs):
                print(outputs)
            def training_step_end(self, outputs):
                return outputs
        """
    assert [note.line for note in notes(code)] == [4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
    by_line = {note.line: note.write for note in notes(code)}
    assert "self.automatic_optimization = False" in by_line[8]
    assert "on_validation_epoch_end(self)" in by_line[12]
    assert by_line[14] == "def backward(self, loss)"
    rest = again(text(code)).replace("leyden", "pytorch_lightning")
    assert rest == text(code)


def test_a_loader_decorator_that_is_used_otherwise_stays_imported() -> None:
    code = "from pytorch_lightning import Trainer, data_loader\n@data_loader\ndef f(): pass\n"
    assert again(code) == "from leyden import Trainer\ndef f(): pass\n"
    assert again(f"{code}g = data_loader(f)\n").startswith("from leyden import Trainer, data_loader\ndef f()")
    assert again("if x:\n    from pytorch_lightning import data_loader\n") == "if x:\n    pass\n"


def test_hooks_that_cannot_be_rewritten_by_their_arguments() -> None:
    code = """
        from leyden import LightningModule

        class Net(LightningModule):
            def on_batch_start(self, batch, *rest): pass
            def on_epoch_start(self, /): pass
            def on_batch_end(): pass
            def test_epoch_end(self, outputs): return 1
            def on_train_batch_start(self, *batch): pass
        """
    assert again(text(code)) == text(code)
    assert [note.line for note in notes(code)] == [4, 5, 6, 7]


def test_a_call_within_an_f_string_keeps_its_quotes() -> None:
    code = 'import leyden as L\nf"{L.Trainer(gpus=0)} {L.Trainer(max_nb_epochs=1)}"\n'
    assert again(code) == code.replace("max_nb", "max")
    (note,) = rewrite(code).notes
    assert note.write == 'L.Trainer(accelerator="cpu")'


def test_targets_of_hparams() -> None:
    found = notes("""
        import leyden
        class A(leyden.LightningModule):
            def __init__(self, hparams):
                super().__init__()
                self.hparams, self.z = hparams, 1
                self.hparams = self.kept = hparams
                [self.x, (self.hparams, *self.y)] = hparams
                self.hparams["x"], self.hparams.y = 1, 2
        """)
    assert [(note.line, note.what) for note in found] == [(line, "self.hparams = …") for line in (5, 6, 7)]


BASE = "import leyden as pl\nclass Base(pl.LightningModule):\n    def on_epoch_start(self): print('base')\n"
USES = {
    "mixin": "class Mixin:\n    def on_epoch_start(self): super().on_epoch_start()\nclass Net(Mixin, Base): pass\n",
    "mixin-used": "class Mixin:\n    def f(self): self.on_epoch_start()\nclass Net(Mixin, Base): pass\n",
    "qualified": "class Net(Base):\n    def on_epoch_start(self): Base.on_epoch_start(self)\n",
    "lambda": "class Net(Base):\n    on_epoch_start = lambda self: None\n",
    "assigned": "class Net(Base):\n    def f(self): self.on_epoch_start = print\n",
    "condition": "class Net(Base):\n    if True:\n        def on_epoch_start(self): print('net')\n",
    "object": "def f(net): net.on_epoch_start()\n",
    "string": "class Net(Base):\n    def f(self): getattr(self, 'on_epoch_start')()\n",
    "today": "class Net(Base):\n    def on_train_epoch_start(self): pass\n",
    "left": "class Net(Base):\n    def on_epoch_start(self, *more): super().on_epoch_start()\n",
}


@pytest.mark.parametrize("name", USES)
def test_a_hook_that_is_used_otherwise_stays_and_is_listed(name: str) -> None:
    code = BASE + USES[name]
    assert again(code) == code
    first = rewrite(code).notes[0]
    assert (first.line, first.what) == (3, "on_epoch_start()")
    assert first.write == "def on_train_epoch_start(self), and the same wherever it is used"


@pytest.mark.parametrize(
    "use",
    [
        "class Net(Base):\n    def f(self): self.on_epoch_start(); super().on_epoch_start(); f = self.on_epoch_start\n",
        "class Net(Base):\n    def on_epoch_start(self): super().on_epoch_start()\n",
    ],
)
def test_a_hook_is_rewritten_where_classes_below_use_it(use: str) -> None:
    code = BASE + use
    assert again(code) == code.replace("on_epoch_start", "on_train_epoch_start")
    assert not rewrite(code).notes


@pytest.mark.parametrize(
    "use",
    [
        "class Counter:\n    def on_epoch_start(self): self.on_epoch_start()\nCounter.on_epoch_start(Counter())\n",
        "def on_epoch_start(trainer, module): pass\nf(on_epoch_start=on_epoch_start)\n",
        "class Other(pl.LightningModule):\n    def on_batch_end(self, *more): pass\n",
    ],
)
def test_a_hook_is_rewritten_beside_what_has_nothing_to_do_with_it(use: str) -> None:
    assert again(BASE + use) == BASE.replace("on_epoch_start", "on_train_epoch_start") + use


@pytest.mark.parametrize(
    "body",
    [
        "def on_batch_end(self): print(1)\n    def helper(self): self.on_batch_end()",
        "def on_batch_end(self): print(1)\n    def helper(self): super().on_batch_end()",
        "def transfer_batch_to_device(self, b, device): return b\n"
        "    def f(self, b): return self.transfer_batch_to_device(b, 'cpu')",
        "def on_epoch_end(self): print(1)\n    def training_epoch_end(self, outputs): print(2)",
        "def on_train_epoch_end(self, outputs): pass\n"
        "class Net(A):\n    def on_train_epoch_end(self, unused=None): super().on_train_epoch_end(unused)",
    ],
)
def test_a_hook_whose_arguments_change_stays_where_it_is_called_otherwise(body: str) -> None:
    code = f"import leyden\nclass A(leyden.LightningModule):\n    {body}\n"
    assert again(code) == code
    assert rewrite(code).notes[0].line == 3


def test_a_hook_that_is_used_otherwise_in_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.py").write_text(BASE, encoding="utf-8")
    use = "from base import Base as B\nclass Net(B):\n    def on_epoch_start(self): B.on_epoch_start(self)\n"
    (tmp_path / "net.py").write_text(use, encoding="utf-8")
    assert main(["--write", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        f"{tmp_path / 'base.py'}:3: on_epoch_start(): it is used otherwise too (B.on_epoch_start), and stays; leyden"
        in out
    )
    assert f"{tmp_path / 'net.py'}:3: on_epoch_start()" in out
    assert (tmp_path / "net.py").read_text("utf-8") == use
    assert (tmp_path / "base.py").read_text("utf-8") == BASE


def test_other_classes_are_left_alone() -> None:
    code = "import leyden\n\n\nclass A:\n    def on_epoch_end(self):\n        self.hparams = 1\n"
    assert rewrite(code).text == code


# What has nothing to do with it

LIBRARY = sorted(path for path in Path(inspect.__file__ or "").parent.glob("*.py") if path.stat().st_size < 40_000)


@pytest.mark.parametrize(
    "path", [*LIBRARY[::17], *sorted((ROOT / "tests").glob("test_*.py"))[::5]], ids=lambda path: path.name
)
def test_other_programs_are_left_as_they_are(path: Path) -> None:
    code = path.read_bytes().decode()
    assert rewrite(code).text == code
    with_import = f"import leyden as L\n{code}"  # so that every line is looked at
    assert rewrite(with_import).text == with_import


@given(st.text(alphabet=st.sampled_from("import lightning\n\t =(),:#'\"gpus2\\é{}[]@;"), max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_is_rewritten_or_refused(code: str) -> None:
    libcst = pytest.importorskip("libcst")
    code = f"import lightning as L\n{code}"
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return
    try:
        new = rewrite(code).text
    except libcst.ParserSyntaxError:
        return
    ast.parse(new)
    assert rewrite(new).text == new


# The command

OLD = "import pytorch_lightning as pl\n\ntrainer = pl.Trainer(gpus=0)\n"
NEW = 'import leyden as pl\n\ntrainer = pl.Trainer(accelerator="cpu")\n'


def test_nothing_is_changed_without_being_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.py"
    path.write_text(OLD, encoding="utf-8")
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert path.read_text("utf-8") == OLD
    assert "-import pytorch_lightning as pl\n+import leyden as pl\n" in out
    assert f"python -m leyden.compat.migrate --write {path}" in out
    assert main(["--check", str(path)]) == 1
    assert path.read_text("utf-8") == OLD
    assert main(["--write", str(path)]) == 0
    assert path.read_text("utf-8") == NEW
    capsys.readouterr()
    assert main(["--check", str(path)]) == 0
    assert capsys.readouterr().out == "Nothing to rewrite.\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (OLD.replace("\n", "\r\n").encode(), NEW.replace("\n", "\r\n").encode()),
        (b"\xef\xbb\xbf" + OLD.encode(), b"\xef\xbb\xbf" + NEW.encode()),
        (
            f"# -*- coding: latin-1 -*-\n# é\n{OLD}".encode("latin-1"),
            f"# -*- coding: latin-1 -*-\n# é\n{NEW}".encode("latin-1"),
        ),
        (f"#!/usr/bin/env python\n{OLD}\x0c\n# é\n\tif".encode()[:-4] + b"\n\n\n  ", None),
        (OLD.encode()[:-1], NEW.encode()[:-1]),
        (b"import pytorch_lightning\n # a\n \t", b"import leyden\n # a\n \t"),
        (b"x = 1\r\nimport pytorch_lightning\ny = 2\r\n", b"x = 1\r\nimport leyden\ny = 2\r\n"),
    ],
    ids=["crlf", "mark", "latin-1", "odd", "no-newline", "blanks", "mixed"],
)
def test_bytes_stay(before: bytes, after: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(before)
    path.chmod(0o751)
    link = tmp_path / "link.py"
    link.symlink_to(path)
    assert main(["--write", str(link)]) == 0
    new = before.replace(OLD.encode(), NEW.encode()) if after is None else after
    assert path.read_bytes() == new
    assert path.stat().st_mode & 0o777 == 0o751
    assert link.is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.py", "link.py"]


def test_a_file_that_cannot_be_parsed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = {"good.py": OLD, "python2.py": "import pytorch_lightning\nprint 'x'\n", "plain.py": "print 'x'\n"}
    for name, code in contents.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "bytes.py").write_bytes(b"import pytorch_lightning # \xff\n")
    assert main(["--write", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'python2.py'}: cannot be rewritten" in error
    assert f"{tmp_path / 'bytes.py'}: cannot be read" in error
    assert "plain.py" not in error
    assert (tmp_path / "python2.py").read_text("utf-8") == contents["python2.py"]
    assert (tmp_path / "good.py").read_text("utf-8") == NEW


def test_a_write_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.py"
    path.write_text(OLD, encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    assert main(["--write", str(path)]) == 1
    assert path.read_text("utf-8") == OLD
    assert os.listdir(tmp_path) == ["a.py"]


def test_line_ends_that_cannot_be_kept_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(OLD.replace("\n", "\r").encode())
    assert main(["--write", str(path)]) == 1
    assert "line ends" in capsys.readouterr().err
    assert b"pytorch_lightning" in path.read_bytes()


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "There is no" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "libcst", None)
    assert main([str(tmp_path)]) == 2
    assert "pip install 'leyden[migrate]'" in capsys.readouterr().err


def test_notebooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cell(kind: str, source: Any) -> dict[str, Any]:
        return {"cell_type": kind, "metadata": {}, "source": source}

    document = {
        "cells": [
            cell("markdown", ["import pytorch_lightning as pl\n"]),
            cell("code", ["%matplotlib inline\n", "!pip install é\n", "import pytorch_lightning as pl"]),
            cell("code", ["%%bash\n", "import pytorch_lightning as pl"]),
            cell(
                "code", "if True:\n    %time pl.Trainer(gpus=0)\n    pl.Trainer(gpus=n)\ntrainer = pl.Trainer(gpus=0)\n"
            ),
        ],
        "nbformat": 4,
    }
    path = tmp_path / "a.ipynb"
    before = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    path.write_text(before, encoding="utf-8")
    assert main(["--write", str(path)]) == 0
    after = before.replace('inline\\n",\n    "!pip', 'inline\\n",\n    "!pip')
    first, second = after.split("%%bash")
    first = first[: first.index('"code"')] + first[first.index('"code"') :].replace("pytorch_lightning", "leyden")
    second = second.replace("trainer = pl.Trainer(gpus=0)", 'trainer = pl.Trainer(accelerator=\\"cpu\\")')
    assert path.read_text("utf-8") == f"{first}%%bash{second}"
    assert f"{path}:cell 3:3: gpus=n" in capsys.readouterr().out
    assert main(["--check", str(path)]) == 0
    path.write_text("{}", encoding="utf-8")
    assert main([str(path)]) == 1


def notebook(path: Path, *cells: str) -> str:
    each = [{"cell_type": "code", "metadata": {}, "source": cell} for cell in cells]
    path.write_text(json.dumps({"cells": each, "nbformat": 4}, indent=1) + "\n", encoding="utf-8")
    return path.read_text("utf-8")


def test_lines_for_ipython(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ipynb"
    cells = [
        "%%time\nimport pytorch_lightning as pl\n!pip install \\\n    torch \\\n\t--quiet\nx = !ls\nd['=%s'], e = !ls",
        "if x:\n    !pip install pytorch_lightning\nfiles = %who_ls\npl.Trainer??\n?x\nx['a'].b ?\nawait x",
        'a = ("%d"\n%who\n)\nb = """\n!ls\nwhat?\n""" \\\n% 3\nt = pl.Trainer(gpus=0)  # why?',
    ]
    before = notebook(path, *cells)
    assert main(["--write", str(path)]) == 0
    assert "leyden-keeps" not in capsys.readouterr().out
    after = before.replace("import pytorch_lightning as", "import leyden as").replace("gpus=0", 'accelerator=\\"cpu\\"')
    assert path.read_text("utf-8") == after


def test_a_name_that_a_line_for_ipython_uses_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    before = notebook(path, "import lightning\n!pip install lightning.x", "%time lightning.Trainer()\nx = [lightning]")
    assert main(["--write", str(path)]) == 0
    assert path.read_text("utf-8") == before.replace("import lightning", "import leyden as lightning")


@pytest.mark.parametrize("wrong", ["x = 1\nprint 'a'", "a ? b"])
def test_a_cell_that_cannot_be_parsed_is_named(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ipynb"
    before = notebook(path, "import lightning", "x = 1", wrong)
    assert main(["--write", str(path)]) == 1
    assert f"{path}:cell 2: cannot be rewritten" in capsys.readouterr().err
    assert path.read_text("utf-8") == before


def test_torch_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(OLD, encoding="utf-8")
    code = "import sys; from leyden.compat.migrate.__main__ import main; main(['a.py']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.endswith("\nFalse\n")


def test_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "migrate.md").read_text("utf-8")
    program, shown = (
        re.search(rf"^```{kind}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]  # type: ignore[index]
        for kind in ("python", "diff")
    )
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    commands = re.findall(r"^(?:\$ )?(python -m leyden\.compat\.migrate .*?)(?:  +#.*)?$", page, re.MULTILINE)
    assert len(commands) == 3
    outputs = []
    for command in commands:
        words = [sys.executable, *command.split()[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert not done.stderr, done.stderr
        outputs.append((done.returncode, done.stdout))
    assert outputs[0] == (0, shown)
    assert outputs[1][0] == 1  # --check, before
    assert outputs[2][0] == 0
    assert outputs[2][1].endswith("Rewritten: 1 file.\n")
