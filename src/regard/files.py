"""Files that are written whole or not at all, and their sizes in words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once all is written."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(size: int | str, name: str = "budget") -> int:
    """A number of bytes, from one or from words such as "1GB", "1.5 GiB" or "500 kB"; ValueError naming the argument.

    >>> parse_bytes("1.5 MB"), parse_bytes("32 MiB"), parse_bytes(1000)
    (1500000, 33554432, 1000)
    """
    said = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if isinstance(size, bool) or said is None or said[2].upper() not in _UNITS:
        raise ValueError(
            f'{name} is {size!r}; a number of bytes fits, such as 10**9, or words such as "1GB" or "500 kB"'
        )
    return int(float(said[1]) * _UNITS[said[2].upper()])
