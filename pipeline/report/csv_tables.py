"""Files for a paper's appendix: every figure of the page as SVG, for white paper, and every table as CSV.

Numbers have all digits, shares are in [0, 1], and an empty cell was not computed. The scores of single examples are in
`out/scores`. Equal comparisons give equal bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.core import paths, records
from pipeline.report import figures
from pipeline.report.curves import Curve
from pipeline.score.comparison import Aspect, Comparison
from pipeline.score.side_by_side import Row
from pipeline.score.significance import Interval

Table = list[dict[str, Any]]


def write(comparison: Comparison, rows: Sequence[Row], curves: Sequence[Curve]) -> None:
    """Write `paths.FIGURES` and `paths.TABLES`. `reports/` gets a copy of both."""
    for name, drawing in figures.all_of(comparison, rows, curves, figures.FILE).items():
        records.write_text(paths.FIGURES / f"{name}.svg", drawing)
    for name, table in tables(comparison).items():
        records.write_text(paths.TABLES / f"{name}.csv", text(table))


def tables(comparison: Comparison) -> dict[str, Table]:
    """The tables by name, without empty ones."""
    found = {
        "scores": list(_scores(comparison)),
        "seeds": list(_seeds(comparison)),
        "specific": list(_specific(comparison)),
        "baselines": list(_baselines(comparison)),
        "beyond_source": list(_beyond(comparison)),
        "lines": list(_lines(comparison)),
        "aspects": list(_parts("aspect", comparison.aspects)),
        "slices": list(_parts("slice", comparison.slices)),
        "published": [{"metric": one.metric, "value": one.value, "about": one.about} for one in comparison.published],
        "outputs": list(_outputs(comparison)),
        "training": [asdict(one) for one in comparison.cost.training],
        "forgetting": list(_forgetting(comparison)),
        "guards": [asdict(one) for one in comparison.guards],
    }
    return {name: table for name, table in found.items() if table}


def text(table: Table) -> str:
    """A table as CSV, with the keys of the first row as header."""
    header = list(table[0])
    return records.csv_text(header, ([row[name] for name in header] for row in table))


def _interval(name: str, one: Interval) -> dict[str, float]:
    return {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}


def _scores(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for name, one in comparison.results.items():
        yield {
            "metric": name,
            **_interval("base", one.base),
            **_interval("tuned", one.tuned),
            "difference": one.diff.value,
            "low": one.deciding.low,
            "high": one.deciding.high,
            "confidence": comparison.confidence,
            "p": one.p,
            "shown": one.direction,
            "within_margin": one.within_margin,
            "effect": one.effect,
            "effect_of_rows": one.effect_of_rows,
            "detectable": one.detectable,
            "wins": one.wins,
            "ties": one.ties,
            "losses": one.losses,
        }


def _seeds(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for name, one in comparison.results.items():
        if one.seeds:
            yield {
                "metric": name,
                **_interval("examples", one.diff),
                "sd_between_seeds": one.seeds.sd,
                **_interval("both", one.seeds.both),
            }


def _specific(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for part in comparison.specific:
        for name, one in part.results.items():
            scores = {key: value for key, value in asdict(one).items() if key.startswith(("base", "tuned"))}
            gain = {**_interval("specific", one.gain), "p": one.p, "shown": one.direction}
            yield {"aspect": part.aspect, "rows": part.n, "groups": part.groups, "metric": name, **scores, **gain}


def _baselines(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for part in comparison.baselines:
        for name, one in part.tuned.items():
            yield {
                "variant": part.output.variant,
                "rows": part.n,
                "groups": part.groups,
                "metric": name,
                **_interval("score", one.base),
                **_interval("over_base", part.gain[name].deciding),
                **_interval("tuned_ahead", one.deciding),
                "p": one.p,
                "shown": one.direction,
            }


def _beyond(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for name, one in comparison.beyond_source:
        for what, part in asdict(one).items():
            yield {"texts": name, "what": what, **part}


def _lines(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for line in comparison.lines:
        for name, score in line.scores.items():
            yield {
                "line": line.key,
                "rows": line.n,
                "metric": name,
                "score": score,
                **_interval("tuned_ahead", line.ahead[name]),
            }


def _parts(kind: str, parts: Sequence[Aspect]) -> Iterable[dict[str, Any]]:
    for part in parts:
        for name, one in part.results.items():
            yield {
                kind: part.name,
                "rows": part.n,
                "metric": name,
                "base": one.base.value,
                "tuned": one.tuned.value,
                "difference": one.diff.value,
                "low": one.deciding.low,
                "high": one.deciding.high,
                "p": one.p,
                "p_holm": part.p_holm.get(name),
            }


def _forgetting(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for found in comparison.cost.forgetting:
        yield {
            "probe": found.name,
            "source": found.source,
            "tokens": found.tokens,
            "window": found.window,
            "bos": found.bos,
            "texts": found.texts,
            "base_loss": found.base_loss,
            "tuned_loss": found.tuned_loss,
            **_interval("difference", found.diff),
            "p": found.p,
            "p_holm": found.p_holm,
            "base_perplexity": found.base_perplexity,
            "tuned_perplexity": found.tuned_perplexity,
            **_interval("cross_entropy", found.cross_entropy),
            **_interval("kl", found.kl),
        }


def _outputs(comparison: Comparison) -> Iterable[dict[str, Any]]:
    yield {
        "variant": "references",
        "words": comparison.reference_words,
        **dict.fromkeys(("stopped_by_cap", "empty", "copied")),
        "in_language": comparison.references_in_language,
        **dict.fromkeys(comparison.results),
    }
    for one in comparison.outputs:
        row = asdict(one)
        del row["not_in_source"]
        scores = row.pop("scores")
        yield {**row, **scores}
