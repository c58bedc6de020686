"""A report's page of planted examples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.core import contracts
from pipeline.core.contracts import Validation
from pipeline.core.params import Evaluate
from pipeline.core.records import Example
from pipeline.record.origin import Origin
from pipeline.report import figures, page
from pipeline.report.curves import Curve
from pipeline.report.page import Content
from pipeline.score.comparison import Comparison
from pipeline.score.side_by_side import Row, Written
from tests.made.comparison import comparison
from tests.made.records import base_facts, data_card, quantized_facts, training

EVALUATE = Evaluate(
    split="test",
    metrics=["rouge1", "rouge2"],
    use_stemmer=True,
    rouge_tokenizer="latin",
    bleu_tokenizer="13a",
    bertscore=None,
    normal_form="NFC",
    language=None,
)
COST = contracts.Cost("f" * 64, 75.5, 3000.0, device="cpu", threads=2, energy_kwh=0.0012, energy_meter="RAPL")
DIGEST = "0123456789abcdef" * 4


def losses(*seeds: int) -> list[Curve]:
    """The training curves of some seeds."""
    steps = [(step, 3 - step / 999) for step in range(0, 999, 3)]
    return [Curve(seed, steps, [Validation(0, 3.0), Validation(9, 2.0)]) for seed in seeds]


def row(name: str, aspect: str = "approach", text: str = "The model sings.", seeds: int = 1, **change: Any) -> Row:
    example = Example(name, name, aspect, "A source.", "A reference model.", "A source.")
    written = Written(text, 5, False, {"rouge1": 10.0, "rouge2": 5.0})
    better = replace(written, scores={"rouge1": 40.0, "rouge2": 5.0})
    return replace(Row(example, written, [better] * seeds), **change)


def content(made: Comparison | None = None, rows: Sequence[Row] | None = None, **change: Any) -> Content:
    made = made or comparison()
    rows = list(rows or [row("p1/approach", seeds=len(made.tuned)), row("p2", "outcome", seeds=len(made.tuned))])
    ids = {one.example.id for one in rows}
    costs = replace(made.cost, training=[replace(made.cost.training[0], seed=17 + i) for i in range(len(made.tuned))])
    made = replace(made, cost=costs, best=[pair for pair in made.best if pair.id in ids])
    return replace(
        Content(
            comparison=made,
            rows=rows,
            training=[training(17 + i, steps=25) for i in range(len(made.tuned))],
            costs={"train-17": COST, "fetch": None},
            origin=Origin(
                digest=DIGEST,
                commit="c" * 40,
                changed=[],
                experiment=None,
                stages={"prepare": {"out/data": "d" * 32}},
                params={"lora.r": "16", "generation.max_new_tokens": "80"},
                params_yaml="seeds: [17] # http://example.org\n",
                versions={"python": "3.11.7"},
                machine={"cpu": "a <cpu>", "cores": 2, "system": "Linux 6"},
            ),
            card=data_card(),
            base=base_facts(),
            quantized=quantized_facts(),
        ),
        **change,
    )


def drawn(one: Content) -> Content:
    curves = losses(*(summary.seed for summary in one.training))
    return replace(one, figures=figures.all_of(one.comparison, one.rows, curves, figures.PAGE))


def render(one: Content, explorer: int = 50) -> str:
    return page.render(one, EVALUATE, explorer)
