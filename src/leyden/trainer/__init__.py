"""The Trainer: `trainer` has the arguments and the verbs, `view` what may be read of it, `requests` what may be asked of it."""

from leyden.seed import seed_everything
from leyden.trainer.trainer import Trainer

__all__ = ["Trainer", "seed_everything"]
