"""Keep what libraries print off the user's screen."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dkm_export.errors import DkmWarning


@contextmanager
def quiet(*, enabled: bool = True) -> Iterator[None]:
    """Swallow stdout and stderr of Python and native code, and Python's warnings but our own.

    Our own are given at the end, unless there is an exception, which has a message of its own.

    Converters and runtimes write from C++ straight to the file descriptors, where neither
    `contextlib.redirect_stdout` nor `logging` reaches.
    """
    if not enabled:
        yield
        return
    _flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with tempfile.TemporaryFile() as sink, warnings.catch_warnings(record=True) as own:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", DkmWarning)
            for descriptor in (1, 2):
                os.dup2(sink.fileno(), descriptor)
            yield
    finally:
        _flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
    for warning in own:
        warnings.warn(warning.message, stacklevel=3)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
