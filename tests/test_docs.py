"""The documentation builds without a warning, names everything that is public, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import rgap
from rgap import defences

ROOT = Path(__file__).parents[1]
MODULES = ("rgap.attacks", "rgap.losses", "rgap.models", "rgap.rank", "rgap.auditing", "rgap.sweeps")
"""Modules whose every public name has its place in the reference."""
LOADED = {("img", "src"), ("script", "src"), ("iframe", "src"), ("source", "src"), ("object", "data"), ("use", "href")}
"""Attributes that make a browser fetch something; those of links follow from their rel."""
FETCHED = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "icon", "manifest"}


class Page(HTMLParser):
    """The anchors of a page, its links, and what a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        if "id" in said:
            self.anchors.add(said["id"])
        if tag == "a" and "href" in said:
            self.links.append(said["href"])
        self.fetched += [said[name] for name in said if (tag, name) in LOADED]
        if tag == "link" and FETCHED & set(said.get("rel", "").split()):
            self.fetched.append(said.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `mkdocs build --strict` builds it, where warnings are errors."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", "mkdocs.yml", "-d", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "WARNING" not in ran.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}


def test_every_public_name_is_in_the_reference(site: Path, pages: dict[Path, Page]) -> None:
    expected = {f"rgap.{name}" for name in rgap.__all__}
    expected |= {f"rgap.defences.{kind.__name__}" for kind in defences.ALL}
    for module in MODULES:
        # What is public as rgap.NAME too is shown there.
        own = set(importlib.import_module(module).__all__) - set(rgap.__all__)
        expected |= {f"{module}.{name}" for name in own}
    found = {anchor for path, page in pages.items() if path.parent == site / "api" for anchor in page.anchors}
    assert sorted(expected - found) == []


def test_no_page_loads_anything_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    assert {"index.html", "getting-started.html", "api/attacks.html"} <= {
        path.relative_to(site).as_posix() for path in pages
    }
    elsewhere = [
        f"{path.relative_to(site)}: {address}"
        for path, page in pages.items()
        for address in page.fetched
        if urlsplit(address).scheme not in ("", "data") or address.startswith("//")
    ]
    assert elsewhere == []
    for path in site.rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*", path.read_text()) == []


def test_links_between_pages_lead_somewhere(pages: dict[Path, Page]) -> None:
    """Anchors too, and in pages that are made from docstrings or from other files, which mkdocs does not check."""
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            known = target in pages and (not address.fragment or unquote(address.fragment) in pages[target].anchors)
            if not known and address.fragment != "__skip":
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_the_search_knows_the_pages(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert any("twins" in each["text"].lower() for each in index["docs"])


def test_how_to_cite_it() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert said["cff-version"] == "1.2.0"
    assert said["version"] == version("rgap")
    assert said["license"] == "MIT"
    assert {"title", "message", "authors"} <= set(said)
    [paper] = said["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert any("2010.07733" in each["value"] for each in paper["identifiers"])
