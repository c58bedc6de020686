"""The comparison as pictures: a ladder of scores, differences, gains, aspects, training curves, lengths, and endings.

Vega-Lite draws them inside `vl-convert`, which needs no browser and no network. Equal numbers give equal bytes.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.text import words
from pipeline.report.curves import Curve
from pipeline.score.comparison import Comparison
from pipeline.score.metrics import LABELS
from pipeline.score.side_by_side import Row

BAND = 56
"""Height of one metric in the panel of scores, in pixels. The panel of differences has half of it."""
FONT = "Liberation Sans, Arial, sans-serif"
"""Texts are measured in the first font, which vl-convert contains, so a machine's fonts do not change the bytes."""
UPRIGHT = "M-0.1,-1H0.1V1H-0.1Z"
"""The legend's sign for a reference line, as an SVG path: an upright bar."""


@dataclass(frozen=True, slots=True)
class Look:
    """Width of the plot area and font size in pixels, and colours in any notation of SVG."""

    width: int
    font: int
    background: str
    text: str
    grid: str
    base: str
    tuned: str
    lines: tuple[str, str, str]
    seeds: tuple[str, ...]


# The palette of Okabe and Ito, which people with any colour vision can tell apart.
FILE = Look(
    520,
    12,
    "#ffffff",
    "#1f2328",
    "#e4e7eb",
    "#a9b4c0",
    "#0072b2",
    ("#e69f00", "#cc5c9a", "#009e73"),
    ("#0072b2", "#d55e00", "#009e73", "#cc5c9a", "#e69f00", "#56b4e9"),
)
# The page sets these variables for light and dark. The width fits a phone.
PAGE = Look(
    340,
    13,
    "transparent",
    "var(--text)",
    "var(--grid)",
    "var(--base)",
    "var(--tuned)",
    ("var(--line-1)", "var(--line-2)", "var(--line-3)"),
    tuple(f"var(--seed-{i})" for i in range(1, 7)),
)

OF_OBJECTS = {
    "constructor", "hasOwnProperty", "isPrototypeOf", "propertyIsEnumerable", "toLocaleString", "toString", "valueOf",
    "__defineGetter__", "__defineSetter__", "__lookupGetter__", "__lookupSetter__", "__proto__",
}  # fmt: skip
"""The properties of every object of JavaScript."""
UNCUT = 6
"""A label holds at least this many characters of any script."""
BINS = 40
"""The approximate number of bins of a histogram, whose width is a round number."""


def svg(comparison: Comparison, look: Look) -> str:
    """The figure of `comparison.md`, the ladder above the differences, as an SVG document."""
    import altair

    metrics = [LABELS[name] for name in comparison.results]
    parts = _ladder(comparison, look), _differences(comparison, look, metrics)
    return drawn(altair.vconcat(*parts, spacing=28).resolve_scale(color="independent"), look)


def all_of(comparison: Comparison, rows: Sequence[Row], curves: Sequence[Curve], look: Look) -> dict[str, str]:
    """Every figure by name, as an SVG document. `aspects` is left out if the comparison has none."""
    metrics = [LABELS[name] for name in comparison.results]
    charts = {
        "ladder": _ladder(comparison, look),
        "differences": _differences(comparison, look, metrics),
        "gains": _gains(comparison, rows, look),
        "aspects": _aspects(comparison, look),
        "training": _training(curves, look),
        "lengths": _lengths(rows, look),
        "endings": _endings(comparison, look),
    }
    return {name: drawn(chart, look) for name, chart in charts.items() if chart is not None}


@dataclass(frozen=True, slots=True)
class Point:
    """A method in the picture of costs: its cost, its score with the interval, and what is shown against the reference.

    `shown` is "reference", "higher", "lower" or "none".
    """

    name: str
    cost: float
    score: float
    low: float
    high: float
    shown: str


SHOWN = {
    "reference": ("the reference", 0),
    "higher": ("shown to be higher", 1),
    "none": ("no difference shown", 2),
    "lower": ("shown to be lower", 3),
}
"""The words of the legend and the places of their colours."""


