"""``python -m dkm_exporters.executorch.expand WEIGHTS.lut OUT.ptd``: what an app does once.

Does in Python what ``dkm_expand`` does, and verifies more: ExecuTorch has to make the same head.
Exits with 0, with 1 after one line of stderr, or with 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dkm_export.errors import DkmError
from dkm_export.files import require_replaceable
from dkm_export.quiet import quiet


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dkm_exporters.executorch.expand",
        description="Expand the packed weights of an ExecuTorch program to the .ptd it takes.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS.lut")
    parser.add_argument("output", type=Path, metavar="OUT.ptd")
    parser.add_argument("--force", action="store_true", help="replace an earlier OUT.ptd")
    arguments = parser.parse_args(words)
    packed, output, force = arguments.weights, arguments.output, arguments.force
    try:
        require_replaceable(output, force=force, sources=[packed])
        with quiet():
            from dkm_exporters.executorch.weights_file import WeightsFile

            WeightsFile.read(packed).expand(output, force=force)
    except DkmError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{output}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
