"""A comparison with known values, as `pipeline.score.compare` finds one."""

from dataclasses import replace
from typing import Any

from pipeline.core import contracts
from pipeline.core.contracts import Absent, NotInSource
from pipeline.score.comparison import (
    Aspect,
    Baseline,
    Comparison,
    EqualLength,
    Line,
    Output,
    Pair,
    Result,
    Specific,
    SpecificGain,
    Spread,
)
from pipeline.score.guard_record import Guard
from pipeline.score.known import Known
from pipeline.score.side_effects import Cost, Forgetting, Training
from pipeline.score.significance import Direction, Interval
from tests.made.records import encoded

GUARDS = [Guard("a <doubled> BOS", "600 prompts | 1 BOS at most")]
NASTY = (
    "a | b\n<script>alert(1)</script> `code` [x](https://evil.example/) **bold** &amp; $x$ \\ <!-- "
    "\x00 www.evil.example"
)


def result(base: float, tuned: float, low: float, high: float) -> Result:
    diff = tuned - base
    return Result(
        base=Interval(base, base - 1, base + 1),
        tuned=Interval(tuned, tuned - 1, tuned + 1),
        diff=Interval(diff, low, high),
        seeds=None,
        direction="higher" if low > 0 else "lower" if high < 0 else "none",
        within_margin=None,
        p=0.0002,
        effect=0.41,
        effect_of_rows=0.22,
        detectable=2.2,
        wins=0.7,
        ties=0.1,
        losses=0.2,
    )


TRAINING = Training(
    seed=17,
    epochs=1.0,
    steps=25,
    planned_steps=25,
    first_loss=3.552,
    best_loss=2.748,
    best_epoch=1.0,
    last_loss=2.748,
    kept_loss=2.748,
    kept_epoch=1.0,
    training_loss=2.701,
    gap=0.047,
)
FORGETTING = Forgetting(
    name="encyclopedia",
    source="pip:texts==1/texts",
    tokens=8192,
    window=128,
    bos=True,
    read=contracts.probe_read("plain", 128, bos=True),
    texts=33,
    units="texts",
    groups=33,
    base_loss=2.9,
    tuned_loss=2.895,
    base_perplexity=18.2,
    tuned_perplexity=18.0,
    diff=Interval(-0.005, -0.012, 0.002),
    cross_entropy=Interval(2.95, 2.9, 3.0),
    kl=Interval(0.05, 0.04, 0.06),
    p=0.2,
    p_holm=0.4,
    direction="none",
)
DIALOGUE = replace(
    FORGETTING,
    name="dialogue",
    source="pip:talks==1/talks",
    tokens=1024,
    window=256,
    read=contracts.probe_read("chat", 256, bos=True),
    texts=80,
    units="conversations",
    groups=80,
    base_loss=3.1,
    tuned_loss=3.11,
    diff=Interval(0.01, -0.02, 0.04),
    p=0.3,
    p_holm=0.6,
)


ORDER = contracts.OrderTest(
    device="cpu",
    threads=2,
    permutations=2,
    groups=8,
    rows=24,
    tokens=700,
    difference=0.0021,
    p=0.31,
    shards=[contracts.ShardOrders(4, 12, 350, -900.0, [-901.5, -900.2])] * 2,
)


SPECIFIC = {
    "rouge1": SpecificGain(25.6, 14.1, 31.3, 16.1, Interval(3.7, 2.3, 5.2), "higher", 0.0002),
    "rouge2": SpecificGain(7.8, 1.1, 10.5, 1.2, Interval(2.6, 1.2, 4.0), "higher", 0.0003),
}
NOT_SPECIFIC = {
    "rouge1": SpecificGain(25.6, 14.1, 31.3, 19.6, Interval(0.2, -2.3, 2.9), "none", 0.8),
    "rouge2": SpecificGain(7.8, 1.1, 10.5, 3.2, Interval(0.6, -1.2, 2.4), "none", 0.6),
}


BEYOND = NotInSource(Absent(20, 5), Absent(1000, 300), Absent(50, 40))
PARTLY: dict[str, Direction] = {"rouge1": "higher", "rouge2": "none"}


