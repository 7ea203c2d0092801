"""Where a task's data are on this machine: the options of verbs that load a checkpoint's task."""

from __future__ import annotations

import argparse
from typing import Any

from dkm_export.errors import InvalidInput


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """``--data`` and ``--no-data``."""
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the task that is another one here, such as root=/data/imagenet",
    )
    data.add_argument(
        "--no-data", action="store_true", help="without the task: random samples and no metric"
    )


def task_data(options: argparse.Namespace) -> dict[str, Any] | None:
    """What `ModelSource.load_task` takes.

    Raises:
        InvalidInput: when a setting has no key or names a part of an argument.
    """
    from dkm_export.settings import parse_setting

    if options.no_data:
        return None
    data = {}
    for text in options.data:
        path, value = parse_setting(text)
        if len(path) != 1:
            raise InvalidInput(f"'{text}' is no argument of a task: write key=value")
        data[path[0]] = value
    return data
