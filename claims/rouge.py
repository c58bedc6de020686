"""Claims about ROUGE: ours is the paper's (Lin 2004), and stemming raises it (Grusky 2023)."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np

from claims import evidence, lab, resampling
from claims.evidence import Evidence
from pipeline.core import records
from pipeline.core.params import Evaluate
from pipeline.core.records import Example
from pipeline.core.text import sentences
from pipeline.score import metrics

Words = tuple[str, ...]

PAIRS = 1000
LONGEST = 12
"""Words in the longest random text: enough for several longest common subsequences."""
POLICE = "police killed the gunman"
"""The reference S1 of Lin 2004, section 3.1, and its candidates S2 to S4."""
CANDIDATES = {"s2": "police kill the gunman", "s3": "the gunman kill police", "s4": "the gunman police killed"}


def parity() -> Evidence:
    """The paper's worked examples, a known rougeLsum, and random texts against counts made here."""
    values: dict[str, evidence.Value] = {}
    for name, text in CANDIDATES.items():
        values[f"rouge2_{name}"] = _score("rouge2", text, POLICE)
        values[f"rouge_l_{name}"] = _score("rougeL", text, POLICE)
    reference, text = "w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"
    anchor = _score("rougeLsum", text, reference)
    # F1 is twice the hits over both lengths. So it yields the hits, and these yield precision and recall.
    written, wanted = len(text.split()), len(reference.split())
    hits = anchor / 100 * (written + wanted) / 2
    values |= {"rouge_lsum": anchor, "rouge_lsum_precision": hits / written, "rouge_lsum_recall": hits / wanted}
    draw = random.Random(17)
    pairs = [(_words(draw), _words(draw)) for _ in range(PAIRS)]
    expected: dict[str, Callable[[Words, Words], float]] = {
        "rouge1": partial(_by_grams, n=1),
        "rouge2": partial(_by_grams, n=2),
        "rougeL": _by_subsequence,
        "rougeLsum": _by_subsequence,  # the same, for texts of one sentence
    }
    for name, count in expected.items():
        found = _each(name, [" ".join(one) for one, _ in pairs], [[" ".join(other)] for _, other in pairs], stem=False)
        values[f"{name.lower()}_difference"] = float(np.abs(found - [count(*pair) for pair in pairs]).max())
    return Evidence(
        values,
        [
            f"{PAIRS:,} pairs of random texts of 1 to {LONGEST} words. ROUGE-1.5.5 itself, a Perl program, is not run: "
            "the anchors are the paper's and those that the package's own tests hold against it."
        ],
    )


def stemming() -> Evidence:
    """ROUGE of the first sentence, and of the first three, of each abstract, with stemming and without."""
    experiment = lab.experiment()
    given = experiment.compare
    rows = records.read_rows(lab.data("default") / "test.jsonl", Example)
    groups = [row.group for row in rows]
    values: dict[str, evidence.Value] = {}
    for lead in (1, 3):
        texts = [" ".join(sentences(row.source)[:lead]) for row in rows]
        for name in ("rouge1", "rouge2", "rougeL"):
            plain, stemmed = (_scores(name, texts, rows, stem) for stem in (False, True))
            rises = stemmed - plain
            label = f"lead{lead}_{name.lower()}"
            values[f"{label}_without"], values[f"{label}_with"] = float(plain.mean()), float(stemmed.mean())
            values[f"{label}_rise"] = resampling.over_texts(
                float(rises.mean()), rises[:, None], groups, lambda sums_bx1, rows_b: sums_bx1[:, 0] / rows_b, given
            )
    return Evidence(
        values,
        [f"{len(rows)} summaries of {len(set(groups))} papers; intervals by a paired bootstrap over papers."],
    )


def _evaluate(name: str, stem: bool) -> Evaluate:
    given = {"metrics": [name], "use_stemmer": stem, "rouge_tokenizer": "latin", "bleu_tokenizer": "13a"}
    return Evaluate.model_validate(given | {"split": "test", "bertscore": None, "language": None, "normal_form": "NFC"})


def _score(name: str, text: str, reference: str) -> float:
    return float(_each(name, [text], [[reference]], stem=False)[0])


def _scores(name: str, texts: Sequence[str], rows: Sequence[Example], stem: bool) -> metrics.Floats:
    return _each(name, texts, [row.references for row in rows], stem)


def _each(name: str, texts: Sequence[str], references: Sequence[Sequence[str]], stem: bool) -> metrics.Floats:
    [metric] = metrics.chosen(_evaluate(name, stem))
    return metric.each(metric.statistics(texts, references))


def _words(draw: random.Random) -> Words:
    return tuple(draw.choices(["w1", "w2", "w3", "w4", "w5", "w6"], k=draw.randint(1, LONGEST)))


def _by_grams(one: Words, other: Words, n: int) -> float:
    """F1 of the common n-grams, each counted as often as both texts have it (Lin 2004, section 2)."""
    written, wanted = (Counter(text[at : at + n] for at in range(len(text) - n + 1)) for text in (one, other))
    return _f1((written & wanted).total(), written.total(), wanted.total())


def _by_subsequence(one: Words, other: Words) -> float:
    """F1 of the longest common subsequence (Lin 2004, section 3.1)."""
    return _f1(_common(one, other), len(one), len(other))


def _f1(hits: int, written: int, wanted: int) -> float:
    return 200 * hits / (written + wanted) if hits else 0.0


@cache
def _common(one: Words, other: Words) -> int:
    """Length of the longest common subsequence, by its recursive definition."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return _common(one[:-1], other[:-1]) + 1
    return max(_common(one[:-1], other), _common(one, other[:-1]))


if __name__ == "__main__":
    evidence.main({"rouge-parity": parity, "stemming": stemming})
