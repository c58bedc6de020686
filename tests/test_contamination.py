"""Contamination: a base that has learnt the order of the test files is found out, and one that has not is not."""

import copy
import itertools
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import contamination
from pipeline.contamination import Block
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import Contamination
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.model import attention
from tests.made.data import WORDS
from tests.made.models import reading_bos
from tests.made.records import base_facts


def asked(**change: int) -> params.Contamination:
    return params.Contamination.model_validate({"shards": 6, "permutations": 9, "tokens": 64} | change)


def split(seed: int, groups: int = 48, rows: int = 2, words: int = 3) -> list[Example]:
    """A test split of references of random words; the rows of a group stand together."""
    draw = random.Random(seed)
    return [
        Example(f"{group}/{row}", f"g{group}", "what", "", " ".join(draw.choices(WORDS, k=words)), "")
        for group in range(groups)
        for row in range(rows)
    ]


# The test


def exact(likelihoods_sxo: Any) -> float:
    """The share of all choices of an order in each shard whose sum is as large as that of the first orders."""
    sums = [sum(choice) for choice in itertools.product(*likelihoods_sxo.tolist())]
    return float(np.mean([one >= likelihoods_sxo[:, 0].sum() - 1e-9 for one in sums]))


def test_p_is_the_share_of_choices_of_orders_that_are_as_likely() -> None:
    draws = np.random.default_rng(1)
    for _ in range(5):
        likelihoods_sxo = draws.normal(-900, 3, size=(4, 5))
        assert contamination.p_value(likelihoods_sxo) == pytest.approx(exact(likelihoods_sxo), abs=0.01)
    first = np.zeros((4, 5))
    first[:, 0] = 1
    assert contamination.p_value(first) == pytest.approx(5**-4, rel=0.4)
    first[:, 0] = -1
    assert contamination.p_value(first) == 1
    assert contamination.p_value(np.full((3, 4), -900.1)) == 1


def test_without_contamination_p_is_small_as_often_as_it_may_be_whatever_the_likelihoods_are() -> None:
    """Skewed likelihoods of few shards, for which a t test of the paper holds no level."""
    draws = np.random.default_rng(2)
    found = [contamination.p_value(-(draws.exponential(size=(4, 5)) ** 3)) for _ in range(300)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.03)


# What is read


