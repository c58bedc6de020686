"""A comparison in words: a line for the terminal, Markdown for the repository, numbers for `dvc metrics`.

This module only chooses words; `pipeline.report.page` makes the page. The templates are in
`pipeline/report/templates/`. Texts of models are never trusted: they are escaped for the place where they appear.
"""

import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.core import paths, records
from pipeline.core.contracts import Absent
from pipeline.core.errors import CONTROLS, UserError
from pipeline.report import figures
from pipeline.score import intervals, significance
from pipeline.score.comparison import Comparison
from pipeline.score.metrics import LABELS
from pipeline.score.side_effects import Cost, Forgetting
from pipeline.score.significance import Direction, Interval

TEMPLATES = Path(__file__).parent / "templates"

BASES = {
    "none": "base",
    "nf4": "NF4 base",
    "fp4": "FP4 base",
    "int8": "int8 base",
    "gptq": "GPTQ base",
    "hqq": "HQQ base",
}
"""What the adapter is compared with, by `quantize.method`."""
FEW_GROUPS = 30
"""With fewer groups of test examples the verdict's first sentence says so."""
MANY_ASPECTS = 6
"""Of more aspects without a specific gain the report gives the number instead of the names."""
MANY_CAPPED = 0.05
"""The report says so if a larger share of outputs was stopped by the token cap."""
OTHER_LANGUAGE = 0.1
"""The report says so if the share of outputs in the expected language is lower than the references' by this much."""
SHARED = {
    ("test", "train"): "tuned may score by what it knows of them, so the gain on new groups may be smaller",
    ("validation", "train"): "the validation loss may be too low for new groups",
    ("test", "validation"): "what was chosen by the validation loss was chosen on groups of the test split",
}
"""What follows if groups of one split lie in another as well."""

WIDTH = 100
"""Columns of the verdict in a terminal."""

COMMANDS = (
    ("dvc metrics diff", "these numbers against the last commit's"),
    ("dvc params diff", "and what was changed to get them"),
    ("dvc exp show", "all experiments side by side"),
    ("make ui", "every experiment's parameters, curves and adapter"),
)


def write(comparison: Comparison) -> None:
    """Write `paths.METRICS`, and Markdown and picture to `paths.COMPARISON`. Equal comparisons give equal bytes."""
    records.write_json(paths.METRICS, metrics(comparison))
    records.write_text(paths.COMPARISON_SVG, figures.svg(comparison, figures.FILE))
    template = environment().get_template("comparison.md.jinja")
    text = template.render(of_both(comparison), shown=LABELS[comparison.decide_by[0]])
    records.write_text(paths.COMPARISON_MD, text)


def of_both(comparison: Comparison) -> dict[str, Any]:
    """The names that the templates of Markdown and page have in common."""
    return {
        "c": comparison,
        "lead": lead(comparison),
        "basis": basis(comparison),
        "specific": specific(comparison),
        "over_baselines": over_baselines(comparison),
        "shown_words": SHOWN,
        "method": method(comparison),
        "caveats": caveats(comparison),
        "power": power(comparison),
        "equal_length": equal_length(comparison),
        "between_baselines": between_baselines(comparison),
        "contamination": contamination(comparison),
        "beyond": beyond(comparison),
        "labels": LABELS,
        "interval": f"{100 * comparison.confidence:g} % interval",
        "commands": COMMANDS,
    }


