"""The report as one offline page, `reports/index.html`: verdict, figures, every test example, guards, costs, lineage.

It needs no network: it contains its style, script and data, and its Content-Security-Policy admits only these, by hash.
Texts of models and data are never trusted: Jinja escapes them, and the script turns them only into text nodes. Times,
memory, commit and versions differ between machines, so the page is neither an output of DVC nor in git. The last stage
writes it whenever it runs. Its last line is a seal, the digest of all lines above.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import BaseFacts, Cost, DataCard, QuantizedFacts, TrainingSummary
from pipeline.core.records import Example
from pipeline.core.text import words
from pipeline.record import costs, identity, track
from pipeline.record.looks import Looks
from pipeline.record.origin import Origin
from pipeline.report import csv_tables, curves, figures, wording
from pipeline.report.marks import Mark, Splitter, closest, shared, splitter
from pipeline.score import side_by_side
from pipeline.score.comparison import Comparison
from pipeline.score.metrics import ANSWERS, LABELS
from pipeline.score.side_by_side import Row, Written

SEAL = "<!-- sha256 of all lines above: {} -->\n"
DIGEST = '<meta name="lora-repro-digest" content="{}">'

SIGNS = {
    "better": "▲",
    "partly-better": "△",
    "unspecific": "△",
    "worse": "▼",
    "partly-worse": "▽",
    "mixed": "◆",
    "equivalent": "≈",
    "none": "=",
    "few": "?",
}


@dataclass(frozen=True, slots=True)
class Content:
    """Everything that the page shows. `training` has one entry a seed; `costs` has None for a stage from a cache."""

    comparison: Comparison
    rows: list[Row]
    training: list[TrainingSummary]
    costs: dict[str, Cost | None]
    origin: Origin
    card: DataCard
    base: BaseFacts
    quantized: QuantizedFacts
    figures: dict[str, str] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)
    """The content of `reports/claims.json`, which is about papers, not about this experiment."""
    looks: Looks | None = None


def write(seeds: Sequence[int], evaluate: params.Evaluate, explorer: int, seen: Looks | None = None) -> None:
    """Write `paths.REPORT_HTML` for the experiment in the working directory. UserError for missing outputs.

    The page contains at most `explorer` test examples. `seen` are the looks at the test split, if they are known.
    """
    records.write_text(paths.REPORT_HTML, render(replace(gather(seeds), looks=seen), evaluate, explorer))


def gather(seeds: Sequence[int]) -> Content:
    """Read the page's content from the stages' outputs, `dvc.lock`, git and this machine. UserError as `write`."""
    comparison, rows = Comparison.read(), side_by_side.read(seeds)
    return Content(
        comparison=comparison,
        rows=rows,
        training=[contracts.read(paths.training_summary(seed), TrainingSummary) for seed in seeds],
        costs=costs.of_stages(seeds),
        origin=Origin.read(seeds),
        card=contracts.read(paths.DATA_CARD, DataCard),
        base=contracts.read(paths.BASE_FACTS, BaseFacts),
        quantized=contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts),
        figures=figures.all_of(comparison, rows, curves.read(seeds), figures.PAGE),
        claims=records.read_json(paths.CLAIMS) if paths.CLAIMS.exists() else [],
    )


# Rendering


def render(content: Content, evaluate: params.Evaluate, explorer: int) -> str:
    """The whole page with its seal. Equal contents give equal bytes."""
    environment = wording.environment()
    css = (wording.TEMPLATES / "page.css").read_text(encoding="utf-8")
    script = (wording.TEMPLATES / "page.js").read_text(encoding="utf-8")
    comparison = content.comparison
    split = splitter(comparison.decide_by[0], evaluate)
    held = chosen(content, explorer)
    environment.filters |= {"marked": marked, "size": size, "duration": duration}
    page = environment.get_template("index.html.jinja").render(
        wording.of_both(comparison),
        content=content,
        o=content.origin,
        sign=SIGNS[comparison.verdict],
        figures={name: Markup(figures.inline(drawing)) for name, drawing in content.figures.items()},
        strips=strips(comparison),
        extremes=_extremes(content, split),
        total=len(content.rows),
        held=len(held),
        data_sources=list(zip(_listed(content.card.source), _listed(content.card.sha256), strict=True)),
        base_name=content.base.source.rstrip("/").rpartition("/")[2],
        meters=list(dict.fromkeys(cost.energy_meter for cost in content.costs.values() if cost and cost.energy_meter)),
        whole_time=_whole_time(content.costs),
        params_yaml=Markup("\n") + wording.html(content.origin.params_yaml),
        files=csv_tables.tables(comparison),
        data=Markup(embedded(_data(content, held, split))),
        words=_words(comparison.decide_by[0], evaluate),
        reproduction=content.origin.commands(),
        css=Markup(css),
        script=Markup(script),
        css_hash=_hash(css),
        script_hash=_hash(script),
        digest_meta=Markup(DIGEST.format(content.origin.digest)),
    )
    return page + SEAL.format(records.sha256_text(page))


def chosen(content: Content, most: int) -> list[int]:
    """The numbers of the rows that the explorer holds: all, or `most`, with the best and worst and evenly spread
    ones."""
    n = len(content.rows)
    if n <= most:
        return list(range(n))
    extreme = {pair.id for pair in (*content.comparison.best, *content.comparison.worst)}
    kept = [i for i, row in enumerate(content.rows) if row.example.id in extreme][:most]
    held = set(kept)
    others = [i for i in range(n) if i not in held]
    room = most - len(kept)
    return sorted(kept + [others[k * len(others) // room] for k in range(room)])


def embedded(content: Any) -> str:
    """JSON that is safe in a script element of HTML: it contains nothing like a tag, a comment or an address."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029\ufeff":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.replace("//", "\\/\\/")