def pareto(points: Sequence[Point], cost: str, score: str, look: Look) -> str:
    """Scores of methods over their cost, both with names, as an SVG document.

    A line joins the methods of which no cheaper one scores as high (the Pareto front).
    """
    import altair

    rows = [
        {
            "name": one.name,
            "cost": one.cost,
            "score": one.score,
            "low": one.low,
            "high": one.high,
            "shown": SHOWN[one.shown][0],
        }
        for one in points
    ]
    colours = {words: (look.text, *look.lines)[place] for words, place in SHOWN.values()}
    x = altair.X("cost:Q", title=cost, scale=altair.Scale(type="log", padding=30), axis=altair.Axis(tickCount=5))
    y = altair.Y("score:Q", title=score, scale=altair.Scale(zero=False, padding=12))
    front = [row for row in rows if not any(_beats(other, row) for other in rows)]
    chart = _chart(rows).encode(x=x, color=_colour("shown", colours))
    layers = [
        _chart(front).mark_line(color=look.grid, strokeWidth=2).encode(x=x, y=y),
        chart.mark_rule(strokeWidth=1.5).encode(y=altair.Y("low:Q", title=score), y2="high:Q"),
        chart.mark_point(filled=True, size=70, opacity=1).encode(y=y),
        _chart(rows)
        .mark_text(color=look.text, align="left", dx=7, dy=-6, fontSize=look.font - 1)
        .encode(x=x, y=y, text="name:N"),
    ]
    return drawn(altair.layer(*layers).properties(width=look.width, height=320), look)


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a method costs no more and scores no less than another, and is better in one of the two."""
    no_worse = one["cost"] <= other["cost"] and one["score"] >= other["score"]
    return bool(no_worse and (one["cost"], one["score"]) != (other["cost"], other["score"]))


def inline(document: str) -> str:
    """An SVG document for use inside HTML: without namespaces, which are addresses, and without a fixed height."""
    document = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", document)
    return re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", document, count=1)


def drawn(chart: Any, look: Look) -> str:
    """A chart as an SVG document."""
    import vl_convert

    configured = (
        chart.configure(background=look.background, font=FONT, padding=8)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=look.text,
            titleColor=look.text,
            gridColor=look.grid,
            domain=False,
            ticks=False,
            labelFontSize=look.font,
            titleFontSize=look.font,
            titleFontWeight="normal",
            labelPadding=6,
        )
        .configure_header(labelColor=look.text, labelFontSize=look.font)
        .configure_legend(labelColor=look.text, labelFontSize=look.font, title=None)
        .configure_title(color=look.text, fontSize=look.font + 1, anchor="start", frame="group")
    )
    return str(vl_convert.vegalite_to_svg(configured.to_dict()))


def _chart(values: list[dict[str, Any]]) -> Any:
    import altair

    return altair.Chart(altair.Data(values=values))


def _colour(field: str, colours: Mapping[str, str], orient: str = "top", **legend: Any) -> Any:
    """The colour of each value of a field, with a horizontal legend."""
    import altair

    return altair.Color(
        f"{field}:N",
        scale=altair.Scale(domain=list(colours), range=list(colours.values())),
        legend=altair.Legend(orient=orient, direction="horizontal", **legend),
    )


def _ladder(comparison: Comparison, look: Look) -> Any:
    """What each step reaches, from a constant text to the tuned model, with a panel for each deciding metric.

    A mark in a bar tells what the same outputs score when they are held against other sources.
    """
    import altair

    kinds = {"not the task": look.lines[0], "base": look.base, "tuned": look.tuned}
    panels = []
    for number, metric in enumerate(comparison.decide_by, start=1):
        first, last = number == 1, number == len(comparison.decide_by)
        rows = [*_steps(comparison, metric)]
        y = altair.Y("step:N", sort=[row["step"] for row in rows], title=None, axis=altair.Axis(labelLimit=210))
        bar = _chart(rows).encode(y=y)
        layers = [
            bar.mark_bar().encode(
                x=altair.X("value:Q", title=None, axis=altair.Axis(tickCount=8)),
                color=_colour("kind", kinds) if first else _colour("kind", kinds).legend(None),
            ),
            _chart([row for row in rows if "low" in row])
            .mark_rule(color=look.text, strokeWidth=1.5)
            .encode(y=y, x="low:Q", x2="high:Q"),
        ]
        if elsewhere := [row for row in rows if "other" in row]:
            mark = _chart(elsewhere).mark_tick(thickness=2.5, size=20, opacity=1)
            same = {"same outputs, other sources": look.lines[1]}
            colour = _colour("mark", same, "bottom", symbolType=UPRIGHT, symbolSize=220, labelLimit=0)
            layers.append(mark.encode(y=y, x="other:Q", color=colour if last else colour.legend(None)))
        panels.append(
            altair.layer(*layers)
            .resolve_scale(color="independent")
            .properties(width=look.width, height=28 * len(rows), title=f"{LABELS[metric]} with {_interval(comparison)}")
        )
    return altair.vconcat(*panels, spacing=20).resolve_scale(x="shared", color="independent")


def _steps(comparison: Comparison, metric: str) -> Iterator[dict[str, Any]]:
    """The bars of the ladder in one metric, the lowest step first."""
    for line in comparison.lines:
        if line.key in ("constant", "lead", "copy"):
            yield {"step": line.label, "kind": "not the task", "value": line.scores[metric]}
    result, whole = comparison.results[metric], comparison.specific[:1]
    for kind, one in (("base", result.base), ("tuned", result.tuned)):
        if kind == "tuned":
            for baseline in comparison.baselines:
                score = baseline.tuned[metric].base
                some = f" ({baseline.n} rows)" if baseline.n < comparison.n else ""
                own = {"value": score.value, "low": score.low, "high": score.high}
                yield {"step": f"{baseline.short}{some}", "kind": "base", **own}
        row = {"step": kind.capitalize(), "kind": kind, "value": one.value, "low": one.low, "high": one.high}
        if whole and metric in whole[0].results:
            found = whole[0].results[metric]
            other = found.base_other if kind == "base" else found.tuned_other
            row |= {"other": other, "mark": "same outputs, other sources"}
        yield row


def _differences(comparison: Comparison, look: Look, metrics: list[str]) -> Any:
    """Tuned minus base with the deciding interval, and a tick for each of several seeds."""
    import altair

    rows = [
        {"metric": LABELS[name], "value": one.diff.value, "low": one.deciding.low, "high": one.deciding.high}
        for name, one in comparison.results.items()
    ]
    y = altair.Y("metric:N", sort=metrics, title=None)
    rule, point = _interval_marks(rows, y, look)
    layers = [_zero(look), rule]
    if len(comparison.tuned) > 1:
        each = [
            {"metric": LABELS[name], "value": one.scores[name] - comparison.base.scores[name]}
            for name in comparison.results
            for one in comparison.tuned
        ]
        tick = _chart(each).mark_tick(color=look.text, thickness=1.5, size=14, opacity=1)
        layers.append(tick.encode(y=y, x="value:Q"))
    return altair.layer(*layers, point).properties(
        width=look.width, height=BAND * len(metrics) // 2, title=f"Tuned − base with {_interval(comparison)}"
    )


def _interval_marks(rows: list[dict[str, Any]], y: Any, look: Look) -> tuple[Any, Any]:
    """A line from low to high, and a point at the value, for each row."""
    import altair

    base = _chart(rows).encode(y=y)
    return (
        base.mark_rule(color=look.tuned, strokeWidth=3).encode(x=altair.X("low:Q", title=None), x2="high:Q"),
        base.mark_point(color=look.tuned, fill=look.tuned, size=70, opacity=1).encode(x="value:Q"),
    )


def _aspects(comparison: Comparison, look: Look) -> Any:
    """The difference in each aspect, with a panel for each deciding metric; None without aspects."""
    import altair

    if not comparison.aspects:
        return None
    names = [_drawn(aspect.name, number) for number, aspect in enumerate(comparison.aspects, start=1)]
    panels = []
    for metric in comparison.decide_by:
        rows = [
            {"aspect": name, "value": found.diff.value, "low": found.deciding.low, "high": found.deciding.high}
            for name, one in zip(names, comparison.aspects, strict=True)
            for found in [one.results[metric]]
        ]
        y = altair.Y("aspect:N", sort=names, title=None, axis=altair.Axis(labelLimit=140))
        panels.append(
            altair.layer(_zero(look), *_interval_marks(rows, y, look)).properties(
                width=look.width, height=28 * len(names), title=f"{LABELS[metric]}, tuned − base"
            )
        )
    return altair.vconcat(*panels, spacing=20).resolve_scale(x="shared")


def _drawn(aspect: str, number: int) -> str:
    """The label of an aspect. If Vega would fail at it, it gets a number, and long ones are cut.

    Vega fails at names that are properties of every object. It may also cut a long name within a character that
    JavaScript stores as two units.
    """
    if aspect in OF_OBJECTS:
        return f"{number}. {aspect}"
    if len(aspect) > UNCUT and max(aspect) > "\uffff":
        return f"{number}. {aspect[:UNCUT]}…"
    return aspect


def _zero(look: Look) -> Any:
    """A dashed line at zero."""
    return _chart([{"zero": 0}]).mark_rule(color=look.text, strokeDash=[4, 3]).encode(x="zero:Q")


def _gains(comparison: Comparison, rows: Sequence[Row], look: Look) -> Any:
    """A histogram of the examples' gains in the first deciding metric. Equal scores have a bar of their own."""
    import altair

    metric = comparison.decide_by[0]
    gains = [row.gain(metric) for row in rows]
    step = _round_step((max(gains) - min(gains)) / BINS)
    bars: dict[tuple[float, float], int] = {}
    for gain in gains:
        # (0, step] is the first bin of gains, [-step, 0) the first bin of losses.
        far = math.ceil(abs(gain) / step - 1e-9) * step
        ends = (far - step, far) if gain > 0 else (-far, step - far)
        if abs(gain) < 1e-9:
            ends = (-step / 8, step / 8)
        bars[ends] = bars.get(ends, 0) + 1
    values = [
        {"from": low, "to": high, "n": n, "side": "equal" if low < 0 < high else "higher" if low >= 0 else "lower"}
        for (low, high), n in sorted(bars.items())
    ]
    return altair.layer(
        _chart(values)
        .mark_rect(stroke=look.background, strokeWidth=0.5)
        .encode(
            x=altair.X("from:Q", title=f"{LABELS[metric]} of tuned − base, points"),
            x2="to:Q",
            y=altair.Y("n:Q", title="examples", axis=altair.Axis(tickMinStep=1, tickCount=5)),
            y2=altair.datum(0),
            color=_colour("side", {"lower": look.base, "equal": look.text, "higher": look.tuned}),
        ),
        _zero(look),
    ).properties(width=look.width, height=170, title="Gain of each example")