def metrics(comparison: Comparison) -> dict[str, Any]:
    """The numbers for `dvc metrics`, nested, without lists and nulls. Scores are in points, shares in [0, 1].

    `lines` has the scores of the reference lines, and tuned's lead over each in the deciding metrics.
    """
    content: dict[str, Any] = {"examples": comparison.n, "groups": comparison.groups, "seeds": len(comparison.tuned)}
    for name, result in comparison.results.items():
        content[name] = {
            "base": result.base.value,
            "tuned": result.tuned.value,
            "diff": result.diff.value,
            "ci_low": result.deciding.low,
            "ci_high": result.deciding.high,
            "p": result.p,
            "effect": result.effect,
            "effect_of_rows": result.effect_of_rows,
            "detectable": result.detectable,
            "wins": result.wins,
            "ties": result.ties,
            "losses": result.losses,
        }
        if result.seeds:
            content[name]["seed_sd"] = result.seeds.sd
    if comparison.specific:
        for name, one in comparison.specific[0].results.items():
            content[name]["specific"] = {
                "diff": one.gain.value,
                "ci_low": one.gain.low,
                "ci_high": one.gain.high,
                "p": one.p,
            }
    content["baselines"] = {
        one.output.variant: {
            name: {
                "score": one.tuned[name].base.value,
                "tuned_diff": one.tuned[name].diff.value,
                "tuned_ci_low": one.tuned[name].deciding.low,
                "tuned_ci_high": one.tuned[name].deciding.high,
            }
            for name in comparison.decide_by
        }
        for one in comparison.baselines
    }
    content["lines"] = {}
    for line in comparison.lines:
        content["lines"][line.key] = dict(line.scores)
        for name in comparison.decide_by:
            ahead = line.ahead[name]
            content["lines"][line.key] |= {
                f"{name}_diff": ahead.value,
                f"{name}_ci_low": ahead.low,
                f"{name}_ci_high": ahead.high,
            }
    if (order := comparison.contamination.tested) is not None:
        content["contamination"] = {"diff": order.difference, "p": order.p, "shards": len(order.shards)}
    content["cost"] = costs(comparison.cost)
    content["words"] = {"references": comparison.reference_words}
    content["stopped_by_cap"] = {}
    for model, outputs in (("base", [comparison.base]), ("tuned", comparison.tuned)):
        content["words"][model] = sum(one.words for one in outputs) / len(outputs)
        content["stopped_by_cap"][model] = sum(one.stopped_by_cap for one in outputs) / len(outputs)
    return content


def costs(cost: Cost) -> dict[str, Any]:
    """The cost of fine-tuning that is equal on all machines. Losses are in nats a token, means over seeds."""
    training = cost.training
    content: dict[str, Any] = {
        "trainable_parameters": cost.trainable_parameters,
        "adapter_bytes": cost.adapter_bytes,
        "epochs": _mean([one.epochs for one in training]),
        "best_epoch": _mean([one.best_epoch for one in training]),
        "kept_epoch": _mean([one.kept_epoch for one in training]),
        "validation_loss_before": _mean([one.first_loss for one in training]),
        "validation_loss": _mean([one.kept_loss for one in training]),
        "validation_loss_best": _mean([one.best_loss for one in training]),
        "training_loss": _mean([one.training_loss for one in training]),
        "gap": _mean([one.gap for one in training]),
    }
    if cost.forgetting:
        content["general_loss"] = {one.name: _forgetting(one) for one in cost.forgetting}
    return content


