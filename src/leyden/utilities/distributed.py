"""What concerns the first process alone, at the place where programs of 2020 and 2021 import it from."""

from __future__ import annotations

from leyden.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["rank_zero_deprecation", "rank_zero_info", "rank_zero_only", "rank_zero_warn"]
