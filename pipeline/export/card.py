"""The model card of an export, in the hub's format: YAML for machines, Markdown for people.

Source: Model Cards for Model Reporting, arXiv 1810.03993; huggingface.co/docs/hub/model-cards. Every number comes from
the run's outputs, every command from its parameters. Tests run the commands of the card.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import BaseFacts, QuantizedFacts, TrainingSummary
from pipeline.core.errors import UserError
from pipeline.export import licence, ollama
from pipeline.export.licence import Stated
from pipeline.export.merge import Difference
from pipeline.model import checkpoint
from pipeline.model.prompt import DATE, starts_with_bos
from pipeline.record import store
from pipeline.record.origin import Origin
from pipeline.report import wording
from pipeline.score.comparison import Comparison
from pipeline.score.metrics import LABELS

LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "gpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "unknown",
)  # fmt: skip
"""Names that the hub knows and that usual sources have. Any other licence is given as `other` with its name."""

MAX_RISE = 0.01
"""Files that raise the perplexity by more than this share lose quality, as for `lora-repro parity`."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a card says of an export.

    `base` is the folder or file of the base beside the adapter (None: it is not part of the export), and `base_words`
    says what the base holds. `files` maps a path to its size in bytes and its sha256. `measured` is the result of
    `merge.difference`. `command` writes the same files again.
    """

    what: str
    seed: int
    given: params.Params
    base: str | None
    base_words: str
    files: dict[str, tuple[int, str]]
    measured: Difference | None
    why_not_measured: str
    comparison: Comparison
    origin: Origin
    run: str | None
    licences: dict[str, Stated]
    command: str


def licences(given: params.Params) -> dict[str, Stated]:
    """The licence of every source of the experiment, by the source's name."""
    found = {given.model.source: licence.stated(given.model.source, given.model.sha256, kind="model", key="model")}
    for name, sha256 in given.data.pinned:
        found[name] = licence.stated(name, sha256, kind="dataset", key="data")
    return found


def shown(source: str) -> str:
    """A source without the path of a local one, which belongs to this machine."""
    return source if source.startswith(("pip:", "hf:")) else f"local:{Path(source).name}"


def render(content: Content) -> str:
    """The whole README.md."""
    given, comparison = content.given, content.comparison
    facts = contracts.read(paths.BASE_FACTS, BaseFacts)
    packages, code = loading(content)
    body = wording.environment().get_template("card.md.jinja").render(
        c=content,
        comparison=comparison,
        title=_title(content),
        kind=KINDS[content.what],
        labels=LABELS,
        lead=wording.lead(comparison),
        specific=wording.specific(comparison),
        over_baselines=wording.over_baselines(comparison),
        basis=wording.basis(comparison),
        caveats=wording.caveats(comparison),
        interval=f"{100 * comparison.confidence:g} % interval",
        own=next(one for one in comparison.tuned if one.variant == paths.variant(content.seed)),
        probes=[(one, shown(one.source)) for one in comparison.cost.forgetting],
        facts=facts,
        quantized=contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts),
        training=contracts.read(paths.training_summary(content.seed), TrainingSummary),
        parameters=sorted(_parameters(content).items()),
        data=[(shown(name), sha256, content.licences[name]) for name, sha256 in given.data.pinned],
        base=shown(given.model.source),
        base_licence=content.licences[given.model.source],
        counts={split: _rows(split) for split in paths.SPLITS},
        packages=packages,
        code=code,
        reproduction=content.origin.commands(),
        versions=content.origin.versions,
        hub=hub(given.model.source),
        backend=_backend(given.generation),
        loss=loss(content.measured),
        otherwise=content.what.startswith("gguf") and not ollama.decodes(given.generation),
    )  # fmt: skip
    return f"---\n{_metadata(content).to_yaml()}\n---\n{body}"


KINDS = {
    "adapter": "LoRA adapter in PEFT's format",
    "merged": "model with the LoRA adapter merged into its weights, in safetensors",
    "gguf": "base and LoRA adapter as GGUF files for llama.cpp",
    "gguf-merged": "model with the LoRA adapter merged into its weights, as a GGUF file for llama.cpp",
}
LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp", "gguf-merged": "llama.cpp"}


def loss(measured: Difference | None) -> str | None:
    """A sentence that says that exported files lose quality; None if they do not, or if nothing was measured."""
    if measured is None or (rise := math.exp(measured.loss - measured.loss_measured) - 1) <= MAX_RISE:
        return None
    return (
        f"These files lose quality: the perplexity of {measured.tokens:,} tokens of validation answers is "
        f"{100 * rise:.1f} % above that of the model as it was trained."
    )


def _backend(generation: params.Generation) -> str:
    if generation.backend == "llama.cpp":
        return f"llama.cpp (the base as GGUF in {generation.gguf_type})"
    return generation.backend