def marked(text: str, marks: Sequence[Mark]) -> Markup:
    """A text as HTML with its marks, escaped like `wording.html`."""
    parts, position = [], 0
    for mark in marks:
        parts.append(escape(text[position : mark.start]))
        parts.append(Markup('<mark class="m{}">{}</mark>').format(mark.level, text[mark.start : mark.end]))
        position = mark.end
    parts.append(escape(text[position:]))
    return Markup(Markup("").join(parts).replace("://", "&#58;//")) or Markup("<em>(empty)</em>")


def size(count: float) -> str:
    """Bytes in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """A time in one or two units."""
    whole = round(seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _whole_time(costs: Mapping[str, Cost | None]) -> float | None:
    """The seconds of all stages together; None if one of them came from a cache."""
    known = [cost.seconds for cost in costs.values() if cost is not None]
    return sum(known) if len(known) == len(costs) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def strips(comparison: Comparison) -> list[dict[str, Any]]:
    """Each deciding metric's interval on one scale from 0 to 100, for the strip below its figure."""
    intervals = [comparison.results[name].deciding for name in comparison.decide_by]
    low, high = min(0.0, *(one.low for one in intervals)), max(0.0, *(one.high for one in intervals))
    width = (high - low) * 1.08 or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low + width * 0.037) / width, 2)

    return [
        {
            "name": name,
            "result": comparison.results[name],
            "zero": place(0),
            "low": place(one.low),
            "high": place(one.high),
            "value": place(comparison.results[name].diff.value),
        }
        for name, one in zip(comparison.decide_by, intervals, strict=True)
    ]


def _words(name: str, evaluate: params.Evaluate) -> str:
    """Which words are marked, for a sentence of the page."""
    if name == "chrf":
        return "words, as written, that both have; chrF itself counts characters"
    label = LABELS[name] if name in ("bleu", *ANSWERS) else "ROUGE"
    stemmed = evaluate.use_stemmer and label == "ROUGE"
    return f"words that {label} counts as shared" + (" (compared by their stems)" if stemmed else "")


# The examples


def _extremes(content: Content, split: Splitter) -> list[dict[str, Any]]:
    """The best and the worst examples with their marks."""
    comparison = content.comparison
    by_id = {row.example.id: row for row in content.rows}
    found = []
    for title, pairs, otherwise in (
        ("Where it helped most", comparison.best, "No example scores higher after tuning."),
        ("Where it hurt most", comparison.worst, "No example scores lower after tuning."),
    ):
        articles = []
        for pair in pairs:
            row = by_id[pair.id]
            base, tuned = (_compared(one, row.example, split) for one in (row.base, row.tuned[0]))
            articles.append({"pair": pair, "base": base, "tuned": tuned})
        found.append({"title": title, "articles": articles, "otherwise": otherwise})
    return found


