"""A store that cannot be used is named before anything is computed: servers of all kinds, files, folders."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.record import reach

TRACKING = params.Tracking(uri=None, experiment="a study")
SECRET = "planted0secret"


@contextmanager
def server(
    status: int, kind: str = "application/json", location: str | None = None
) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server with one answer: its address, and the path and authorization of every request so far."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}", asked
        finally:
            served.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Name a store, as a user does, from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda uri: monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


def refused() -> str:
    with pytest.raises(UserError) as caught:
        reach.require_reachable(TRACKING)
    return str(caught.value)


@pytest.mark.parametrize("status", [200, 404])
def test_a_server_with_or_without_the_experiment_is_taken(status: int, here: Callable[[str], None]) -> None:
    with server(status) as (uri, asked):
        here(uri)
        assert reach.require_reachable(TRACKING)
    assert asked == [("/api/2.0/mlflow/experiments/get-by-name?experiment_name=a%20study", None)]


def test_nothing_listens(here: Callable[[str], None]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{bound.getsockname()[1]}"
        here(uri)
        assert f"the MLflow server {uri} does not answer" in refused()


def test_a_server_that_says_nothing_is_left(here: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "SECONDS", 0.2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        here(f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert "does not answer (timed out)" in refused()


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, "text/html", "refuses the credentials (401)"),
        (403, "application/json", "refuses the credentials (403)"),
        (404, "text/html", "does not answer as MLflow does (404"),
        (500, "application/json", "does not answer as MLflow does (500"),
    ],
)
def test_a_server_that_refuses(status: int, kind: str, said: str, here: Callable[[str], None]) -> None:
    with server(status, kind) as (uri, _):
        here(uri)
        assert said in refused()


def test_credentials_are_sent_as_mlflow_sends_them_and_never_shown(
    here: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(401) as (uri, asked):
        here(uri.replace("//", f"//me:{SECRET}@"))
        assert SECRET not in refused()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "you")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        here(uri)
        assert SECRET not in refused()
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
        assert SECRET not in refused()
    assert [sent for _, sent in asked] == [
        "Basic bWU6cGxhbnRlZDBzZWNyZXQ=",
        "Basic eW91OnBsYW50ZWQwc2VjcmV0",
        f"Bearer {SECRET}",
    ]


def test_credentials_follow_to_no_other_server(here: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    with server(200) as (other, asked), server(302, location=other) as (uri, _):
        here(uri)
        assert "does not answer as MLflow does (302" in refused()
    assert asked == []


@pytest.mark.parametrize("uri", ["postgresql://db/mlflow", "databricks"])
def test_what_only_mlflow_can_ask_is_said_to_be_open(uri: str, here: Callable[[str], None]) -> None:
    here(uri)
    assert not reach.require_reachable(TRACKING)


class TestFiles:
    def test_a_database_that_is_not_there_yet_is_taken(self, here: Callable[[str], None]) -> None:
        here("sqlite:///new/mlflow.db")
        assert reach.require_reachable(TRACKING)
        assert not Path("new").exists()

    @pytest.mark.parametrize("uri", ["sqlite:///notes.txt", "sqlite:///notes.txt/mlflow.db", "notes.txt/runs"])
    def test_a_file_of_another_kind(self, uri: str, here: Callable[[str], None]) -> None:
        Path("notes.txt").write_text("years of work\n")
        here(uri)
        assert "notes.txt" in refused()
        assert Path("notes.txt").read_text() == "years of work\n"

    def test_a_folder_in_place_of_a_database(self, here: Callable[[str], None]) -> None:
        Path("store").mkdir()
        here("sqlite:///store")
        assert "is a folder, and no SQLite database" in refused()

    def test_a_folder_that_may_not_be_written(
        self, here: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
        here("sqlite:///mlflow.db")
        assert "cannot be written, so nothing could be recorded" in refused()