def hub(source: str) -> tuple[str, str] | None:
    """Repository and revision of a whole repository on the hub; None for any other source."""
    found = re.fullmatch(r"hf:([^@]+)@([0-9a-f]{40})", source)
    return (found[1], found[2]) if found else None


def _title(content: Content) -> str:
    return f"{_short(content.given.model.source)}, fine-tuned with LoRA"


def _named(source: str) -> str:
    """A source in one word: the package of a wheel, else the last part of the source."""
    return source.removeprefix("pip:").partition("==")[0] if source.startswith("pip:") else _short(source)


def _short(source: str) -> str:
    """The last part of a source, without the ending of a file."""
    return re.sub(r"\.gguf$", "", source.partition("@")[0].rstrip("/").rpartition("/")[2])


def _parameters(content: Content) -> dict[str, str]:
    """All parameters of the run, without paths of this machine. A value that does not fit in a line is quoted."""
    given = content.given
    sources = {"data.source": [name for name, _ in given.data.pinned], "model.source": [given.model.source]}
    sources |= {f"{probe.at}.source": [probe.source] for probe in given.forget.probes}
    locked = {name: value for name, value in content.origin.params.items() if not name.startswith(tuple(sources))}
    locked = {
        name: json.dumps(value, ensure_ascii=False) if "\n" in value or value != value.strip() else value
        for name, value in locked.items()
    }
    return locked | {name: ", ".join(map(shown, names)) for name, names in sources.items()}


def _rows(split: str) -> int:
    return len(records.read_rows(paths.split(split), records.Example))


def _metadata(content: Content) -> Any:
    """The metadata in YAML. The hub's own keys get only names that the hub knows, since it refuses others."""
    from huggingface_hub import EvalResult, ModelCardData

    given, comparison = content.given, content.comparison
    on_hub = hub(given.model.source)
    named = content.licences[given.model.source].identifier
    known = named in LICENCES
    datasets = [found[0] for name, _ in given.data.pinned if (found := hub(name))]
    data_name = ", ".join(_named(name) for name, _ in given.data.pinned)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else data_name,
            dataset_name=f"{data_name}, {comparison.split} split of {comparison.n} examples",
            metric_type="rouge" if name.startswith("rouge") else name,
            metric_name=(
                f"{LABELS[name]} (base {wording.points(one.base.value)}, difference {wording.signed(one.diff.value)}, "
                f"{100 * comparison.confidence:g} % interval {wording.span(one.deciding)})"
            ),
            metric_value=round(one.tuned.value, 2),
        )
        for name, one in comparison.results.items()
    ]
    return ModelCardData(
        base_model=on_hub[0] if on_hub else None,
        license=named if known else "other",
        license_name=None if known else named,
        library_name=LIBRARIES[content.what],
        pipeline_tag="text-generation",
        tags=["lora", "lora-repro", contracts.read(paths.BASE_FACTS, BaseFacts).family, content.what],
        datasets=datasets or None,
        metrics=sorted({result.metric_type for result in results}),
        model_name=_title(content),
        eval_results=results,
        lora_repro={
            "digest": content.origin.digest,
            "commit": content.origin.commit,
            "base": {"source": shown(given.model.source), "sha256": given.model.sha256},
            "data": [{"source": shown(name), "sha256": sha256} for name, sha256 in given.data.pinned],
        },
    )


# Commands


def loading(content: Content) -> tuple[str, str]:
    """The packages for the export, and the Python that loads it and writes one answer."""
    if content.what.startswith("gguf"):
        return "xllamacpp", _llama_cpp(content)
    packages = "torch transformers"
    if content.what == "adapter":
        packages += " peft"
        if not content.base and content.given.quantize.method != "none":
            packages += " accelerate bitsandbytes"
    return packages, _transformers(content)


