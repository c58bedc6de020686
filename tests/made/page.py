"""A report's page of planted examples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.core import paths
from pipeline.core.params import Evaluate
from pipeline.core.records import Example, write_json
from pipeline.report import figures as charts
from pipeline.report import page
from pipeline.report.page import Content, Origin, Spent
from pipeline.score.compare import Comparison
from pipeline.score.side_by_side import Row, Written
from tests.made.comparison import GUARDS, comparison

EVALUATE = Evaluate(
    metrics=["rouge1", "rouge2"], use_stemmer=True, rouge_tokenizer="latin", bleu_tokenizer="13a", language=None
)
DIGEST = "0123456789abcdef" * 4


def write_curves() -> None:
    """Three seeds' training curves in the current folder, from which `drawn` draws."""
    for seed in (17, 18, 19):
        paths.training_log(seed).parent.mkdir(parents=True, exist_ok=True)
        paths.training_log(seed).write_text("step,loss\n" + "".join(f"{i},{3 - i / 999}\n" for i in range(999)))
        write_json(paths.training_summary(seed), {"validation": [{"step": 0, "loss": 3.0}, {"step": 9, "loss": 2.0}]})


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
    summary = {
        "rows": 300, "steps": 25, "tokens": 1000, "final_loss": 2.5, "validation": [{"step": 0, "loss": 3.0}],
        "largest_grad_norm": 1.5, "trainable_parameters": 4884480,
    }  # fmt: skip
    return replace(
        Content(
            comparison=made,
            guards=GUARDS,
            rows=rows,
            training=[summary | {"seed": 17 + i} for i in range(len(made.tuned))],
            spent=[Spent("train-17", 75.5, 3000.0, None, 0.0012, "RAPL", "cpu", 2), Spent("fetch", *[None] * 7)],
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
            card={"source": "pip:a==1/x", "sha256": None, "splits": {"train": {"rows": 300}}},
            base={"source": "pip:m==1/m.gguf", "parameters": 134515008, "sha256": "e" * 64},
            quantized={"method": "nf4", "double_quantization": True, "bits_per_parameter": 4.127, "dtype": "bfloat16"},
        ),
        **change,
    )


def drawn(one: Content) -> Content:
    """The content with its figures."""
    seeds = [summary["seed"] for summary in one.training]
    return replace(one, figures=charts.figures(one.comparison, one.rows, seeds, charts.PAGE))


def render(one: Content, explorer: int = 50) -> str:
    return page.render(one, EVALUATE, explorer)
