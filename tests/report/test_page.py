"""The page shows what the comparison found, asks nothing of any network, and no text gets out of its place."""

import base64
import csv
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest

from pipeline.core import contracts, paths
from pipeline.core.params import Published
from pipeline.core.records import Decoding, Example, Prediction, write_rows
from pipeline.report import csv_tables, figures, page, wording
from pipeline.score import side_by_side
from pipeline.score.comparison import Pair, Verdict
from pipeline.score.evaluate import score_variant
from pipeline.score.side_effects import Cost
from tests.made.comparison import FIRST, NASTY, comparison, several_seeds
from tests.made.page import COST, DIGEST, EVALUATE, content, drawn, losses, render, row
from tests.made.records import encoded

HARD = (
    "</script><!-- <script> ]]> \u2028\u2029 \u202eRTL\u202c zero\u200bwidth \ufeff שלום 👩‍🔬 \x00 http://evil.example"
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Tags(HTMLParser):
    """Collects what a browser sees, and insists that what is opened is closed."""

    VOID = frozenset({"meta", "path", "line", "rect", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.comments: list[str] = []
        self.inside: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            kind = self.tags[-1][1].get("type") or self.open[-1]
            self.inside[kind] = self.inside.get(kind, "") + data
        else:
            self.text.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def shown(self) -> str:
        return " ".join("".join(self.text).split())

    def data(self) -> Any:
        return json.loads(self.inside["application/json"])


def test_the_verdict_comes_first() -> None:
    tags = Tags(render(content()))
    shown = tags.shown()
    assert shown.index("Fine-tuning made the model better than the NF4 base ROUGE-1 25.6") < shown.index("Result")
    assert FIRST.split("**: ")[1] in shown
    assert "+5.7" in shown
    assert "One training seed" in shown


@pytest.mark.parametrize("verdict", get_args(Verdict))
def test_every_verdict_has_its_words_and_sign(verdict: Verdict) -> None:
    one = comparison(verdict=verdict, margin=1.0)
    text = render(content(one))
    assert f"{page.SIGNS[verdict]}</span>{wording.lead(one)}</h1>" in text
    assert f".{verdict} h1 .sign" in text


def test_it_asks_nothing_of_any_network() -> None:
    # Not as params.yaml may have it, where it is a label: what is shown is escaped all the same.
    given = Published.model_construct(metric="rouge1", value=53.8, about=f"a paper {HARD}")
    text = render(drawn(content(comparison(published=[given]), [row(HARD, HARD, HARD)])))
    assert not re.search(r"https?://|url\(|@import|<link|<img|<iframe|\ssrc=|xmlns|fetch\(|XMLHttp|import\(", text)
    assert not re.search(r"""["'(=]//""", text)
    tags = Tags(text)
    assert all(re.fullmatch(r"#[\w-]+", one["href"] or "") for one in tags.of("a"))
    assert not [name for _, attributes in tags.tags for name in attributes if name.startswith("on") or name == "style"]


def test_its_policy_admits_its_own_style_and_script_alone() -> None:
    tags = Tags(render(content()))
    [policy] = [one["content"] or "" for one in tags.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    hashes = {
        kind: base64.b64encode(hashlib.sha256(tags.inside[kind].encode()).digest()).decode()
        for kind in ("style", "script")
    }
    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{hashes['style']}'",
        f"script-src 'sha256-{hashes['script']}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "innerHTML" not in tags.inside["script"]
    assert "eval" not in tags.inside["script"]


def test_texts_survive_and_stay_texts() -> None:
    one = row(HARD, HARD, HARD)
    example = replace(
        one.example,
        source=HARD,
        target=HARD,
        references=[HARD, "another"],
        history=[{"role": "user", "content": HARD}],
    )
    extreme = Pair(HARD, HARD, HARD, HARD, HARD, 1.0, 2.0)
    tags = Tags(render(content(comparison(best=[extreme]), [replace(one, example=example), row("p2", "b")])))
    expected = HARD.replace("\x00", "\ufffd").replace("\u2028", "\n").replace("\u2029", "\n")
    data = tags.data()
    [first, _] = data["examples"]
    assert (first["id"], data["aspects"][0], data["sources"][0]) == (expected, expected, expected)
    assert first["r"] == [expected, "another"]
    assert first["h"] == [["user", expected]]
    assert first["v"][0]["t"] == expected
    assert tags.text.count("http://evil.example") + "".join(tags.text).count("</script><!--") >= 4
    assert [comment.split(":")[0] for comment in tags.comments] == [" sha256 of all lines above"]
    assert len(tags.of("script")) == 2


def test_lone_surrogates_are_replaced() -> None:
    assert wording.shown("a\ud800b\x07 ") == "a\ufffdb\ufffd"


def test_marks_count_in_the_units_of_javascript() -> None:
    tags = Tags(render(content(rows=[row("p", text="👩‍🔬 a model")])))
    [one] = tags.data()["examples"]
    text, runs = one["v"][0]["t"].encode("utf-16-le"), one["v"][0]["m"]
    start = runs[0]
    assert text[2 * start : 2 * (start + runs[1])].decode("utf-16-le") == "a"
    start += runs[1] + runs[3]
    assert text[2 * start : 2 * (start + runs[4])].decode("utf-16-le") == "model"
    assert one["v"][0]["k"] == [0, 1, 1, 11, 5, 1]  # "A reference model."


def test_it_can_be_read_by_ear_and_by_keyboard() -> None:
    tags = Tags(render(drawn(content(several_seeds()))))
    ids = [attributes["id"] for _, attributes in tags.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    named = [name for _, attributes in tags.tags for name in (attributes.get("aria-labelledby") or "").split()]
    # the name of the example that the script shows
    assert set(named) - {"title"} <= set(ids)
    anchors = [(one["href"] or "")[1:] for one in tags.of("a")]
    assert set(anchors) <= set(ids)
    assert [len(tags.of(tag)) for tag in ("main", "nav", "h1", "header", "footer")] == [1] * 5
    levels = [int(tag[1]) for tag, _ in tags.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(one.get("aria-label") for one in tags.of("div") if one.get("role") in ("img", "region", "listbox"))
    assert [one["id"] for _, one in tags.tags if one.get("aria-live")] == ["count", "said"]
    assert tags.of("html") == [{"lang": "en"}]


def test_every_table_has_headers_with_a_scope() -> None:
    text = render(content(several_seeds()))
    tables = re.findall(r"<table.*?</table>", text, flags=re.S)
    assert len(tables) >= 12
    for table in tables:
        assert "<caption>" in table
        assert table.count("<th ") + table.count("<th>") == table.count("<th scope=")
        head = re.search(r"<thead><tr>(.*?)</tr></thead>", table, flags=re.S)
        assert head is not None
        columns = head[1].count('<th scope="col"')
        body = re.findall(r"<tr(?: class=\"\w+\")?>(.*?)</tr>", table, flags=re.S)[1:]
        assert body
        assert {len(re.findall(r"<t[hd]", one)) for one in body} == {columns}


def test_it_has_a_dark_mode_a_print_style_and_no_motion_for_those_who_want_none() -> None:
    style = Tags(render(drawn(content()))).inside["style"]
    for query in (
        "prefers-color-scheme: dark",
        "prefers-reduced-motion: no-preference",
        "@media print",
        ":focus-visible",
    ):
        assert query in style
    used = set(re.findall(r"var\((--[\w-]+)\)", render(drawn(content(several_seeds())))))
    light, dark, printed = (style.split(":root {")[i].split("}")[0] for i in (1, 2, 3))
    assert all(f"{name}: " in light and f"{name}: " in dark for name in used)
    colours = used & set(re.findall(r"--[\w-]+", " ".join(figures.PAGE.lines + figures.PAGE.seeds)))
    assert all(f"{name}: " in printed for name in colours)


@pytest.mark.parametrize(
    ("theme", "pairs"),
    [
        (1, [("text", "page"), ("soft", "page"), ("soft", "panel"), ("tuned-text", "page"), ("tuned-text", "panel"),
             ("text", "word"), ("text", "pair"), ("text", "base-word"), ("text", "base-pair"), ("warn", "warn-soft"),
             ("soft", "raised"), ("text", "warn-soft")]),
        (2, [("text", "page"), ("soft", "page"), ("soft", "panel"), ("tuned-text", "page"), ("tuned-text", "panel"),
             ("text", "word"), ("text", "pair"), ("text", "base-word"), ("text", "base-pair"), ("warn", "warn-soft"),
             ("soft", "raised"), ("text", "warn-soft")]),
    ],
)  # fmt: skip
def test_contrast(theme: int, pairs: list[tuple[str, str]]) -> None:
    style = (wording.TEMPLATES / "page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", style.split(":root {")[theme].split("}")[0]))

    def luminance(name: str) -> float:
        channels = [int(colours[name][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for pair in pairs:
        dark, light = sorted(map(luminance, pair))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair  # WCAG 2.2, 1.4.3, AA


def test_all_examples_are_there_with_every_seed_and_metric() -> None:
    tags = Tags(render(content(several_seeds())))
    data = tags.data()
    assert data["metrics"] == ["ROUGE-1", "ROUGE-2"]
    assert data["variants"] == ["base", "tuned-0", "tuned-1", "tuned-2"]
    assert [one["id"] for one in data["examples"]] == ["p1/approach", "p2"]
    assert [one["p"] for one in data["examples"][0]["v"]] == [[10, 5], [40, 5], [40, 5], [40, 5]]
    assert len(data["sources"]) == 1  # both have the same
    assert data["examples"][0]["w"] == [2, 3]
    assert {one["w"] for one in data["examples"][0]["v"]} == {3}
    assert "All 2 test examples." in tags.shown()
    assert any(one.get("id") == "seed" for one in tags.of("select"))
    assert not any(one.get("id") == "seed" for one in Tags(render(content())).of("select"))
    bare = Tags(render(content(comparison(aspects=[]))))
    assert not any(one.get("id") == "aspect" for one in bare.of("select"))


def test_of_too_many_examples_evenly_spread_ones_with_the_extremes_are_held() -> None:
    rows = [row(f"p{i}") for i in range(1000)]
    pair = replace(comparison().best[0], id="p777")
    one = content(comparison(best=[pair]), rows)
    held = page.chosen(one, 10)
    assert len(held) == len(set(held)) == 10
    assert 777 in held
    assert sorted(held) == held
    assert max(b - a for a, b in pairwise(held)) <= 112
    tags = Tags(render(one, 10))
    assert [one["id"] for one in tags.data()["examples"]] == [f"p{i}" for i in held]
    assert "10 of 1,000 test examples ( compare.explorer )".replace("( ", "(").replace(" )", ")") in tags.shown()
    assert page.chosen(one, 1000) == list(range(1000))
    assert page.chosen(one, 1) == [777]


def test_costs_say_what_was_measured_and_what_was_not() -> None:
    text = render(content())
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)<", one) for one in re.findall("<tr>.*?</tr>", text)]
    assert ["train-17", "1 min 16 s", "3.15 GB", "n/a", "cpu", "2", "1.2 Wh"] in cells
    assert ["fetch", "from a cache", "n/a", "n/a", "n/a", "n/a", "n/a"] in cells
    assert "4,884,480 trainable parameters, 3.63 % of the base's; an adapter of 19.6 MB." in text
    assert "Energy: RAPL." in text
    assert not any(cell[:1] == ["all of them"] for cell in cells)
    known = render(content(costs={"a": replace(COST, seconds=30.0), "b": replace(COST, seconds=45.0)}))
    assert '<th scope="row">all of them</th><td>1 min 15 s</td>' in known


def test_what_it_cost_in_general_ability_is_shown_where_it_was_measured() -> None:
    text = render(content())
    loss = '<th scope="row">encyclopedia: loss</th><td>2.900</td><td>2.895</td><td>−0.005</td><td>−0.012 to +0.002</td>'
    assert f"{loss}<td>0.400</td>" in text
    assert '<th scope="row">dialogue: loss</th><td>3.100</td><td>3.110</td><td>+0.010</td>' in text
    assert "read through the chat template, in conversations of at most 256 tokens, of which the last answer" in text
    assert "2.748<small>after 1 epoch</small>" in text
    assert "no sign that the base knows the order of the files. It does not show that the texts were unseen" in text
    cost = comparison().cost
    unknown = comparison(cost=Cost(cost.trainable_parameters, cost.adapter_bytes, cost.training, []))
    assert "Forgetting was not measured: forget.probes is empty." in Tags(render(content(unknown))).shown()
    assert "forgetting" not in csv_tables.tables(unknown)
    assert [one["probe"] for one in csv_tables.tables(comparison())["forgetting"]] == ["encyclopedia", "dialogue"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 00 s"),
        (75.4, "1 min 15 s"),
        (3599.6, "1 h 00 min"),
        (7322.0, "2 h 02 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text


def test_how_to_reproduce_it_depends_on_the_commit() -> None:
    origin = content().origin
    commands = [command for command, _ in origin.commands()]
    assert commands[:2] == [f"git checkout {'c' * 40}", "make repro"]
    dirty = replace(origin, changed=["params.yaml"])
    assert [command for command, _ in dirty.commands()][1] == "$EDITOR params.yaml"
    assert "differed from its commit in params.yaml." in Tags(render(content(origin=dirty))).shown()
    assert replace(origin, commit=None).commands()[0][0] == "$EDITOR params.yaml"
    assert "seeds: [17] # http://example.org" in "".join(Tags(render(content())).text)


def test_a_table_without_rows_is_left_out() -> None:
    bare = content(comparison(lines=[], aspects=[]))
    text = render(bare)
    assert "Reference lines" not in text
    assert "<tbody>\n</tbody>" not in text
    assert not {"lines", "aspects", "seeds", "published"} & set(csv_tables.tables(bare.comparison))


def test_two_kinds_of_chance_stand_there_with_several_seeds_alone() -> None:
    shown = Tags(render(content(several_seeds()))).shown()
    assert "Two kinds of chance" in shown
    assert "+3.5 to +7.9" in shown
    assert "Two kinds of chance" not in Tags(render(content())).shown()


def test_equal_contents_give_equal_bytes() -> None:
    assert render(drawn(content())) == render(drawn(content()))


def test_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    assert page.faults(path, DIGEST) == ["missing"]
    assert page.digest_of(path) is None
    path.write_text(render(content()))
    assert page.faults(path, DIGEST) == []
    assert page.digest_of(path) == DIGEST
    [other] = page.faults(path, "f" * 64)
    assert other == f"it shows another experiment ({DIGEST[:12]}…) than the one here (ffffffffffff…)"
    text = path.read_bytes()
    for spoilt in (
        text[:-1],
        text + b"\n",
        text.replace(b"better", b"bettar", 1),
        text[:-500],
        b"",
        b"\xff" + text[1:],
    ):
        path.write_bytes(spoilt)
        assert page.faults(path, DIGEST)[0].startswith("not what was written")


def test_json_that_stands_in_html_is_json() -> None:
    hard = {"a": [HARD, NASTY, "//"]}
    text = page.embedded(hard)
    assert json.loads(text) == hard
    assert not re.search(r"[<>&\u2028\u2029\ufeff]|//", text)


# What a paper's appendix takes


def test_tables_and_figures_are_the_same_bytes_each_time() -> None:
    made, rows = several_seeds(), [row(f"p{i}", seeds=3) for i in range(5)]
    csv_tables.write(made, rows, losses(17, 18, 18))
    files = {path: path.read_bytes() for path in paths.COMPARISON.rglob("*.*")}
    csv_tables.write(made, rows, losses(17, 18, 18))
    assert {path: path.read_bytes() for path in paths.COMPARISON.rglob("*.*")} == files
    assert {path.name for path in files} == {
        *("differences.svg", "ladder.svg", "gains.svg", "aspects.svg", "training.svg", "lengths.svg", "endings.svg"),
        *(
            "scores.csv",
            "seeds.csv",
            "specific.csv",
            "lines.csv",
            "aspects.csv",
            "slices.csv",
            "outputs.csv",
            "guards.csv",
        ),
        *("training.csv", "forgetting.csv", "baselines.csv", "beyond_source.csv"),
    }
    for path, drawing in files.items():
        if path.suffix == ".svg":
            assert drawing.startswith(b"<svg xmlns=")
            assert b"var(" not in drawing


def test_tables_hold_all_digits() -> None:
    tables = csv_tables.tables(several_seeds())
    [first, _] = list(csv.DictReader(csv_tables.text(tables["scores"]).splitlines()))
    assert (first["metric"], float(first["base"]), float(first["low"]), float(first["p"])) == (
        "rouge1",
        25.6,
        3.5,
        2e-4,
    )
    assert tables["guards"] == [{"rules_out": "a <doubled> BOS", "measured": "600 prompts | 1 BOS at most"}]
    [reference, *_] = tables["outputs"]
    assert (reference["variant"], reference["words"], reference["empty"]) == ("references", 22.2, None)


def test_no_text_but_an_aspect_is_in_a_figure() -> None:
    """A control character in one would end the process, so here it would fail every test."""
    nasty = "word \x1b\0\ufffe\ud800\u2028 constructor" * 9
    one = row(nasty, text=nasty, seeds=2)
    whole = replace(one.example, group=nasty, source=nasty, target=nasty, lead=nasty, references=[nasty, nasty])
    made = several_seeds()
    lines = [replace(made.lines[0], about=nasty)]
    made = replace(made, lines=lines, best=[], worst=[], published=[Published(metric="rouge1", value=1, about="a")])
    drawings = figures.all_of(made, [replace(one, example=whole)], losses(17, 18), figures.FILE)
    assert len(drawings) == 7
    assert not [name for name, figure in drawings.items() if "word" in re.sub("words", "", figure)]


def test_aspects_that_vega_cannot_draw_are_told_apart() -> None:
    made = comparison()
    names = ["constructor", "__proto__", "\U0001f600" * 50, "\U0001f600" * 51, "\U0001f600", "a" * 200, "plain"]
    aspects = [replace(made.aspects[0], name=name) for name in names]
    figure = figures.all_of(replace(made, aspects=aspects), [row("p")], losses(17), figures.FILE)["aspects"]
    shown = "".join(ElementTree.fromstring(figure).itertext())
    face = "\U0001f600"
    for label in ("1. constructor", "2. __proto__", f"3. {face * 6}…", f"4. {face * 6}…", f"{face}", "plain"):
        assert label in shown


def test_figures_of_extreme_rows() -> None:
    same = row("p", tuned=[row("p").base])
    for rows in ([same], [same, row("q", text="word " * 3000)], [row("p", text="")]):
        drawings = figures.all_of(comparison(aspects=[]), rows, losses(17), figures.FILE)
        assert "aspects" not in drawings
        assert "NaN" not in "".join(drawings.values())


@pytest.mark.parametrize(
    ("about", "step"), [(0, 1), (0.9, 1), (1, 1), (1.1, 2), (3, 5), (7, 10), (0.03, 0.05), (120, 200)]
)
def test_round_steps(about: float, step: float) -> None:
    assert figures._round_step(about) == pytest.approx(step)


def test_examples_are_read_in_the_order_of_the_test_split() -> None:
    rows = [Example(name, name, "", "s", "r", "s") for name in "ba"]
    write_rows(paths.split("test"), rows)
    decoding = Decoding("v", "p", "m", None, {}, "cpu", 1, "float32", {}, False, encoded(1))
    for variant in ("base", "tuned-17"):
        write_rows(
            paths.predictions(variant), [Prediction(name, "0", 1, f"{variant} {name}", 2, "length") for name in "ba"]
        )
        contracts.write(paths.decoding(variant), decoding)
        score_variant(variant, EVALUATE)
    [first, second] = side_by_side.read([17])
    assert (first.example.id, second.base.text, second.tuned[0].text) == ("b", "base a", "tuned-17 a")
    assert first.base.capped
    assert first.base.scores == {"rouge1": 0.0, "rouge2": 0.0}
    assert first.gain("rouge1") == 0


CLAIM = {
    "id": "two", "kind": "EXACT", "claim": "<i>2</i> is 2", "paper": "Anon", "place": "table 1",
    "published": {"n": 2.0}, "distance": None, "amended": None,
    "findings": [{"text": "n (3) = published.n (2)", "holds": False}], "verdict": "not reproduced",
    "seconds": 2.0,
}  # fmt: skip


def test_claims_are_shown_where_they_have_been_checked() -> None:
    assert "Paper results" not in render(content())
    other: dict[str, Any] = {
        "id": "three",
        "findings": [],
        "seconds": None,
        "distance": "a tenth",
        "amended": "after: & the bound",
    }
    text = render(content(claims=[CLAIM, CLAIM | other]))
    seen = Tags(text)
    assert [attributes["id"] for _, attributes in seen.tags if (attributes.get("id") or "").startswith("claim-")] == [
        "claim-two",
        "claim-three",
    ]
    shown = " ".join(" ".join(seen.text).split())
    assert "<i>2</i> is 2" in shown
    assert "✗ n (3) = published.n (2)" in shown
    assert shown.count("Changed ") == 1
    assert "Here: a tenth. Changed after: & the bound" in shown
    assert shown.count("not reproduced") == 2
    assert shown.count("table 1. Here: a tenth") == 1
