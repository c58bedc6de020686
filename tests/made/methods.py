"""The kinds of adapters, and where each works or is refused: the cases of the tests, and the table of docs/methods.md.

`python -m tests.made.methods` writes the table into the page.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import ROOT

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- table: python -m tests.made.methods -->", "<!-- end of table -->"
COLUMNS = {
    "peft": "loss and gradients equal PEFT's",
    "none": "unquantized base",
    "nf4": "NF4 base",
    "resume": "killed and resumed",
    "adapter": "export adapter",
    "merged": "export merged",
    "gguf": "export GGUF",
    "llama.cpp": "decoded by llama.cpp",
}


@dataclass(frozen=True)
class Method:
    """Settings of the section `lora`, and the columns in which they are refused, with a phrase of the message.

    `model`: what the base of the tests has beside plain layers (`biases`).
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The quantization of the tests that need one."""
        return "nf4" if "none" in self.refused else "none"


ONE_BASE = {"nf4": "quantized again for each adapter"}
NOT_PLAIN = {"gguf": "is not plain LoRA", "llama.cpp": "cannot apply such an adapter"}
BIASED = {"attention_bias": True, "mlp_bias": True}
METHODS = (
    Method("plain"),
    Method("`rslora: true`", {"rslora": True}),
    Method("`layers: [1]`", {"layers": [1]}),
    Method(
        "`rank_pattern`, `alpha_pattern`",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 6}, "alpha_pattern": {"down_proj": 3.0, "k_proj": 16.0}},
    ),
    Method("`dora: true`", {"dora": True}, NOT_PLAIN),
    Method("`init: gaussian`", {"init": "gaussian"}),
    Method("`init: orthogonal`", {"init": "orthogonal"}),
    Method("`init: pissa`", {"init": "pissa"}, ONE_BASE),
    Method("`init: pissa_niter_<n>`", {"init": "pissa_niter_8"}, ONE_BASE),
    Method("`init: olora`", {"init": "olora", "rslora": True}, ONE_BASE),
    Method("`init: loftq`", {"init": "loftq"}, {"none": "makes up for what 4 bits round away"}),
    Method("`init: eva`", {"init": "eva"}),
    Method("`train_only: B`", {"train_only": "B"}),
    Method("`train_only: A`", {"train_only": "A", "init": "orthogonal"}),
    Method("`plus_ratio: 16`", {"plus_ratio": 16.0}),
    Method("`bias: all`", {"bias": "all", "target_modules": ["q_proj", "down_proj"]}, NOT_PLAIN, BIASED),
    Method("`bias: lora_only`", {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}, NOT_PLAIN, BIASED),
    Method("`modules_to_save`", {"modules_to_save": ["embed_tokens", "lm_head"]}, NOT_PLAIN),
)


def having(column: str, refused: bool = False) -> list[Method]:
    """The methods that work in a column, or are refused there."""
    assert column in COLUMNS
    return [one for one in METHODS if (column in one.refused) == refused]


def names(methods: list[Method]) -> list[str]:
    """Names for pytest."""
    return [one.name.replace("`", "") for one in methods]


def table() -> str:
    """The table in Markdown."""
    rows = [["`lora`", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    rows += [[one.name, *("refused" if column in one.refused else "tested" for column in COLUMNS)] for one in METHODS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(text: str) -> str:
    """The text of the page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    Path(PAGE).write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
