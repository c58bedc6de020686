"""The report says what the comparison found, in every place the same, and no text of a model gets out of its cell; the
page is tests/report/test_page.py's."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import contracts, paths
from pipeline.core.contracts import SharedGroups
from pipeline.core.errors import UserError
from pipeline.core.params import Published
from pipeline.record import track
from pipeline.report import figures, wording
from pipeline.score.comparison import Aspect, Pair, Specific
from pipeline.score.side_effects import Cost
from pipeline.score.significance import Interval
from tests.made.comparison import (
    DIALOGUE,
    FIRST,
    FORGETTING,
    NASTY,
    NOT_SPECIFIC,
    ORDER,
    SPECIFIC,
    TRAINING,
    comparison,
    result,
    several_seeds,
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_first_line_is_the_verdict_everywhere() -> None:
    wording.write(comparison())
    assert paths.COMPARISON_MD.read_text().split("\n")[0] == FIRST
    track.publish()
    printed = wording.closing_lines("sqlite:///here.db", "there/index.html")
    verdict, _, rest = printed.partition("\n\n")
    assert verdict.replace("\n", " ") == FIRST.replace("**", "")
    assert max(map(len, verdict.split("\n"))) <= wording.WIDTH
    assert rest.startswith("  report ")
    assert "mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///here.db" in printed
    assert "  report   there/index.html  (or reports/comparison.md)" in printed


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        ("http://host:5055", "  record   http://host:5055/#/experiments  (make ui)"),
        ("https://host/mlflow/#/experiments/7", "  record   https://host/mlflow/#/experiments/7  (make ui)"),
        ("databricks://profile", "  record   databricks://profile: the pages of your workspace"),
        (
            "postgresql://host/runs",
            "  record   mlflow ui --host 127.0.0.1 --backend-store-uri postgresql://host/runs  (make ui)",
        ),
        (
            "sqlite:////home/me/my project/.mlflow/mlflow.db",
            "  record   mlflow ui --host 127.0.0.1 --backend-store-uri "
            "'sqlite:////home/me/my project/.mlflow/mlflow.db'  (make ui)",
        ),
    ],
)
def test_a_server_is_shown_by_its_own_page_and_a_database_by_a_viewer(store: str, expected: str) -> None:
    wording.write(comparison())
    track.publish()
    assert wording.closing_lines(store, "page").split("\n")[-1] == expected


@pytest.mark.parametrize(
    ("verdict", "shown", "words"),
    [
        ("better", ("higher", "higher"), "Fine-tuning made the model better than the NF4 base"),
        (
            "partly-better",
            ("none", "higher"),
            "Fine-tuning made the model better than the NF4 base in ROUGE-2; no difference is shown in ROUGE-1",
        ),
        (
            "unspecific",
            ("higher", "higher"),
            "Fine-tuning raised ROUGE-1 and ROUGE-2 over the NF4 base, but not what is specific to the source",
        ),
        ("worse", ("lower", "lower"), "Fine-tuning made the model worse than the NF4 base"),
        (
            "partly-worse",
            ("lower", "none"),
            "Fine-tuning made the model worse than the NF4 base in ROUGE-1; no difference is shown in ROUGE-2",
        ),
        (
            "mixed",
            ("lower", "higher"),
            "The metrics disagree about fine-tuning: better than the NF4 base in ROUGE-2; worse in ROUGE-1",
        ),
        ("none", ("none", "none"), "No difference between the NF4 base and the tuned model is shown"),
        ("few", ("few", "few"), "No verdict: 100 groups of test examples are too few, and a verdict takes 10"),
    ],
)
def test_every_verdict_has_its_words(verdict: Any, shown: tuple[Any, Any], words: str) -> None:
    results = comparison().results
    results = {name: replace(results[name], direction=one) for name, one in zip(results, shown, strict=True)}
    wording.write(comparison(verdict=verdict, results=results))
    assert paths.COMPARISON_MD.read_text().startswith(f"**{words}**: ROUGE-1")


def test_a_margin_has_its_words() -> None:
    equivalent = comparison(verdict="equivalent", margin=1.5)
    assert wording.lead(equivalent) == "The tuned model is equivalent to the NF4 base, within ±1.5 points"
    assert wording.lead(comparison(margin=1.0)).endswith("better than the NF4 base, by at least 1 points")
    assert wording.lead(comparison(margin=2.0)).endswith("better than the NF4 base")
    results = {name: result(10, 6, -5, -3) for name in comparison().results}
    assert wording.lead(comparison(verdict="worse", margin=2.0, results=results)).endswith("by at least 2 points")
    assert "two one-sided tests" in " ".join(wording.method(equivalent))


@pytest.mark.parametrize(("groups", "said"), [(29, " (on only 29 groups of test examples)"), (30, "")])
def test_few_groups_are_in_the_first_sentence(groups: int, said: str) -> None:
    assert wording.lead(comparison(groups=groups)) == f"Fine-tuning made the model better than the NF4 base{said}"


class TestSpecific:
    """How much of the gain is specific to the source is told in the second sentence."""

    def test_of_all_rows_and_of_aspects(self) -> None:
        assert wording.specific(comparison()) == FIRST.split("groups. ")[1].partition(" Against")[0]

    def test_of_one_metric_alone(self) -> None:
        part = Specific(None, 300, 100, {"rouge1": SPECIFIC["rouge1"], "rouge2": NOT_SPECIFIC["rouge2"]})
        assert wording.specific(comparison(specific=[part])) == (
            "Specific to the source is +3.7 (+2.3 to +5.2) in ROUGE-1: that much is lost when each output is held "
            "against the references of other sources. No gain is shown to be specific to the source: +0.6 (−1.2 to "
            "+2.4) in ROUGE-2."
        )

    def test_lost(self) -> None:
        lost = replace(SPECIFIC["rouge1"], gain=Interval(-4.0, -5.0, -3.0), direction="lower")
        part = Specific(None, 300, 100, {"rouge1": lost, "rouge2": lost})
        assert wording.specific(comparison(specific=[part])) == (
            "Less is specific to the source than before: −4.0 (−5.0 to −3.0) in ROUGE-1 and −4.0 (−5.0 to −3.0) in "
            "ROUGE-2."
        )

    def test_of_many_aspects_is_counted(self) -> None:
        aspects = [Specific(f"a{i}", 10, 10, NOT_SPECIFIC) for i in range(8)]
        text = wording.specific(comparison(specific=[Specific(None, 300, 100, SPECIFIC), *aspects]))
        assert text.endswith("For 8 of 8 aspects no specific gain is shown.")

    def test_is_left_out_where_it_is_not_known(self) -> None:
        assert wording.specific(comparison(specific=[])) == ""
        assert wording.specific(comparison(verdict="few")) == ""
        wording.write(comparison(specific=[]))
        assert "pecific" not in paths.COMPARISON_MD.read_text()


def test_groups_and_seeds_are_named_only_where_they_say_something() -> None:
    assert wording.basis(comparison(n=100)).endswith("over 100 test examples.")
    assert wording.basis(several_seeds()).endswith("of 100 groups, mean of 3 seeds.")


def test_with_several_seeds_both_kinds_of_chance_are_shown_and_the_wider_interval_decides() -> None:
    wording.write(several_seeds())
    text = paths.COMPARISON_MD.read_text()
    assert "ROUGE-2 7.8 → 10.5 (+2.7, −0.1 to +5.5)" in text
    assert "| ROUGE-1 | +5.7 | +4.1 to +7.2 | 0.30 | +3.5 to +7.9 |" in text
    wording.write(comparison())
    assert "Two kinds of chance" not in paths.COMPARISON_MD.read_text()


def test_the_size_of_the_test_set_is_judged() -> None:
    # 2.2 points with 100 groups: 1 point needs 2.2 squared as many.
    assert wording.power(comparison()) == (
        "Such a comparison finds a true difference of 2.2 points in ROUGE-1 and 2.2 points in ROUGE-2 in 80 % of "
        "repetitions; to find 1 point in each of them takes about 485 groups of examples (here 100)."
    )
    wording.write(comparison())
    assert wording.power(comparison()) in paths.COMPARISON_MD.read_text()


def test_an_aspect_without_a_shown_difference_says_so() -> None:
    wording.write(comparison())
    text = paths.COMPARISON_MD.read_text()
    assert "| +4.1 to +7.2 | ≤ 0.001 | tuned higher |" in text
    assert "| +1.2 to +3.9 | 0.200 | no difference shown |" in text


def test_published_figures_stand_beside_the_result() -> None:
    given = [
        Published(metric="rouge1", value=53.8, about="LoRA, Table 4: GPT-3 | SAMSum"),
        Published(metric="chrf", value=60.0, about="another paper"),
    ]
    wording.write(comparison(published=given))
    text = paths.COMPARISON_MD.read_text()
    assert "| ROUGE-1 | 53.8 | 31.3 | LoRA, Table 4: GPT-3 \\| SAMSum |" in text
    assert "| chrF | 60.0 | not computed | another paper |" in text


def test_drawn_answers_are_told_with_how_much_they_vary() -> None:
    one = comparison()
    assert not any("drawn" in sentence for sentence in wording.method(one))
    drawing = {"samples": 4, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "seed": 5}
    base, tuned = (
        replace(side, samples=4, samples_sd={"rouge1": sd}) for side, sd in ((one.base, 0.31), (one.tuned[0], 1.2))
    )
    decoding = one.decoding | {"generation": {"sampling": drawing}}
    found = comparison(base=base, tuned=[tuned], decoding=decoding)
    [said] = [sentence for sentence in wording.method(found) if "drawn" in sentence]
    assert said == (
        "Answers are drawn (temperature 0.7, top-k 0, top-p 0.9, min-p 0, seed 5), and each row's score is the mean "
        "over 4; texts that are shown are the first ones. From one draw of all answers to the next, ROUGE-1 varies by "
        "0.3 for base and 1.2 for tuned-17 (standard deviation)."
    )


def test_outputs_in_another_language_are_told() -> None:
    one = comparison()
    found = comparison(
        language="en",
        references_in_language=0.8,
        baselines=[],
        base=replace(one.base, in_language=0.3),
        tuned=[replace(one.tuned[0], in_language=0.75)],
    )
    assert "30 % of the outputs of base are identified as en, against 80 % of the references." in wording.caveats(found)
    assert not any("tuned-17 are identified" in caveat for caveat in wording.caveats(found))
    wording.write(found)
    assert "| base | 49.2 | 1 % | 0 % | 0 % | 30 % |" in paths.COMPARISON_MD.read_text()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-1, 2, " against the base without quantization, so no difference between the two is shown."),
        (0.1, 2, " against the base without quantization."),
    ],
)
def test_the_untrained_variants_of_the_base_are_compared_with_each_other(low: float, high: float, said: str) -> None:
    one = comparison()
    ahead = {"rouge1": result(26.7, 27.2, low, high), "rouge2": result(7.3, 7.0, -2, 1)}
    shots = replace(one.baselines[0], label="the base with 3 demonstrations", ahead=ahead)
    found = comparison(baselines=[*one.baselines, shots])
    text = wording.between_baselines(found)
    assert text.startswith("The base with 3 demonstrations scores +0.5 (")
    assert text.endswith(f"in ROUGE-1 and −0.3 (−2.0 to +1.0) in ROUGE-2{said}")
    wording.write(found)
    assert text in paths.COMPARISON_MD.read_text()
    assert wording.between_baselines(one) == ""


def test_a_gain_that_an_untrained_base_has_too_is_told() -> None:
    one = comparison()
    shots = replace(one.baselines[0], label="the base with 3 demonstrations", n=300, groups=100)
    shots = replace(shots, tuned={"rouge1": result(31.0, 31.3, -1, 2), "rouge2": result(7.0, 10.5, 1, 6)})
    found = comparison(baselines=[*one.baselines, shots])
    assert wording.over_baselines(found).endswith(
        "Against the base with 3 demonstrations the difference is +0.3 (−1.0 to +2.0) in ROUGE-1 and +3.5 (+1.0 to "
        "+6.0) in ROUGE-2."
    )
    said = [one for one in wording.caveats(found) if "demonstrations" in one]
    assert said == [
        "Tuned is not shown to be better than the base with 3 demonstrations in ROUGE-1: +0.3 (−1.0 to +2.0), over 100 "
        "groups."
    ]
    wording.write(found)
    text = paths.COMPARISON_MD.read_text()
    row = "| the base without quantization | 150 | ROUGE-1 | 24.9 | 26.7 | +1.8 (+0.3 to +3.3) | +6.1 | +3.8 to +8.4 |"
    assert row in text
    assert "| tuned-17 | 5 of 20 (25 %) | 300 of 1,000 (30 %) | 40 of 50 (80 %) |" in text
    assert "| references | none | 400 of 1,200 (33 %) |" in text


def test_notices_of_the_scores_are_to_be_read_with_care() -> None:
    assert "Seven per cent are foreign." in wording.caveats(comparison(notices=["Seven per cent are foreign."]))


def test_guards_stand_in_the_report_with_what_they_measured() -> None:
    wording.write(comparison())
    text = paths.COMPARISON_MD.read_text(encoding="utf-8")
    assert "| a &lt;doubled&gt; BOS | 600 prompts \\| 1 BOS at most |" in text


def test_closing_lines_without_a_report() -> None:
    with pytest.raises(UserError, match="run `dvc repro`"):
        wording.closing_lines("x", "y")


def test_equal_comparisons_give_equal_bytes() -> None:
    files = [paths.METRICS, paths.COMPARISON_MD, paths.COMPARISON_SVG]
    wording.write(comparison())
    before = [path.read_bytes() for path in files]
    wording.write(comparison())
    assert [path.read_bytes() for path in files] == before
    assert sorted([*paths.COMPARISON.iterdir(), *paths.REPORTS.iterdir()]) == sorted(files)


def leaves(content: Any) -> Iterator[Any]:
    if isinstance(content, dict):
        for value in content.values():
            yield from leaves(value)
    else:
        yield content


def test_metrics_hold_numbers_only() -> None:
    wording.write(several_seeds())
    content = json.loads(paths.METRICS.read_text())
    numbers = list(leaves(content))
    assert len(numbers) > 30
    assert all(type(value) in (int, float) for value in numbers)
    assert content["rouge1"] == {
        "base": 25.6,
        "tuned": 31.3,
        "diff": pytest.approx(5.7),
        "ci_low": 3.5,
        "ci_high": 7.9,
        "p": 0.0002,
        "effect": 0.41,
        "effect_of_rows": 0.22,
        "detectable": 2.2,
        "wins": 0.7,
        "ties": 0.1,
        "losses": 0.2,
        "seed_sd": 0.3,
        "specific": {"diff": 3.7, "ci_low": 2.3, "ci_high": 5.2, "p": 0.0002},
    }
    assert content["lines"]["lead"]["rouge2_ci_low"] == 3
    assert "seed_sd" not in wording.metrics(comparison())["rouge1"]


def test_a_number_that_is_none_stops_the_report() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        wording.write(comparison(reference_words=float("nan")))


def test_line_breaks_are_replaced_as_the_plain_expression_does() -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choices(("a", "|", " ", "   ", "\t", "\n", "\r\n", "\u2028", "\xa0", "\x1c", "\x00"), k=9))
        once = wording.shown(text).replace("|", r"\|")
        assert wording.markdown(text) == (re.sub(r"\s*\n\s*", "<br>", once) or "*(empty)*"), text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b <c>", "`a_b <c>`"),
        ("a`b", "<code>a\\`b</code>"),
        ("a|b", "<code>a\\|b</code>"),
        ("a\r\nb", "<code>a<br>b</code>"),
        ("a\0\ud800", "`a\ufffd\ufffd`"),
        (" ", "<code>*(empty)*</code>"),
    ],
)
def test_code_ends_where_it_should(text: str, shown: str) -> None:
    assert wording.code(text) == shown


def test_markdown_keeps_foreign_text_in_its_cell() -> None:
    nasty = Pair(NASTY, NASTY, NASTY, NASTY, NASTY, 1.0, 2.0)
    wording.write(
        comparison(
            best=[nasty],
            worst=[nasty],
            aspects=[Aspect(NASTY, 3, comparison().results, {"rouge1": 1.0, "rouge2": 1.0})],
        )
    )
    text = paths.COMPARISON_MD.read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert len(tables) == 13
    for table in tables:
        # as GitHub splits rows: at bars that no backslash escapes
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert not re.search(r"<(?!br>)|https?://", text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, state-of-the-art (yes) 1.5!", "plain, state-of-the-art (yes) 1.5!"),
        ("a|b", r"a\|b"),
        ("a\n\n b", "a<br>b"),
        ("a\r\nb\u2028c", "a<br>b<br>c"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("`x` *y* _z_ ~w~ $m$ [l](u) \\", r"\`x\` \*y\* \_z\_ \~w\~ \$m\$ \[l\](u) \\"),
        ("http://x www.y.z a@b", "http&#58;&#47;&#47;x www&#46;y.z a&#64;b"),
        ("  ", "*(empty)*"),
    ],
)
def test_markdown_escapes(text: str, shown: str) -> None:
    assert wording.markdown(text) == shown


def test_html_escapes() -> None:
    assert wording.html("<i>&\"' http://x") == "&lt;i&gt;&amp;&#34;&#39; http&#58;//x"
    assert wording.html(" ") == "<em>(empty)</em>"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(5.74, "+5.7"), (-1.26, "−1.3"), (0.0, "+0.0"), (0.04, "+0.04"), (-0.04, "−0.04"), (0.1, "+0.1")],
)
def test_signed(value: float, shown: str) -> None:
    assert wording.signed(value) == shown


def test_rows_that_were_not_scored_are_to_be_read_with_care() -> None:
    found = comparison(not_scored={"message with tool_calls": 1200, "fuzzy entries": 2})
    told = (
        "Not all that the files of the test split hold was scored. Left out are: fuzzy entries (2), message with "
        "tool_calls (1,200)."
    )
    assert told in wording.caveats(found)
    wording.write(found)
    care = paths.COMPARISON_MD.read_text().partition("## Read with care")[2]
    assert "fuzzy entries (2), message with tool" in care.partition("\n## ")[0]
    assert not any("scored" in one for one in wording.caveats(comparison()))


def test_caveats() -> None:
    assert len(wording.caveats(comparison())) == 1
    assert "One training seed" in wording.caveats(comparison())[0]
    one = comparison()
    close = replace(one.lines[0], ahead={"rouge1": Interval(1, -0.5, 2), "rouge2": Interval(4.5, 3, 6)})
    found = wording.caveats(
        comparison(lines=[close], groups=12, base=replace(one.base, stopped_by_cap=0.2), tuned=one.tuned * 2)
    )
    assert [sentence.split(":")[0][:45] for sentence in found] == [
        "Tuned is not shown to be ahead of the referen",
        "20 % of the outputs of base were stopped by t",
        "Two training seeds say little about their spr",
    ]
    # a line that tuned does not pass matters only to a claim of better
    assert not any("ahead" in sentence for sentence in wording.caveats(comparison(lines=[close], verdict="mixed")))


def test_cut_prompts_and_thoughts_are_to_be_read_with_care() -> None:
    one = comparison()
    cut = {
        "train": replace(one.encoded["train"], cut=12, lost=1234, thoughts=7),
        "validation": one.encoded["validation"],
        "test": replace(one.encoded["test"], cut=3, lost=40),
    }
    tuned = [replace(one.tuned[0], thoughts=2)]
    odd = replace(one, encoded=cut, base=replace(one.base, thoughts=290), tuned=tuned)
    assert wording.caveats(odd)[:-1] == [
        "12 of 300 training prompts were cut to prompt.max_tokens: they lost 1,234 tokens.",
        "3 of 300 test prompts were cut to prompt.max_tokens: they lost 40 tokens.",
        "7 of 300 training answers hold a thought or its mark, which the model is trained to write.",
        "290 of 300 outputs of base hold a thought or its mark, and are scored with it (prompt.thinking is false).",
        "2 of 300 outputs of tuned-17 hold a thought or its mark, and are scored with it (prompt.thinking is false).",
    ]
    wording.write(odd)
    text = paths.COMPARISON_MD.read_text(encoding="utf-8")
    assert "- 290 of 300 outputs of base hold a thought" in text
    assert "prompt.thinking false" in text


def test_what_the_data_shares_between_splits_is_to_be_read_with_care() -> None:
    shared = [
        SharedGroups("test", "train", 4, 4, ["<c0>", "c1"]),
        SharedGroups("validation", "train", 1, 9, ["c1"]),
        SharedGroups("test", "validation", 2, 4, ["c1"]),
    ]
    said = wording.caveats(comparison(shared_groups=shared))
    assert [one for one in said if "as well" in one] == [
        "4 of 4 test groups are in train as well: tuned may score by what it knows of them, so the gain on new groups "
        "may be smaller.",
        "1 of 9 validation groups is in train as well: the validation loss may be too low for new groups.",
        "2 of 4 test groups are in validation as well: what was chosen by the validation loss was chosen on groups of "
        "the test split.",
    ]
    wording.write(comparison(shared_groups=shared))
    assert "- 4 of 4 test groups are in train as well: " in paths.COMPARISON_MD.read_text()
    assert not any("as well" in one for one in wording.caveats(comparison()))


def test_references_in_another_normal_form_are_to_be_read_with_care() -> None:
    [said] = [one for one in wording.caveats(comparison(not_nfc=3)) if "NFC" in one]
    assert said.startswith("3 of 300 test rows have references that are not in the normal form NFC.")
    assert not any("NFC" in one for one in wording.caveats(comparison()))


def test_the_chart_stands_alone_in_a_file() -> None:
    wording.write(comparison())
    drawing = paths.COMPARISON_SVG.read_text()
    assert drawing.startswith("<svg")
    assert "var(" not in drawing
    assert all(
        label in drawing for label in ("ROUGE-1", "ROUGE-2", "Base", "Tuned", "Lead", "other sources", "95 % intervals")
    )


def test_inline_svg_drops_namespaces_and_height() -> None:
    document = (
        '<svg class="m" xmlns="x" xmlns:xlink="y" version="1.1" width="9" height="8" viewBox="0 0 9 8"><g/></svg>'
    )
    assert figures.inline(document) == '<svg class="m" version="1.1" width="9" viewBox="0 0 9 8"><g/></svg>'


# What it cost


def test_what_it_cost_is_in_the_report_and_in_the_numbers() -> None:
    wording.write(comparison())
    text = paths.COMPARISON_MD.read_text()
    for line in (
        "4,884,480 trainable parameters, an adapter of 19,600,000 bytes.",
        "| encyclopedia: loss | 2.900 | 2.895 | −0.005 | −0.012 to +0.002 | 0.400 |",
        "| perplexity | 18.2 | 18.0 | −0.2 | | |",
        "| cross-entropy against the base's distribution | 2.900 | 2.950 | +0.050 (KL) | +0.040 to +0.060 | |",
        "| dialogue: loss | 3.100 | 3.110 | +0.010 | −0.020 to +0.040 | 0.600 |",
        "| 17 | 1 | 3.552 | 2.748 after 1 epoch | 2.748 after 1 epoch | 2.701 | +0.047 |",
        "- encyclopedia: 8,192 tokens of 33 texts of pip:texts==1/texts, read without a chat template, in windows of "
        "128 tokens, each with a BOS first; intervals over texts",
        "- dialogue: 1,024 tokens of 80 conversations of pip:talks==1/talks, read through the chat template, in "
        "conversations of at most 256 tokens, of which the last answer counts; intervals over conversations",
    ):
        assert f"\n{line}" in text
    assert "; intervals over texts\n- dialogue: 1,024" in text
    assert "; intervals over conversations\n\n| probe | base |" in text
    assert "Losses are in nats a token; p is corrected for 2 probes (Holm)." in text
    numbers = json.loads(paths.METRICS.read_text())["cost"]
    found = numbers["general_loss"]
    assert list(found) == ["dialogue", "encyclopedia"]
    assert found["encyclopedia"] | {"base": 2.9, "diff": -0.005, "kl_ci_high": 0.06} == found["encyclopedia"]
    assert found["dialogue"] | {"p": 0.3, "p_holm": 0.6} == found["dialogue"]
    assert (numbers["gap"], numbers["validation_loss"], numbers["adapter_bytes"]) == (0.047, 2.748, 19_600_000)
    assert not any(word in text for word in ("on the probe", "past its best"))


def test_a_probe_that_was_forgotten_and_training_gone_too_far_are_to_be_read_with_care() -> None:
    late = replace(TRAINING, epochs=3.0, kept_epoch=3.0, kept_loss=2.9, last_loss=2.9)
    forgot = replace(DIALOGUE, tuned_loss=3.4, diff=Interval(0.3, 0.2, 0.4), p_holm=0.0004, direction="higher")
    few = replace(FORGETTING, name="own", groups=6, direction="few")
    found = wording.caveats(comparison(cost=Cost(1000, 4000, [late], [FORGETTING, forgot, few])))
    assert (
        "Fine-tuning made the model worse at text that is not of the task, on the probe dialogue: 3.100 → 3.400 nats a "
        "token (+0.300, +0.200 to +0.400), a perplexity of 18.2 → 18.0."
    ) in found
    assert [one for one in found if "on the probe" in one][1:] == [
        "Whether fine-tuning made the model worse on the probe own cannot be shown: 6 texts are too few, 10 are needed "
        "at least."
    ]
    assert (
        "The adapter is trained past its best: the validation loss was 2.748 after 1 epoch and is 2.900 after 3 "
        "epochs, which is what was kept. train.early_stopping keeps the best."
    ) in found
    kept = replace(late, kept_loss=2.748, kept_epoch=1.0)
    assert not any("past its best" in one for one in wording.caveats(comparison(cost=Cost(1, 1, [kept], [FORGETTING]))))


def test_forgetting_that_was_not_measured_is_said() -> None:
    one = comparison(cost=Cost(1000, 4000, [replace(TRAINING, steps=20)], []))
    wording.write(one)
    text = paths.COMPARISON_MD.read_text()
    assert "Forgetting was not measured: `forget.probes` is empty." in text
    assert "- Forgetting was not measured (forget.probes is empty)" in text
    assert "| 17 | 1 (stopped early) | " in text
    assert "general_loss" not in json.loads(paths.METRICS.read_text())["cost"]


def test_what_the_order_of_the_references_says_is_said_as_it_is() -> None:
    wording.write(comparison())
    text, numbers = paths.COMPARISON_MD.read_text(), json.loads(paths.METRICS.read_text())
    said = text.partition("## Contamination\n\n")[2].partition("\n")[0]
    assert "the references of 8 groups, in 2 shards, in the order of the files and in 2 shuffled orders" in said
    assert "minus that shuffled, is +0.002 nats a token; one-sided p 0.310. This is no sign" in said
    assert "It does not show that the texts were unseen: the test finds a memorized order alone" in said
    assert numbers["contamination"] == {"diff": 0.0021, "p": 0.31, "shards": 2}
    assert "in pretraining, unless the files are sorted" not in text
    known = comparison(
        contamination=contracts.Contamination("b" * 64, tested=replace(ORDER, difference=0.05, p=0.0004))
    )
    wording.write(known)
    text = paths.COMPARISON_MD.read_text()
    care, said = text.partition("## Contamination\n\n")[::2]
    assert "(one-sided p ≤ 0.001): it may have seen them in pretraining, unless the files are sorted." in care
    assert "Either it has seen these files in pretraining, and the scores of base and tuned may rest on memory" in said


def test_a_test_of_the_order_that_was_not_made_has_no_p() -> None:
    wording.write(comparison(contamination=contracts.Contamination("b" * 64, not_tested="contamination.shards is 0")))
    said = paths.COMPARISON_MD.read_text().partition("## Contamination\n\n")[2].partition("\n")[0]
    assert said == (
        "Whether the base has seen the test references in pretraining was not tested: contamination.shards is 0."
    )
    assert "contamination" not in json.loads(paths.METRICS.read_text())


def test_a_small_difference_of_losses_keeps_its_sign() -> None:
    assert [wording.change(value) for value in (0.0, 0.00012, -0.00012, 0.25)] == [
        "+0.000",
        "+0.00012",
        "−0.00012",
        "+0.250",
    ]
