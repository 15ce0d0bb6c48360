"""Files, at the place where programs of 2020 to 2022 import functions for them from: what they are today."""

from __future__ import annotations

from leyden.errors import no_such_name

__all__: list[str] = []


def __getattr__(name: str) -> object:
    absent = {
        "load": "leyden.load_checkpoint(path), which reads files of Lightning too",
        "get_filesystem": "fsspec.core.url_to_fs(path)[0]",
        "atomic_save": "trainer.save_checkpoint(path), which is atomic",
    }
    return no_such_name(__name__, name, absent)
