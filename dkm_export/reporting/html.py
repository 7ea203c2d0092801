"""A report as one HTML file: style and figures inside, no script, nothing to load."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from dkm_export.errors import ExitCode
from dkm_export.reporting import tables
from dkm_export.reporting.axes import size
from dkm_export.reporting.content import Content, ran
from dkm_export.reporting.elements import fold, prose, section, table
from dkm_export.reporting.markup import Markup, tag
from dkm_export.reporting.sections import (
    accuracy_section,
    fidelity_section,
    front_section,
    layer_section,
    target_section,
    weight_section,
)
from dkm_export.reporting.wording import lede

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def html(content: Content) -> str:
    """The report; the same content gives the same text."""
    style = (resources.files("dkm_export.reporting") / "style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        # an empty icon, or a browser asks the server for one
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{content.name}: palettization report"),
        tag("style", Markup(style)),
    )
    body = tag(
        "main",
        _header(content),
        target_section(content),
        layer_section(content),
        accuracy_section(content.metrics, content.metric_name) if content.metrics else None,
        front_section(content.plan, content.deviations) if content.plan else None,
        fidelity_section(content.check) if content.check else None,
        weight_section(content.shown),
        _environment(content),
        tag("footer", f"Written by dkm-export {content.tool_version}."),
    )
    page = tag("html", head, tag("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _header(content: Content) -> Markup:
    return tag(
        "header",
        tag("p", "Palettization report", class_="kind"),
        tag("h1", content.name),
        tag("p", lede(content), class_="lede"),
        _facts(content),
        _absent(content),
    )


def _facts(content: Content) -> Markup:
    paper = content.account
    counted = f"{paper.paper_ratio:.1f}x as the DKM paper counts" if paper.paper else None
    change = tables.change(content)
    facts = [
        _fact(
            "Checkpoint",
            size(content.checkpoint_bytes),
            f"of {size(content.fp32_bytes)} in float32",
        ),
        _fact("Compression", f"{content.ratio:.1f}x", counted),
    ]
    if content.hard is None:
        evaluated = "the task was not evaluated when the model was compressed"
        reason = evaluated if content.model.source.task else "the model has no task"
        facts.append(_fact("Metric", "not measured", reason))
    else:
        values = [
            tables.metric(value) for value in (content.fp32, content.hard) if value is not None
        ]
        note = f"{change} by palettizing" if change else "after palettizing"
        facts.append(_fact(content.metric_name, " → ".join(values), note))
    facts.append(_checks(content))
    return tag("ul", facts, class_="facts")


def _checks(content: Content) -> Markup:
    check = content.check
    if check is None:
        return _fact("Checks", "not checked", "no report of a check was given")
    words = {ExitCode.OK: ("passed", "pass"), ExitCode.GATE: ("failed", "fail")}
    word, style = words.get(check.exit_code, ("incomplete", ""))
    idle = len(check.runtimes) - ran(check)
    return _fact("Checks", word, f"{ran(check)} runtimes ran, {idle} not run", style)


def _fact(name: str, value: str, note: str | None, style: str = "") -> Markup:
    more = tag("span", note) if note else None
    return tag("li", tag("span", name), tag("strong", value, class_=style or None), more)


def _absent(content: Content) -> Markup | None:
    if not content.missing:
        return None
    lines = [
        tag("li", tag("b", f"{missing.what[:1].upper()}{missing.what[1:]}: "), prose(missing.how))
        for missing in content.missing
    ]
    return tag("ul", lines, class_="absent", aria_label="Not in this report")


def _environment(content: Content) -> Markup:
    about = [
        "SHA-256 of each file as it is now; of one that is missing, or was not read, as it was "
        "recorded.",
        "There is no time in this page: the same inputs give the same bytes.",
    ]
    parts: Sequence[Markup | None] = (
        table(tables.file_table(content), "Files and their hashes"),
        fold("Versions", tables.version_table(content)),
        fold("Model and settings", tables.setting_table(content)),
    )
    return section("Environment and hashes", about, parts)
