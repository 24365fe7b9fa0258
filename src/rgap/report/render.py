"""From an audit to a page."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rgap.files import write_atomically
from rgap.report import charts, digest, reading, words


def render(audit: dict[str, Any]) -> str:
    """The page, from the content of audit.json.

    Raises:
        ReportError: it is no audit, of a format this version does not know, or against the schema.
    """
    reading.check(audit)
    audit = reading.clean(audit)
    attack, layers = digest.layers(audit)
    shown = digest.shown(audit)
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            audit=audit,
            facts=digest.facts(audit),
            unknown=audit["verdict"]["level"] == "not recovered" and "not known" in map(digest.level, audit["samples"]),
            samples=shown[: digest.SHOWN],
            left_out=len(shown) - digest.SHOWN,
            attack_of_layers=attack,
            layers=layers,
            joint=digest.joint(audit)[: digest.SHOWN],
            words=words,
            charts=charts,
            digest=digest,
        )
    )


def write(audit_json: Path, html: Path) -> None:
    """Read an audit and write its page, whole or not at all.

    Raises:
        ReportError: as `render`, and if the file is not JSON.
        OSError: a file cannot be read or written.
    """
    audit = reading.load(audit_json)
    try:
        page = render(audit)
    except reading.ReportError as error:
        raise reading.ReportError(f"{audit_json}: {error}") from None
    write_atomically(html, page.encode())


@cache
def _environment() -> Environment:
    # Every text in an audit may be hostile, so everything is escaped; no template marks anything as safe.
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