def _transformers(content: Content) -> str:
    """The Python for transformers, with PEFT for an adapter."""
    names, first, loads = ["AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"], [], []
    if content.what == "merged":
        loads = ['model = AutoModelForCausalLM.from_pretrained(".", dtype="auto").eval()']
        loads += ['tokenizer = AutoTokenizer.from_pretrained(".")']
    else:
        first = ["from peft import PeftModel"]
        where, quantized = '"base"', ""
        if not content.base:
            found, method = hub(content.given.model.source), content.given.quantize.method
            where = f"{_python(found[0])}, revision={_python(found[1])}" if found else '"<folder of the base>"'
            if method != "none":
                names = [*names[:2], "BitsAndBytesConfig", names[2]]
                quantized = f", quantization_config={_quantization(content.given)}"
        dtype = '"auto"' if content.base else f'"{content.given.model.dtype}"'
        loads = [f"base = AutoModelForCausalLM.from_pretrained({where}, dtype={dtype}{quantized})"]
        loads += ['model = PeftModel.from_pretrained(base, ".").eval()']
        loads += [f"tokenizer = AutoTokenizer.from_pretrained({where})"]
    return "\n".join(
        [
            *first,
            f"from transformers import {', '.join(names)}",
            "",
            *loads,
            "",
            *_text(content.given.prompt),
            *_prompt(content.given.prompt),
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)',
            "output = model.generate(",
            '    inputs["input_ids"],',
            '    attention_mask=inputs["attention_mask"],',
            '    generation_config=GenerationConfig.from_pretrained("."),',
            ")",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _quantization(given: params.Params) -> str:
    """The Python that quantizes the base as in training."""
    quantize = given.quantize
    if quantize.method == "int8":
        return f"BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold={quantize.int8_threshold})"
    return (
        f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{quantize.method}", bnb_4bit_use_double_quant='
        f'{quantize.double_quantization}, bnb_4bit_compute_dtype="{given.model.dtype}")'
    )


def _text(prompt: params.Prompt) -> list[str]:
    """The Python that makes a prompt's text, from the template and the first instruction."""
    lines = ['source = "Here stands the text that the task is about."']
    text = _python(prompt.template)
    if prompt.instructions and "{instruction}" in prompt.template:
        first = next(iter(prompt.instructions))
        lines += [
            f"instructions = {_python(prompt.instructions)}",
            f"text = {text}",
            f'text = text.replace("{{instruction}}", instructions[{_python(first)}])',
            'text = text.replace("{source}", source)',
        ]
        return lines
    return [*lines, f'text = {text}.replace("{{source}}", source)']


def _python(value: str | dict[str, str]) -> str:
    """A string or a dictionary of strings as a literal, which JSON and Python write alike.

    Invisible characters, such as bidirectional controls, are escaped: they would hide what the code does.
    """
    text = json.dumps(value, ensure_ascii=False, indent=4)
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


def _prompt(prompt: params.Prompt) -> list[str]:
    if prompt.style == "chat":
        return [
            'messages = [{"role": "user", "content": text}]',
            "prompt = tokenizer.apply_chat_template(",
            f'    messages, tokenize=False, add_generation_prompt=True, date_string="{DATE}",',
            f"    enable_thinking={prompt.thinking},",
            ")",
        ]
    return ["prompt = tokenizer.bos_token + text" if starts_with_bos(checkpoint.tokenizer()) else "prompt = text"]


def _llama_cpp(content: Content) -> str:
    given = content.given
    [model] = [name for name in content.files if name.endswith(".gguf") and not name.startswith("adapter")]
    adapters = [name for name in content.files if name.startswith("adapter")]
    settings = given.generation
    tokens = given.prompt.max_tokens + settings.max_new_tokens
    lora = [f"settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo({_python(name)}, 1.0)]" for name in adapters]
    drawing = settings.sampling
    choice = {"temperature": 0} if drawing is None else drawing.model_dump(exclude={"samples"})
    options = f'{json.dumps(choice)[1:-1]}, "max_tokens": {settings.max_new_tokens}, '
    options += f'"n_predict": {settings.max_new_tokens}'
    if given.prompt.style == "chat":
        options += f', "chat_template_kwargs": {{"enable_thinking": {given.prompt.thinking}}}'
        call = 'server.handle_chat_completions({"messages": [{"role": "user", "content": text}], **options})'
        written = 'answer["choices"][0]["message"]["content"]'
    else:
        call = 'server.handle_completions({"prompt": text, **options})'
        written = 'answer["choices"][0]["text"] if "choices" in answer else answer["content"]'
    # Over all tokens before, as in transformers, and not over the last 64.
    penalty = f'"repeat_penalty": {settings.repetition_penalty}, "repeat_last_n": {tokens}'
    return "\n".join(
        [
            "import json",
            "",
            "import xllamacpp",
            "",
            "settings = xllamacpp.CommonParams()",
            f"settings.model.path = {_python(model)}",
            "settings.n_parallel = 1",
            f"settings.n_ctx = {tokens}",
            *lora,
            "server = xllamacpp.Server(settings)",
            "",
            *_text(given.prompt),
            f"options = {{{options}, {penalty}}}",
            f"answer = {call}",
            "answer = json.loads(answer) if isinstance(answer, str) else answer",
            f"print({written})",
        ]
    )


def run_of(given: params.Params, digest: str) -> str | None:
    """Name and id of the finished MLflow run of an experiment; None if there is none, or the store cannot be read."""
    try:
        run = store.finished(digest, given.tracking)
    except UserError:
        return None
    return f"{run.name} ({run.run_id})" if run else None
