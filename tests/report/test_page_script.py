"""The page's explorer of test examples, used in a browser: search, filters, order, keys, and nothing on the console."""

import contextlib
import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.records import Example
from pipeline.score.side_by_side import Row, Written
from tests.made import browser
from tests.made.browser import Page
from tests.made.comparison import comparison, several_seeds
from tests.made.page import content, drawn, render

PROGRAM = browser.installed() or ""
if not PROGRAM:
    pytest.skip("No Chromium here: the page's script was not run", allow_module_level=True)

HOSTILE = "=<img src=x onerror=document.title='run'>"


def example(
    name: str, aspect: str, base: float, tuned: float, words: int, text: str = "The model sings.", capped: bool = False
) -> Row:
    """One example by its scores; the third of three seeds gives what base gives. `words`: of its reference."""
    reference = " ".join(["word"] * words)
    given = Example(name, name, aspect, f"The source of {name}.", reference, "The source.")
    by = Written("The model hums.", 5, False, {"rouge1": base, "rouge2": 1.0})
    other = Written(text, 7, capped, {"rouge1": tuned, "rouge2": 9.0 - words})
    return Row(given, by, [other, replace(other, capped=False), by])


ROWS = [
    example("small", "approach", 60, 61, 3),
    example("lost", "outcome", 40, 20, 8, capped=True),
    example("won", "approach", 20, 50, 5, "A Kingfisher dives."),
    example("same", "outcome", 30, 30, 4),
    example(HOSTILE, "approach", 10, 15, 1, "<b>bold</b>"),
]
BY_GAIN = ["won", HOSTILE, "small", "same", "lost"]
IDS = "[...document.querySelectorAll('#list .option span:first-child')].map((one) => one.textContent)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three seeds and the page of one seed without aspects, with their figures."""
    made = tmp_path_factory.mktemp("page")
    with contextlib.chdir(made):
        (made / "index.html").write_text(render(drawn(content(several_seeds(), ROWS))), encoding="utf-8")
        single = [replace(row, tuned=row.tuned[:1]) for row in ROWS]
        (made / "single.html").write_text(render(content(comparison(aspects=[]), single)), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser.started(PROGRAM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium: Page, folder: Path) -> Iterator[Page]:
    """The page of three seeds, just opened; whatever a test does on it, its console stays empty."""
    chromium.errors.clear()
    chromium.open(folder / "index.html")
    yield chromium
    assert chromium.value("document.title") != "run"
    assert chromium.errors == []


def listed(page: Page) -> list[str]:
    ids: list[str] = page.value(IDS)
    return ids


def text(page: Page, selector: str) -> str:
    return str(page.value(f"document.querySelector({json.dumps(selector)}).textContent"))


def selected(page: Page) -> str:
    """The example that is chosen in the list, shown beside it, and named to those who hear the page."""
    chosen = page.value("[...document.querySelectorAll('#list [aria-selected=true]')].map((one) => one.id)")
    assert chosen == [page.value("document.getElementById('list').getAttribute('aria-activedescendant')")]
    name = text(page, f"#{chosen[0]} span")
    assert text(page, "#title") == name
    return name


def focus(page: Page) -> str:
    return str(page.value("document.activeElement.id"))


def into(page: Page, name: str, written: str) -> None:
    """Text in place of what a field holds."""
    for action in ("focus", "select"):
        page.value(f"document.getElementById({json.dumps(name)}).{action}()")
    page.press("Backspace")
    page.write(written)


def test_all_examples_are_shown_by_gain(page: Page) -> None:
    assert listed(page) == BY_GAIN
    assert selected(page) == "won"
    assert text(page, "#count") == (
        "5 of 5 examples · ROUGE-1 of each alone, mean 32.0 → 35.2 (+3.2) · 3 higher, 1 equal, 1 lower"
    )
    assert "ROUGE-1 20.0 → 50.0 (+30.0)" in text(page, ".detail-head p")
    assert page.value("[...document.querySelectorAll('#detail .card h4')].map((one) => one.textContent)") == [
        "reference", "base", "tuned-0",
    ]  # fmt: skip


def test_search_finds_words_in_any_text_and_case(page: Page) -> None:
    into(page, "search", "kingfisher")
    assert (listed(page), selected(page)) == (["won"], "won")
    assert text(page, "#count").startswith("1 of 5 examples · ")
    into(page, "search", "sings source")
    assert listed(page) == ["small", "same", "lost"]
    into(page, "search", "nowhere")
    assert listed(page) == []
    assert text(page, "#count") == "0 of 5 examples"
    assert text(page, "#list") == "No example fits: change the filters."
    assert page.value("document.getElementById('detail').hidden")
    page.click("#restart")
    assert (listed(page), selected(page)) == (BY_GAIN, "won")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("outcome", "higher", ["won", HOSTILE, "small"]),
        ("outcome", "equal", ["same"]),
        ("outcome", "lower", ["lost"]),
        ("outcome", "capped", ["lost"]),
        ("aspect", "0", ["won", HOSTILE, "small"]),
        ("aspect", "1", ["same", "lost"]),
        ("sort", "loss", ["lost", "same", "small", HOSTILE, "won"]),
        ("sort", "change", ["won", "lost", HOSTILE, "small", "same"]),
        ("sort", "tuned", ["small", "won", "same", "lost", HOSTILE]),
        ("sort", "base", ["small", "lost", "same", "won", HOSTILE]),
        ("sort", "longest", ["lost", "won", "same", "small", HOSTILE]),
        ("sort", "shortest", [HOSTILE, "small", "same", "won", "lost"]),
        ("sort", "id", [HOSTILE, "lost", "same", "small", "won"]),
        ("sort", "order", ["small", "lost", "won", "same", HOSTILE]),
    ],
)
def test_a_filter_and_an_order(page: Page, name: str, value: str, expected: list[str]) -> None:
    page.choose(name, value)
    assert (listed(page), selected(page)) == (expected, expected[0])


