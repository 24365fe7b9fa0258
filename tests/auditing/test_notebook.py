"""What an audit and a reconstruction show of themselves in a notebook."""

from __future__ import annotations

import html
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_audits import open_target, pictures

from rgap import audit, capture
from rgap.attacks import IDLG, Bias


class Reader(HTMLParser):
    """Tags, and the attributes of the first frame."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.frame: dict[str, str | None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "iframe":
            self.frame = dict(attrs)


def test_an_audit_shows_its_report_in_a_frame() -> None:
    found = audit(open_target(), pictures(2), attacks=[Bias()])
    reader = Reader()
    reader.feed(found._repr_html_())
    assert reader.tags == ["iframe"]
    page = reader.frame["srcdoc"]
    assert page is not None
    assert page.startswith("<!doctype html>")
    assert found.verdict.headline in html.unescape(page)


def test_a_reconstruction_shows_what_it_says_and_nothing_as_markup() -> None:
    target = open_target()
    shown = Bias()(target, capture(target, pictures(1).inputs, torch.tensor([1.0])))
    reader = Reader()
    reader.feed(shown._repr_html_())
    assert set(reader.tags) == {"p", "b", "ul", "li"}
    assert all(html.escape(note) in shown._repr_html_() for note in shown.assumptions)


def test_a_data_frame_has_a_row_for_each_sample_and_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    class DataFrame:
        def __init__(self, rows: list[dict[str, Any]], columns: list[str]):
            self.rows, self.columns = rows, columns

    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=DataFrame))
    found = audit(open_target(), pictures(3), attacks=[IDLG(iterations=1), Bias()])
    frame = found.to_pandas()
    assert [(row["sample"], row["attack"]) for row in frame.rows] == [
        (f"p{at}", name) for at in range(3) for name in ("iDLG", "Bias")
    ]
    assert all(set(row) == set(frame.columns) for row in frame.rows)
    assert [row["mse"] for row in frame.rows] == [result.mse for case in found.cases for result in case.results]


def test_without_pandas_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="needs pandas, which is not installed: pip install pandas"):
        audit(open_target(), pictures(1), attacks=[Bias()]).to_pandas()