def several_seeds() -> Comparison:
    """Three seeds, whose spread makes the interval that decides wider."""
    spread = {"rouge1": Spread(0.3, Interval(5.7, 3.5, 7.9)), "rouge2": Spread(0.2, Interval(2.7, -0.1, 5.5))}
    one = comparison()
    return replace(
        one,
        verdict="partly-better",
        results={name: replace(one.results[name], seeds=spread[name], direction=PARTLY[name]) for name in one.results},
        tuned=[replace(one.tuned[0], variant=f"tuned-{i}") for i in range(3)],
    )


def comparison(**change: Any) -> Comparison:
    results = {"rouge1": result(25.6, 31.3, 4.1, 7.2), "rouge2": result(7.8, 10.5, 1.2, 3.9)}
    scores = {"rouge1": 22.0, "rouge2": 6.0}
    ahead = {"rouge1": Interval(9.3, 8.0, 10.0), "rouge2": Interval(4.5, 3.0, 6.0)}
    pair = Pair("p1/approach", "The source.", "The reference.", "Base said.", "Tuned said.", 10.0, 60.0)
    return replace(
        Comparison(
            verdict="better",
            decide_by=["rouge1", "rouge2"],
            margin=None,
            quantization="nf4",
            confidence=0.95,
            samples=10000,
            seed=17,
            split="test",
            n=300,
            groups=100,
            signature="rouge-score 0.1.2|F1x100",
            decoding={"device": "cpu", "dtype": "bfloat16", "prompts_sha256": "a" * 64, "model_sha256": "b" * 64}
            | {"thinking": False},
            results=results,
            aspects=[Aspect("approach", 100, results, {"rouge1": 0.0004, "rouge2": 0.2})],
            slices=[Aspect("sources of 9 to 80 words", 100, results, {"rouge1": 0.001, "rouge2": 0.3})],
            specific=[Specific(None, 300, 100, SPECIFIC), Specific("approach", 100, 100, NOT_SPECIFIC)],
            equal_length=EqualLength(0.5, {"rouge1": Interval(5.1, 3.0, 7.2), "rouge2": Interval(2.2, -0.1, 4.5)}),
            lines=[Line("lead", "Lead", "the first sentence", 300, scores, ahead)],
            baselines=[
                Baseline(
                    label="the base without quantization",
                    short="Base, unquantized",
                    n=150,
                    groups=50,
                    tuned={"rouge1": result(26.7, 32.8, 3.8, 8.4), "rouge2": result(7.3, 12.8, 3.5, 7.6)},
                    gain={"rouge1": result(24.9, 26.7, 0.3, 3.3), "rouge2": result(7.5, 7.3, -1.3, 0.9)},
                    ahead={},
                    output=Output(
                        "base-unquantized", 44.1, 0.05, 0.0, 0.0, None, {"rouge1": 26.7, "rouge2": 7.3}, 0, BEYOND
                    ),
                )
            ],
            base=Output("base", 49.2, 0.01, 0.0, 0.0, None, {"rouge1": 25.6, "rouge2": 7.8}, 0, BEYOND),
            tuned=[Output("tuned-17", 21.0, 0.0, 0.0, 0.0, None, {"rouge1": 31.3, "rouge2": 10.5}, 0, BEYOND)],
            language=None,
            references_in_language=None,
            published=[],
            reference_words=22.2,
            best=[pair],
            worst=[],
            cost=Cost(4_884_480, 19_600_000, [TRAINING], [FORGETTING, DIALOGUE]),
            guards=GUARDS,
            known=Known(0, 0),
            contamination=contracts.Contamination("b" * 64, tested=ORDER),
            notices=[],
            references_not_in_source=NotInSource(Absent(0, 0), Absent(1200, 400), Absent(80, 20)),
            encoded={"train": encoded(300), "validation": encoded(150), "test": encoded(300)},
        ),
        **change,
    )


FIRST = (
    "**Fine-tuning made the model better than the NF4 base**: ROUGE-1 25.6 → 31.3 (+5.7, 95 % interval +4.1 to +7.2), "
    "ROUGE-2 7.8 → 10.5 (+2.7, +1.2 to +3.9), over 300 test examples of 100 groups. Specific to the source are +3.7 "
    "(+2.3 to +5.2) in ROUGE-1 and +2.6 (+1.2 to +4.0) in ROUGE-2: that much is lost when each output is held against "
    "the references of other sources. For approach no specific gain is shown. Against the base without quantization, "
    "over 150 of these examples, the difference is +6.1 (+3.8 to +8.4) in ROUGE-1 and +5.5 (+3.5 to +7.6) in ROUGE-2."
)
