"""Files of strangers that DVC and our commands act on: nothing of them runs, and nothing outside is removed or read."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.check import check
from pipeline.commands import use
from pipeline.core import params, paths, records, stage, yaml12
from pipeline.core.errors import UserError
from pipeline.record import lockfile
from pipeline.search import grid, spec, trial
from tests import ROOT
from tests.made.clone import Finished, environment, make_clone

RUNS = "17; touch ran #"


def dvc(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["dvc", *arguments], cwd=folder, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def set_seeds(folder: Path, seeds: list[Any]) -> None:
    content = yaml12.read(folder / paths.PARAMS)
    YAML().dump(content | {"seeds": seeds}, folder / paths.PARAMS)


@pytest.fixture
def clone(tmp_path: Path, tiny_model: Path) -> Path:
    """A clone in which an earlier `check` has succeeded, with folders of the user's beside it and in it."""
    (tmp_path / "data").mkdir()
    make_clone(tmp_path / "clone", tmp_path / "data", tiny_model)
    assert dvc(tmp_path / "clone", "repro", "check").returncode == 0
    for folder in (tmp_path / "victim", tmp_path / "clone" / "victim"):
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
    return tmp_path / "clone"


WAYS: list[tuple[str, ...]] = [
    ("repro",),
    ("repro", "--keep-going"),
    ("repro", "--ignore-errors"),
    ("repro", "--force", "--keep-going"),
    ("exp", "run"),
]
PLANTED = ([17, RUNS, "../../victim"], [17, "../../../victim"])
"""From out/adapters, the paths lead to a folder of the project, and to one beside it."""


