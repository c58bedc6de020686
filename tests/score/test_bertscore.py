"""BERTScore has the values of the package `bert-score`, and only by the encoder that was named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core import params, records
from pipeline.core.errors import UserError
from pipeline.score import bertscore, metrics
from tests.made.encoder import encoder
from tests.made.experiment import EVALUATE

PAIRS = [
    ("the cat sat on the mat .", "a dog ran in the park ."),
    ("the cat sat", "the cat sat"),
    ("it was fast", "the old red dog was big and slow and sat on a mat in the park ."),
    ("dogs", "cat"),
    ("the red cat", "cat red the"),
]
GOLDEN = {
    1: [0.744188, 1.0, 0.648536, 0.657845, 0.997348],
    2: [0.820303, 1.0, 0.722152, 0.765849, 0.997927],
    3: [0.79012, 1.0, 0.721869, 0.636749, 0.99737],
}
"""F1 of `PAIRS` by bert-score 0.3.13 with the encoder of `tests.made.encoder`, by layer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("encoder") / "bert")


def named(folder: Path, layer: int = 2, **change: Any) -> params.Bertscore:
    given: dict[str, Any] = {"source": str(folder), "sha256": records.sha256_tree(folder), "layer": layer}
    return params.Bertscore(**given | change)


@pytest.mark.parametrize("layer", sorted(GOLDEN))
def test_values_are_those_of_the_package(layer: int, folder: Path) -> None:
    assert bertscore.f1(PAIRS, named(folder, layer)) == pytest.approx(GOLDEN[layer], abs=2e-6)


def test_neither_other_texts_nor_threads_change_a_value(folder: Path) -> None:
    threads = torch.get_num_threads()
    together = bertscore.f1([*PAIRS, ("a b c d e f g", "h i j k l m n o p q r")], named(folder))
    assert torch.get_num_threads() == threads
    assert [bertscore.f1([one], named(folder))[0] for one in PAIRS] == pytest.approx(together[:-1], abs=1e-6)


def test_a_text_without_tokens_scores_nothing(folder: Path) -> None:
    assert bertscore.f1([("", "the cat"), ("the cat", ""), ("", "")], named(folder)) == [0, 0, 0]


def test_of_several_references_the_best_one_counts(folder: Path) -> None:
    settings = EVALUATE.model_copy(update={"metrics": ["bertscore"], "bertscore": named(folder)})
    [metric] = metrics.chosen(settings)
    rows = metric.statistics(["the cat sat", "it was"], [["a dog ran", "the cat sat"], ["it was fast"]])
    assert rows[0, 0] == pytest.approx(100, abs=1e-4)
    assert metric.corpus(rows.sum(axis=0)[None], torch.tensor([2.0]).numpy())[0] == pytest.approx(rows.mean())
    sha256 = named(folder).sha256[:12]
    assert f"BERTScore|F1x100|encoder:{sha256}|layer:2|idf:no|rescaled:no" in metrics.signature(settings, [["a"]])


def test_an_encoder_that_is_not_the_named_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the sha256 .*: the encoder is another one than was named"):
        params.require_encoder(named(folder, sha256="0" * 64))
    with pytest.raises(UserError, match=r"is no folder with config.json, a tokenizer and weights in \*.safetensors"):
        params.require_encoder(named(folder, source=str(tmp_path)))
    with pytest.raises(UserError, match=r"evaluate.bertscore.layer = 4, but the encoder has 3 layers"):
        bertscore.f1(PAIRS, named(folder, 4))


@pytest.mark.parametrize(("names", "given"), [(["rouge1", "bertscore"], False), (["rouge1"], True)])
def test_metric_and_encoder_come_together(names: list[str], given: bool, folder: Path) -> None:
    content = EVALUATE.model_dump() | {"metrics": names, "bertscore": named(folder).model_dump() if given else None}
    with pytest.raises(ValueError, match="bertscore must name an encoder if metrics holds bertscore"):
        params.Evaluate.model_validate(content)
