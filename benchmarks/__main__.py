"""The benchmarks by name: `python -m benchmarks cpu`, `gpu`, `model`, `toy`, `memory`, `alignment`, `recording`, `page`
or `pronounce`.

`-h` after a name says more.
"""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("cpu", "gpu", "model", "toy", "memory", "alignment", "recording", "page", "pronounce")


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        print(f"usage: python -m benchmarks {{{','.join(NAMES)}}} ...", file=sys.stderr)
        return 2
    sys.argv[:2] = [f"python -m benchmarks {name}"]
    return import_module(f"benchmarks.{name}").main() or 0


if __name__ == "__main__":
    sys.exit(main())