@pytest.mark.slow
class TestSeeds:
    @pytest.mark.parametrize("way", WAYS, ids=" ".join)
    def test_nothing_of_a_seed_runs_and_nothing_is_removed(self, way: tuple[str, ...], clone: Path) -> None:
        for seeds in PLANTED:
            set_seeds(clone, seeds)
            done = dvc(clone, *way, "train")
            assert done.returncode != 0 or "--ignore-errors" in way
        assert not list(clone.rglob("ran"))
        assert (clone.parent / "victim" / "thesis.txt").is_file()
        assert (clone / "victim" / "thesis.txt").is_file()

    @pytest.mark.parametrize("way", [["--single-item"], ["--single-item", "--force"]], ids=" ".join)
    def test_nothing_of_a_seed_runs_in_a_stage_alone(self, way: list[str], clone: Path) -> None:
        """DVC then starts the stage although `check` has failed: the command holds nothing of the seed."""
        set_seeds(clone, [17, RUNS])
        done = dvc(clone, "repro", *way, f"train@{RUNS}")
        assert done.returncode != 0
        assert "--force" not in way or "is not a whole number: correct seeds in params.yaml" in done.stderr
        assert not list(clone.rglob("ran"))

    def test_nor_in_a_project_whose_stages_are_cached(self, finished: Finished, tmp_path: Path) -> None:
        folder = finished.copy(tmp_path / "clone")
        set_seeds(folder, [17, RUNS])
        done = dvc(folder, "repro", "--keep-going")
        assert done.returncode != 0
        assert f"seeds.1 = '{RUNS}': input should be a valid integer" in done.stdout + done.stderr
        assert not list(folder.rglob("ran"))

    @pytest.mark.parametrize(
        ("named", "arguments", "seed"),
        [
            ("train@17", [], 17),
            ("../dvc.yaml:train@17", [], 17),
            (None, ["--seed", "18"], 18),
            ("train@17", ["--seed", "18"], 18),
        ],
    )
    def test_a_stage_learns_its_seed(
        self, named: str | None, arguments: list[str], seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if named is not None:
            monkeypatch.setenv("DVC_STAGE", named)
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        assert stage.seed("about") == seed

    @pytest.mark.parametrize("named", [None, "train", "train@", f"train@{RUNS}", "train@-1", "train@١٧", "train@1_7"])
    def test_a_stage_without_one_is_refused(
        self, named: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if named is not None:
            monkeypatch.setenv("DVC_STAGE", named)
        monkeypatch.setattr("sys.argv", ["train.py"])
        with pytest.raises(SystemExit, match="2"):
            stage.seed("about")
        assert ("seed" if named is None else "is not a whole number") in capsys.readouterr().err


SECRET = "${oc.env:HF_TOKEN}"
PUBLISHED = {"metric": "rouge1", "value": 1.0, "about": SECRET}


class TestInterpolation:
    """DVC's `-S` resolves `${...}` through OmegaConf, and keeps the result in git and in `dvc.lock`."""

    @pytest.mark.parametrize(
        ("place", "change"),
        [
            ("prompt.template", {"prompt": {"template": "{source} " + SECRET}}),
            ("prompt.instructions.what", {"prompt": {"instructions": {"what": SECRET}}}),
            (f"prompt.instructions.{SECRET}", {"prompt": {"instructions": {SECRET: "a"}}}),
            ("data.files.train.1", {"data": {"files": {"train": ["a", SECRET], "validation": "b", "test": "c"}}}),
            ("compare.published.0.about", {"compare": {"published": [PUBLISHED]}}),
            ("tracking.experiment", {"tracking": {"experiment": SECRET}}),
        ],
    )  # fmt: skip
    def test_is_refused_in_params(self, place: str, change: dict[str, Any], project: params.Params) -> None:
        content = project.model_dump(mode="json")
        for section, values in change.items():
            content[section] |= values
        with pytest.raises(UserError) as refused:
            params.check(content, "params.yaml")
        assert f"{place} = " in str(refused.value)
        assert "write the value itself" in str(refused.value)

    def test_is_refused_in_a_search(self, project: params.Params) -> None:
        assert project
        text = (ROOT / "sweeps" / "example.yaml").read_text(encoding="utf-8")
        content = yaml12.load(text, "example.yaml")
        content["parameters"] = {"lora.target_modules": {"choices": [["q_proj"], [SECRET]]}}
        YAML().dump(content, Path("mine.yaml"))
        with pytest.raises(UserError, match=r"parameters.lora.target_modules.choices.1.0 = .*write the value itself"):
            spec.load(Path("mine.yaml"))

    def test_is_refused_in_a_recipe(self, project: params.Params) -> None:
        assert project
        Path(use.DEFAULT).write_text((ROOT / use.DEFAULT).read_text(encoding="utf-8"))
        before = paths.PARAMS.read_bytes()
        recipe = {"about": "a", "source": "b", "needs": {}, "params": {"prompt": {"template": "{source}" + SECRET}}}
        YAML().dump(recipe, Path("theirs.yaml"))
        with pytest.raises(UserError, match="write the value itself"):
            use.apply("theirs.yaml", force=True)
        assert paths.PARAMS.read_bytes() == before

    def test_is_refused_on_the_command_line_of_a_sweep(self, project: params.Params) -> None:
        assert project
        with pytest.raises(UserError, match="write the value itself"):
            grid.check(grid.expand([f"prompt.template='{{source}} {SECRET}'"]))


def locked(**stages: Any) -> str:
    return json.dumps({"schema": "2.0", "stages": stages})


OUTSIDE = ("/etc/passwd", "../victim", "out/../../victim", "out/data/../../../victim", "", "a\0b")
NO_DIGESTS = ("../../../../etc/passwd", "A" * 32, "a" * 31, f"{'a' * 32}.dir/../x", f"{'a' * 32}\n", "")


class TestLocks:
    @pytest.mark.parametrize("kind", ["outs", "deps"])
    @pytest.mark.parametrize("path", OUTSIDE)
    def test_a_path_that_leads_out_is_refused(self, kind: str, path: str) -> None:
        lock = locked(
            prepare={"cmd": "x", kind: [{"path": "out/data", "md5": "a" * 32}, {"path": path, "md5": "b" * 32}]}
        )
        with pytest.raises(UserError, match=rf"stages.prepare.{kind}.1.path: the path .* leads out of the project"):
            lockfile.stages_of(lock, "dvc.lock")

    @pytest.mark.parametrize("md5", NO_DIGESTS)
    def test_a_digest_that_names_another_file_is_refused(self, md5: str) -> None:
        lock = locked(prepare={"cmd": "x", "outs": [{"path": "out/data", "md5": md5}]})
        with pytest.raises(UserError, match=r"stages.prepare.outs.0.md5"):
            lockfile.stages_of(lock, "dvc.lock")

    @pytest.mark.parametrize(
        "text", ["", "[]", "stages: 1", "stages: {a: [x]}", "stages: {a: {outs: [{path: 1}]}}", "a: *b"]
    )
    def test_what_is_no_lock_is_one_error(self, text: str) -> None:
        with pytest.raises(UserError, match=r"^dvc.lock"):
            lockfile.stages_of(text, "dvc.lock")

    def test_the_lock_of_this_repository_is_taken(self) -> None:
        stages = lockfile.stages_of(lockfile.text(ROOT / paths.DVC_LOCK), "dvc.lock")
        assert {"prepare", "train@17", "track"} <= stages.keys()

    def test_a_listing_in_the_cache_names_files_within_its_folder_alone(self, tmp_path: Path) -> None:
        entries = [{"relpath": "a", "md5": "a" * 32}, {"relpath": "../../x", "md5": "b" * 32}]
        entries += [{"relpath": "/etc/passwd", "md5": "c" * 32}, {"relpath": "b", "md5": "../../../x"}]
        text = json.dumps(entries).encode()
        (tmp_path / "listing").write_bytes(text)
        name = str(records.dvc_md5(tmp_path / "listing"))
        place = lockfile.object_path(tmp_path, f"{name}.dir")
        place.parent.mkdir(parents=True)
        place.write_bytes(text)
        assert lockfile.listing_of(tmp_path, f"{name}.dir") == [("a", "a" * 32)]

    @pytest.mark.parametrize("path", ["victim", "../victim", "link/victim"])
    def test_a_trial_removes_nothing_outside_of_its_clone(self, path: str, tmp_path: Path) -> None:
        project = tmp_path / "clone"
        project.mkdir()
        (project / "link").symlink_to(tmp_path)
        (tmp_path / "victim").mkdir()
        (project / "victim").mkdir()
        lock = locked(compare={"cmd": "x", "outs": [{"path": path, "md5": "a" * 32}]})
        (project / paths.DVC_LOCK).write_text(lock)
        if path == "victim":
            trial._forget_tests(project, [])
        else:
            with pytest.raises(UserError, match="leads out of"):
                trial._forget_tests(project, [])
        assert (tmp_path / "victim").is_dir()
        assert (project / "victim").is_dir() == (path != "victim")

    def test_what_a_trial_keeps_of_its_lock_stays_as_it_was(self, tmp_path: Path) -> None:
        text = (ROOT / paths.DVC_LOCK).read_text(encoding="utf-8")
        (tmp_path / paths.DVC_LOCK).write_text(text, encoding="utf-8")
        trial._forget_tests(tmp_path, ["train@17"])
        before, after = yaml12.load(text, "before"), yaml12.read(tmp_path / paths.DVC_LOCK)
        kept = {"prepare", "fetch", "prompts", "quantize", "infer@base", "evaluate@base", "train@17"}
        kept |= {"infer-unquantized", "evaluate-unquantized", "infer-shots", "evaluate-shots"}
        assert after == {
            "schema": before["schema"],
            "stages": {name: before["stages"][name] for name in before["stages"] if name in kept},
        }


# Each letter stands for nine of the one before.
BOMB = "a: &a [x]\n" + "".join(
    f"{chr(n)}: &{chr(n)} [{', '.join([f'*{chr(n - 1)}'] * 9)}]\n" for n in range(ord("b"), ord("m"))
)


class TestAliases:
    @pytest.mark.parametrize("file", [paths.PARAMS, paths.DVC_LOCK])
    def test_are_refused_before_dvc_expands_them(self, file: Path, project: params.Params) -> None:
        assert project
        file.write_text(BOMB)
        with pytest.raises(UserError, match=rf"(?m)(^|- ){file}:2: the alias \*a stands for another part of the file"):
            check.require_sound()

    def test_make_repro_checks_before_dvc_starts(self) -> None:
        recipe = (ROOT / "Makefile").read_text().partition("\nrepro:")[2].partition("\n\n")[0]
        commands = [line.strip().removeprefix("@") for line in recipe.splitlines()[1:]]
        assert commands.index("lora-repro check") < commands.index("dvc repro")


class TestVllm:
    def test_a_params_file_names_no_program(self, project: params.Params) -> None:
        content = project.model_dump(mode="json")
        content["runtime"]["vllm"] = "data/train.jsonl"
        with pytest.raises(UserError, match=r"runtime.vllm = 'data/train.jsonl': unknown key"):
            params.check(content, "params.yaml")

    def test_the_environment_does(
        self, project: params.Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "python"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        chosen = project.generation.model_copy(update={"backend": "vllm"})
        with pytest.raises(UserError, match=f"{params.VLLM_PYTHON} is not set"):
            params.require_backend(chosen)
        monkeypatch.setenv(params.VLLM_PYTHON, str(program))
        params.require_backend(chosen)
