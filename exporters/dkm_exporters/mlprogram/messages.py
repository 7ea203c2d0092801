"""What coremltools says about a model while it converts it, without what is not about the model."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import coremltools as ct

from dkm_export.errors import DkmWarning

_ROOT: Final = Path(ct.__file__).parent

_CATEGORIES: Final = (UserWarning, RuntimeWarning)
"""Of Python's warnings. The others are about code, such as a function that will go."""

_HARMLESS: Final = re.compile(
    "|".join(
        (
            # about arguments that only matter for gradients, such as padding_idx
            r"embedding \(gather\) layer does not support any inputs besides",
            # said of every int64 array, whatever its values are
            r"Saving value type of int64 into a builtin type of int32",
            # An operation with a constant beyond float16 stays float32. Only constants beyond 1e38
            # are cast, which stand for no bound at all.
            r"overflow encountered in cast",
            # an optimization that is left out
            r"is skipped in const elimination pass",
            # becomes an error later
            r"has been renamed to",
        )
    )
)


@contextmanager
def model_warnings(target: str) -> Iterator[None]:
    """Give what coremltools logs or warns of as a `DkmWarning` of one line, at the end.

    Libraries' warnings about themselves and what is known to be harmless are dropped. After an
    exception, nothing is given: it has a message of its own.

    Args:
        target: whose warning it is.
    """
    logged = _Listener(logging.WARNING)
    logger = logging.getLogger("coremltools")
    logger.addHandler(logged)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("ignore")
            for category in _CATEGORIES:
                warnings.simplefilter("always", category)
            yield
    finally:
        logger.removeHandler(logged)
    said = [str(entry.message) for entry in warned if Path(entry.filename).is_relative_to(_ROOT)]
    lines = dict.fromkeys(" ".join(text.split()) for text in (*logged.texts, *said))
    for line in lines:
        if not _HARMLESS.search(line):
            warnings.warn(f"{target}: coremltools says: {line}", DkmWarning, stacklevel=3)


class _Listener(logging.Handler):
    """Keeps the texts of what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
