"""What the tests share: a tiny random Llama with a tokenizer of its own, and a project folder around it."""

import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from claims import lab
from pipeline.core import contracts, params, paths, records
from pipeline.record import store
from tests import ROOT
from tests.made.clone import SECRETS, Finished, environment, make_clone
from tests.made.data import SPLIT_GROUPS, rows, write_data
from tests.made.models import tiny_llama, trained_words
from tests.made.parameters import tiny_params
from tests.made.records import base_facts

COMPUTE = ("claims", "export", "fetch", "infer", "lora", "model", "quantize", "search")
"""The rooms whose tests compute with a model, or run a search."""
KEEP = ("test_contamination", "test_forget", "test_gguf", "test_promote", "test_store", "test_track")
"""Modules of other tests that compute with a model, or keep an MLflow store."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all tests of `COMPUTE` and `KEEP`, and those that ask for a project in which stages have run."""
    for item in items:
        waits = isinstance(item, pytest.Function) and "finished" in item.fixturenames
        if waits or item.path.parent.name in COMPUTE or item.path.stem in KEEP:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC and MLflow obey their environment variables: those of the tests' caller are not for the tests."""
    for name in list(os.environ):
        if name.startswith(("DVC_", "MLFLOW_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model as Llama 1 and 2 have one: pairs, with bytes for what is not in the vocabulary."""
    return trained_words(tmp_path_factory.mktemp("words") / "tokenizer.model", "bpe")


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
    contracts.write(lab.BASE_FACTS, base_facts())
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


@pytest.fixture
def quantized(project: params.Params, tiny_model: Path) -> params.Params:
    """A project with the quantized base in place."""
    from pipeline.quantize import quantize

    shutil.copytree(tiny_model, paths.BASE)
    contracts.write(paths.BASE_FACTS, base_facts(sha256=records.sha256_tree(paths.BASE)))
    quantize.write_quantized(project.quantize, project.runtime)
    return project


@pytest.fixture
def mlflow_calls_what_its_dependencies_deprecate() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
        yield
