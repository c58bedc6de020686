"""The stage `prompts`: what is wrong with prompts is found before anything is computed with the model.

Validation and test prompts are encoded as `train` and `infer` encode them. A test prompt that is too long, or that the
chat template refuses, would else be found after training, and its remedy would throw the training away. Training
prompts are left to `train`, which encodes them before it loads the model.
"""

from collections.abc import Sequence

from pipeline.core import baseline, contracts, params, paths, records
from pipeline.core.contracts import BaseFacts
from pipeline.core.progress import say
from pipeline.core.records import Example
from pipeline.model import checkpoint, demonstrations
from pipeline.model.prompt import Encoder, notices, require_model


def require_fitting(
    prompt: params.Prompt, new_tokens: int, asked: params.Baseline, scored: params.Split = "test"
) -> None:
    """Write `paths.FITTING`, on which the stages that compute depend. Its content is always the same, so a change of
    the test split alone trains nothing again.

    `new_tokens` is the room for an answer to a test prompt, and to a validation prompt if that split is `scored`.
    UserError for prompts that cannot be made or do not fit,
    and if no demonstrations of `baseline.shots` (`asked`) fit.
    """
    facts = contracts.read(paths.BASE_FACTS, BaseFacts)
    require_model(prompt, facts.context, None)  # before the tokenizer is read, which may take long
    encoder = Encoder(checkpoint.tokenizer(paths.BASE), prompt, facts.context)
    validation, of_validation = encoder.rows(records.read_rows(paths.split("validation"), Example))
    longest_answer = max(len(row.completion) for row in validation)
    if scored == "validation":
        longest_answer = max(longest_answer, new_tokens)
    encoder.require_fit({row.id: row.prompt for row in validation}, "validation", longest_answer)
    examples = records.read_rows(paths.split("test"), Example)
    test, of_test = encoder.prompts(examples)
    encoder.require_fit(test, "test", new_tokens)
    for split, encoded in {"validation": of_validation, "test": of_test}.items():
        for notice in notices(split, encoded):
            say(f"prompts: {notice}")
    say(
        f"prompts: {len(validation)} validation and {len(test)} test prompts fit, the longest has "
        f"{max(len(ids) for ids in [*test.values(), *(row.prompt for row in validation)])} tokens"
    )
    if asked.shots:
        questions = records.read_rows(paths.split(scored), Example)
        _require_demonstrations(encoder, questions, asked, new_tokens)
    records.write_json(paths.FITTING, {"prompts": "fit"})


def _require_demonstrations(
    encoder: Encoder, split: Sequence[Example], asked: params.Baseline, new_tokens: int
) -> None:
    """UserError if the prompts of `base-shots`, which answers `split`, cannot be made."""
    pool = demonstrations.Pool(records.read_rows(paths.split("train"), Example), split)
    questions = [split[row] for row in baseline.rows(split, asked.rows)]
    made = [encoder.made(example) for example in questions]
    prompts, shown = demonstrations.prompts(encoder, questions, made, pool, asked, new_tokens)
    fewer = "" if shown.most == asked.shots else f" (baseline.shots = {asked.shots}, groups are shown whole)"
    say(
        f"prompts: {len(prompts)} prompts fit with {shown.most} demonstrations{fewer}, the longest has "
        f"{max(map(len, prompts.values()))} tokens"
    )
