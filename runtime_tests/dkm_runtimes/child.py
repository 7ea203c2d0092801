"""A process that runs artifacts for us, and what to say when it is gone."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from dkm_export.errors import InvalidInput, Unsupported

_PATIENCE = 600
"""Seconds that one inference may take; then the process is killed, which ends the wait."""


class TooSlow(InvalidInput):
    """A process that took longer to answer than it had time."""


class Child:
    """The process ends with this object, and by itself when Python is gone.

    Args:
        name: what messages call it.
        command: the program and its arguments.

    Attributes:
        end: ends the process now; for when an error is raised, whose traceback keeps this object.

    Raises:
        Unsupported: when it does not start.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._late = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 a pipe that nobody reads would fill up
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        except OSError as error:
            raise Unsupported(f"{name} does not start: {error.strerror}") from error
        self.end = weakref.finalize(self, _end, self._process, self._log)

    def write(self, *parts: bytes) -> None:
        """Send bytes.

        Raises:
            InvalidInput: when the process is gone.
        """
        stdin = self._process.stdin
        assert stdin is not None
        try:
            for part in parts:
                stdin.write(part)
            stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def read(self, count: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            InvalidInput: when the process is gone before.
        """
        data = self._stdout.read(count)
        if len(data) < count:
            raise self._ended()
        return data

    def read_line(self) -> bytes:
        """A line.

        Raises:
            InvalidInput: when the process is gone before its end.
        """
        line = self._stdout.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        return line

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within it, the process has its time to answer; then it is killed."""
        watchdog = threading.Timer(_PATIENCE, self._give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            watchdog.join()  # its thread refers to this object

    def _give_up(self) -> None:
        self._late = True
        self._process.kill()

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _ended(self) -> InvalidInput:
        """The error for a process that is gone, with the last that it said."""
        code = self._process.wait()
        if self._late:
            return TooSlow(f"{self._name} did not answer within {_PATIENCE} seconds")
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
        return InvalidInput(f"{self._name} ended with code {code}{last}")


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, log):
        assert stream is not None
        try:
            stream.close()
        except OSError:  # unsent bytes, to a process that is gone
            continue