def _forgetting(found: Forgetting) -> dict[str, float]:
    return {
        "base": found.base_loss,
        "tuned": found.tuned_loss,
        "diff": found.diff.value,
        "ci_low": found.diff.low,
        "ci_high": found.diff.high,
        "p": found.p,
        "p_holm": found.p_holm,
        "cross_entropy": found.cross_entropy.value,
        "cross_entropy_ci_low": found.cross_entropy.low,
        "cross_entropy_ci_high": found.cross_entropy.high,
        "kl": found.kl.value,
        "kl_ci_low": found.kl.low,
        "kl_ci_high": found.kl.high,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


SHOWN: dict[Direction, str] = {
    "higher": "tuned higher",
    "lower": "tuned lower",
    "none": "no difference shown",
    "few": "too few groups",
}


def lead(comparison: Comparison) -> str:
    """The verdict in words, with what the tuned model is compared with, and the split unless it is the test split."""
    if comparison.verdict == "few":
        return (
            f"No verdict: {comparison.groups} groups of {comparison.split} examples are too few, and a verdict takes "
            f"{intervals.MIN_GROUPS}"
        )
    text = _lead(comparison, BASES[comparison.quantization])
    if comparison.split != "test":
        text = f"On the {comparison.split} split: {text[0].lower()}{text[1:]}"
    if comparison.groups < FEW_GROUPS:
        text += f" (on only {comparison.groups} groups of {comparison.split} examples)"
    return text


def _lead(comparison: Comparison, base: str) -> str:
    verdict, margin = comparison.verdict, comparison.margin
    if verdict == "none":
        return f"No difference between the {base} and the tuned model is shown"
    if verdict == "equivalent":
        return f"The tuned model is equivalent to the {base}, within ±{margin:g} points"
    if verdict == "unspecific":
        names = [LABELS[name] for name in comparison.decide_by if comparison.results[name].direction == "higher"]
        return f"Fine-tuning raised {listed(names)} over the {base}, but not what is specific to the source"
    if verdict in ("better", "worse"):
        least = min(abs(_nearest(comparison.results[name].deciding)) for name in comparison.decide_by)
        by = f", by at least {margin:g} points" if margin is not None and least > margin else ""
        return f"Fine-tuning made the model {verdict} than the {base}{by}"
    parts: list[str] = []
    for direction, words in (("higher", "better"), ("lower", "worse"), ("none", "no difference is shown")):
        if names := [LABELS[name] for name in comparison.decide_by if comparison.results[name].direction == direction]:
            than = "" if parts or direction == "none" else f" than the {base}"
            parts.append(f"{words}{than} in {listed(names)}")
    if verdict == "mixed":
        return f"The metrics disagree about fine-tuning: {'; '.join(parts)}"
    return f"Fine-tuning made the model {'; '.join(parts)}"


def _nearest(one: Interval) -> float:
    """The end of an interval that is nearest to zero."""
    return one.low if abs(one.low) < abs(one.high) else one.high


def specific(comparison: Comparison) -> str:
    """How much of the difference is specific to the source, in one or more sentences; empty if it is not known."""
    if comparison.verdict == "few" or not comparison.specific:
        return ""
    whole, *aspects = comparison.specific
    of: dict[str, list[str]] = {"higher": [], "none": [], "lower": []}
    for name in comparison.decide_by:
        one = whole.results[name]
        if one.direction in of:
            of[one.direction].append(f"{signed(one.gain.value)} ({span(one.gain)}) in {LABELS[name]}")
    found = []
    if of["higher"]:
        found.append(
            f"Specific to the source {'is' if len(of['higher']) == 1 else 'are'} {listed(of['higher'])}: that much is "
            "lost when each output is held against the references of other sources."
        )
        without = [
            one.aspect or ""
            for one in aspects
            if not any(one.results[name].direction == "higher" for name in comparison.decide_by)
        ]
        if without:
            names = listed(without) if len(without) <= MANY_ASPECTS else f"{len(without)} of {len(aspects)} aspects"
            found.append(f"For {names} no specific gain is shown.")
    if of["none"]:
        found.append(f"No gain is shown to be specific to the source: {listed(of['none'])}.")
    if of["lower"]:
        found.append(f"Less is specific to the source than before: {listed(of['lower'])}.")
    return " ".join(found)


def method(comparison: Comparison) -> list[str]:
    """How verdict, intervals and p-values come about: one or more sentences each."""
    names = listed([LABELS[name] for name in comparison.decide_by])
    several = len(comparison.decide_by) > 1
    found = [
        f"“Better” needs {names} above zero{', all of them' if several else ''}, by interval and by p, with "
        f"{intervals.MIN_GROUPS} groups of examples at least; “worse” needs {'them' if several else 'it'} below.",
        f"Intervals: a studentized bootstrap (bootstrap-t) of the jackknife values of {comparison.groups} groups, "
        f"{comparison.samples:,} resamples, PCG64 seed {comparison.seed}"
        + (f"; with fewer than {intervals.FEW} groups Student's t." if comparison.groups < intervals.FEW else "."),
        "p: two-sided, of no difference, by flipping the signs of the groups' values"
        + (", in all ways." if comparison.groups <= intervals.EXACT else ".")
        + " d_z: mean over standard deviation of the differences, of groups and of rows.",
    ]
    if comparison.margin is not None:
        found.append(
            f"“Equivalent” needs the {100 * (2 * comparison.confidence - 1):g} % interval{'s' if several else ''} "
            f"within ±{comparison.margin:g} points (two one-sided tests)."
        )
    if comparison.base.samples > 1:
        found.append(_sampled(comparison))
    if len(comparison.tuned) > 1:
        found.append(
            f"Tuned scores are means over the {len(comparison.tuned)} seeds. The interval that decides covers them "
            "too: at each end, the distances by examples and by seeds (Student's t) are added as the sides of a right "
            "angle (MOVER)."
        )
    return found


def _sampled(comparison: Comparison) -> str:
    """How answers were drawn, and how much scores vary with the draw, in two sentences."""
    drawing = comparison.decoding["generation"]["sampling"]
    spreads = [
        f"{points(one.samples_sd[name] or 0.0)} for {one.variant}"
        for name in comparison.decide_by[:1]
        for one in (comparison.base, *comparison.tuned)
    ]
    return (
        f"Answers are drawn (temperature {drawing['temperature']:g}, top-k {drawing['top_k']}, top-p "
        f"{drawing['top_p']:g}, min-p {drawing['min_p']:g}, seed {drawing['seed']}), and each row's score is the mean "
        f"over {comparison.base.samples}; texts that are shown are the first ones. From one draw of all answers to the "
        f"next, {LABELS[comparison.decide_by[0]]} varies by {listed(spreads)} (standard deviation)."
    )


def over_baselines(comparison: Comparison) -> str:
    """What the difference is to the untrained variants of the base, a sentence each; empty if there are none."""
    if comparison.verdict == "few":
        return ""
    found = []
    for one in comparison.baselines:
        over = f", over {one.n} of these examples," if one.n < comparison.n else ""
        parts = [
            f"{signed(result.diff.value)} ({span(result.deciding)}) in {LABELS[name]}"
            for name, result in one.tuned.items()
            if name in comparison.decide_by
        ]
        found.append(f"Against {one.label}{over} the difference is {listed(parts)}.")
    return " ".join(found)


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def basis(comparison: Comparison) -> str:
    """The numbers behind the verdict, for the report's first sentence."""
    parts = []
    for i, name in enumerate(comparison.decide_by):
        one = comparison.results[name]
        interval = f"{100 * comparison.confidence:g} % interval " if i == 0 else ""
        parts.append(
            f"{LABELS[name]} {points(one.base.value)} → {points(one.tuned.value)} "
            f"({signed(one.diff.value)}, {interval}{span(one.deciding)})"
        )
    over = f"{comparison.n} {comparison.split} examples"
    if comparison.groups < comparison.n:
        over += f" of {comparison.groups} groups"
    if len(comparison.tuned) > 1:
        over += f", mean of {len(comparison.tuned)} seeds"
    return f"{', '.join(parts)}, over {over}."


def caveats(comparison: Comparison) -> list[str]:
    """The objections of a careful reader to this comparison, one or more sentences each; may be empty."""
    found: list[str] = []
    if comparison.split == "validation":
        found.append(
            "The validation split is for choosing among experiments, and training may have used it to stop. A gain on "
            "it is no evidence. `lora-repro unseal` scores this experiment on the test split, once."
        )
    found.extend(_not_ahead(comparison))
    found.extend(comparison.notices)
    found.extend(
        f"{share(one.stopped_by_cap)} of the outputs of {one.variant} were stopped by the token cap, so its scores "
        "depend on generation.max_new_tokens."
        for one in (comparison.base, *comparison.tuned)
        if one.stopped_by_cap > MANY_CAPPED
    )
    found.extend(_texts(comparison))
    found.extend(f"{one.counted}: {SHARED[one.split, one.other]}." for one in comparison.shared_groups)
    found.extend(_known(comparison))
    found.extend(_price(comparison))
    if comparison.not_scored:
        parts = ", ".join(f"{why} ({count:,})" for why, count in sorted(comparison.not_scored.items()))
        found.append(f"Not all that the files of the {comparison.split} split hold was scored. Left out are: {parts}.")
    for one in (comparison.base, *comparison.tuned):
        expected = comparison.references_in_language
        if one.in_language is not None and expected is not None and one.in_language < expected - OTHER_LANGUAGE:
            found.append(
                f"{share(one.in_language)} of the outputs of {one.variant} are identified as {comparison.language}, "
                f"against {share(expected)} of the references."
            )
    if len(comparison.tuned) == 1:
        found.append("One training seed: the intervals cover the choice of examples, not that of the seed.")
    if len(comparison.tuned) == 2:
        found.append("Two training seeds say little about their spread, which makes the intervals wide.")
    return found


def _not_ahead(comparison: Comparison) -> list[str]:
    """What a tuned model that is called better is not shown to be better than."""
    found: list[str] = []
    if comparison.verdict in ("better", "partly-better"):
        found.extend(
            f"Tuned is not shown to be ahead of the reference line “{line.label}” ({line.about}) in "
            f"{LABELS[name]}: {signed(line.ahead[name].value)} ({span(line.ahead[name])})."
            for line in comparison.lines
            for name in comparison.decide_by
            if line.ahead[name].low <= 0
        )
        found.extend(
            f"Tuned is not shown to be better than {one.label} in {LABELS[name]}: "
            f"{signed(one.tuned[name].diff.value)} ({span(one.tuned[name].deciding)}), over {one.groups} groups."
            for one in comparison.baselines
            for name in comparison.decide_by
            if one.tuned[name].direction != "higher"
        )
    return found


def _known(comparison: Comparison) -> list[str]:
    """What tuned or base may know of the rows before they are asked, and what the form of the references does."""
    found = []
    if answers := comparison.known.answers:
        found.append(
            f"{answers:,} of {comparison.n:,} {comparison.split} rows have an answer that is a training answer as "
            "well: tuned may know it by heart."
        )
    if sources := comparison.known.sources:
        found.append(
            f"{sources:,} of {comparison.n:,} {comparison.split} rows have a short source that is a training source as "
            "well, but for its numbers."
        )
    if (order := comparison.contamination.tested) is not None and knows_order(comparison):
        found.append(
            "The base finds the test references more likely in the order of their files than shuffled (one-sided p "
            f"{probability(order.p)}): it may have seen them in pretraining, unless the files are sorted."
        )
    if comparison.not_nfc:
        found.append(
            f"{comparison.not_nfc:,} of {comparison.n:,} {comparison.split} rows have references that are not in the "
            "normal form NFC. A model that writes é in their form gains by that alone, since a metric here compares "
            "code points."
        )
    return found


def _texts(comparison: Comparison) -> list[str]:
    """What is odd about texts: prompts that were cut, and thoughts where answers are expected."""
    thinking = str(comparison.decoding["thinking"]).lower()
    found = [
        f"{one.cut:,} of {one.examples:,} {split.replace('train', 'training')} prompts were cut to prompt.max_tokens: "
        f"they lost {one.lost:,} tokens."
        for split, one in comparison.encoded.items()
        if one.cut
    ]
    if thoughts := comparison.encoded["train"].thoughts:
        found.append(
            f"{thoughts:,} of {comparison.encoded['train'].examples:,} training answers hold a thought or its mark, "
            "which the model is trained to write."
        )
    found.extend(
        f"{one.thoughts:,} of {comparison.n:,} outputs of {one.variant} hold a thought or its mark, and are scored "
        f"with it (prompt.thinking is {thinking})."
        for one in (comparison.base, *comparison.tuned)
        if one.thoughts
    )
    return found


def _price(comparison: Comparison) -> list[str]:
    """What the gain cost, as far as it is known: general text forgotten, or training that went too far."""
    found = []
    if not comparison.cost.forgetting:
        found.append(
            "Forgetting was not measured (forget.probes is empty): what the adapter costs elsewhere is not known."
        )
    found.extend(
        f"Fine-tuning made the model worse at text that is not of the task, on the probe {one.name}: "
        f"{nats(one.base_loss)} → {nats(one.tuned_loss)} nats a token ({change(one.diff.value)}, "
        f"{change_span(one.diff)}), a perplexity of {points(one.base_perplexity)} → {points(one.tuned_perplexity)}."
        for one in comparison.cost.forgetting
        if one.rose
    )
    found.extend(
        f"Whether fine-tuning made the model worse on the probe {one.name} cannot be shown: {one.groups} {one.units} "
        f"are too few, {intervals.MIN_GROUPS} are needed at least."
        for one in comparison.cost.forgetting
        if one.direction == "few"
    )
    several = len(comparison.cost.training) > 1
    found.extend(
        f"The adapter{f' of seed {one.seed}' if several else ''} is trained past its best: the validation loss was "
        f"{nats(one.best_loss)} after {epochs(one.best_epoch)} and is {nats(one.kept_loss)} after "
        f"{epochs(one.kept_epoch)}, which is what was kept. train.early_stopping keeps the best."
        for one in comparison.cost.training
        if one.overfitted
    )
    return found


def between_baselines(comparison: Comparison) -> str:
    """How the untrained variants of the base differ from each other, in a sentence; empty without two of them."""
    if comparison.verdict == "few":
        return ""
    found = []
    for first, second in ((one, two) for one, two in pairwise(comparison.baselines) if two.ahead):
        parts = [
            f"{signed(one.diff.value)} ({span(one.deciding)}) in {LABELS[name]}"
            for name, one in second.ahead.items()
            if name in comparison.decide_by
        ]
        shown = any(second.ahead[name].direction in ("higher", "lower") for name in comparison.decide_by)
        said = "" if shown else ", so no difference between the two is shown"
        label = second.label[0].upper() + second.label[1:]
        found.append(f"{label} scores {listed(parts)} against {first.label}{said}.")
    return " ".join(found)


def knows_order(comparison: Comparison) -> bool:
    """Whether it is shown that the base finds the test references more likely in the order of their files."""
    order = comparison.contamination.tested
    return order is not None and order.p <= 1 - comparison.confidence


def contamination(comparison: Comparison) -> str:
    """What the order of the test references says of pretraining, in sentences."""
    order = comparison.contamination.tested
    if order is None:
        return (
            "Whether the base has seen the test references in pretraining was not tested: "
            f"{comparison.contamination.not_tested}."
        )
    measured = (
        f"The base without quantization read the references of {order.groups:,} groups, in {len(order.shards)} shards, "
        f"in the order of the files and in {order.permutations} shuffled orders of each shard. The log-likelihood in "
        f"the order of the files, minus that shuffled, is {change(order.difference)} nats a token; one-sided p "
        f"{probability(order.p)}."
    )
    if knows_order(comparison):
        return (
            f"{measured} So the base knows something of this order. Either it has seen these files in pretraining, and "
            "the scores of base and tuned may rest on memory; or the files are sorted, so that neighbours are alike. "
            "Files whose rows are in a random order rule out the second."
        )
    return (
        f"{measured} This is no sign that the base knows the order of the files. It does not show that the texts were "
        "unseen: the test finds a memorized order alone, not a text that was seen by itself or in another order."
    )


def equal_length(comparison: Comparison) -> str:
    """The gain at equal length, in a sentence; empty if it is not known."""
    found = comparison.equal_length
    if found is None:
        return ""
    gains = listed([f"{signed(one.value)} ({span(one)}) in {LABELS[name]}" for name, one in found.gains.items()])
    return (
        f"Tuned writes {found.ratio:.2g} times as many words as base, in the median. At equal length the difference is "
        f"{gains}, by a line through the examples' differences over the logarithm of the ratio of lengths."
    )


def beyond(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What references and outputs say beyond their sources, in the order numbers, names, rare words; may be empty."""
    return [
        (name, [_absent(part) for part in (one.numbers, one.names, one.rare_words)])
        for name, one in comparison.beyond_source
    ]


def _absent(one: Absent) -> str:
    return "none" if one.share is None else f"{one.absent:,} of {one.found:,} ({share(one.share)})"


def power(comparison: Comparison) -> str:
    """The size of the difference that this test set shows, and the size of a test set that shows one point."""
    found = {name: comparison.results[name].detectable for name in comparison.decide_by}
    most = max(found.values())
    if most <= significance.TIE:
        return "All differences are the same, so nothing can be said about the size of the test set."
    differences = listed([f"{points(value)} points in {LABELS[name]}" for name, value in found.items()])
    text = f"Such a comparison finds a true difference of {differences} in {share(significance.POWER)} of repetitions"
    if len(comparison.tuned) > 1:
        return f"{text}."
    needed = significance.groups_needed(1.0, most, comparison.groups)
    each = " in each of them" if len(found) > 1 else ""
    return f"{text}; to find 1 point{each} takes about {needed:,} groups of examples (here {comparison.groups:,})."


def closing_lines(store: str, page: str) -> str:
    """The verdict of the last comparison and where to look next, for a terminal.

    `store` is the text of `store.shown`: a server's page, or the address of another MLflow store. `page` is the text of
    `page.describe`.

    UserError if there is no report yet.
    """
    text = paths.published(paths.COMPARISON_MD)
    try:
        verdict = text.read_text(encoding="utf-8").split("\n", 1)[0]
    except FileNotFoundError:
        raise UserError(f"{text} is missing: run `dvc repro`, which makes it") from None
    return "\n".join(
        [
            fill(verdict.replace("**", ""), WIDTH, break_long_words=False, break_on_hyphens=False),
            "",
            f"  report   {page}  (or {text})",
            f"  numbers  {paths.METRICS}  (dvc metrics diff)",
            f"  record   {_viewer(store)}",
        ]
    )


def _viewer(store: str) -> str:
    """The page of an MLflow server, or the command that shows a store which has no server."""
    if store.startswith(("http://", "https://")):
        return f"{store}  (make ui)" if "#" in store else f"{store.rstrip('/')}/#/experiments  (make ui)"
    if store.startswith("databricks"):
        return f"{store}: the pages of your workspace"
    return f"mlflow ui --host 127.0.0.1 --backend-store-uri {shlex.quote(store)}  (make ui)"


def points(value: float) -> str:
    """A score with one decimal."""
    return f"{value:.1f}"


def signed(value: float) -> str:
    """A difference with its sign: one decimal, or two below 0.1, so that its sign is certain."""
    return _signed(value, f"{abs(value):.1f}" if abs(value) >= 0.1 or value == 0 else f"{abs(value):.2f}")


def nats(value: float) -> str:
    """A loss, in nats a token."""
    return f"{value:.3f}"


def change(value: float) -> str:
    """A difference of losses with its sign: three decimals, or five below 0.001, so that its sign is certain."""
    return _signed(value, f"{abs(value):.3f}" if abs(value) >= 0.001 or value == 0 else f"{abs(value):.5f}")


def _signed(value: float, digits: str) -> str:
    return f"−{digits}" if value < 0 else f"+{digits}"


def change_span(interval: Interval) -> str:
    return f"{change(interval.low)} to {change(interval.high)}"


def epochs(value: float) -> str:
    """`1 epoch`, `2.5 epochs`."""
    return f"{value:.3g} epoch{'' if value == 1 else 's'}"


def probability(value: float) -> str:
    """A p-value: three decimals, or "≤ 0.001"."""
    return "≤ 0.001" if value < 0.001 else f"{value:.3f}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def span(interval: Interval) -> str:
    return f"{signed(interval.low)} to {signed(interval.high)}"


def markdown(text: str) -> str:
    """Any text as one line of plain Markdown, also for a table cell, without markup, HTML or links of its own."""
    text = shown(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    text = re.sub(r"://|(?<=www)\.|@", lambda found: "".join(f"&#{ord(c)};" for c in found[0]), text, flags=re.I)
    return re.sub(r"\s+", lambda found: "<br>" if "\n" in found[0] else found[0], text) or "*(empty)*"


def code(text: str) -> str:
    """Any text as code within a line of Markdown, also in a table: a code span, or HTML that looks like one."""
    text = shown(text)
    return f"`{text}`" if text and not re.search(r"[`|\n]", text) else f"<code>{markdown(text)}</code>"


def html(text: str) -> Markup:
    """Any text as HTML: escaped, and without addresses that a tool could take for links."""
    return Markup(str(escape(shown(text))).replace("://", "&#58;//")) or Markup("<em>(empty)</em>")


def shown(text: str) -> str:
    """A text as reports show it: stripped, line breaks as newlines, controls and halves of characters as U+FFFD."""
    return re.sub(rf"[{CONTROLS}\ud800-\udfff]", "\ufffd", "\n".join(text.splitlines())).strip()


def environment(folder: Path = TEMPLATES) -> Environment:
    """Jinja on the templates of a folder, with functions of this module as filters."""
    filters = (points, signed, span, share, probability, nats, change, change_span, epochs, markdown, code, html)
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {function.__name__: function for function in filters}
    return made
