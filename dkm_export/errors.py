"""The errors a user can meet, and the exit code each one gives to a build pipeline.

Every message is one line that says what is wrong, where (layer, key or file), what is
allowed and what to do about it.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the ``dkm`` program; build pipelines may rely on them."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    GATE = 3
    UNSUPPORTED = 4


class DkmWarning(UserWarning):
    """What a user should know though the work goes on; one line, like an error."""


class DkmError(Exception):
    """Base of all errors that dkm-export raises on purpose."""

    exit_code = ExitCode.INTERNAL


class InvalidInput(DkmError):
    """A recipe, checkpoint, path, factory or option is not what it has to be."""

    exit_code = ExitCode.USAGE


class GateFailed(DkmError):
    """An artifact does not hold what its checkpoint holds."""

    exit_code = ExitCode.GATE


class Unsupported(DkmError):
    """The target or runtime cannot do what was asked, or is not installed here."""

    exit_code = ExitCode.UNSUPPORTED
