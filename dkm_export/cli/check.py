"""check an export: palettes bit for bit, every runtime against PyTorch, the task's metric"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dkm_export.cli.data import add_data_arguments, task_data
from dkm_export.cli.terminal import Terminal, ratio
from dkm_export.errors import DkmError, ExitCode, InvalidInput

if TYPE_CHECKING:
    from dkm_export.checking.gates import GateSettings
    from dkm_export.checking.report import Report


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
        "--max-bytes",
        action="append",
        default=[],
        metavar="[TARGET=]SIZE",
        help="fail when an artifact is larger: 3.3MB, or onnx=800kB for one target",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="fail when the task's metric fell by more during compression",
    )
    parser.add_argument(
        "--gates",
        type=Path,
        metavar="FILE",
        help="a TOML file of limits, max_bytes, max_drop and require; options win over it, and "
        "--require adds to it",
    )
    add_data_arguments(parser)
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write a JUnit XML report")
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FILE",
        help="append a Markdown report, as to the file that $GITHUB_STEP_SUMMARY names",
    )
    parser.add_argument(
        "--format",
        choices=("text", "github", "xcode"),
        default="text",
        help="what to print: tables, workflow commands of GitHub, or diagnostics of Xcode",
    )
    parser.add_argument(
        "--schema", action=_PrintSchema, help="print the JSON Schema of what --json prints"
    )
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


class _PrintSchema(argparse.Action):
    """Prints and exits, as ``--version`` does."""

    def __init__(self, option_strings: list[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        file = resources.files("dkm_export.checking") / "report.schema.json"
        print(file.read_text(), end="")
        parser.exit()


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm check``."""
    if options.format == "text":
        return _run(options, terminal)
    if terminal.json:
        raise InvalidInput(f"--json and --format {options.format} both print on stdout: choose one")
    from dkm_export.checking.diagnostics import FORMATS, Diagnostic

    try:
        return _run(options, terminal)
    except DkmError as error:
        line = Diagnostic("error", options.path.resolve(), "check", str(error))
        terminal.print(FORMATS[options.format](line))
        raise


def _run(options: argparse.Namespace, terminal: Terminal) -> int:
    from dkm_export.checking.check import check
    from dkm_export.checking.device import make_device_tests, write_device_tests
    from dkm_export.checking.gates import Gates, GateSettings, load_gates
    from dkm_export.checking.junit import junit_xml
    from dkm_export.checking.summary import summary
    from dkm_export.files import staged

    _require_outputs(options)
    runtimes = _names(options.runtime)
    stored = load_gates(options.gates) if options.gates else GateSettings()
    flags = _flags(options)
    gates = Gates()
    if options.gates:
        gates = gates.changed(stored, options.gates.name)
    gates = gates.changed(flags, "command line")
    device_tests = {}
    if options.device_test:
        device_tests = make_device_tests(options.path, runtimes, gates.limits)
    report = check(
        options.path,
        runtimes=runtimes,
        required=list(dict.fromkeys((*stored.require, *flags.require))),
        devices=options.device,
        device_runner=options.device_runner,
        gates=gates,
        data=task_data(options),
        progress=terminal.progress,
        verbose=terminal.verbose,
    )
    if options.junit:
        with staged(options.junit, force=options.force) as file:
            file.write_bytes(junit_xml(report))
    if options.summary:
        options.summary.parent.mkdir(parents=True, exist_ok=True)
        with options.summary.open("a", encoding="utf-8") as stream:
            stream.write(summary(report))
    if options.device_test and report.exit_code is ExitCode.GATE:
        terminal.progress("no device test is written, because a check failed")
    elif options.device_test:
        write_device_tests(device_tests, options.device_test, force=options.force)
        terminal.progress(f"device test: {options.device_test}")
    if terminal.json:
        terminal.result(report.to_json())
    elif options.format == "text":
        _print(report, terminal)
    else:
        _print_diagnostics(report, options, terminal)
    return report.exit_code


def _require_outputs(options: argparse.Namespace) -> None:
    """Refuse outputs before the work that they are for."""
    from dkm_export.files import MANIFEST, require_replaceable

    outputs = {"junit": "file", "summary": "file", "device_test": "folder"}
    for name, kind in outputs.items():
        output: Path | None = getattr(options, name)
        if output is None:
            continue
        if any((folder / MANIFEST).is_file() for folder in output.resolve().parents):
            raise InvalidInput(f"{output} lies in an export: name a {kind} outside of it")
        if name == "summary":  # which is appended to what is there
            if output.is_dir():
                raise InvalidInput(f"{output} is a folder: name a file to append to")
            continue
        require_replaceable(
            output, force=options.force, folder=kind == "folder", sources=[options.path]
        )


def _flags(options: argparse.Namespace) -> GateSettings:
    """The gates of the command line."""
    from dkm_export.checking.gates import ALL, parse_gates

    sizes = {}
    for text in options.max_bytes:
        target, equals, size = text.rpartition("=")
        sizes[target if equals else ALL] = size
    data = {"max_bytes": sizes, "require": _names(options.require)}
    if options.max_drop is not None:
        data["max_drop"] = options.max_drop
    return parse_gates(data, "command line")


def _names(values: list[str]) -> list[str]:
    return [name for value in values for name in value.split(",")]


def _print(report: Report, terminal: Terminal) -> None:
    from dkm_export.checking.report import merged

    runtimes = merged(report.runtimes)
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


def _print_diagnostics(report: Report, options: argparse.Namespace, terminal: Terminal) -> None:
    from dkm_export.checking.check import locate
    from dkm_export.checking.diagnostics import FORMATS, diagnostics

    root, _, _ = locate(options.path)
    for line in diagnostics(report, root):
        terminal.print(FORMATS[options.format](line))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
