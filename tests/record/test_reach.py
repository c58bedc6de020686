"""Whether a store can be used is known within seconds, without MLflow, and without a password in the answer."""

import base64
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.record import reach, store
from tests import ROOT
from tests.made.clone import SECRET

OWN = params.Tracking(uri=None, experiment="toy")
Answer = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str]]]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    (folder / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The address of a server that gives a status and headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers = answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def refused(monkeypatch: pytest.MonkeyPatch, uri: str) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError) as caught:
        reach.require_reachable(OWN)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def accepted(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    reach.require_reachable(OWN)


@pytest.mark.parametrize("scheme", ["http", "postgresql", "mysql+pymysql"])
def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said = refused(monkeypatch, f"{scheme}://me:{SECRET}@127.0.0.1:{port}/x")
    assert f"{scheme}://127.0.0.1:{port}/x does not answer" in said
    assert "`dvc repro -s track`" in said


def test_a_server_that_accepts_and_says_nothing_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "does not answer within 2 s" in refused(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_a_server_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    with serving(lambda _: (status, {})) as uri:
        assert str(status) in refused(monkeypatch, uri)


def test_a_server_gets_the_credentials_that_mlflow_would_send(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        seen.append(handler.headers.get("Authorization"))
        return 200 if seen[-1] else 401, {}

    with serving(answer) as uri:
        assert "refuses the credentials" in refused(monkeypatch, uri)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
        accepted(monkeypatch, uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        accepted(monkeypatch, uri)
        for name in ("TOKEN", "USERNAME", "PASSWORD"):
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
        (tmp_path / ".mlflow").mkdir()
        lines = ["[mlflow]", "mlflow_tracking_username = me", f"mlflow_tracking_password = {SECRET}", ""]
        (tmp_path / ".mlflow" / "credentials").write_text("\n".join(lines))
        accepted(monkeypatch, uri)
    basic = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
    assert seen == [None, f"Bearer {SECRET}", basic, basic]


def test_no_credentials_follow_a_server_that_sends_on_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    asked: list[str] = []

    def second(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        asked.append(handler.path)
        return 200, {}

    with serving(second) as other, serving(lambda _: (302, {"Location": f"{other}/x"})) as uri:
        assert "sends on to" in refused(monkeypatch, uri)
    assert asked == []
    with serving(lambda one: (200, {}) if one.path.startswith("/in/") else (308, {"Location": "/in/"})) as uri:
        accepted(monkeypatch, uri)


def test_a_server_behind_a_proxy_that_knows_only_its_health_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda one: (200 if one.path == "/health" else 404, {})) as uri:
        accepted(monkeypatch, uri)


@pytest.mark.parametrize("uri", ["sqlite:///taken/mlflow.db", "sqlite:///folder", "sqlite:///taken", "taken/runs"])
def test_a_file_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    Path("folder").mkdir()
    Path("taken").write_text("this is no database, and no folder")
    assert "the MLflow store" in refused(monkeypatch, uri)
    assert sorted(path.name for path in Path().iterdir()) == [".dvc", "folder", "taken"]


def test_a_file_that_can_be_written_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted(monkeypatch, "sqlite:///new/deep/mlflow.db")
    accepted(monkeypatch, "new/runs")
    assert [path.name for path in Path().iterdir()] == [".dvc"]
    with closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("create table t (x)")
        database.commit()
        before = Path("mlflow.db").read_bytes()
        accepted(monkeypatch, "sqlite:///mlflow.db")
        database.execute("BEGIN EXCLUSIVE")  # another process is writing: MLflow waits for it
        accepted(monkeypatch, "sqlite:///mlflow.db")
    assert Path("mlflow.db").read_bytes() == before


def test_the_question_needs_no_mlflow() -> None:
    code = (
        "import sys\nfrom pipeline.core import params\nfrom pipeline.record import reach\n"
        "reach.require_reachable(params.Tracking(uri='http://127.0.0.1:9', experiment='x'))"
    )
    code = f"try:\n    exec({code!r})\nexcept Exception as error:\n    print(type(error).__name__)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said, modules = done.stdout.splitlines()
    assert said == "UserError"
    assert "requests" in modules.split()
    assert "mlflow" not in modules.split()


def test_recording_waits_for_a_silent_server_no_longer_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS_TO_BEGIN", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match="results are kept in out/"):
            store.stored(OWN)


def test_a_process_asks_a_server_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def count(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        asked.append(handler.path)
        return 200, {"Content-Length": "0"}

    with serving(count) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for _ in range(3):
            with store.opened(OWN):
                pass
    assert len(asked) == 1


def test_a_store_in_a_folder_that_mlflow_cannot_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    (folder / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="the project is in .*whose name is not UTF-8"), store.opened(OWN):
        pass