def test_filters_hold_together(page: Page) -> None:
    page.choose("aspect", "0")
    into(page, "least", "2")
    assert listed(page) == ["won", "small"]
    into(page, "most", "4")
    assert listed(page) == ["small"]
    page.choose("of", "tuned")
    assert listed(page) == ["won", "small"]


def test_another_score_and_another_seed(page: Page) -> None:
    page.press("Tab")
    page.choose("metric", "1")
    assert listed(page) == [HOSTILE, "small", "same", "won", "lost"]
    assert selected(page) == "won"  # what one reads stays
    assert "ROUGE-2 1.0 → 4.0 (+3.0)" in text(page, ".detail-head p")
    page.choose("metric", "0")
    page.choose("seed", "2")
    page.choose("outcome", "capped")
    assert listed(page) == []
    page.choose("seed", "3")
    page.choose("outcome", "equal")
    assert listed(page) == ["small", "lost", "won", "same", HOSTILE]
    assert text(page, "#detail .of-tuned h4") == "tuned-2"


def test_keys_move_in_the_list(page: Page) -> None:
    page.value("document.getElementById('list').focus()")
    for key, expected in [
        ("j", HOSTILE), ("ArrowDown", "small"), ("j", "same"), ("k", "small"), ("ArrowUp", HOSTILE), ("End", "lost"),
        ("j", "lost"), ("ArrowDown", "lost"), ("Home", "won"), ("k", "won"), ("ArrowUp", "won"), ("PageDown", "lost"),
        ("PageUp", "won"),
    ]:  # fmt: skip
        page.press(key)
        assert selected(page) == expected, key
        assert focus(page) == "list"
    page.press("j", "Enter")
    assert focus(page) == "title"
    page.press("j")  # from the example, as from the list
    assert (selected(page), focus(page)) == ("small", "list")
    page.press("/")
    assert focus(page) == "search"


def test_keys_are_letters_where_one_writes(page: Page) -> None:
    page.value("document.getElementById('search').focus()")
    page.press("j", "k")
    assert page.value("document.getElementById('search').value") == "jk"
    assert listed(page) == []


def test_keys_outside_of_the_explorer_do_nothing(page: Page) -> None:
    page.press("j")
    assert selected(page) == "won"


def test_a_click_chooses_and_buttons_step(page: Page) -> None:
    page.click("#option-3")
    assert selected(page) == "same"
    page.click("[aria-label='next example']")
    assert selected(page) == "lost"
    page.click("[aria-label='previous example']")
    page.click("[aria-label='previous example']")
    assert selected(page) == "small"
    assert page.value("document.activeElement.getAttribute('aria-label')") == "previous example"


def test_an_example_has_an_address(page: Page, folder: Path) -> None:
    assert page.value("location.hash") == ""
    page.value("document.getElementById('list').focus()")
    page.press("j")
    address = page.value("location.hash")
    assert address.startswith("#example=%3D%3Cimg")
    page.open(folder / "index.html", address)
    assert selected(page) == HOSTILE
    page.open(folder / "index.html", "#example=%E0%A4%A")  # no address of this page's
    assert selected(page) == "won"


def test_texts_are_shown_as_they_are(page: Page) -> None:
    page.click("#option-1")
    assert text(page, "#title") == HOSTILE
    assert text(page, "#detail .of-tuned p") == "<b>bold</b>"
    assert page.value("document.querySelectorAll('#explorer img, #explorer .card p b').length") == 0


def test_what_is_shown_is_saved(page: Page, tmp_path: Path) -> None:
    page.choose("outcome", "higher")
    page.choose("seed", "1")
    file = page.downloaded(tmp_path, "#save")
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert file.name == "examples.csv"
    assert [one["id"] for one in rows[::4]] == ["won", f"'{HOSTILE}", "small"]
    assert [one["variant"] for one in rows[:4]] == ["base", "tuned-0", "tuned-1", "tuned-2"]
    assert (rows[1]["ROUGE-1"], rows[1]["text"]) == ("50", "A Kingfisher dives.")


def test_the_page_of_one_seed_without_aspects(page: Page, folder: Path) -> None:
    page.open(folder / "single.html")
    assert (listed(page), selected(page)) == (BY_GAIN, "won")
    assert page.value("[document.getElementById('seed'), document.getElementById('aspect')]") == [None, None]
    page.choose("outcome", "lower")
    assert listed(page) == ["lost"]
