"""What the report says, and what it refuses to be made from."""

# ruff: noqa: RUF001 - minus signs and dashes are what is tested

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_audits import AUDITS, HOSTILE, Audit, closed, empty, hostile, partial, result, rich

import rgap.report
from rgap.auditing.results import EXACT_PSNR
from rgap.printable import visible
from rgap.report import ReportError, charts, digest, reading, render, words, write

VOID = {"meta", "link", "img", "br", "line", "rect", "circle"}
SCHEMA = json.loads((Path(rgap.report.__file__).parent / "schema.json").read_text())


class Page(HTMLParser):
    """A page taken apart, by a parser that knows nothing of how it was made."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)
        if not self.open or self.open[-1] not in ("style", "title"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(rich()))


@cache
def rendered(title: str) -> str:
    return render(AUDITS[title]())


@pytest.mark.parametrize("title", AUDITS)
def test_every_page_is_whole(title: str) -> None:
    html = rendered(title)
    page = Page(html)
    assert page.open == []
    assert html.startswith("<!doctype html>")
    assert page.count("h1") == page.count("main") == page.count("nav") == 1
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    for tag, name, value in page.attributes:
        if name == "href" and value.startswith("#"):
            assert value[1:] in identifiers
        if name == "aria-labelledby":
            assert set(value.split()) <= set(identifiers)
        if tag == "th" and name == "scope":
            assert value in ("row", "col")
    assert all("scope" in names for tag, names in page.tags if tag == "th")
    assert all("alt" in names for tag, names in page.tags if tag == "img")


@pytest.mark.parametrize("title", AUDITS)
def test_headings_skip_no_level(title: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(rendered(title)).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize("title", AUDITS)
def test_nothing_is_loaded_and_nothing_runs(title: str) -> None:
    html = rendered(title)
    page = Page(html)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form", "base"}
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("#", "data:"))
    assert "url(" not in html
    assert "@import" not in html


def test_the_verdict_comes_first_with_its_numbers(page: Page) -> None:
    verdict = rich()["verdict"]
    parts = [verdict["headline"], verdict["sentences"][0], "recovered exactly 6 of 8", "included 7 of 8"]
    places = [page.text.index(part) for part in parts]
    assert places == sorted(places)
    assert places[-1] < page.text.index("What the best attack made")
    sections = [
        "What came back", "Which layer gives it away", "What the solver met", "Attacks", "Attacks that did not apply",
        "Where defences close it", "What to do", "What this audit does not say", "Left out", "Run it again",
    ]  # fmt: skip
    assert [heading for heading in page.headings if heading in sections] == sections


def test_everything_needed_to_run_it_again(page: Page) -> None:
    audit = rich()
    for part in (audit["made"]["command"], audit["target"]["fingerprint"], "2.13.0", "0.1.0", "3.11.7", "123,456"):
        assert part in page.text
    assert "Each client sends the gradient of one batch of 1 sample." in page.text


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(
    ("sends", "steps", "rate"), [("gradient", 1, None), ("difference", 1, 0.1), ("difference", 5, 0.1)]
)
def test_the_protocol_in_words(sends: str, steps: int, rate: float | None, summed: bool, clients: int) -> None:
    protocol = {"sends": sends, "steps": steps, "learning_rate": rate, "optimiser": "adam", "summed": summed}
    sentences = re.findall(r"[^ ].*?[a-z]\.", words.protocol(protocol | {"clients": clients}, 4))
    first = {
        ("gradient", 1): "Each client sends the gradient of one batch of 4 samples.",
        (
            "difference",
            1,
        ): "Each client sends how far its weights have moved after 1 step of adam with a learning rate of "
        "0.1, on a batch of 4 samples.",
        (
            "difference",
            5,
        ): "Each client sends how far its weights have moved after 5 steps of adam with a learning rate "
        "of 0.1, each on the same batch of 4 samples.",
    }[sends, steps]
    second = ["The loss is summed over the batch, not averaged."] * summed
    assert sentences == [first, *second, *["The server sees only the average over 2 clients."] * (clients - 1)]


@pytest.mark.parametrize(
    ("of", "batch", "clients", "told"), [(3, 1, 1, "up to 3 samples"), (4, 2, 2, ""), (8, 2, 2, "up to 8 samples")]
)
def test_updates_of_more_samples_than_the_protocol_has_are_told(of: int, batch: int, clients: int, told: str) -> None:
    audit = rich(2)
    audit["target"]["batch_size"], audit["protocol"]["clients"] = batch, clients
    audit["samples"][0]["results"][0]["of"] = of
    text = Page(render(audit)).text
    assert ("Some updates say that they are of more" in text) is bool(told)
    assert told in text


def test_the_words_for_exact_are_what_counts_as_exact(page: Page) -> None:
    assert f"its PSNR is {EXACT_PSNR:g} dB or more" in page.text
    assert "no other one explains it" not in page.text


def test_attacks_are_not_said_to_have_had_the_same_samples(page: Page) -> None:
    assert "the rows need not be of the same samples" in page.text


def test_attacks_that_did_not_apply_say_why(page: Page) -> None:
    assert "Bias : no Linear layer with a bias reads the input" in page.text


def test_advice_has_before_and_after(page: Page) -> None:
    text = page.text
    assert "Before 92.4 dB 88%" in text
    assert "After 9.3 dB 0%" in text
    assert "an error of the gradient of 0.3, epsilon 41" in text
    assert "expected, not measured" in text


def test_it_never_says_safe(page: Page) -> None:
    (sentence,) = re.findall(r"[^.]*\bsafe\b[^.]*", page.text)
    assert sentence.startswith(" It never says that a model is safe:")


def test_an_interrupted_audit_says_so_before_anything_else() -> None:
    text = Page(render(partial())).text
    assert text.index("This audit was interrupted.") < text.index(partial()["verdict"]["headline"])
    assert "3 of 8 samples had been attacked" in text
    assert "interrupted" not in Page(render(rich())).text


def test_an_empty_audit_is_a_page_all_the_same() -> None:
    text = Page(render(empty())).text
    for part in ("The updates hold nothing.", "No sample was attacked.", "No attack ran.", "No defence was swept.",
                 "The audit has no advice. No sample came back", "It was started from Python"):  # fmt: skip
        assert part in text


def test_inputs_that_are_no_pictures() -> None:
    page = Page(render(closed()))
    assert page.count("img") == 0
    assert "MSE 0.4" in page.text
    assert "No attack gave a result." in page.text
    assert "bn1: batch norm in training mode" in page.text
    assert "after 5 steps of sgd with a learning rate of 0.1" in page.text
    assert "The loss is summed over the batch, not averaged. The server sees only the average over 10" in page.text


@pytest.mark.parametrize(
    ("columns", "original", "told"),
    [
        (["age", "income"], [31.0, 4200.0], "age 31 30.99 income 4,200 4,200.4 value 3 – 7"),
        ([], [31.0, 4200.0, 7.0], "value 1 31 30.99 value 2 4,200 4,200.4 value 3 7 7"),
        (["age", "income", "id", "more"], None, "age 30.99 income 4,200.4 id 7"),
    ],
)
def test_values_of_a_table_stand_beside_each_other_by_their_columns(
    columns: list[str], original: list[float] | None, told: str
) -> None:
    audit = closed()
    audit["settings"]["columns"] = columns
    sample = audit["samples"][0]
    made = result("Bias", None, None, 0) | {"values": [30.99, 4200.4, 7.0]}
    audit["samples"] = [sample | {"values": original, "best": "Bias", "results": [made]}]
    assert told in " ".join(Page(render(audit)).text.split())


@pytest.mark.parametrize(
    ("labels", "right", "told"), [(None, False, False), ([], False, False), ([1.0], False, True), ([1.0], True, True)]
)
def test_no_label_is_said_to_be_wrong_where_none_was_found(labels: list[float] | None, right: bool, told: bool) -> None:
    audit = closed()
    made = result("Closed", None, None, 0) | {"labels": labels, "labels_right": right}
    audit["samples"] = [audit["samples"][0] | {"best": "Closed", "results": [made]}]
    page = Page(render(audit)).text
    word = "right" if right else "wrong"
    assert (f"label {word}" in page) is (f"({word})" in page) is told


@pytest.mark.parametrize(
    ("label", "residual", "level", "told"),
    [
        (None, 0.03, "not recovered", "Not known"),
        (None, None, "not recovered", "Not recovered"),
        (1.0, 0.03, "not recovered", "Not recovered"),
        (None, 1e-7, "exact", "Exact"),
    ],
)
def test_what_nobody_can_compare_is_not_said_not_to_be_recovered(
    label: float | None, residual: float | None, level: str, told: str
) -> None:
    audit = closed()
    made = result("iDLG", None, None, 0) | {"gradient_residual": residual}
    audit["samples"] = [audit["samples"][0] | {"label": label, "level": level, "best": "iDLG", "results": [made]}]
    page = render(audit)
    assert f">{told}</span>" in page[page.index('id="samples"') : page.index("</header>", page.index('id="samples"'))]


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (24, 24), (25, 24), (200, 24)])
def test_the_first_samples_are_shown_and_the_others_counted(count: int, shown: int) -> None:
    page = Page(render(rich(count)))
    assert page.attributes.count(("li", "class", "sample")) == shown
    more = re.search(r"([\d,]+) more are in the numbers above", page.text)
    assert (int(more.group(1)) if more else 0) == count - shown
    assert f"of {count}" in page.text


def test_pictures_are_shown_with_their_sizes_and_small_ones_as_squares(page: Page) -> None:
    sizes = [value for tag, name, value in page.attributes if tag == "img" and name in ("width", "height")]
    assert set(sizes) == {"32"}
    assert all("pixels" in value for tag, name, value in page.attributes if (tag, name) == ("img", "class"))
    assert digest.picture("iVBORw0KGgo=").width == 0  # type: ignore[union-attr]


def test_an_error_of_zero_is_an_infinite_psnr() -> None:
    audit = rich(1)
    audit["samples"][0]["results"][0] |= {"mse": 0.0, "psnr": None}
    assert "PSNR ∞ dB" in Page(render(audit)).text


def test_what_the_solver_met_is_put_together_over_samples() -> None:
    audit = rich(8)
    attack, layers = digest.layers(audit)
    conditions = [
        layer["condition"] for sample in audit["samples"] for layer in sample["results"][0]["layers"]
        if layer["name"] == "conv1"
    ]  # fmt: skip
    row = next(layer for layer in layers if layer.name == "conv1")
    assert attack == "Closed"
    assert row.rank == "2,990 to 3,072"
    assert row.worst == words.number(max(conditions))
    assert row.condition == words.number((sorted(conditions)[3] + sorted(conditions)[4]) / 2)


# ---- what names may do ----


def test_hostile_names_are_shown_and_do_nothing() -> None:
    page = Page(render(hostile()))
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script"}
    assert "<script>alert(1)</script>" in page.text
    assert "holiday[U+202E]gnp.exe" in page.text
    assert "[U+D83D][U+0000][U+DC80]" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "9,000 characters left out" in page.text
    assert "x" * 1001 not in page.text


def test_a_hostile_page_has_the_structure_of_a_harmless_one() -> None:
    names = iter(range(10**6))
    harmless = hostile()
    for sample in harmless["samples"]:
        fresh = f"name {next(names)}"
        sample["name"] = sample["best"] = sample["results"][0]["attack"] = fresh
        sample["results"][0] |= {"reason": fresh, "warnings": [fresh], "status": fresh}
    harmless["verdict"] |= {"headline": "x", "sentences": ["x"] * len(HOSTILE)}
    harmless["target"] |= {"model": "x", "layers": ["x"], "obstacles": ["x"]}
    assert Page(render(harmless)).tags == Page(render(hostile())).tags


def put(audit: Audit, text: str) -> Audit:
    """The text wherever an audit has free text."""

    def everywhere(value: Any) -> Any:
        if isinstance(value, dict):
            fixed = ("kind", "sends", "level", "role", "picture", "date")
            return {key: entry if key in fixed else everywhere(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [everywhere(entry) for entry in value]
        return text if isinstance(value, str) else value

    found = everywhere(audit)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def plain_tags() -> list[tuple[str, tuple[str, ...]]]:
    return Page(render(put(rich(2), "plain"))).tags


@settings(max_examples=15, deadline=None)
@given(
    text=st.text(st.characters(codec=None), min_size=1, max_size=200)
    | st.sampled_from(HOSTILE)
    | st.lists(st.sampled_from(["<", ">", '"', "'", "&", "/", "=", "x", " ", "<!--", "]]>"]), min_size=1).map("".join)
)
def test_no_text_becomes_markup(text: str, plain_tags: list[tuple[str, tuple[str, ...]]]) -> None:
    html = render(put(rich(2), text))
    page = Page(html)
    assert page.open == []
    assert page.tags == plain_tags
    html.encode()
    shown = " ".join(visible(text).split())
    assert shown in page.text


@given(st.text(st.characters(codec=None), max_size=3000))
def test_text_is_made_visible(text: str) -> None:
    shown = visible(text)
    assert len(shown) <= 8 * reading.LONGEST + 100
    assert not re.search("[\u202a-\u202e\u2066-\u2069\ud800-\udfff\x00-\x08\x7f-\x9f]", shown)
    assert len(words.name(shown)) <= max(words.NAME, len("(no name)"))


# ---- what is refused ----


@pytest.mark.parametrize("title", AUDITS)
def test_the_samples_follow_the_schema(title: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(AUDITS[title](), SCHEMA)


def test_the_schema_is_of_the_format_that_is_read() -> None:
    assert SCHEMA["properties"]["format"]["const"] == rgap.report.FORMAT
    assert SCHEMA["$id"].endswith(f":{rgap.report.FORMAT}")


def changed(change: Callable[[Audit], Any]) -> Audit:
    audit = copy.deepcopy(rich(1))
    change(audit)
    return audit


@pytest.mark.parametrize(
    ("audit", "message"),
    [
        ([], "got kind a list, expected 'rgap-audit'"),
        (None, "got kind a NoneType"),
        ({}, "got kind None"),
        (changed(lambda a: a.update(kind="rgap-rank")), "got kind 'rgap-rank', expected 'rgap-audit'"),
        (changed(lambda a: a.update(format=7)), "got audit format 7, expected 2"),
        (changed(lambda a: a.pop("format")), "got audit format None, expected 2"),
        (changed(lambda a: a.pop("verdict")), r"\$: 'verdict' is a required property"),
        (changed(lambda a: a["samples"][0].update(level="fine")), r"\$\.samples\[0\]\.level: 'fine' is not one of"),
        (changed(lambda a: a["samples"][0]["results"][1].update(psnr="high")), r"\.results\[1\]\.psnr: 'high'"),
        (changed(lambda a: a["samples"][0]["results"][1].update(psnr=math.nan)), r"\[0\]\.results\[1\]\.psnr: nan is"),
        (changed(lambda a: a["made"].update(seconds=math.inf)), r"\$\.made\.seconds: inf"),
        (changed(lambda a: a["made"].update(seconds=10**400)), r"\$\.made\.seconds: 10+…"),
        (changed(lambda a: a["samples"][0].update(picture="javascript:alert(1)")), r"\$\.samples\[0\]\.picture: "),
        (changed(lambda a: a["samples"][0].update(picture='iVBORw0KGgo" onerror="x')), r"\$\.samples\[0\]\.picture: "),
        (changed(lambda a: a["rank"]["layers"][0].pop("unknowns")), r"\$\.rank\.layers\[0\]: 'unknowns' is a required"),
        (changed(lambda a: a["verdict"].update(layer={"name": "x", "role": "y", "why": ""})), r"\.layer\.role: "),
        (changed(lambda a: a["target"].update(parameters=2.0)), r"parameters: 2\.0 is not of type 'integer'"),
        (changed(lambda a: a["target"].update(parameters=-1)), r"\$\.target\.parameters: -1 is less than"),
        (changed(lambda a: a["made"].update(command=["<" * 9999])), r"\$\.made\.command: .{1,210}$"),
    ],
)  # fmt: skip
def test_what_is_no_audit_is_refused_and_says_where(audit: Any, message: str) -> None:
    with pytest.raises(ReportError, match=message) as error:
        rgap.report.reading.check(audit)
    assert len(str(error.value)) < 300


def test_report_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="got audit format 7, expected 2"):
        render(rich(1) | {"format": 7})


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b'{"kind": "rgap-audit", "format": 2, "complete": NaN}', b"[" * 100_000]
)
def test_a_file_that_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "audit.json"
    source.write_bytes(content)
    with pytest.raises(ReportError, match=r"audit\.json is not JSON"):
        write(source, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == [source]


def test_a_refused_audit_leaves_the_old_report(tmp_path: Path) -> None:
    source, page = tmp_path / "audit.json", tmp_path / "report.html"
    page.write_text("old")
    source.write_text(json.dumps(rich(1) | {"format": 7}))
    with pytest.raises(ReportError, match=r"audit\.json: got audit format 7, expected 2"):
        write(source, page)
    assert page.read_text() == "old"


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "audit.json", tmp_path / "report.html")


@pytest.mark.parametrize("title", ["rich", "hostile"])
def test_the_file_holds_what_was_rendered(title: str, tmp_path: Path) -> None:
    source, page = tmp_path / "audit.json", tmp_path / "report.html"
    source.write_text(json.dumps(AUDITS[title](), allow_nan=False))
    write(source, page)
    assert page.read_bytes() == render(json.loads(source.read_text())).encode()


def test_an_audit_is_not_changed_by_its_report() -> None:
    audit = hostile()
    before = copy.deepcopy(audit)
    render(audit)
    assert audit == before


# ---- charts and words ----

floats = st.floats(allow_nan=False, allow_infinity=False)
points = st.fixed_dictionaries(
    {
        "strength": floats, "median_psnr": st.none() | floats, "median_ssim": st.none() | floats,
        "recovered": st.none() | st.floats(0, 1), "gradient_error": st.none() | floats, "epsilon": st.none() | floats,
    }
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(points, max_size=8), st.data())
def test_every_point_is_inside_its_chart(points: list[Audit], data: st.DataObject) -> None:
    closes = data.draw(st.sampled_from([None, *(point["strength"] for point in points)]))
    defence = {
        "name": "Noise",
        "strength": "deviation",
        "about": "",
        "points": points,
        "closes_at": closes,
        "sentence": "",
    }
    for curve in charts.curves(defence):
        places = [dot.x for dot in curve.dots] + [tick.at for tick in curve.x_ticks]
        assert all(0 <= place <= 100 for place in places)
        assert all(curve.top <= dot.y <= curve.bottom for dot in curve.dots)
        ticks = [tick.at for tick in curve.x_ticks]
        assert ticks == sorted(ticks)
    render(empty() | {"defences": [defence]})


@given(st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=8, unique=True))
def test_an_axis_keeps_the_order_of_values(values: list[float]) -> None:
    axis = charts._Axis(values)
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert min(places) >= charts._LEFT - 1e-9
    assert max(places) <= charts._RIGHT + 1e-9


def test_zero_has_a_place_of_its_own_on_a_logarithmic_axis() -> None:
    axis = charts._Axis([0.0, 1e-6, 1e-3])
    assert axis.place(0.0) < axis.place(1e-6) < axis.place(1e-3)
    assert axis.ticks()[0].text == "0"


def test_a_defence_closes_at_one_of_its_points() -> None:
    noise, pruning = rich(1)["defences"]
    end = charts.closing(noise)
    assert end is not None
    assert end["gradient_error"] == 0.3
    assert charts.closing(pruning) is None
    assert charts.closing(noise | {"closes_at": 0.5}) is None
    strength, cost, epsilon = charts.curves(noise)
    assert [curve.closes.text for curve in (strength, cost, epsilon) if curve.closes] == [
        "closes at 0.001", "closes at 0.3", "closes at 41",
    ]  # fmt: skip
    assert [dot.recognised for dot in strength.dots] == [True] * 4 + [False] * 2


def test_a_defence_that_leaves_no_answer_closes_all_the_same() -> None:
    noise, _ = rich(1)["defences"]
    noise["points"][4]["median_psnr"] = noise["points"][5]["median_psnr"] = None
    curve = charts.curves(noise)[0]
    assert len(curve.dots) == 6
    assert curve.dots[4].y == curve.bottom
    assert curve.closes is not None
    assert "to nothing at 0.01. The leak closes at 0.001." in curve.description


@given(
    st.fixed_dictionaries(
        {key: st.integers(0, 2**53 - 1) for key in ("unknowns", "weight_rows", "gradient_rows", "virtual_rows")}
    ),
    st.none() | st.integers(0, 2**53 - 1),
)
def test_bars_fit(counts: Audit, free: int | None) -> None:
    (bar,) = charts.bars([{"name": "conv1", "index": 0, "rank": None, "free": free} | counts])
    assert sum(piece.width for piece in bar.pieces) <= 100 + 1e-9
    assert 0 <= bar.missing <= 50
    constraints = counts["weight_rows"] + counts["gradient_rows"] + counts["virtual_rows"]
    if counts["unknowns"] and constraints >= counts["unknowns"]:
        assert bar.missing < 1e-9
    assert bar.cut == (constraints > 2 * max(counts["unknowns"], 1))


def test_a_deep_network_has_a_chart_of_its_first_layers() -> None:
    audit = rich(1)
    audit["rank"]["layers"] = [audit["rank"]["layers"][0] | {"name": f"conv{at}"} for at in range(60)]
    text = Page(render(audit)).text
    assert "The chart shows the first 30 of 60 layers" in text
    assert "conv59" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (0.3, "0.3"), (1.0, "1"), (12.34, "12.3"), (1234.5, "1,230"), (0.001, "0.001"),
        (6e-10, "6 × 10⁻¹⁰"), (1e-6, "10⁻⁶"), (-1e-6, "−10⁻⁶"), (2.43e7, "2.4 × 10⁷"), (-0.25, "−0.25"),
        (99999.9, "100,000"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0%"), (1.0, "100%"), (0.875, "88%"), (0.001, "1%"), (0.999, "99%")]
)
def test_a_few_are_neither_none_nor_all(value: float | None, text: str) -> None:
    assert words.share(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.041, "0.041 s"), (12.0, "12 s"), (59.96, "60 s"), (84.0, "1 min 24 s"), (7800.0, "2 h 10 min")],
)
def test_times_are_readable(value: float | None, text: str) -> None:
    assert words.seconds(value) == text


@given(floats)
def test_every_number_can_be_said(value: float) -> None:
    for say in (words.number, words.decibels, words.seconds, words.likeness, words.count):
        assert say(value)


def test_dates() -> None:
    assert words.day("2026-11-25T03:00:00+00:00") == "25 November 2026, 03:00 UTC"
    assert words.day("yesterday") == "yesterday"


json_values = st.recursive(
    st.none() | st.booleans() | floats | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(json_values)
def test_other_json_is_refused(value: Any) -> None:
    with pytest.raises(ReportError):
        reading.check(value)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_value_in_any_place_is_either_shown_or_refused(data: st.DataObject) -> None:
    audit = rich(1)
    place: Any = audit
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inside = place[key]
        if not isinstance(inside, (dict, list)) or not inside or data.draw(st.integers(0, 4)) == 0:
            break
        place = inside
    place[key] = data.draw(
        st.none() | st.booleans() | floats | st.integers() | st.text(max_size=20) | st.just([]) | st.just({})
    )
    try:
        html = render(audit)
    except ReportError:
        return
    assert Page(html).open == []


@pytest.mark.parametrize("samples", [1, 3, 40])
def test_no_sample_is_said_to_be_tried_where_no_attack_ran(samples: int) -> None:
    audit = rich(samples)
    for sample in audit["samples"]:
        sample["results"] = []
    text = Page(render(audit)).text
    assert "No sample was attacked: no attack applies to these updates" in text
    assert "No attack gave a result." not in text


def test_results_without_an_answer_are_results() -> None:
    audit = rich(1)
    audit["samples"][0]["results"] = [result("Closed", None, None, 1, reason="a layer is dead")]
    assert "nothing came back" in Page(render(audit)).text


@pytest.mark.parametrize(
    ("level", "known", "told"),
    [
        ("exact", True, "the same command with --defence all"),
        ("exact", False, "is tried on samples that are known: rgap audit with --defence all"),
        ("recognisable", True, "the same command with --defence all"),
        ("not recovered", True, "No sample came back that a defence could close"),
        ("not recovered", False, "Nobody here can say whether a sample came back, so look at what was found"),
    ],
)
def test_the_way_on_without_a_defence_is_one_that_there_is(level: str, known: bool, told: str) -> None:
    audit = copy.deepcopy(rich(2))
    audit["defences"], audit["verdict"]["advice"], audit["verdict"]["level"] = [], [], level
    for sample in audit["samples"]:
        sample["level"] = level
        if not known:
            sample["label"] = sample["picture"] = None
    page = render(audit)
    assert told in " ".join(" ".join(Page(page).texts).split())
    assert ("<figcaption>Original</figcaption>" in page) is known
