"""The report of a comparison of methods: what each arm reaches, what it costs, and which differences are shown.

Each arm is compared with one reference arm, paired on the same examples, over its seeds. p-values are corrected for all
arms and metrics (Holm).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pipeline.commands import compare
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.record import store
from pipeline.record.runs import Stored, of_digest
from pipeline.report import figures, wording
from pipeline.score import significance
from pipeline.score.comparison import Result
from pipeline.score.metrics import LABELS
from pipeline.search import arms
from pipeline.search.arms import Chosen
from pipeline.search.spec import Value


@dataclass(frozen=True)
class Arm:
    """A tested arm with its results: over its base, and over the reference arm (None: it is the reference).

    `p` are the p-values of the latter by metric, corrected for all arms and metrics. `seconds` is the mean of a seed's
    training, `memory` the largest peak in MB; each None if it is not known. `forgetting` maps a probe to the rise of
    its loss in nats a token.
    """

    tested: Chosen
    run: Stored
    base: dict[str, Result]
    over: dict[str, Result] | None
    p: dict[str, float]
    parameters: int
    seconds: float | None
    memory: float | None
    forgetting: dict[str, float]

    def shown(self, metric: str, confidence: float) -> str:
        """What is shown against the reference: "reference", "higher", "lower", "none" or "few"."""
        if self.over is None:
            return "reference"
        direction = self.over[metric].direction
        return "none" if direction in ("higher", "lower") and self.p[metric] > 1 - confidence else direction


def run(path: Path, jobs: int) -> None:
    """Run the comparison that `path` declares, and write and print its report. UserError as of `arms.compared`."""
    plan = arms.load(path)
    tested = arms.compared(plan, path, jobs)
    given = params.load()
    found = gathered(plan, tested, given)
    page = markdown(path, plan, found, given.compare)
    target = paths.REPORTS / f"{path.stem}.md"
    records.write_text(target, page)
    records.write_text(target.with_suffix(".csv"), table(found, given.compare))
    records.write_text(target.with_suffix(".svg"), drawing(found, given.compare))
    say(page)
    say(f"written: {target}, {target.with_suffix('.csv')}, {target.with_suffix('.svg')}")


def gathered(plan: arms.Arms, tested: Sequence[Chosen], given: params.Params) -> list[Arm]:
    """The arms with their results, in the order of the file. UserError if an experiment has no run or no scores."""
    runs = store.stored(given.tracking)
    experiments = {one.arm: compare.find(one.experiment, given.tracking) for one in tested}
    reference = experiments[plan.reference]
    over = {
        one.arm: compare.gain(experiments[one.arm], reference, given.compare)
        for one in tested
        if one.arm != plan.reference
    }
    keys = [(arm, metric) for arm, results in over.items() for metric in results]
    corrected = dict(zip(keys, significance.holm([over[arm][metric].p for arm, metric in keys]), strict=True))
    found = []
    for one in tested:
        of_arm = of_digest(one.digest, runs)
        if not of_arm:
            raise UserError(f"{one.experiment} has no MLflow run: `dvc exp apply {one.experiment}`, then `dvc repro`")
        held = of_arm[0].metrics
        found.append(
            Arm(
                tested=one,
                run=of_arm[0],
                base=compare.gain_over_base(experiments[one.arm], given.compare),
                over=over.get(one.arm),
                p={metric: p for (arm, metric), p in corrected.items() if arm == one.arm},
                parameters=int(held["cost.trainable_parameters"]),
                seconds=_mean(_matching(held, r"cost/train-\d+_seconds")),
                memory=max(_matching(held, r"cost/train-\d+_peak_(device_)?mb"), default=None),
                forgetting={
                    probe[1]: value
                    for name, value in held.items()
                    if (probe := re.fullmatch(r"cost\.general_loss\.(.+)\.diff", name))
                },
            )
        )
    return found


def _matching(metrics: dict[str, float], pattern: str) -> list[float]:
    return [value for name, value in metrics.items() if re.fullmatch(pattern, name)]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def markdown(path: Path, plan: arms.Arms, found: Sequence[Arm], settings: params.Compare) -> str:
    """The report as Markdown."""
    names = settings.decide_by
    probes = list(dict.fromkeys(probe for one in found for probe in one.forgetting))
    header = [
        "method",
        "rate",
        *(LABELS[name] for name in names),
        *(f"over {plan.reference}, {LABELS[name]}" for name in names),
    ]
    header += ["shown", "trainable", "train s a seed", "peak MB", *(f"forgets {probe}" for probe in probes)]
    rows = [_row(one, names, probes, settings.confidence) for one in found]
    seeds = ", ".join(map(str, plan.seeds))
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    common = ", ".join(f"`{name}: {value}`" for name, value in plan.common.items()) or "nothing"
    interval = f"{100 * settings.confidence:g} %"
    lines = [
        f"# Methods compared ({path.name})",
        "",
        f"**{verdict(plan, found, settings)}**",
        "",
        f"Each arm took the learning rate with the lowest validation loss of seed {plan.rate_seed}, among {rates}, "
        f"unless the arm names one. It was then trained with seeds {seeds} and tested once each. Common to all arms: "
        f"{common}.",
        "",
        f"![Scores over trainable parameters]({path.stem}.svg)",
        "",
        *compare.table(header, rows),
        "",
        f"Scores are means over seeds; in brackets {interval} intervals over examples and seeds. Differences are "
        f"paired, and shown where the interval and p agree, corrected for {len(plan.arms) - 1} arms and {len(names)} "
        f"metric{'s' if len(names) > 1 else ''} (Holm). Forgetting is the rise of the loss in nats a token. Times are "
        "of one machine, and of those seeds that were computed for this test: compare them only if one trial ran at "
        "once.",
        "",
        "## What each arm is",
        "",
        *(f"- `{arm}`: {_values(values)}" for arm, values in plan.arms.items()),
        "",
        "## Validation losses at each rate",
        "",
        *(
            f"- `{one.tested.arm}`: "
            + ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(one.tested.losses.items()))
            for one in found
        ),
        "",
    ]
    return "\n".join(lines)


def _values(values: dict[str, Value]) -> str:
    return ", ".join(f"`{name}: {value}`" for name, value in values.items()) or "the parameters as they are"


def verdict(plan: arms.Arms, found: Sequence[Arm], settings: params.Compare) -> str:
    """Which arms are shown to differ from the reference, in one or more sentences."""
    sentences = []
    for direction, word in (("higher", "higher"), ("lower", "lower")):
        for metric in settings.decide_by:
            named = [one.tested.arm for one in found if one.shown(metric, settings.confidence) == direction]
            if named:
                verb = "is" if len(named) == 1 else "are"
                sentences.append(
                    f"{wording.listed(named)} {verb} shown to be {word} than {plan.reference} in {LABELS[metric]}."
                )
    if any(one.shown(metric, settings.confidence) == "few" for one in found for metric in settings.decide_by):
        return "There are too few groups of examples to say which methods differ."
    if not sentences:
        metrics = wording.listed([LABELS[name] for name in settings.decide_by])
        return f"Of {len(found) - 1} methods none is shown to differ from {plan.reference} in {metrics}."
    rest = [
        one.tested.arm
        for one in found
        if all(one.shown(metric, settings.confidence) == "none" for metric in settings.decide_by)
    ]
    if rest:
        sentences.append(f"For {wording.listed(rest)} no difference is shown.")
    return " ".join(sentences)


def _row(one: Arm, names: Sequence[str], probes: Sequence[str], confidence: float) -> list[str]:
    scores = [_with_interval(one.base[name]) for name in names]
    over = ["—" for _ in names] if one.over is None else [_difference(one.over[name]) for name in names]
    shown = {LABELS[name]: one.shown(name, confidence) for name in names}
    words = {"higher": "higher", "lower": "lower"}
    said = ", ".join(f"{words[value]} in {label}" for label, value in shown.items() if value in words)
    return [
        f"`{one.tested.arm}`",
        f"{one.tested.rate:g}",
        *scores,
        *over,
        "reference" if one.over is None else said or "no",
        f"{one.parameters:,}",
        "n/a" if one.seconds is None else f"{one.seconds:.0f}",
        "n/a" if one.memory is None else f"{one.memory:,.0f}",
        *(wording.change(one.forgetting[probe]) if probe in one.forgetting else "n/a" for probe in probes),
    ]


def _with_interval(one: Result) -> str:
    return f"{wording.points(one.tuned.value)} ({wording.points(one.tuned.low)} to {wording.points(one.tuned.high)})"


def _difference(one: Result) -> str:
    return f"{wording.signed(one.diff.value)} ({wording.span(one.deciding)})"


def table(found: Sequence[Arm], settings: params.Compare) -> str:
    """The report's numbers as CSV, a line for each arm and metric."""
    header = ["arm", "rate", "experiment", "run", "metric", "score", "over_reference", "low", "high", "p_holm", "shown"]
    header += ["trainable_parameters", "train_seconds", "peak_mb", "forgetting"]
    rows = []
    for one in found:
        for metric in settings.decide_by:
            over = None if one.over is None else one.over[metric]
            difference = [None] * 3 if over is None else [over.diff.value, over.deciding.low, over.deciding.high]
            rows.append(
                [
                    one.tested.arm,
                    one.tested.rate,
                    one.tested.experiment,
                    one.run.run_id,
                    metric,
                    one.base[metric].tuned.value,
                    *difference,
                    one.p.get(metric),
                    one.shown(metric, settings.confidence),
                    one.parameters,
                    one.seconds,
                    one.memory,
                    " ".join(f"{probe}={value:.6g}" for probe, value in one.forgetting.items()),
                ]
            )
    return records.csv_text(header, rows)


def drawing(found: Sequence[Arm], settings: params.Compare) -> str:
    """The first deciding metric over the number of trainable parameters, as SVG."""
    metric = settings.decide_by[0]
    points = [
        figures.Point(
            one.tested.arm,
            one.parameters,
            one.base[metric].tuned.value,
            one.base[metric].tuned.low,
            one.base[metric].tuned.high,
            {"few": "none"}.get(shown := one.shown(metric, settings.confidence), shown),
        )
        for one in found
    ]
    return figures.pareto(points, "trainable parameters", f"{LABELS[metric]} of the tuned model", figures.FILE)