def _training(curves: Sequence[Curve], look: Look) -> Any:
    """Training loss (thin lines) and validation loss (points) by step, with a colour for each seed."""
    import altair

    seeds = [str(curve.seed) for curve in curves]
    train, validation = [], []
    for seed, curve in zip(seeds, curves, strict=True):
        train += [{"seed": seed, "step": step, "loss": loss} for step, loss in curve.training]
        validation += [{"seed": seed, "step": one.step, "loss": one.loss} for one in curve.validation]
    colours = [look.seeds[i % len(look.seeds)] for i in range(len(seeds))]
    color = altair.Color(
        "seed:N",
        scale=altair.Scale(domain=seeds, range=colours),
        legend=altair.Legend(orient="bottom", direction="horizontal", columns=6) if len(seeds) > 1 else None,
    )
    x = altair.X("step:Q", title="optimizer steps", axis=altair.Axis(tickMinStep=1, tickCount=6))
    y = altair.Y("loss:Q", title="loss, nats a token", scale=altair.Scale(zero=False))
    thin = _chart(train).encode(x=x, y=y, color=color)
    thick = _chart(validation).encode(x=x, y=y, color=color)
    return altair.layer(
        thin.mark_line(strokeWidth=1.2, opacity=0.75),
        thick.mark_line(strokeWidth=2.5, strokeDash=[6, 3]),
        thick.mark_point(filled=True, size=55, opacity=1),
    ).properties(width=look.width, height=190, title="Loss: training (line), validation (points)")


