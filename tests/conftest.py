"""What every test shares."""

from __future__ import annotations

import os

# Small tensors gain nothing from threads, and two test runs on one machine would wait for each other's.
# Set before torch is imported, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