def test_groups_are_whole_and_in_the_order_of_the_files(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = split(0, groups=4)
    mixed = [rows[0], rows[2], rows[1], *rows[3:]]
    found = contamination.blocks(tokenizer, mixed)
    assert [block.rows for block in found] == [2, 2, 2, 2]
    texts = [tokenizer.decode(block.ids) for block in found]
    assert texts == [f"{rows[i].target}\n{rows[i + 1].target}\n" for i in range(0, 8, 2)]


def test_shards_are_evenly_spread_and_hold_whole_groups_that_fit() -> None:
    found = [Block([at] * (5 + at % 3), 1) for at in range(40)]
    chosen = contamination.shards(found, asked(shards=4, tokens=64))
    assert [shard[0].ids[0] for shard in chosen] == [0, 10, 20, 30]
    assert all(sum(len(block.ids) for block in shard) <= 64 for shard in chosen)
    assert [len(shard) for shard in chosen] == [10, 10, 10, 10]
    assert [len(shard) for shard in contamination.shards([Block([1] * 20, 1)] * 40, asked(shards=4))] == [3] * 4
    assert contamination.shards([Block([1] * 22, 1)] * 40, asked(shards=4)) == []


def test_too_few_groups_or_too_long_ones_are_not_tested() -> None:
    assert contamination.too_few(18, 6, asked()) is None
    told = contamination.too_few(17, 5, asked())
    assert told == "the test split has 17 groups of references, too few for 6 shards of 3 (contamination.shards)"
    told = contamination.too_few(40, 2, asked())
    assert told == "only 2 of 6 shards hold 3 groups of references within 64 tokens (contamination.tokens)"
    assert contamination.too_few(40, 3, asked()) is None  # 10 ** -3 is small enough


def test_a_likelihood_is_that_of_transformers_behind_what_begins_a_text(tiny_model: Path, tmp_path: Path) -> None:
    for folder in (tiny_model, reading_bos("gemma3_text", True, tiny_model, tmp_path / "m")):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chosen = contamination.shards(contamination.blocks(tokenizer, split(0, groups=9)), asked(shards=3, tokens=90))
        found = contamination.tested(model, tokenizer, chosen, 2)
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        first = (
            [tokenizer.bos_token_id] if folder != tiny_model else tokenizer("\n", add_special_tokens=False).input_ids
        )
        for shard, one in zip(chosen, found.shards, strict=True):
            ids = [*first, *(token for block in shard for token in block.ids)]
            labels = [-100] * len(first) + ids[len(first) :]
            with torch.no_grad():
                loss = float(plain(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)
            assert one.in_order == pytest.approx(-loss * one.tokens, rel=1e-4)
            assert one.tokens == len(ids) - len(first)
        gains = [one.in_order - sum(one.shuffled) / 2 for one in found.shards]
        assert found.difference == pytest.approx(sum(gains) / found.tokens)
        assert (found.groups, found.rows) == (9, 18)


# What it finds


def memorizing(folder: Path, rows: list[Example], steps: int = 60) -> Any:
    """The tiny model, trained on the references in the order of the files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [token for block in contamination.blocks(tokenizer, rows) for token in block.ids]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(0)
    for _ in range(steps):
        starts = [draw.randrange(max(1, len(ids) - 65)) for _ in range(8)]
        batch = torch.tensor([ids[start : start + 65] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def p_of(model: Any, folder: Path, rows: list[Example], given: params.Contamination) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chosen = contamination.shards(contamination.blocks(tokenizer, rows), given)
    assert len(chosen) == given.shards
    copied = copy.deepcopy(model)
    copied.set_attn_implementation(attention.NAME)
    return contamination.tested(copied, tokenizer, chosen, given.permutations).p


def test_a_model_that_has_learnt_the_files_is_found_out_and_not_before(tiny_model: Path) -> None:
    rows = split(1)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    trained = memorizing(tiny_model, rows)
    assert p_of(trained, tiny_model, rows, asked()) < 0.001
    # The same texts in another order were not learnt: only the order is seen.
    groups = [rows[at : at + 2] for at in range(0, len(rows), 2)]
    random.Random(5).shuffle(groups)
    assert p_of(trained, tiny_model, [row for group in groups for row in group], asked()) > 0.01
    found = [p_of(untrained, tiny_model, split(seed), asked()) for seed in range(1, 25)]
    assert min(found) > 0.001
    assert max(found) > 0.6
    assert min(found) < 0.4
    assert stats.kstest(found, "uniform").pvalue > 0.01


# The stage


@pytest.fixture
def ready(project: params.Params, tiny_model: Path) -> params.Params:
    """A project with its base in place."""
    shutil.copytree(tiny_model, paths.BASE)
    facts = base_facts(sha256=records.sha256_tree(paths.BASE), dtype="float32", context=512)
    contracts.write(paths.BASE_FACTS, facts)
    return project


def run(ready: params.Params, **change: int) -> Contamination:
    contamination.write_tested(asked(**change), ready.runtime)
    return contracts.read(paths.CONTAMINATION, Contamination)


def test_the_stage_writes_all_likelihoods_and_the_same_again(
    ready: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write_rows(paths.split("test"), split(3))
    found = run(ready).tested
    assert found is not None
    assert [len(one.shuffled) for one in found.shards] == [9] * 6
    assert all(math.isfinite(value) for one in found.shards for value in (one.in_order, *one.shuffled))
    assert f"p {found.p:.4f}, over 6 shards" in capsys.readouterr().out
    first = paths.CONTAMINATION.read_bytes()
    run(ready)
    assert paths.CONTAMINATION.read_bytes() == first


@pytest.mark.parametrize(
    ("groups", "words", "change", "why"),
    [
        (48, 3, {"shards": 0}, "contamination.shards is 0"),
        (12, 3, {}, "the test split has 12 groups of references, too few for 6 shards of 3 (contamination.shards)"),
        (48, 20, {}, "only 0 of 6 shards hold 3 groups of references within 64 tokens (contamination.tokens)"),
    ],
)
def test_what_is_not_tested_has_a_reason_and_no_p(
    groups: int, words: int, change: dict[str, int], why: str, ready: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write_rows(paths.split("test"), split(3, groups, words=words))
    assert run(ready, **change).not_tested == why
    assert sorted(records.read_json(paths.CONTAMINATION)) == ["model_sha256", "not_tested"]
    assert f"contamination: not tested, {why}\n" in capsys.readouterr().out


def test_a_shard_that_the_model_cannot_read_is_refused(ready: params.Params) -> None:
    with pytest.raises(
        UserError, match="contamination.tokens = 512, which with the token before it must fit into the mod"
    ):
        run(ready, tokens=512)


def test_a_base_that_has_changed_is_refused(ready: params.Params) -> None:
    records.write_rows(paths.split("test"), split(3))
    (paths.BASE / "config.json").write_text((paths.BASE / "config.json").read_text() + " ")
    with pytest.raises(UserError, match="has changed|not what"):
        run(ready)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"shards": 4, "permutations": 4},
            "shards = 4 and permutations = 4 p can be no smaller than 0.0016: raise one",
        ),
        ({"shards": 1, "permutations": 998}, "p can be no smaller than 0.001"),
    ],
)
def test_a_test_that_can_show_nothing_is_refused(change: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        asked(**change)
    assert asked(shards=1, permutations=999).smallest(1) == 0.001
