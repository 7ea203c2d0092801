"""install runtimes that are downloaded on request, or remove them"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dkm_export.checking.runtime import InstallableRuntime, Runtime
from dkm_export.cli.terminal import Terminal
from dkm_export.errors import ExitCode, InvalidInput
from dkm_export.plugins import RUNTIMES, discover, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dkm runtimes``."""
    parser.add_argument(
        "action",
        choices=("install", "remove"),
        metavar="install|remove",
        help="download into the user's cache folder, or delete from there",
    )
    parser.add_argument(
        "names", nargs="+", metavar="R", help="a runtime that `dkm targets` says to install so"
    )


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm runtimes``."""
    results = []
    for runtime in _installable(options.names):
        folder = runtime.installation.folder
        if options.action == "install":
            runtime.install(terminal.progress)
            line = f"{runtime.name} {runtime.version} is in {folder}"
        elif runtime.installation.remove():
            line = f"{runtime.name} is removed"
        else:
            line = f"{runtime.name} was not installed"
        results.append(
            {
                "runtime": runtime.name,
                "version": runtime.version,
                "folder": str(folder),
                "installed": options.action == "install",
            }
        )
        if not terminal.json:
            terminal.print(line)
    if terminal.json:
        terminal.result({"runtimes": results})
    return ExitCode.OK


def _installable(names: Sequence[str]) -> list[InstallableRuntime]:
    """The runtimes of these names.

    Raises:
        InvalidInput: for a name that no runtime has, or one that is not installed so.
    """
    known: dict[str, Runtime] = discover(RUNTIMES)
    allowed = [name for name, runtime in known.items() if isinstance(runtime, InstallableRuntime)]
    chosen = []
    for runtime in select(known, names, "runtime"):
        if not isinstance(runtime, InstallableRuntime):
            raise InvalidInput(
                f"runtime '{runtime.name}' is not one that dkm downloads: choose from "
                f"{', '.join(allowed)}, and see `dkm targets` for what the others need"
            )
        chosen.append(runtime)
    return chosen
