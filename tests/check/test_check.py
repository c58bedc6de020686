"""`lora-repro check`: every mistake that can be known before the expensive work is named, all of them at once."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sacrebleu.utils

from pipeline.check import check, place, rows
from pipeline.core import params, paths, records, yaml12
from pipeline.core.errors import UserError
from tests.made.clone import environment
from tests.made.parameters import edit, edit_probe, rewrite


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that nothing listens on: it is bound, and refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])


@pytest.fixture
def repository(project: params.Params) -> params.Params:
    """The project in a git repository, as every project is."""
    for command in ("init -q", "add -A", "commit -qm start"):
        subprocess.run(["git", *command.split()], env=environment(), check=True)
    return project


def mistakes() -> list[str]:
    with pytest.raises(UserError) as refused:
        check.require_sound()
    return refused.value.problems


def one_group(split: str, project: params.Params) -> None:
    """Leave the rows of one group in a file of the data, and pin it again."""
    source = Path(str(project.data.source))
    lines = (source / f"{split}.jsonl").read_text().splitlines()
    (source / f"{split}.jsonl").write_text("\n".join(lines[:2]) + "\n")
    edit(data={"sha256": records.sha256_tree(source)})
    edit_probe(sha256=records.sha256_tree(source))


def plant_ten(project: params.Params, port: int) -> list[str]:
    """Ten mistakes of ten kinds in one project, and what names each."""
    one_group("test", project)
    edit(
        train={"epochz": 3},
        prompt={"max_tokens": 100_000, "instructions": {"what": "Say what."}},
        compare={"decide_by": ["bleu"]},
        generation={"backend": "vllm"},
        runtime={"device": "mps" if sys.platform != "darwin" else "cuda"},
        tracking={"uri": f"http://127.0.0.1:{port}"},
    )
    edit_probe(column="txet", tokens=40_000, window=30_000)
    rewrite(seeds=17)
    return [
        "params.yaml: train.epochz = 3: unknown key; did you mean epochs?",
        "params.yaml: seeds = 17: input should be a valid list",
        "params.yaml: compare.decide_by names ['bleu'], which evaluate.metrics does not compute",
        "one group",
        "prompt.instructions has no entry for 'who'",
        "prompt.max_tokens = 100000, but the model's context is",
        "forget.probes.general.window = 30000, but the model's context is",
        "forget.probes.general.column = 'txet'",
        "generation.backend = 'vllm' needs the Python of an environment with vLLM",
        "runtime.device = ",
        f"http://127.0.0.1:{port}",
    ]


def test_mistakes_of_all_kinds_are_named_at_once(repository: params.Params, closed_port: int) -> None:
    planted = plant_ten(repository, closed_port)
    found = mistakes()
    assert len(found) == len(planted) >= 10
    assert [text for text in planted if not any(text in one for one in found)] == []


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"target_modules": ["q_prj"]}, "lora.target_modules names q_prj, which this model does not have"),
        ({"layers": [2]}, "lora.layers names block 2, but this model has 2: 0 to 1"),
        ({"rank_pattern": {"layers.7.mlp.up_proj": 2}}, "which matches no adapted layer"),
        ({"bias": "all"}, "lora.bias = 'all', but this model has no biases"),
        ({"modules_to_save": ["lm_head"]}, "but embeddings and head of this model are one tensor"),
    ],
)
@pytest.mark.usefixtures("repository")
def test_an_adapter_that_the_model_cannot_have_is_named(lora: dict[str, Any], named: str) -> None:
    edit(lora=lora)
    [problem] = mistakes()
    assert named in problem


def test_no_model_library_is_loaded(repository: params.Params, closed_port: int) -> None:
    """Loading torch and transformers takes seconds, and more on a slow disk."""
    program = (
        "import sys\n"
        "from pipeline.check import check\n"
        "from pipeline.core.errors import UserError\n"
        "try:\n"
        "    check.require_sound()\n"
        "except UserError as error:\n"
        "    print(len(error.problems))\n"
        "print([name for name in ('torch', 'transformers', 'mlflow', 'dvc') if name in sys.modules])\n"
    )
    root = Path(check.__file__).parents[2]
    command = [sys.executable, "-c", program]
    surroundings = environment() | {"PYTHONPATH": str(root)}

    def printed() -> list[str]:
        return subprocess.run(command, env=surroundings, check=True, capture_output=True, text=True).stdout.splitlines()

    assert printed()[-1] == "[]"
    planted = plant_ten(repository, closed_port)
    assert printed() == [str(len(planted)), "[]"]


def test_a_sound_experiment_is_said_to_be_checked(
    repository: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repository
    check.require_sound()
    printed = capsys.readouterr().out
    assert printed == (
        "checked: params.yaml, 32 rows of data, 12 texts of forget.probes.general, the model's configuration, the "
        "installed packages, the MLflow store\n"
    )


def test_conversations_are_counted_as_such(repository: params.Params, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(str(repository.data.source))
    (source / "talks.yml").write_text("talks:\n- [Hello, Hi]\n- [Who?, Me.]\n- [And?]\n")
    edit(data={"sha256": records.sha256_tree(source)})
    edit_probe(sha256=records.sha256_tree(source), style="chat", files="talks.yml", column="talks")
    check.require_sound()
    assert "2 conversations of forget.probes.general, the model's configuration" in capsys.readouterr().out


class TestEachKind:
    @pytest.mark.parametrize(
        ("section", "change", "said"),
        [
            ("data", {"source": "nowhere"}, "data.source = 'nowhere': no such file or folder"),
            ("data", {"sha256": None}, "data.sha256 is null: pin the content of"),
            ("data", {"sha256": "0" * 64}, "data.sha256 = '000"),
            ("data", {"files": {"train": "trian.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}},
             "data.files.train = 'trian.jsonl': data.source has no such file"),
            ("data", {"columns": {"source": "sorce", "target": "target", "id": None, "group": None, "aspect": None}},
             "data.columns.source = 'sorce': no such column; did you mean 'source'?"),
            ("data", {"source": "pip:nothing"}, "write pip:<package>==<version>/<path in wheel>"),
            ("model", {"source": "nowhere"}, "model.source = 'nowhere': no such file or folder"),
            ("model", {"sha256": None}, "model.sha256 is null: pin the content of"),
            ("probe", {"sha256": None}, "forget.probes.general.sha256 is null: pin the content of"),
            ("probe", {"files": "*.txt"}, "forget.probes.general.files = '*.txt': forget.probes.general.source has no"),
            ("prompt", {"instructions": {}}, "prompt.instructions has no entry for 'what'"),
            ("tracking", {"uri": "ftp://example.org"}, "tracking.uri of params.yaml is ftp://example.org"),
        ],
    )  # fmt: skip
    def test_one_mistake_is_one_problem(
        self, section: str, change: dict[str, Any], said: str, repository: params.Params
    ) -> None:
        assert repository
        if section == "probe":
            edit_probe(**change)
        else:
            edit(**{section: change})
        (problem, *others) = mistakes()
        assert said in problem
        assert len(others) == (section == "prompt")  # the second aspect

    @pytest.mark.parametrize("seeds", [17, None, {}, "17", [], [17, 17], [1.5]])
    def test_seeds_that_are_no_list_of_numbers(self, seeds: Any, repository: params.Params) -> None:
        """DVC itself would say that a 'Value' object is not iterable."""
        assert repository
        rewrite(seeds=seeds)
        (problem,) = mistakes()
        assert problem.startswith("params.yaml: seeds")

    def test_a_section_that_is_missing_hides_no_other_mistake(self, repository: params.Params) -> None:
        assert repository
        content = dict(yaml12.read(paths.PARAMS))
        del content["data"]
        rewrite(**content | {"data": None})
        edit(prompt={"max_tokens": 100_000})
        found = mistakes()
        assert any(one.startswith("params.yaml: data") for one in found)
        assert any("prompt.max_tokens = 100000" in one for one in found)

    def test_a_chat_template_that_is_not_there(self, repository: params.Params, tmp_path: Path) -> None:
        folder = tmp_path / "plain"
        shutil.copytree(str(repository.model.source), folder)
        (folder / "chat_template.jinja").unlink()
        edit(model={"source": str(folder), "sha256": records.sha256_tree(folder)}, prompt={"style": "chat"})
        assert mistakes() == ["prompt.style = 'chat', but the model's tokenizer has no chat template: set it to plain"]

    def test_a_device_that_the_build_of_torch_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(place, "version", lambda _: "2.13.0+cpu")
        monkeypatch.setattr(sys, "platform", "linux")
        runtime = params.Runtime(
            device="cuda", threads=1, processes=1, sharding="none", gradient_checkpointing=False, keep_dequantized=True
        )
        with pytest.raises(UserError, match=r"torch 2.13.0\+cpu is a build for the CPU alone"):
            place.require_device(runtime)
        monkeypatch.setattr(place, "version", lambda _: "2.13.0+cu130")
        place.require_device(runtime)

    def test_references_of_a_script_that_the_metric_does_not_know(self, repository: params.Params) -> None:
        """`evaluate` would say it behind hours of training."""
        source = Path(str(repository.data.source))
        rows_of = [json.loads(line) for line in (source / "test.jsonl").read_text().splitlines()]
        for row in rows_of:
            row |= {"target": "नमस्ते दुनिया", "references": ["नमस्ते दुनिया"]}
        (source / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
        edit(data={"sha256": records.sha256_tree(source)})
        edit_probe(sha256=records.sha256_tree(source))
        (problem,) = mistakes()
        assert "set evaluate.rouge_tokenizer to unicode" in problem
        edit(evaluate={"rouge_tokenizer": "unicode", "use_stemmer": False})
        check.require_sound()

    def test_references_that_bleu_cannot_cut(
        self, repository: params.Params, capsys: pytest.CaptureFixture[str], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        source = Path(str(repository.data.source))
        rows_of = [json.loads(line) for line in (source / "test.jsonl").read_text().splitlines()]
        for row in rows_of:
            row |= {"target": "แมวกำลังนอน", "references": ["แมวกำลังนอน"]}
        (source / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
        edit(data={"sha256": records.sha256_tree(source)})
        edit_probe(sha256=records.sha256_tree(source))
        edit(evaluate={"metrics": ["chrf", "bleu"], "bleu_tokenizer": "13a"}, compare={"decide_by": ["chrf"]})
        (problem,) = mistakes()
        assert "set it to another (zh cuts Chinese, ja-mecab Japanese, ko-mecab Korean, char and flores200" in problem
        edit(evaluate={"bleu_tokenizer": "char"})
        check.require_sound()
        monkeypatch.setattr(sacrebleu.utils, "SACREBLEU_DIR", str(tmp_path))
        edit(evaluate={"bleu_tokenizer": "flores200"})
        check.require_sound()
        left = "not checked: the model of evaluate.bleu_tokenizer flores200 is not here; stage evaluate downloads it"
        assert left in capsys.readouterr().out

    @pytest.mark.usefixtures("repository")
    @pytest.mark.parametrize(("name", "extra"), [("ja-mecab", "ja"), ("ko-mecab", "ko")])
    def test_a_tokenizer_of_bleu_whose_packages_are_missing(
        self, name: str, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = importlib.util.find_spec
        missing = {module for _, modules in params.TOKENIZER_PACKAGES.values() for module in modules}
        monkeypatch.setattr(importlib.util, "find_spec", lambda one, *a: None if one in missing else found(one, *a))
        edit(evaluate={"metrics": ["rouge1", "rouge2", "bleu"], "bleu_tokenizer": name})
        (problem,) = mistakes()
        assert f"evaluate.bleu_tokenizer = '{name}' needs" in problem
        assert f"pip install 'sacrebleu[{extra}]'" in problem
        # Every stage that computes says so, and those that need no scores do not.
        for stage in ("train", "infer", "evaluate", "compare"):
            with pytest.raises(UserError, match=name):
                params.read(stage)
        params.read("prepare")


class TestWhatIsNotAtHand:
    def test_is_named_with_the_stage_that_checks_it(
        self, repository: params.Params, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert repository
        edit(
            data={"source": "pip:no-such-package==1.0/data", "sha256": "0" * 64},
            model={"source": f"hf:nobody/nothing@{'0' * 40}", "sha256": None},
        )
        monkeypatch.setattr(rows, "MOST", 10)
        check.require_sound()
        printed = capsys.readouterr().out
        assert "not checked: data.source is not on this machine; stage prepare downloads and checks it" in printed
        assert "not checked: model.source is not on this machine; stage fetch downloads and checks it" in printed
        assert "not checked: forget.probes.general.source has 0 MiB; stage forget reads it" in printed

    def test_the_base_that_was_fetched_tells_of_its_source(
        self, quantized: params.Params, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """After `fetch`, a model of a wheel or of the hub is known."""
        assert quantized
        facts = records.read_json(paths.BASE_FACTS)
        source = "pip:no-such-package==1.0/model"
        records.write_json(paths.BASE_FACTS, facts | {"source": source})
        edit(model={"source": source, "sha256": "0" * 64}, prompt={"max_tokens": 100_000})
        subprocess.run(["git", "init", "-q"], check=True)
        (problem,) = mistakes()
        assert problem.startswith("prompt.max_tokens = 100000, but the model's context is")
        assert capsys.readouterr().out == ""

    def test_groups_that_do_not_fill_the_layers_of_the_model(self, quantized: params.Params) -> None:
        assert quantized
        edit(quantize={"method": "hqq", "double_quantization": False, "group_size": 128})
        subprocess.run(["git", "init", "-q"], check=True)
        (problem,) = mistakes()
        assert problem.startswith("quantize.group_size = 128 does not divide 64, the inputs of linear layers of this")


@pytest.mark.usefixtures("repository")
def test_a_project_in_a_folder_that_dvc_cannot_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC and MLflow end with a traceback there, or with `surrogates not allowed`."""
    check.require_sound()
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(Path.cwd(), folder)
    monkeypatch.chdir(folder)
    assert [one for one in mistakes() if "whose name is not UTF-8" in one and "rename it" in one]


@pytest.mark.usefixtures("repository")
def test_a_repository_that_git_refuses_is_found_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage track would refuse it, after all the training."""
    check.require_sound()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests
    assert [one for one in mistakes() if "git config --global --add safe.directory" in one]
