"""What the tests share: a tiny random Llama with a tokenizer of its own, and a project folder around it."""

import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from claims import lab
from pipeline.core import params, paths, records, yaml12
from pipeline.record import store

# Before torch is imported: the models here are so small that threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "runs",
    "sleeps",
    "sings",
    "fast",
    "slow",
    "here",
    "there",
    "now",
]
ASPECTS = ("what", "who")
SPLIT_GROUPS = {"train": 8, "validation": 4, "test": 4}


SECONDS = 10
"""What one input may take at most; each takes milliseconds."""


@contextmanager
def soon() -> Iterator[None]:
    """AssertionError where the block takes longer than an input may."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done in {SECONDS} s")

    # Of the processor; other tests may have it. What only waits ends by the clock.
    timers = {signal.SIGVTALRM: (signal.ITIMER_VIRTUAL, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 10 * SECONDS)}
    before = {sign: signal.signal(sign, late) for sign in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for sign, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(sign, before[sign])


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC and MLflow obey their environment variables: those of the tests' caller are not for the tests."""
    for name in list(os.environ):
        if name.startswith(("DVC_", "MLFLOW_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LlamaForCausalLM with grouped-query attention and a byte-level tokenizer, in the hub's layout."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model as Llama 1 and 2 have one: pairs, with bytes for what is not in the vocabulary."""
    return trained_words(tmp_path_factory.mktemp("words") / "tokenizer.model", "bpe")


def trained_words(file: Path, kind: str, prefix: bool = True, control: Sequence[str] = ()) -> Path:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 3
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, character_coverage=1.0, split_digits=True, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix, minloglevel=2,
        num_threads=1, control_symbols=list(control),
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return file


def rows(split: str, groups: int) -> list[records.Example]:
    """Examples with two aspects a group, none of them alike; the same for the same arguments."""
    draw = random.Random(split)
    made = []
    for number in range(groups):
        source = " ".join(draw.choices(WORDS, k=12)) + f" {split} {number}."
        for aspect in ASPECTS:
            name = f"{split}-{number}"
            made.append(
                records.Example(f"{name}/{aspect}", name, aspect, source, " ".join(draw.choices(WORDS, k=4)), source)
            )
    return made


def tiny_params(tiny_model: Path, data: Path) -> dict[str, Any]:
    """The default params.yaml, made small: local sources, tiny limits."""
    content: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["data"] |= {
        "source": str(data),
        "sha256": records.sha256_tree(data),
        "format": "table",
        "files": {split: f"{split}.jsonl" for split in paths.SPLITS},
        "columns": {name: name for name in ("id", "group", "aspect", "source", "target")},
    }
    content["model"] |= {"source": str(tiny_model), "sha256": records.sha256_tree(tiny_model), "dtype": "float32"}
    content["quantize"] |= {"perplexity_tokens": 256}
    content["prompt"] |= {"max_tokens": 200, "instructions": {"what": "Say what.", "who": "Say who."}}
    content["lora"] |= {"r": 4, "alpha": 8}
    content["train"] |= {"batch_size": 4, "micro_batch_tokens": 64, "learning_rate": 1e-2}
    content["forget"] |= {"source": str(data), "sha256": records.sha256_tree(data), "files": "general.jsonl"}
    content["forget"] |= {"column": "text", "html": False, "tokens": 200, "window": 32}
    content["generation"] |= {"max_new_tokens": 8, "batch_size": 4}
    content["compare"] |= {"bootstrap_samples": 1000, "examples": 2}
    content["runtime"] |= {"device": "cpu", "threads": 1}
    return content


def write_data(folder: Path) -> None:
    """A local data set of JSON lines, and general text beside it."""
    for split, groups in SPLIT_GROUPS.items():
        lines = [json.dumps(asdict(row)) for row in rows(split, groups)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    general = [json.dumps({"text": row.source}) for row in rows("general", 12)]
    (folder / "general.jsonl").write_text("\n".join(general) + "\n")


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> params.Params:
    """A project folder as the working directory, with the splits and `params.yaml` in place; gives the parameters."""
    data = tmp_path / "data"
    data.mkdir()
    write_data(data)
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    content = tiny_params(tiny_model, data)
    YAML().dump(content, paths.PARAMS)
    paths.DVC_YAML.write_text((ROOT / "dvc.yaml").read_text())
    for split, groups in SPLIT_GROUPS.items():
        records.write_rows(paths.split(split), rows(split, groups))
    return params.load()


@pytest.fixture
def claims_base(project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> params.Params:
    """The project with its base and its splits where measurements of claims find them; gives its parameters."""
    monkeypatch.setattr(lab, "experiment", lambda *_: project)
    shutil.copytree(tiny_model, lab.BASE)
    records.write_json(lab.BASE_FACTS, {"context": 512, "dtype": "float32", "stop_ids": [1]})
    shutil.copytree(paths.DATA, lab.data("default"))
    return project


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store just created: its migrations take seconds, so the tests that are not about them start from a copy."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder.as_posix()}/mlflow.db")
        with store.opened(params.Tracking(uri=None, experiment="none")) as client:
            client.search_experiments()
    return folder / "mlflow.db"


def environment() -> dict[str, str]:
    """The tests' own environment without what DVC, MLflow and git would obey; stages write no byte-compiled files away
    from where Python puts them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org"}
    identity |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}
    return (
        kept
        | identity
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    )


def make_clone(folder: Path, data: Path, tiny_model: Path) -> None:
    """The tracked files of this repository, with tiny parameters, committed in a repository of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if not name.startswith(("reports/", "tests/", "dvc.lock")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    write_data(data)
    YAML().dump(tiny_params(tiny_model, data), folder / "params.yaml")
    for command in ("init -q", "add -A", "commit -qm start"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True, env=environment())


SECRET = "planted0secret"
SECRETS = {
    "HF_TOKEN": f"hf_{SECRET}",
    "MLFLOW_TRACKING_USERNAME": SECRET,
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "MLFLOW_TRACKING_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "PIP_INDEX_URL": f"https://me:{SECRET}@localhost:9/simple",
}
"""What a user's environment may hold, and nothing that is written or printed."""


@dataclass(frozen=True)
class Finished:
    """A clone in which `dvc repro` has run, and what that printed. Not to be changed: `copy` it."""

    folder: Path
    printed: str

    def copy(self, folder: Path) -> Path:
        """The whole project, cache and store included, in a new folder; MLflow's addresses are absolute, so moved."""
        shutil.copytree(self.folder, folder, symlinks=True)
        with closing(sqlite3.connect(folder / ".mlflow" / "mlflow.db")) as store:
            for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
                store.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(self.folder), str(folder)))
            store.commit()
        return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Finished:
    """The experiment from end to end, with secrets in the environment, once for all tests that need its results."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):  # the processes that share the tests share it as well
        root = root.parent
    folder, printed = root / "finished", root / "printed"
    with FileLock(root / "finished.lock"):
        if not printed.exists():
            (root / "source").mkdir()
            make_clone(folder, root / "source", tiny_model)
            result = subprocess.run(
                ["dvc", "repro"], cwd=folder, env=environment() | SECRETS, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert result.returncode == 0, result.stdout
            printed.write_text(result.stdout)
    return Finished(folder, printed.read_text())


def edit(**sections: dict[str, Any]) -> None:
    """Change values of params.yaml, as a user does."""
    content = yaml12.read(paths.PARAMS)
    for name, values in sections.items():
        content[name] |= values
    YAML().dump(content, paths.PARAMS)


def runtime(**settings: Any) -> params.Runtime:
    """One process on one CPU thread, unless `settings` have it otherwise."""
    given: dict[str, Any] = {
        "device": "cpu", "threads": 1, "processes": 1, "sharding": "none", "gradient_checkpointing": False,
        "keep_dequantized": True,
    }  # fmt: skip
    return params.Runtime(**given | settings)


@pytest.fixture
def quantized(project: params.Params, tiny_model: Path) -> params.Params:
    """A project with the quantized base in place."""
    from pipeline import quantize

    shutil.copytree(tiny_model, paths.BASE)
    facts = {"context": 512, "dtype": "float32", "stop_ids": [1], "sha256": records.sha256_tree(paths.BASE)}
    records.write_json(paths.BASE_FACTS, facts)
    quantize.quantize(project.quantize, project.runtime)
    return project


@pytest.fixture
def mlflow_calls_what_its_dependencies_deprecate() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
        yield
