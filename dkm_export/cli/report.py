"""write what is known of a palettized model as one page, HTML or Markdown"""

from __future__ import annotations

import argparse
from pathlib import Path

from dkm_export.cli.terminal import Terminal, size
from dkm_export.errors import ExitCode, InvalidInput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``dkm report``."""
    parser.add_argument(
        "path", type=Path, metavar="RUN|OUT", help="folder of `dkm compress` or of `dkm export`"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="page to write, .html or .md",
    )
    parser.add_argument(
        "--run",
        dest="training",  # `run` is the verb's function
        type=Path,
        metavar="RUN",
        help="folder of `dkm compress` that an export was made of: what the training measured",
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="what `dkm check --json` printed"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="what `dkm plan --json` printed")
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PATTERN",
        help="show the weights of these layers, such as 'features.*', instead of the largest; "
        "may be given several times",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``dkm report``."""
    output: Path = options.output
    if output.suffix not in (".html", ".md"):
        raise InvalidInput(f"-o {output}: name a file that ends in .html or .md")
    from dkm_export.files import require_replaceable, sha256, staged
    from dkm_export.reporting.content import gather
    from dkm_export.reporting.html import html
    from dkm_export.reporting.markdown import markdown
    from dkm_export.reporting.sources import read_sources

    require_replaceable(output, force=options.force)
    sources = read_sources(
        options.path, run=options.training, check=options.check, plan=options.plan
    )
    content = gather(sources, options.layer)
    text = (html if output.suffix == ".html" else markdown)(content)
    with staged(output, force=options.force) as file:
        file.write_text(text, encoding="utf-8", newline="\n")
    missing = {entry.what: entry.how for entry in content.missing}
    if terminal.json:
        terminal.result(
            {
                "output": str(output),
                "bytes": output.stat().st_size,
                "sha256": sha256(output),
                "missing": missing,
            }
        )
        return ExitCode.OK
    terminal.print(f"report: {output}, {size(output.stat().st_size)}")
    for what, how in missing.items():
        terminal.print(f"not in it: {what}: {how}")
    return ExitCode.OK
