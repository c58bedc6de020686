"""What the guards of a run measured, for the report.

Each guard fails its stage as soon as its fault arises, so if there is a report, all of them held. This module only
collects their measurements from the stages' outputs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.core import contracts, paths
from pipeline.core.contracts import DataCard, QuantizedFacts, TrainingSummary
from pipeline.core.records import Decoding


@dataclass(frozen=True, slots=True)
class Guard:
    """One guard: the fault that it rules out, and what it measured."""

    rules_out: str
    measured: str


def measured(seeds: Sequence[int]) -> list[Guard]:
    """The guards of the experiment in the working directory, in the order of its stages."""
    card = contracts.read(paths.DATA_CARD, DataCard)
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    training = [contracts.read(paths.training_summary(seed), TrainingSummary) for seed in seeds]
    variants = [paths.variant(None), *(paths.variant(seed) for seed in seeds)]
    decodings = {variant: contracts.read(paths.decoding(variant), Decoding) for variant in variants}
    base = decodings["base"]
    return [
        Guard("test or validation examples in training", _overlap(card)),
        Guard("quantization or a device other than asked for", f"{_quantization(facts)}; computed on {base.device}"),
        Guard(
            "a doubled BOS, or another prefix in inference than in training",
            f"{_each(one.prompts_checked for one in training)} prompts start with one BOS at most; training "
            "continues the ids that inference continues",
        ),
        Guard(
            "training rows without a supervised token or a closing EOS",
            f"shortest answer {min(one.shortest_answer for one in training)} tokens, the EOS included, in each of "
            f"{_each(one.rows for one in training)} rows; {_each(one.dropped for one in training)} dropped as "
            "too long",
        ),
        Guard(
            "gradients through repacked 4-bit weights",
            f"{_each(one.repacked_layers for one in training)} layers repacked at the end of training",
        ),
        Guard(
            "a loss or an adapter that is not finite",
            f"largest gradient norm {_each(_number(one.largest_grad_norm) for one in training)}, last loss "
            f"{_each(_number(one.final_loss) for one in training)}",
        ),
        Guard(
            "an adapter that is not applied",
            f"it moves a logit by up to {_each(_number(one.logit_change) for one in training)}; every tensor was "
            "loaded as saved, on the base it was trained on",
        ),
        Guard("outputs that depend on their batch", _recheck(decodings, base.generation["batch_size"])),
        Guard(
            "hidden decoding defaults, unequal prompts",
            f"{len(base.generation)} decoding settings, {base.device} with {base.threads} threads, "
            f"{base.dtype} and prompts {base.prompts_sha256[:12]} are those of all {len(variants)} variants; "
            f"{base.generation['backend']} computed them",
        ),
    ]


def not_scored(split: str) -> dict[str, int] | None:
    """What the files of a scored split hold and no row of it has, by reason: entries left out, rows dropped.

    None if there is nothing. Rows that the parameters exclude do not count. UserError if the data's card is missing.
    """
    card = contracts.read(paths.DATA_CARD, DataCard)
    scored, train = card.splits[split], card.splits["train"]
    counts = Counter(scored.left_out or {}) + Counter({why: gone.rows for why, gone in scored.dropped.items()})
    if scored.held_out:  # these rows are of the training files
        counts += Counter(train.left_out or {})
    return dict(counts) or None


def _overlap(card: DataCard) -> str:
    parts = [f"{pair}: {seen.exact} exact, {seen.near} near" for pair, seen in sorted(card.overlap.items())]
    return "; ".join(parts) + " (dropped)"


def _quantization(facts: QuantizedFacts) -> str:
    if facts.method == "none":
        return f"none asked, none found; {facts.bits_per_parameter:g} bits a parameter"
    errors = facts.layers.values()
    return (
        f"{facts.quantized_layers} layers of {facts.method}, {facts.bits_per_parameter:.3f} bits a parameter, "
        f"relative error {min(errors):.3f} to {max(errors):.3f} a layer; "
        f"perplexity {facts.perplexity_before:.2f} to {facts.perplexity_after:.2f} ({facts.perplexity_read})"
    )


def _recheck(decodings: Mapping[str, Decoding], batch_size: int) -> str:
    seen = "; ".join(
        f"{variant}: {one.recheck['identical']} of {one.recheck['examples']} rechecked alone are the same"
        for variant, one in decodings.items()
    )
    return f"{seen}; the batch size ({batch_size}) is part of the experiment"


def _each(values: Iterable[object]) -> str:
    """The different values of the seeds, joined."""
    return " / ".join(dict.fromkeys(map(str, values)))


def _number(value: float) -> str:
    return f"{value:.3g}"
