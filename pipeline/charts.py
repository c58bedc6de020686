"""The comparison as a picture: scores with their intervals and reference lines above, paired differences below.

Drawn by Vega-Lite inside `vl-convert`, so no browser, no network, and the same bytes for the same numbers.
"""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.compare import Comparison
from pipeline.metrics import LABELS

BAND = 56
"""Height of one metric in the upper panel, pixels; the lower panel has half of it."""
FONT = "Liberation Sans, Arial, sans-serif"
"""The first is inside vl-convert, so that the picture is the same on every machine."""
UPRIGHT = "M-0.1,-1H0.1V1H-0.1Z"
"""The legend's sign for a reference line, as an SVG path: upright, as the line is."""


@dataclass(frozen=True, slots=True)
class Look:
    """Width of the plot area in pixels, and the colours, each anything that SVG takes as one."""

    width: int
    background: str
    text: str
    grid: str
    base: str
    tuned: str
    lines: tuple[str, str, str]


FILE = Look(520, "#ffffff", "#1f2328", "#e4e7eb", "#a9b4c0", "#0072b2", ("#e69f00", "#cc5c9a", "#009e73"))
# The page sets these variables, for light and for dark; it is drawn narrow enough to be read on a phone.
PAGE = Look(
    250,
    "transparent",
    "var(--text)",
    "var(--grid)",
    "var(--base)",
    "var(--tuned)",
    ("var(--line-1)", "var(--line-2)", "var(--line-3)"),
)


def svg(comparison: Comparison, look: Look) -> str:
    """The chart as an SVG document."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg(_specification(comparison, look)))


def png(comparison: Comparison, look: Look) -> bytes:
    """The chart as a PNG of twice the size of the SVG."""
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(_specification(comparison, look), scale=2))


def inline(document: str) -> str:
    """An SVG document as it stands inside HTML: without namespaces, which are addresses, and without a fixed size."""
    document = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", document)
    return re.sub(r'(<svg[^>]*?)\swidth="[^"]*"\sheight="[^"]*"', r"\1", document, count=1)


def _specification(comparison: Comparison, look: Look) -> dict[str, Any]:
    import altair

    metrics = [LABELS[name] for name in comparison.results]
    chart = altair.vconcat(_scores(comparison, look, metrics), _differences(comparison, look, metrics), spacing=28)
    chart = (
        chart.configure(background=look.background, font=FONT, padding=8)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=look.text,
            titleColor=look.text,
            gridColor=look.grid,
            domain=False,
            ticks=False,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelPadding=6,
        )
        .configure_legend(labelColor=look.text, labelFontSize=12, title=None)
        .configure_title(color=look.text, fontSize=13, anchor="start", frame="group")
    )
    specification: dict[str, Any] = chart.to_dict()
    return specification


def _scores(comparison: Comparison, look: Look, metrics: list[str]) -> Any:
    import altair

    bars = [
        {"metric": LABELS[name], "model": model, "value": one.value, "low": one.low, "high": one.high}
        for name, result in comparison.results.items()
        for model, one in (("base", result.base), ("tuned", result.tuned))
    ]
    ticks = [
        {"metric": LABELS[name], "line": line.label.lower(), "value": value}
        for line in comparison.lines
        for name, value in line.scores.items()
    ]
    lines = [line.label.lower() for line in comparison.lines]
    y = altair.Y("metric:N", sort=metrics, title=None, scale=altair.Scale(paddingInner=0.3))
    offset = altair.YOffset("model:N", sort=["base", "tuned"])
    models = altair.Color(
        "model:N",
        scale=altair.Scale(domain=["base", "tuned"], range=[look.base, look.tuned]),
        legend=altair.Legend(orient="top", direction="horizontal"),
    )
    bar = altair.Chart(altair.Data(values=bars)).encode(y=y, yOffset=offset)
    kinds = altair.Color(
        "line:N",
        scale=altair.Scale(domain=lines, range=list(look.lines[: len(lines)])),
        legend=altair.Legend(orient="bottom", direction="horizontal", symbolType=UPRIGHT, symbolSize=220),
    )
    tick = altair.Chart(altair.Data(values=ticks)).mark_tick(thickness=2.5, size=BAND * 0.78, opacity=1)
    return (
        altair.layer(
            bar.mark_bar().encode(x=altair.X("value:Q", title=None), color=models),
            tick.encode(y=y, x="value:Q", color=kinds),
            bar.mark_rule(color=look.text, strokeWidth=1.5).encode(x="low:Q", x2="high:Q"),
        )
        .resolve_scale(color="independent")
        .properties(width=look.width, height=BAND * len(metrics), title=f"Scores with {_interval(comparison)}")
    )


def _differences(comparison: Comparison, look: Look, metrics: list[str]) -> Any:
    import altair

    rows = [
        {"metric": LABELS[name], "value": one.deciding.value, "low": one.deciding.low, "high": one.deciding.high}
        for name, one in comparison.results.items()
    ]
    base = altair.Chart(altair.Data(values=rows)).encode(y=altair.Y("metric:N", sort=metrics, title=None))
    zero = altair.Chart(altair.Data(values=[{"zero": 0}])).mark_rule(color=look.text, strokeDash=[4, 3])
    return altair.layer(
        zero.encode(x="zero:Q"),
        base.mark_rule(color=look.tuned, strokeWidth=3).encode(x=altair.X("low:Q", title=None), x2="high:Q"),
        base.mark_point(color=look.tuned, fill=look.tuned, size=70, opacity=1).encode(x="value:Q"),
    ).properties(width=look.width, height=BAND * len(metrics) // 2, title=f"Tuned − base with {_interval(comparison)}")


def _interval(comparison: Comparison) -> str:
    return f"{100 * comparison.confidence:g} % intervals"
