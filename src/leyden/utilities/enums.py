"""Words with a fixed set of values. Each is a string, and the Trainer takes it as one."""

from __future__ import annotations

import enum


class LightningEnum(enum.StrEnum):
    """Base of such words: equal to its string."""


class GradClipAlgorithmType(LightningEnum):
    """What ``gradient_clip_algorithm`` may be."""

    VALUE = "value"
    NORM = "norm"
