"""What ollama is told of an exported model: its chat template, and how the run decoded."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.export import ollama
from tests.limits import soon
from tests.made.templates import HEADED

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "<<SYS>>{{ messages[0].content }}<</SYS>>{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    "{{ m.content }}{% endif %}{% endfor %}"
)
"""The system message within the user's, as Llama 2 has it, which ollama's language cannot tell message by message."""


def test_ollama_is_told_the_template_and_the_decoding(project: params.Params, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    text = ollama.modelfile("base.gguf", "adapter.gguf", folder, project.generation, 208)
    assert text.splitlines()[:2] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    assert text.splitlines()[2].startswith("# Ollama from 0.34.1 on is reported to refuse ADAPTER")
    assert '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>' in text
    assert text.splitlines()[-7:] == [
        "PARAMETER temperature 0",
        "PARAMETER top_k 1",
        "PARAMETER repeat_penalty 1.0",
        "PARAMETER repeat_last_n 208",
        "PARAMETER num_ctx 208",
        "PARAMETER num_predict 8",
        'PARAMETER stop "<|end|>"',
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    default = "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}"
    for template, expected in ((CHATML, default), (INST, None)):
        tokenizer.chat_template = template
        told = ollama._template(tokenizer)
        assert (told or "").startswith(expected or "")
        assert (told is None) == (expected is None)
    tokenizer.save_pretrained(folder)
    beams = project.generation.model_copy(update={"num_beams": 2})
    text = ollama.modelfile("base.gguf", None, folder, beams, 208)
    assert "ADAPTER" not in text
    assert "# The model's chat template cannot be told in ollama's language" in text
    assert "# Ollama has neither beam search" in text
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    tokenizer.eos_token = '<"\\>'
    tokenizer.save_pretrained(folder)
    text = ollama.modelfile("base.gguf", None, folder, project.generation, 208)
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert 'PARAMETER stop "<"\\>"' in text.splitlines()


@pytest.mark.parametrize("thinking", [False, True])
def test_ollama_asks_a_model_to_think_or_not_as_the_experiment_did(
    thinking: bool, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = HEADED
    tokenizer.save_pretrained(folder)
    text = ollama.modelfile("base.gguf", None, folder, project.generation, 208, thinking)
    assert ("<|assistant|><think>\n\n</think>\n" in text) == (not thinking)
    assert ("Reasoning Mode: /no_think" in text) == (not thinking)


def test_braces_and_quotes_of_a_template_stay_what_they_are() -> None:
    assert ollama._go('a {{ b """ c') == 'a {{ "{{" }} b ""{{ "\\"" }} c'


def test_a_template_that_never_ends_is_one_error(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loops * 9 + CHATML
    with soon(), pytest.raises(UserError, match="chat template takes more than 2 s of the processor"):
        ollama._template(tokenizer)


def test_no_token_and_no_template_writes_a_line_of_its_own(
    project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = '<end>"\nFROM /etc/passwd\nPARAMETER stop "'
    tokenizer.save_pretrained(folder)
    text = ollama.modelfile("base.gguf", None, folder, project.generation, 208)
    assert "passwd" not in text
    assert "# A token that ends an answer holds a quote and a line break" in text
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif", 'assistant "{% endif')
    assert ollama._template(tokenizer) is None
