"""The ``dkm`` program: parses arguments, runs a verb, turns errors into exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dkm_export import __version__
from dkm_export.cli import check, compress, export, inspect, plan, report, runtimes, targets
from dkm_export.cli.terminal import Terminal
from dkm_export.errors import DkmError, ExitCode, InvalidInput

_INTERRUPTED = 130
_VERBS = (compress, plan, export, check, inspect, report, targets, runtimes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dkm`` with ``arguments`` (those of the process by default); returns the exit code."""
    _open_closed_streams()
    _end_cleanly()
    arguments = sys.argv[1:] if arguments is None else arguments
    terminal = Terminal(json="--json" in arguments)
    try:
        options = _parser().parse_args(arguments)
        terminal = Terminal(json=options.json, quiet=options.quiet, verbose=options.verbose)
        with terminal.own_warnings():
            return int(options.run(options, terminal))
    except DkmError as error:
        if terminal.verbose:
            traceback.print_exc()
        terminal.error(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        terminal.error("interrupted", _INTERRUPTED)
        return _INTERRUPTED
    except OSError as error:
        if terminal.verbose:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        terminal.error(f"{where}{error.strerror or error}", ExitCode.USAGE)
        return ExitCode.USAGE
    except Exception as error:
        traceback.print_exc()
        terminal.error(f"internal error, please report it: {error}", ExitCode.INTERNAL)
        return ExitCode.INTERNAL


class _Parser(argparse.ArgumentParser):
    """Raises its errors like all others, so that ``--json`` prints them too."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{message}: see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    volume = common.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="no progress")
    volume.add_argument(
        "-v", "--verbose", action="store_true", help="what libraries print, and tracebacks"
    )
    parser = _Parser(
        prog="dkm",
        description="Palettize PyTorch models with differentiable k-means, export them to "
        "Core ML, ONNX and ExecuTorch, and check every artifact.",
        epilog="exit codes: 0 ok, 1 internal error, 2 wrong usage or input, 3 an artifact failed "
        "a check, 4 a target or runtime cannot do it or is not installed",
    )
    parser.add_argument("--version", action="version", version=f"dkm {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for verb in _VERBS:
        name = verb.__name__.rpartition(".")[2]
        summary = (verb.__doc__ or "").strip()
        subparser = verbs.add_parser(
            name, parents=[common], help=summary, description=summary, allow_abbrev=False
        )
        verb.add_arguments(subparser)
        subparser.set_defaults(run=verb.run)
    return parser


def _end_cleanly() -> None:
    """End on SIGTERM and SIGHUP as on Ctrl-C: a build that is given up leaves no half output."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _open_closed_streams() -> None:
    """Give a process that was started without stdout or stderr something to write to."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(descriptor, "w"))
