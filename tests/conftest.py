"""What every test shares."""

from __future__ import annotations

import os
import signal

# Small tensors gain nothing from threads, and two test runs on one machine would wait for each other's.
# Set before torch is imported, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job starts with SIGINT ignored, and the programs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
