"""``python -m benchmarks``: the benchmark. The other commands go by their name: ``python -m benchmarks numerics``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = ("numerics", "report", "inspect", "features")

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces each of its runs on stderr


def main(arguments: Sequence[str]) -> int:
    """Runs the command named first, else the benchmark itself; returns its exit status."""
    command, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in COMMANDS else ("run", arguments)
    status: int = importlib.import_module(f"benchmarks.{command}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