@dataclass(frozen=True, slots=True)
class Compared:
    """A text, the reference (number `nearest`) that it shares most with, and the marks of both."""

    text: str
    marks: list[Mark]
    nearest: int
    reference: str
    reference_marks: list[Mark]


def _compared(written: Written, example: Example, split: Splitter) -> Compared:
    text, references = wording.shown(written.text), [wording.shown(one) for one in example.references]
    own, others = split(text), [split(one) for one in references]
    nearest = closest(own, others)
    marks, reference_marks = shared(own, others[nearest])
    return Compared(text, marks, nearest, references[nearest], reference_marks)


def _data(content: Content, held: Iterable[int], split: Splitter) -> dict[str, Any]:
    """The data of the explorer's script. Each source is in it once, since rows of a group share it."""
    comparison, shown = content.comparison, wording.shown
    sources: dict[str, int] = {}
    aspects: dict[str, int] = {}
    metrics = list(comparison.results)
    rows = []
    for i in held:
        row = content.rows[i]
        example = row.example
        one: dict[str, Any] = {
            "id": shown(example.id),
            "a": aspects.setdefault(shown(example.aspect), len(aspects)),
            "s": sources.setdefault(shown(example.source), len(sources)),
            "r": [shown(text) for text in example.references],
            "w": [len(words(text)) for text in (example.source, *example.references)],
            "v": [_variant(written, example, split, metrics) for written in (row.base, *row.tuned)],
        }
        if example.history:
            one["h"] = [[shown(str(message["role"])), shown(str(message["content"]))] for message in example.history]
        rows.append(one)
    return {
        "metrics": [LABELS[name] for name in metrics],
        "decide": metrics.index(comparison.decide_by[0]),
        "variants": [comparison.base.variant, *(one.variant for one in comparison.tuned)],
        "aspects": list(aspects),
        "sources": list(sources),
        "examples": rows,
    }


def _variant(written: Written, example: Example, split: Splitter, metrics: Sequence[str]) -> dict[str, Any]:
    found = _compared(written, example, split)
    one = {
        "t": found.text,
        "n": written.tokens,
        "w": written.words,
        "p": [round(written.scores[name], 2) for name in metrics],
        "m": _runs(found.text, found.marks),
        "k": _runs(found.reference, found.reference_marks),
    }
    if found.nearest:
        one["b"] = found.nearest
    if written.capped:
        one["c"] = 1
    return one


def _runs(text: str, marks: Sequence[Mark]) -> list[int]:
    """Marks as a flat list of gap, length and level, in UTF-16 units, as JavaScript counts."""

    def units(start: int, end: int) -> int:
        return end - start + sum(ord(character) > 0xFFFF for character in text[start:end])

    runs, position = [], 0
    for mark in marks:
        runs += [units(position, mark.start), units(mark.start, mark.end), mark.level]
        position = mark.end
    return runs


# The seal


def faults(path: Path, digest: str) -> list[str]:
    """The faults of the page at `path`, as a page of the experiment with this digest."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return ["missing"]
    except UnicodeDecodeError as error:
        return [f"not what was written: byte {error.start} is not UTF-8"]
    body, _, last = text.rstrip("\n").rpartition("\n")
    body += "\n"
    if f"{last}\n" != SEAL.format(records.sha256_text(body)) or not text.endswith("-->\n"):
        return ["not what was written: the seal in its last line is of other content"]
    if DIGEST.format(digest) not in body:
        return [f"it shows another experiment ({(digest_of(path) or 'none')[:12]}…) than the one here ({digest[:12]}…)"]
    return []


def describe(seeds: Sequence[int]) -> str:
    """One line: where the page is, and whether it shows the experiment in the working directory."""
    found = digest_of(paths.REPORT_HTML)
    if found == identity.digest(identity.here(seeds)):
        return str(paths.REPORT_HTML)
    wrong = f"shows another experiment, {found[:12]}…" if found else "is missing, or was written by another version"
    return f"{paths.REPORT_HTML} {wrong}: run `{track.COMMAND}`"


def digest_of(path: Path) -> str | None:
    """The digest of the experiment that a page says it shows; None if it says nothing, or there is no page."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = "".join(line for line, _ in zip(file, range(20), strict=False))
    except FileNotFoundError:
        return None
    found = re.search(DIGEST.format("([0-9a-f]{64})"), head)
    return found[1] if found else None
