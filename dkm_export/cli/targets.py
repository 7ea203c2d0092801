"""list targets and runtimes, what they can do, and why one is missing"""

from __future__ import annotations

import argparse
from typing import Any

from dkm_export.checking.runtime import Runtime
from dkm_export.cli.terminal import Terminal
from dkm_export.errors import ExitCode
from dkm_export.exporting.exporter import Exporter
from dkm_export.plugins import EXPORTERS, RUNTIMES, discover


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``dkm targets`` takes none of its own."""


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm targets``."""
    exporters: list[Exporter[Any]] = list(discover(EXPORTERS).values())
    runtimes: list[Runtime] = list(discover(RUNTIMES).values())
    if terminal.json:
        terminal.result(
            {
                "targets": [_target(exporter) for exporter in exporters],
                "runtimes": [_runtime(runtime) for runtime in runtimes],
            }
        )
        return ExitCode.OK
    terminal.table(
        "targets",
        ("target", "bits", "dim", "axis", "groups", "rest", "here"),
        [
            (
                exporter.target,
                " ".join(map(str, exporter.capabilities.bits)),
                f"1-{exporter.capabilities.max_dim}",
                "any"
                if exporter.capabilities.axes is None
                else " ".join(map(str, exporter.capabilities.axes)),
                "yes" if exporter.capabilities.groups else "no",
                "padded" if exporter.capabilities.padding else "refused",
                exporter.unavailable() or "yes",
            )
            for exporter in exporters
        ],
    )
    terminal.print("rest: where dim does not divide its axis")
    for exporter in exporters:
        if exporter.options.model_fields:
            names = ", ".join(exporter.options.model_fields)
            terminal.print(f"{exporter.target}, --set {exporter.target}.<option>=<value>: {names}")
    terminal.print()
    terminal.table(
        "runtimes",
        ("runtime", "target", "how it runs", "here"),
        [
            (
                runtime.name,
                runtime.target,
                runtime.where,
                runtime.unavailable() or ("when it is named" if runtime.only_named else "yes"),
            )
            for runtime in runtimes
        ],
    )
    return ExitCode.OK


def _target(exporter: Exporter[Any]) -> dict[str, Any]:
    capabilities = exporter.capabilities
    return {
        "target": exporter.target,
        "bits": list(capabilities.bits),
        "max_dim": capabilities.max_dim,
        "axes": None if capabilities.axes is None else list(capabilities.axes),
        "groups": capabilities.groups,
        "padding": capabilities.padding,
        "options": list(exporter.options.model_fields),
        "unavailable": exporter.unavailable(),
    }


def _runtime(runtime: Runtime) -> dict[str, Any]:
    return {
        "runtime": runtime.name,
        "target": runtime.target,
        "where": runtime.where,
        "unavailable": runtime.unavailable(),
        "only_named": runtime.only_named,
    }
