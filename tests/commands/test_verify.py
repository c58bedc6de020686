"""Every place where a byte can turn is read by `lora-repro verify`, and the remedies it prints are tried as printed.

The tests share one finished project and put back what they break, by those remedies or byte for byte.
"""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.commands import cli, recompute, show, verify
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.record import address, current, lockfile, provenance, store
from pipeline.record.runs import DIGEST, Stored
from pipeline.report import page
from pipeline.sources import source
from tests.made.clone import Finished, entered, environment

pytestmark = pytest.mark.usefixtures("mlflow_calls_what_its_dependencies_deprecate")


@pytest.fixture(scope="module")
def copied(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.copy(tmp_path_factory.mktemp("verify") / "my project")


@pytest.fixture(autouse=True)
def here(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished project as the working directory."""
    return entered(copied, monkeypatch)


def flip(path: Path, at: int | None = None) -> None:
    """Flip one bit, keeping mode, size and times: nothing but the content tells."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(status.st_mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextmanager
def flipped(path: Path, at: int | None = None) -> Iterator[None]:
    flip(path, at)
    try:
        yield
    finally:
        flip(path, at)


def checked(capsys: pytest.CaptureFixture[str]) -> str:
    """What `lora-repro verify` prints; its exit code and its last line say the same."""
    capsys.readouterr()
    agreed = verify.check_all()
    printed = capsys.readouterr().out
    assert (printed.splitlines()[-1] == "all agreed") == agreed
    return printed


def mend(printed: str) -> None:
    """Run the printed remedies, each once, in their order."""
    commands = [line.removeprefix("    mend: ") for line in printed.splitlines() if line.startswith("    mend: ")]
    assert commands
    for command in dict.fromkeys(commands):
        done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, command + done.stdout + done.stderr


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], env=environment(), check=True, capture_output=True, text=True)
    return done.stdout.strip()


def places(check: Callable[[lockfile.Project], current.Outcome]) -> list[str]:
    return [f"{one.place}: {one.wrong}" for one in check(lockfile.read()).findings]


def cached(md5: str) -> Path:
    return Path(".dvc/cache/files/md5", md5[:2], md5[2:])


def out(path: str) -> lockfile.Out:
    [found] = [one for one in lockfile.read().outs() if one.path == Path(path)]
    return found


def tracking() -> params.Tracking:
    return params.load().tracking


def run() -> Stored:
    [found] = store.stored(tracking())
    return found