def _lengths(rows: Sequence[Row], look: Look) -> Any:
    """Histograms of the lengths of references and outputs, in words; all seeds of tuned count together."""
    import altair

    lengths = {
        "references": [len(words(one)) for row in rows for one in row.example.references],
        "base": [row.base.words for row in rows],
        "tuned": [one.words for row in rows for one in row.tuned],
    }
    everything = [length for some in lengths.values() for length in some]
    # The few longest texts share the last bin: otherwise one endless output would squeeze all others into the first.
    most = max(1, math.ceil(float(np.quantile(everything, 0.995))))
    step = max(1, round(_round_step(most / BINS)))
    bins = most // step + 1
    panels = []
    for (name, some), colour in zip(lengths.items(), (look.lines[2], look.base, look.tuned), strict=True):
        counts = np.bincount(np.minimum(np.array(some) // step, bins - 1), minlength=bins)
        values = [
            {"from": i * step, "to": (i + 1) * step, "share": n / len(some)} for i, n in enumerate(counts.tolist()) if n
        ]
        bar = _chart(values).mark_rect(color=colour, stroke=look.background, strokeWidth=0.5)
        last = name == "tuned"
        x = altair.X(
            "from:Q",
            title="words (triangle: the mean)" if last else None,
            scale=altair.Scale(domain=[0, bins * step]),
            axis=altair.Axis(labels=last, tickMinStep=1, tickCount=6),
        )
        y = altair.Y("share:Q", title=None, axis=altair.Axis(format="%", tickCount=3))
        marker = _chart([{"mean": sum(some) / len(some)}]).mark_point(
            shape="triangle-down", color=look.text, fill=look.text, size=50, opacity=1, yOffset=-6
        )
        panels.append(
            altair.layer(
                bar.encode(x=x, x2="to:Q", y=y, y2=altair.datum(0)), marker.encode(x="mean:Q", y=altair.value(0))
            ).properties(
                width=look.width, height=64, title=altair.TitleParams(name, fontSize=look.font, fontWeight="normal")
            )
        )
    return altair.vconcat(*panels, spacing=6).resolve_scale(y="shared").properties(title="Length")


def _endings(comparison: Comparison, look: Look) -> Any:
    """The shares of each variant's outputs that ended by themselves, and at the cap on new tokens."""
    import altair

    outputs = [comparison.base, *comparison.tuned]
    names = [one.variant for one in outputs]
    values = [
        {"variant": one.variant, "ending": ending, "share": share, "order": i}
        for one in outputs
        for i, (ending, share) in enumerate(
            (("by itself (EOS)", 1 - one.stopped_by_cap), ("by the cap", one.stopped_by_cap))
        )
    ]
    return (
        _chart(values)
        .mark_bar(stroke=look.background, strokeWidth=0.5)
        .encode(
            y=altair.Y("variant:N", sort=names, title=None),
            x=altair.X("share:Q", title=None, axis=altair.Axis(format="%", tickCount=5)),
            order="order:Q",
            color=_colour("ending", {"by itself (EOS)": look.lines[2], "by the cap": look.lines[0]}),
        )
        .properties(width=look.width, height=26 * len(names), title="How outputs ended")
    )


def _round_step(about: float) -> float:
    """The smallest number of the form 1, 2 or 5 times a power of ten that is not below `about`; 1 for 0."""
    if about <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(about))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= about * (1 - 1e-9))


def _interval(comparison: Comparison) -> str:
    return f"{100 * comparison.confidence:g} % intervals"
