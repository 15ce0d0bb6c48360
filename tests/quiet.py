"""A Trainer that trains and does nothing else, for tests that are not about the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import leyden as L


def make_trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **(settings | options))