def test_an_intact_project(here: Path) -> None:
    result = CliRunner().invoke(cli.app, ["verify"])
    assert result.exit_code == 0, result.stdout
    names = ["cache", "outputs", "pipeline", "chain", "reports", "mlflow", "page", "wheels"]
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == names
    objects = [path for path in (here / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    assert lines[0].startswith(f"cache: {len(objects)} objects, ")
    assert lines[-1] == "all agreed"


def test_a_clone_in_which_nothing_ran(capsys: pytest.CaptureFixture[str]) -> None:
    paths.OUT.rename("kept")
    try:
        printed = checked(capsys)
    finally:
        Path("kept").rename(paths.OUT)
    assert "they cannot be compared: " in printed
    assert "mend: dvc repro" in printed


def apart() -> str:
    """What verify prints in a process of its own, which ends without having imported torch."""
    code = "import sys\nfrom pipeline.commands import verify\nverify.check_all()\nassert 'torch' not in sys.modules"
    done = subprocess.run(["python", "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestCache:
    def test_rotten_and_missing_objects(self, capsys: pytest.CaptureFixture[str]) -> None:
        file = cached(out("out/predictions/base.jsonl").md5)
        listing = cached(out("out/adapters/17").md5)
        within = cached(str(records.dvc_md5(Path("out/data/test.jsonl"))))
        gone = cached(out("out/scores/base.json").md5)
        lock = Path("dvc.lock").read_bytes()
        for path in (file, listing, within):
            flip(path)
            assert path.stat().st_mode & 0o777 == 0o444
        gone.unlink()
        printed = checked(capsys)
        wrong = "its content does not match its name; it should be"
        assert f"{file}: {wrong} out/predictions/base.jsonl of stage infer@base" in printed
        assert f"{listing}: {wrong} out/adapters/17 of stage train@17" in printed
        assert f"{within}: {wrong} out/data/test.jsonl of stage prepare" in printed
        assert f"{gone}: missing; it is out/scores/base.json of stage evaluate@base" in printed
        assert printed.splitlines()[-1] == "4 errors: mend them from the top"
        mend(printed)
        assert "all agreed" in checked(capsys)
        assert Path("dvc.lock").read_bytes() == lock

    def test_where_the_output_is_spoilt_too_its_stage_runs_again(self, capsys: pytest.CaptureFixture[str]) -> None:
        flip(cached(out("out/scores/base.json").md5))
        flip(Path("out/scores/base.json"))
        printed = checked(capsys)
        assert "&& rm -rf out/scores/base.json && dvc repro" in printed
        mend(printed)
        assert "all agreed" in checked(capsys)

    def test_objects_and_records_of_other_experiments(self, capsys: pytest.CaptureFixture[str]) -> None:
        other = cached(hashlib.md5(b"of another").hexdigest())
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"of annther")
        earlier = sorted(Path(".dvc/cache/runs").glob("??/*/*"))[0]
        flip(earlier, earlier.read_bytes().index(b"md5: ") + 5)  # not a size, which DVC neither hashes nor reads
        printed = checked(capsys)
        assert f"{other}: its content does not match its name; no current stage needs it" in printed
        assert f"{earlier}: a record of an earlier run" in printed
        mend(printed)
        assert "all agreed" in checked(capsys)

    def test_a_deleted_cache(self, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.rmtree(".dvc/cache")
        printed = checked(capsys)
        assert f"{cached(out('out/models/base').md5)}: missing; it is out/models/base of stage fetch" in printed
        mend(printed)
        assert "all agreed" in checked(capsys)

    def test_a_full_disk(self, capsys: pytest.CaptureFixture[str]) -> None:
        """DVC prints an error; depending on what it could still write, it exits with 0 and changes dvc.lock."""
        kept = Path(".dvc/kept")
        Path(".dvc/cache").rename(kept)
        Path(".dvc/cache").mkdir()
        mounted = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", ".dvc/cache"]
        if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
            Path(".dvc/cache").rmdir()
            kept.rename(".dvc/cache")
            pytest.skip("a file system of 8 MB cannot be mounted here, which takes root: the full disk was not tried")
        try:
            shutil.copytree(kept, ".dvc/cache", dirs_exist_ok=True)
            scores = cached(out("out/scores/base.json").md5)
            scores.unlink()
            with pytest.raises(OSError, match="No space left"), Path(".dvc/cache/filler").open("wb", 0) as filler:
                while True:
                    filler.write(b"x" * 4096)
            Path("out/scores/base.json").unlink()
            command = ["dvc", "repro", "--force", "--single-item", "evaluate@base"]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
            assert "No space left" in done.stdout + done.stderr
            printed = checked(capsys)
            assert f"{scores}: " in printed
            Path(".dvc/cache/filler").unlink()
            mend(printed)
            assert "all agreed" in checked(capsys)
        finally:
            subprocess.run(["umount", ".dvc/cache"], check=True)
            Path(".dvc/cache").rmdir()
            kept.rename(".dvc/cache")


class TestOutputs:
    def test_each_is_named_and_mended(self, capsys: pytest.CaptureFixture[str]) -> None:
        reports = [*sorted(Path("reports").glob("comparison.*")), paths.METRICS]
        assert len(reports) == 3
        spoilt = [Path("out/predictions/tuned-17.jsonl"), Path("out/scores/tuned-17.json"), paths.RECEIPT, *reports]
        for path in [*spoilt, Path("out/adapters/17/adapter_model.safetensors"), paths.COMPARISON_MD]:
            flip(path)
        flip(paths.published(paths.FIGURES / "ladder.svg"))
        flip(paths.REPORT_HTML)
        Path("out/training/17.csv").unlink()
        printed = checked(capsys)
        assert f"\n  {paths.published(paths.FIGURES)}: not what stage track wrote" in printed
        assert f"\n  {paths.REPORT_HTML}: not what was written: the seal" in printed
        for path in spoilt:
            assert f"\n  {path}: not what stage " in printed
        assert "\n  out/adapters/17 (adapter_model.safetensors): not what stage train@17 wrote" in printed
        assert "\n  out/comparison (comparison.md): not what stage compare wrote" in printed
        assert "\n  out/training/17.csv: missing" in printed
        mend(printed)
        assert "all agreed" in checked(capsys)

    def test_changed_inputs(self) -> None:
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
        with flipped(Path("pipeline/model/loss.py")):
            found = places(current.pipeline)
        Path("params.yaml").write_text(text)
        assert "stage train@17: changed since it ran: train, pipeline/model" in found
        assert "stage fetch: changed since it ran: pipeline/model" in found
        assert not any(one.startswith(("stage prepare", "stage compare")) for one in found)


class TestChain:
    """What `dvc commit --force` would lock: files that DVC takes for right, of which one is of another model."""

    @pytest.mark.parametrize(
        "path",
        [
            "out/models/base.json", "out/models/quantized.json", "out/adapters/17/origin.json",
            "out/predictions/base.json", "out/predictions/tuned-17.json", "out/receipt.json",
        ],
    )  # fmt: skip
    def test_a_digest_of_another(self, path: str) -> None:
        text = Path(path).read_text()
        names = ("sha256", "model_sha256", "digest")
        [key, *_] = [name for name in names if name in records.read_json(Path(path))]
        value = records.read_json(Path(path))[key]
        Path(path).write_text(text.replace(value, value[::-1]))
        found = places(verify.chain)
        Path(path).write_text(text)
        assert any(one.startswith(f"{path}: it names another") for one in found)

    def test_scores_of_other_predictions(self) -> None:
        path = paths.scores("tuned-17")
        text = path.read_text()
        path.write_text(text.replace('"device": "cpu"', '"device": "mps"'))
        found = places(verify.chain)
        path.write_text(text)
        assert found == [f"{path}: it names another decoding than the one here"]

    def test_reports_are_computed_again(self) -> None:
        made = (paths.COMPARISON_MD, paths.COMPARISON_SVG, paths.FIGURES / "ladder.svg", paths.TABLES / "outputs.csv")
        for path in (paths.METRICS, *made, *map(paths.published, made)):
            with flipped(path):
                assert places(verify.reports) == [f"{path}: not what the predictions and scores give"]
        path = paths.predictions("base")
        text = path.read_text()
        path.write_text("".join(text.splitlines(keepends=True)[::-1]))
        assert places(verify.reports)[0].startswith("out/predictions, out/scores: they cannot be compared")
        path.write_text(text)


class TestPage:
    def test_a_flipped_byte_anywhere(self) -> None:
        size = paths.REPORT_HTML.stat().st_size
        for at in (0, size // 3, size // 2, size - 40, size - 1):
            with flipped(paths.REPORT_HTML, at):
                [found] = places(verify.page)
            assert found.startswith("reports/index.html: not what was written")

    def test_of_another_experiment(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = paths.REPORT_HTML.read_text()
        digest = page.digest_of(paths.REPORT_HTML)
        assert digest is not None
        other = text.rpartition("<!-- sha256")[0].replace(digest, digest[::-1])
        paths.REPORT_HTML.write_text(other + page.SEAL.format(hashlib.sha256(other.encode()).hexdigest()))
        shows = f"shows another experiment ({digest[::-1][:12]}…) than the one here ({digest[:12]}…)"
        assert places(verify.page) == [f"reports/index.html: it {shows}"]
        told = page.describe([17])
        assert told.endswith(f"{digest[::-1][:12]}…: run `dvc repro --force --single-item track`")
        mend(checked(capsys))
        assert "all agreed" in checked(capsys)

    def test_a_deleted_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        paths.REPORT_HTML.unlink()
        assert "is missing" in page.describe([17])
        printed = checked(capsys)
        assert "\n  reports/index.html: missing\n    mend: dvc repro --force --single-item track" in printed
        mend(printed)
        assert "all agreed" in checked(capsys)
        assert page.describe([17]) == "reports/index.html"


def artifact(path: str) -> Path:
    uri = next(Path(".mlflow/artifacts").glob(f"{run().run_id}/artifacts"))
    return uri / path


def test_an_output_that_the_pipeline_does_not_have_is_in_no_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lock can name any folder, and what is not as the lock says is to be removed."""
    lock = Path("dvc.lock").read_text()
    content = YAML(typ="safe", pure=True).load(lock)
    content["stages"]["prepare"]["outs"] += [{"path": name, "md5": "0" * 32} for name in ("pipeline", "x\nall agreed")]
    YAML().dump(content, Path("dvc.lock"))
    printed = checked(capsys)
    Path("dvc.lock").write_text(lock)
    assert "stage prepare: changed since it ran: the names of its outputs\n    mend: dvc repro" in printed
    assert "rm -rf pipeline" not in printed
    assert "all agreed" not in printed.splitlines()
    assert (here / "pipeline").is_dir()


class TestMlflow:
    @pytest.mark.parametrize(
        "path",
        ["adapter/17/adapter_model.safetensors", "dvc.lock", "versions.json", "tables/predictions.json",
         "reports/index.html"],
    )  # fmt: skip
    def test_an_artifact(self, path: str) -> None:
        with flipped(artifact(path)):
            [found] = places(verify.record)
        assert f"artifacts/{path} is not what was written" in found

    def test_a_run_of_another_experiment(self) -> None:
        """As left by another experiment, its artifacts lost."""
        from mlflow import MlflowClient

        client = MlflowClient(address.tracking_uri(tracking()))
        experiment = client.get_experiment_by_name("lora-repro").experiment_id
        other = client.create_run(experiment, tags={DIGEST: "another"}).info.run_id
        client.set_terminated(other)
        [found] = verify.record(lockfile.read()).findings
        client.delete_run(other)
        assert found.place.endswith(f"({other})")
        assert found.wrong == "artifacts/manifest.json is missing"
        assert f"mlflow runs delete --run-id {other}" in found.remedy

    def test_the_manifest_itself(self) -> None:
        with flipped(artifact("manifest.json")):
            [found] = places(verify.record)
        assert "artifacts/manifest.json is not the one that the tag manifest.sha256 pins" in found

    @pytest.mark.parametrize(
        ("table", "key", "change", "place"),
        [
            ("params", "lora.r", "value = '5'", "params/lora.r"),
            ("metrics", "train/loss", "value = value + 1e-9", "metrics/train/loss"),
            ("latest_metrics", "rouge1.diff", "value = value + 1e-9", "metrics/rouge1.diff"),
            ("metrics", "cost/fetch_seconds", "value = value + 1e-9", "metrics/cost/fetch_seconds"),
            ("tags", "version.torch", "value = '1.0'", "tags/version.torch"),
            ("tags", "device", "value = 'cuda'", "tags/device"),
        ],
    )
    def test_the_database(self, table: str, key: str, change: str, place: str) -> None:
        with closing(sqlite3.connect(".mlflow/mlflow.db")) as store:
            intact = store.execute(f"select rowid, value from {table} where key = ?", (key,)).fetchall()
            store.execute(f"update {table} set {change} where key = ?", (key,))
            store.commit()
            found = places(verify.record)
            store.executemany(f"update {table} set value = ? where rowid = ?", [(value, row) for row, value in intact])
            store.commit()
        assert [f"{place} is not what was written" in one for one in found] == [True]

    def test_a_registered_adapter_is_no_fault_and_peft_loads_it(
        self, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow.artifacts import download_artifacts
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        promoted = CliRunner().invoke(cli.app, ["promote"])
        assert promoted.exit_code == 0, promoted.output
        assert "version   1 of lora-repro, new" in promoted.stdout
        assert places(verify.record) == []
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.tracking_uri(tracking()))
        folder = Path(download_artifacts("models:/lora-repro/1", dst_path=str(tmp_path)))
        assert records.dvc_md5(folder) == out("out/adapters/17").md5
        base = AutoModelForCausalLM.from_pretrained(here / "out/models/base")
        loaded = PeftModel.from_pretrained(base, str(folder))
        assert any("lora_B" in name and weight.any() for name, weight in loaded.named_parameters())

    def test_a_changed_run_is_written_anew(self, capsys: pytest.CaptureFixture[str]) -> None:
        flip(artifact("adapter/17/adapter_model.safetensors"))
        before = run().run_id
        with pytest.raises(UserError, match="(?s)is not what was written.*adapter_model.*not the adapter that the run"):
            show.print_run(before, tracking())
        printed = checked(capsys)
        assert f"({before}): artifacts/adapter/17/adapter_model.safetensors is not what was written" in printed
        mend(printed)
        assert "all agreed" in checked(capsys)
        assert run().run_id != before

    def test_half_written_and_second_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(address.tracking_uri(tracking()))
        experiment = client.get_experiment_by_name("lora-repro").experiment_id
        own = run()
        half = client.create_run(experiment, tags={DIGEST: own.tags[DIGEST]}).info.run_id
        other = client.create_run(experiment, tags={DIGEST: "another"}).info.run_id
        second = client.create_run(experiment, tags={DIGEST: own.tags[DIGEST]}).info.run_id
        client.set_terminated(second)
        printed = checked(capsys)
        for one in (half, other):
            assert f"({one}): half-written, its status is RUNNING" in printed
        assert f"({second}): a second record of the experiment that {own.run_id} holds" in printed
        client.delete_run(other)  # as `mlflow runs delete` does, which a test above waits for
        client.delete_run(second)
        mend(checked(capsys))
        assert "all agreed" in checked(capsys)
        assert run().run_id == own.run_id


def test_a_rotten_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REPRO_CACHE", str(tmp_path))
    digest = hashlib.sha256(b"wheel").hexdigest()
    wheel = tmp_path / "wheels" / digest / "some-1-py3-none-any.whl"
    project = lockfile.read()
    pinned = project.params.data.model_copy(update={"source": "pip:some==1/data", "sha256": digest})
    project.params = project.params.model_copy(update={"data": pinned})
    assert verify.wheels(project).compared == "1 not downloaded here"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"wheel")
    assert (verify.wheels(project).findings, verify.wheels(project).compared) == ([], "1 verified")
    flip(wheel)
    [found] = verify.wheels(project).findings
    assert found.place == str(wheel)
    mend(f"    mend: {found.remedy}")
    assert source.cache() == tmp_path
    assert verify.wheels(project).findings == []


class TestShow:
    def test_by_name_prefix_and_not_at_all(self) -> None:
        found = run()
        for name in (found.run_id, found.run_id[:6], found.name):
            assert show.find(name, [found]) == found
        with pytest.raises(UserError, match=rf"(?s)no run has the name or id none.*{found.run_id}"):
            show.find("none", [found])
        with pytest.raises(UserError, match="may be any of these runs"):
            show.find(found.name, [found, found])

    def test_restored_from_the_run_from_an_experiment_and_from_a_commit(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = run()
        text = {name: Path(name).read_text() for name in ("dvc.lock", "params.yaml")}
        show.print_run(found.name, tracking())
        printed = capsys.readouterr().out
        assert f"adapter  17: sha256 {records.sha256_tree(paths.adapter(17))}, the one in dvc.lock" in printed
        assert f"digest   {found.tags[DIGEST]}" in printed
        commands = show.restoring(found)
        assert commands[0] == f"git checkout {git('rev-parse', 'HEAD')}"
        assert [words.split()[-1] for words in commands[1:3]] == ["params.yaml", "dvc.lock"]
        for name in text:
            Path(name).unlink()
        shutil.rmtree("out/adapters")
        git("checkout", "params.yaml")
        mend("".join(f"    mend: {command}\n" for command in commands))
        assert {name: Path(name).read_text() for name in text} == text
        assert places(current.outputs) == []

        # An experiment of DVC's is a commit under refs/exps.
        git("add", "dvc.lock")
        head = git("rev-parse", "HEAD")
        commit = git("commit-tree", git("write-tree"), "-p", head, "-m", "an experiment")
        git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/lucid-noon", commit)
        assert show.restoring(found) == ["dvc exp apply lucid-noon"]
        Path("dvc.lock").unlink()
        git("reset", "-q")
        mend("    mend: dvc exp apply lucid-noon\n")
        assert Path("dvc.lock").read_text() == text["dvc.lock"]

        git("add", "dvc.lock")
        git("commit", "-qm", "result")
        assert show.restoring(found) == [f"git checkout {git('rev-parse', 'HEAD')}", "dvc checkout"]
        gone = cached(out("out/scores/base.json").md5)
        gone.rename("kept")
        assert show.restoring(found)[1].startswith("dvc pull   # 1 objects are not in the cache")
        Path("kept").rename(gone)


class TestRecompute:
    def stage(self, **locked: Any) -> lockfile.Stage:
        whole = {"cmd": "", "deps": [], "params": {"params.yaml": {}}, "outs": []} | locked
        return lockfile.Stage("train@17", "", [], [], {}, whole)

    def test_equal_inputs_that_give_other_outputs_are_named_first(self) -> None:
        then = self.stage(outs=[{"path": "a", "md5": "1"}])
        now = self.stage(outs=[{"path": "a", "md5": "2"}])
        lines = recompute.compare([then, then], [now, now])
        assert "train@17: other outputs from equal inputs, a (the first" in lines[0]
        assert "the first" not in lines[1]
        assert recompute.compare([then], [then]) == []
        changed = self.stage(params={"params.yaml": {"lora": 1}}, outs=[{"path": "a", "md5": "2"}])
        assert recompute.compare([then], [changed]) == ["train@17: other inputs, lora; other outputs, a"]

    def test_a_changed_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert recompute.environment(params.load(), "cpu") == []
        monkeypatch.setattr(provenance, "versions", lambda: {"torch": "0"})
        lines = recompute.environment(params.load(), "cuda")
        assert "environment: device was cpu, is cuda" in lines
        assert any(line.startswith("environment: version.torch was 2") and line.endswith("is 0") for line in lines)

    def test_interrupted_it_leaves_nothing(self, tmp_path: Path) -> None:
        command = ["lora-repro", "verify", "--recompute"]
        before = Path("dvc.lock").read_bytes()
        started = subprocess.Popen(
            command, env=environment() | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
        )
        assert started.stdout is not None
        for line in started.stdout:
            if line.startswith("Running stage"):
                break
        started.terminate()
        rest = started.stdout.read()
        started.stdout.close()
        assert started.wait(timeout=30) == 143, rest
        deadline = time.monotonic() + 10
        while list(tmp_path.glob("lora-repro-*")) and time.monotonic() < deadline:
            pass
        assert list(tmp_path.glob("lora-repro-*")) == []
        assert Path("dvc.lock").read_bytes() == before


def test_what_python_and_editors_leave_beside_the_code_is_no_input() -> None:
    locked = lockfile.stages_of(lockfile.text(paths.DVC_LOCK), "dvc.lock")["train@17"]["deps"]
    [before] = [dep["md5"] for dep in locked if dep["path"] == "pipeline/model"]
    room = Path("pipeline/model")
    left = [
        room / name for name in ("__pycache__/x.pyc", "x.pyc", ".DS_Store", "loss.py~", ".loss.py.swp", ".#loss.py")
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("left")
    assert records.dvc_md5(room) == before
    status = subprocess.run(["dvc", "status", "dvc.yaml"], capture_output=True, text=True, check=True)
    assert "up to date" in status.stdout
    for path in left:
        path.unlink()
    with flipped(room / "loss.py"):
        assert records.dvc_md5(room) != before


def test_a_damaged_and_a_deleted_store(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a project of its own: this process's MLflow keeps its connections to the database that is gone."""
    here = finished.copy(tmp_path / "my project")
    monkeypatch.chdir(here)
    flip(Path(".mlflow/mlflow.db"), at=3)
    printed = checked(capsys)
    assert f"{here}/.mlflow/mlflow.db: the database is damaged" in printed
    mend(printed)
    shutil.rmtree(".mlflow")
    printed = checked(capsys)
    assert "no finished run of this experiment" in printed
    assert not Path(".mlflow").exists()
    mend(printed)
    assert "all agreed" in apart()
