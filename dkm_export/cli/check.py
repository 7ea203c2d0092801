"""check an export: palettes bit for bit, every runtime against PyTorch, the task's metric"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dkm_export.cli.data import add_data_arguments, task_data
from dkm_export.cli.terminal import Terminal, ratio
from dkm_export.errors import ExitCode, InvalidInput

if TYPE_CHECKING:
    from dkm_export.checking.report import Report, RuntimeReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dkm check``."""
    parser.add_argument(
        "path", type=Path, metavar="OUT|ARTIFACT", help="an export's folder, or a file in it"
    )
    parser.add_argument(
        "--runtime", action="append", default=[], metavar="R[,R]", help="use only these"
    )
    parser.add_argument(
        "--require", action="append", default=[], metavar="R[,R]", help="exit 4 unless these run"
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="D[:ADDRESS]",
        help="run on this device too, and exit 4 unless it ran: adb for the only Android device, "
        "or adb:SERIAL; may be given several times",
    )
    parser.add_argument(
        "--device-runner",
        type=Path,
        metavar="FILE",
        help="the program that runs artifacts there, built for these devices, such as dkm_runner",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="fail when the task's metric fell by more during compression",
    )
    add_data_arguments(parser)
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write a JUnit XML report")
    parser.add_argument(
        "--device-test",
        type=Path,
        metavar="FOLDER",
        help="when no check fails, write a test with samples and limits that an app's own tests "
        "run on the device: an XCTest for Core ML",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing report and device test"
    )


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm check``."""
    from dkm_export.checking.check import check
    from dkm_export.checking.device import make_device_tests, write_device_tests
    from dkm_export.checking.junit import junit_xml
    from dkm_export.files import MANIFEST, require_replaceable, staged

    for output, kind in ((options.junit, "file"), (options.device_test, "folder")):
        if output is None:
            continue
        if any((folder / MANIFEST).is_file() for folder in output.resolve().parents):
            raise InvalidInput(f"{output} lies in an export: name a {kind} outside of it")
        require_replaceable(
            output, force=options.force, folder=kind == "folder", sources=[options.path]
        )
    runtimes = _names(options.runtime)
    device_tests = make_device_tests(options.path, runtimes) if options.device_test else {}
    report = check(
        options.path,
        runtimes=runtimes,
        required=_names(options.require),
        devices=options.device,
        device_runner=options.device_runner,
        max_drop=options.max_drop,
        data=task_data(options),
        progress=terminal.progress,
        verbose=terminal.verbose,
    )
    if options.junit:
        with staged(options.junit, force=options.force) as file:
            file.write_bytes(junit_xml(report))
    if options.device_test and report.exit_code is ExitCode.GATE:
        terminal.progress("no device test is written, because a check failed")
    elif options.device_test:
        write_device_tests(device_tests, options.device_test, force=options.force)
        terminal.progress(f"device test: {options.device_test}")
    if terminal.json:
        terminal.result(report.to_json())
    else:
        _print(report, terminal)
    return report.exit_code


def _names(values: list[str]) -> list[str]:
    return [name for value in values for name in value.split(",")]


def _print(report: Report, terminal: Terminal) -> None:
    runtimes = _merged(report.runtimes)
    suites = report.model_copy(update={"runtimes": runtimes}).suites
    width = max(len(owner) for owner, _ in suites)
    for owner, findings in suites:
        for finding in findings:
            terminal.print(
                f"{finding.status:<8} {owner:<{width}} {finding.check:<17} {finding.message}"
            )
    for artifact in report.artifacts:
        for note in artifact.notes:
            terminal.print(f"note     {artifact.target:<{width}} {note}")
    terminal.print()
    metric = report.metric_name or "metric"
    pytorch = [_figure(report.metrics.get(name)) for name in ("fp32", "hard")]
    artifacts = {artifact.target: artifact for artifact in report.artifacts}
    rows = []
    for runtime in runtimes:
        artifact = artifacts[runtime.target]
        errors = [f"{fidelity.relative_l2:.1e}" for fidelity in runtime.fidelity.values()]
        rows.append(
            (
                runtime.target,
                artifact.path,
                f"{artifact.bytes:,}",
                ratio(report.fp32_bytes, artifact.bytes),
                *pytorch,
                _figure(runtime.metric),
                max(errors, key=float, default="-"),
                runtime.status,
                f"{runtime.runtime} ({runtime.where})",
            )
        )
    terminal.table(
        f"{report.name}: {metric} of PyTorch before and after compression, and of each runtime",
        (
            "target",
            "file",
            "bytes",
            "ratio",
            "fp32",
            "palettized",
            "on runtime",
            "rel. L2",
            "status",
            "runtime",
        ),
        rows,
    )
    for line in report.missing:
        terminal.print(f"not done: {line}")
    terminal.print(
        "passed" if report.exit_code is ExitCode.OK else f"exit code {int(report.exit_code)}"
    )


def _merged(runtimes: Sequence[RuntimeReport]) -> list[RuntimeReport]:
    """One report for runtimes of a target that did not run for the same reason, with all names."""
    groups: dict[object, list[RuntimeReport]] = {}
    for runtime in runtimes:
        idle = runtime.status == "not_run"
        key = (runtime.target, runtime.findings) if idle else runtime.runtime
        groups.setdefault(key, []).append(runtime)
    return [
        group[0].model_copy(update={"runtime": ", ".join(runtime.runtime for runtime in group)})
        for group in groups.values()
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
