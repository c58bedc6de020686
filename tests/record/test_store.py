"""Stores of strangers: their word writes, reads and deletes nothing outside of the store, and earns no password."""

import hashlib
import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from pipeline.commands import cli
from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.record import address, seal, store
from pipeline.record.runs import DIGEST, NOTE, SWEEP, Record, Stored
from tests import ROOT
from tests.made.clone import SECRET

OWN = params.Tracking(uri=None, experiment="toy")
RUN = "0123456789abcdef" * 2
OTHER = "f" * 32


@pytest.fixture(autouse=True)
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a store of its own as the working directory."""
    folder = (tmp_path / "my project").resolve()
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".mlflow").mkdir()
    shutil.copy(empty_database, folder / ".mlflow" / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder that is no store's."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "key").write_text("private")
    return folder


def unharmed(victim: Path) -> bool:
    return [(path.name, path.read_text()) for path in victim.iterdir()] == [("key", "private")]


def record(digest: str = "d") -> Record:
    """A record with a file, which is params.yaml."""
    Path("params.yaml").write_text("of the project")
    return Record("a-run", {DIGEST: digest}, {"lora.r": "4"}, [], {"id": ["a"]}, [(Path("params.yaml"), None)])


def change(table: str, column: str, value: str) -> None:
    """Have the project's store say something else of all its experiments or runs."""
    with closing(sqlite3.connect(".mlflow/mlflow.db")) as database:
        database.execute(f"update {table} set {column} = ?", (value,))
        database.commit()


def said(column: str, table: str) -> list[str]:
    with closing(sqlite3.connect(".mlflow/mlflow.db")) as database:
        return [row[0] for row in database.execute(f"select {column} from {table}")]


def written() -> str:
    """The id of a run in the project's store."""
    [(run, _)] = store.write([record()], OWN)
    return run.run_id


# Deleting


ELSEWHERE: dict[str, Callable[[Path, str], str]] = {
    "an address": lambda victim, _: victim.as_uri(),
    "a path": lambda victim, _: str(victim),
    "with a host": lambda victim, _: f"file://host{victim}",
    "upwards": lambda victim, _: f"{root()}/../../../{victim.name}",
    "upwards, encoded": lambda victim, _: f"{root().as_uri()}/%2e%2e/%2e%2e/%2e%2e/{victim.name}",
    "a link": lambda victim, run: linked(Path(".mlflow/artifacts") / run / "artifacts", victim),
    "the store's root": lambda *_: root().as_uri(),
    "another run's": lambda *_: (root() / OTHER / "artifacts").as_uri(),
    "a part of its own": lambda _, run: (root() / run).as_uri(),
}


def root() -> Path:
    """The folder for the artifacts of the project's store."""
    return Path.cwd() / ".mlflow" / "artifacts"


def linked(place: Path, target: Path) -> str:
    if place.is_dir():
        shutil.rmtree(place)
    place.symlink_to(target)
    return (Path.cwd() / place).as_uri()


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_half_written_run_has_no_folder_deleted_that_is_not_its_own(victim: Path, where: str) -> None:
    run = written()
    other = Path(".mlflow/artifacts") / OTHER / "artifacts"
    other.mkdir(parents=True)
    (other / "key").write_text("of another run")
    change("runs", "artifact_uri", ELSEWHERE[where](victim, run))
    change("runs", "status", "RUNNING")
    assert written() != run
    assert unharmed(victim)
    assert (other / "key").read_text() == "of another run"
    assert (Path(".mlflow/artifacts") / run).is_dir()
    assert sorted(said("lifecycle_stage", "runs")) == ["active", "deleted"]


def test_a_half_written_run_loses_its_own_folder() -> None:
    run = written()
    change("runs", "status", "RUNNING")
    assert written() != run
    assert not (Path(".mlflow/artifacts") / run / "artifacts").exists()


# Writing and reading


@pytest.mark.parametrize("where", ["an address", "a path", "with a host", "upwards", "upwards, encoded"])
def test_an_experiment_that_is_kept_elsewhere_on_this_machine_is_refused(victim: Path, where: str) -> None:
    written()
    change("experiments", "artifact_location", ELSEWHERE[where](victim, RUN))
    for call in (lambda: store.write([record("e")], OWN), lambda: store.crown(OWN, "d", "s", Path("params.yaml"))):
        with pytest.raises(UserError, match="nothing is read or written there"):
            call()
    assert unharmed(victim)
    assert said("status", "runs") == ["FINISHED"]


@pytest.mark.parametrize("where", ["an address", "a path", "with a host", "upwards", "a link", "the store's root"])
def test_a_run_that_is_kept_elsewhere_on_this_machine_is_not_read(victim: Path, tmp_path: Path, where: str) -> None:
    run = written()
    change("runs", "artifact_uri", ELSEWHERE[where](victim, run))
    with pytest.raises(UserError, match="nothing is read or written there"):
        store.read_back(OWN, run, tmp_path / "back")
    with pytest.raises(UserError, match="nothing is read or written there"):
        store.crown(OWN, "d", "s", Path("params.yaml"))
    assert unharmed(victim)
    assert not (tmp_path / "back").exists() or list((tmp_path / "back").iterdir()) == []


def test_what_a_link_in_a_run_leads_to_is_not_read(victim: Path, tmp_path: Path) -> None:
    run = written()
    (Path(".mlflow/artifacts") / run / "artifacts" / "innocent").symlink_to(victim / "key")
    with pytest.raises(UserError, match="refused"):
        store.read_back(OWN, run, tmp_path / "back")
    assert "private" not in [path.read_text() for path in (tmp_path / "back").rglob("*") if path.is_file()]


def test_a_store_whose_artifacts_lie_behind_a_link_of_the_users_is_used(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    Path(".mlflow/artifacts").symlink_to(tmp_path / "large disk")
    run = written()
    assert "artifacts/params.yaml" in store.read_back(OWN, run, tmp_path / "back")


def test_a_project_that_was_moved_is_told_so_with_a_command_that_mends_its_store(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = written()
    moved = tmp_path / "it's moved"
    project.rename(moved)
    monkeypatch.chdir(moved)
    refused = []
    for call in (lambda: store.write([record("e")], OWN), lambda: store.read_back(OWN, run, tmp_path / "back")):
        with pytest.raises(UserError, match="was moved") as caught:
            call()
        refused.append(str(caught.value))
    assert not project.exists()
    [command] = {line.strip() for text in refused for line in text.splitlines() if "python -c" in line}
    program, *arguments = shlex.split(command)
    assert program == "python"
    subprocess.run([shutil.which("python") or "python", *arguments], check=True)
    held = store.read_back(OWN, run, tmp_path / "back")
    assert (tmp_path / "back" / "params.yaml").read_text() == "of the project"
    [stored] = store.stored(OWN)
    assert seal.faults(stored, held, tmp_path / "back") == []
    [(second, word)] = store.write([record("e")], OWN)
    assert word == "recorded"
    with store.opened(OWN) as client:
        assert client.get_run(second.run_id).info.artifact_uri.startswith(moved.as_uri())


# Servers


class Server:
    """A tracking server that answers as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.run_id = uuid.uuid4().hex  # MLflow remembers where the artifacts of a run are
        self.location = "mlflow-artifacts:/1"
        self.created = self.later = f"mlflow-artifacts:/1/{self.run_id}/artifacts"
        self.runs: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.asked.append((self.command, self.path, dict(self.headers)))
                content = server.content(self.command, self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def run(self, uri: str, status: str = "FINISHED", digest: str = "d") -> dict[str, Any]:
        info: dict[str, Any] = {
            "run_id": self.run_id,
            "run_uuid": self.run_id,
            "run_name": "a-run",
            "experiment_id": "1",
        }
        info |= {"status": status, "artifact_uri": uri, "lifecycle_stage": "active", "start_time": 1}
        return {"info": info, "data": {"tags": [{"key": DIGEST, "value": digest}]}}

    def content(self, command: str, path: str) -> bytes:
        place = urlsplit(path).path
        experiment = {"experiment_id": "1", "name": "toy", "artifact_location": self.location}
        answers: dict[str, Any] = {
            "experiments/get-by-name": {"experiment": experiment | {"lifecycle_stage": "active"}},
            "experiments/get": {"experiment": experiment | {"lifecycle_stage": "active"}},
            "runs/search": {"runs": self.runs},
            "runs/create": {"run": self.run(self.created, "RUNNING")},
            "runs/get": {"run": self.run(self.later)},
        }
        if place.endswith("mlflow-artifacts/artifacts") and command == "GET":
            root = "path" in parse_qs(urlsplit(path).query)
            return json.dumps({"files": [{"path": name, "is_dir": False} for name in self.files if root]}).encode()
        if "mlflow-artifacts" in place:
            return b"of the server"
        return json.dumps(next((answers[key] for key in answers if place.endswith(key)), {})).encode()

    def paths(self) -> list[str]:
        return [urlsplit(path).path for _, path, _ in self.asked]

    def authorized(self) -> list[str]:
        """The headers by which anything secret came."""
        return [
            f"{name}: {value}"
            for *_, headers in self.asked
            for name, value in headers.items()
            if name.lower() == "authorization" or SECRET in value
        ]

    def tracking(self) -> params.Tracking:
        return params.Tracking(uri=self.uri, experiment="toy")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def second() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


HERE: dict[str, Callable[[Path], str]] = {
    "an address": lambda victim: victim.as_uri(),
    "a path": str,
    "with a host": lambda victim: f"file://host{victim}",
    "in capitals": lambda victim: f"FILE://{victim}",
    "a relative path": lambda _: "mlruns",
    "like a drive": lambda victim: f"c:{victim}",
    "a database": lambda victim: f"sqlite:///{victim}/mlflow.db",
    "the place of another run": lambda _: f"runs:/{OTHER}",
    "the place of a model": lambda _: "models:/m/1",
}


@pytest.mark.parametrize("where", HERE)
def test_a_server_that_keeps_an_experiment_on_this_machine_is_refused(
    project: Path, victim: Path, server: Server, where: str
) -> None:
    server.location = HERE[where](victim)
    before = sorted(project.iterdir())
    with pytest.raises(UserError, match="nothing is read or written there"):
        store.write([record()], server.tracking())
    assert unharmed(victim)
    assert sorted(project.iterdir()) == [*before, project / "params.yaml"]
    assert [path for path in server.paths() if path.endswith("runs/create")] == []


@pytest.mark.parametrize("where", HERE)
def test_a_server_that_keeps_a_run_on_this_machine_is_refused(
    project: Path, victim: Path, server: Server, tmp_path: Path, where: str
) -> None:
    server.created = server.later = HERE[where](victim)
    before = sorted(project.iterdir())
    with pytest.raises(UserError, match="nothing is read or written there"):
        store.write([record()], server.tracking())
    with pytest.raises(UserError, match="nothing is read or written there"):
        store.read_back(server.tracking(), server.run_id, tmp_path / "back")
    assert unharmed(victim)
    assert not (tmp_path / "back").exists()
    assert sorted(project.iterdir()) == [*before, project / "params.yaml"]


def test_a_server_that_changes_its_word_is_refused(victim: Path, server: Server) -> None:
    """The place of a new run is a good one, and another by the time that its files are written."""
    server.later = victim.as_uri()
    with pytest.raises(UserError, match="nothing is read or written there"):
        store.write([record()], server.tracking())
    server.runs = [server.run(server.created)]
    with pytest.raises(UserError, match="nothing is read or written there"):
        store.crown(server.tracking(), "d", "s", Path("params.yaml"))
    assert unharmed(victim)


def test_a_half_written_run_of_a_server_has_nothing_deleted_on_this_machine(victim: Path, server: Server) -> None:
    place = victim / server.run_id / "artifacts"
    place.mkdir(parents=True)
    server.runs = [server.run(place.as_uri(), "RUNNING")]
    server.location = "mlflow-artifacts:/1"
    store.write([record()], server.tracking())
    assert place.is_dir()
    assert (victim / "key").read_text() == "private"
    assert [path for path in server.paths() if path.endswith("runs/delete")] != []


@pytest.mark.parametrize(
    "name", ["../../out", "/tmp/lora-repro-out", "a/../../../out", "..%2f..%2fout", "file:///tmp/lora-repro-out"]
)
def test_what_a_server_lists_is_not_written_outside_of_the_folder(
    project: Path, server: Server, tmp_path: Path, name: str
) -> None:
    server.files = [name]
    before = sorted(tmp_path.rglob("*"))
    back = tmp_path / "deep" / "down" / "back"
    with pytest.raises(UserError, match="refused"):
        store.read_back(server.tracking(), server.run_id, back)
    new = [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]
    assert new == [project / ".mlflow" / ".lock"]
    assert not Path("/tmp/lora-repro-out").exists()


def test_what_an_honest_server_keeps_is_read(server: Server, tmp_path: Path) -> None:
    server.files = ["params.yaml"]
    assert "artifacts/params.yaml" in store.read_back(server.tracking(), server.run_id, tmp_path / "back")
    assert (tmp_path / "back" / "params.yaml").read_text() == "of the server"


# Addresses


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///records/my.db", "sqlite:///{root}/records/my.db"),
        ("sqlite:///my.db?timeout=9", "sqlite:///{root}/my.db?timeout=9"),
        ("sqlite:///{root}/my.db", "sqlite:///{root}/my.db"),
        ("http://localhost:5000", "http://localhost:5000"),
        ("https://mlflow.example.org/here", "https://mlflow.example.org/here"),
        ("mlruns", "{root_uri}/mlruns"),
        ("file://{root}/mlruns", "file://{root}/mlruns"),
    ],
)
def test_params_yaml_may_name_a_file_of_the_project_and_a_server(project: Path, uri: str, expected: str) -> None:
    places = {"root": project.as_posix(), "root_uri": project.as_uri()}
    given = params.Tracking(uri=uri.format(**places), experiment="toy")
    assert address.tracking_uri(given) == expected.format(**places)


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "sqlite:///{out}/my.db",
            "sqlite:///../out/my.db",
            "sqlite:///link/my.db",
            "sqlite:///a/../../out/my.db?timeout=9",
        ),
        *("sqlite:///{out}/my.db?uri=true", "sqlite+pysqlite:///{out}/my.db", "SQLITE:///{out}/my.db", "sqlite://"),
        *("file://{out}", "file://host{out}", "../out", "{out}", "link", "file:..%2fout", "c:{out}"),
        *("postgresql://127.0.0.1:9/db", "postgresql+psycopg2:///db?host={out}", "mysql://127.0.0.1:9/db"),
        *("mssql+pyodbc:///?driver={out}", "databricks", "databricks://profile", "uc:x"),
        *("plugin://127.0.0.1:9", "ftp://127.0.0.1:9", "http+unix://x", "http:", "http://["),
    ],
)
def test_params_yaml_may_name_no_other_store(
    project: Path, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Databases would be sent the passwords of their own clients, and a driver is code."""
    (tmp_path / "out").mkdir()
    (project / "link").symlink_to(tmp_path / "out")
    given = params.Tracking(uri=uri.format(out=tmp_path / "out"), experiment="toy")
    before = sorted(project.iterdir())
    with pytest.raises(UserError, match="(?s)tracking.uri of params.yaml is .* if you trust it"):
        store.write([record()], given)
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(project.iterdir()) == sorted({*before, project / "params.yaml"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/out/my.db")
    assert address.tracking_uri(given) == f"sqlite:///{tmp_path}/out/my.db"


# Passwords


CREDENTIALS: dict[str, dict[str, str]] = {
    "a password": {"MLFLOW_TRACKING_USERNAME": SECRET, "MLFLOW_TRACKING_PASSWORD": SECRET},
    "a token": {"MLFLOW_TRACKING_TOKEN": SECRET},
    "a signature": {"MLFLOW_TRACKING_AWS_SIGV4": "true"},
    "another way": {"MLFLOW_TRACKING_AUTH": "kubernetes"},
    "a certificate": {"MLFLOW_TRACKING_CLIENT_CERT_PATH": "key.pem"},
    "a file": {},
}


@pytest.fixture(params=list(CREDENTIALS))
def credentials(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What MLflow would sign its requests with."""
    kind = str(request.param)
    for name, value in CREDENTIALS[kind].items():
        monkeypatch.setenv(name, value)
    if kind == "a file":
        (tmp_path / ".mlflow").mkdir()
        lines = ["[mlflow]", f"mlflow_tracking_username = {SECRET}", f"mlflow_tracking_password = {SECRET}", ""]
        (tmp_path / ".mlflow" / "credentials").write_text("\n".join(lines))
    return kind


@pytest.mark.usefixtures("credentials")
def test_passwords_are_not_sent_to_an_address_of_params_yaml(server: Server, tmp_path: Path) -> None:
    for call in (
        lambda: store.write([record()], server.tracking()),
        lambda: store.stored(server.tracking()),
        lambda: store.read_back(server.tracking(), server.run_id, tmp_path / "back"),
        lambda: address.tracking_uri(server.tracking()),
    ):
        with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI={server.uri}") as caught:
            call()
        assert SECRET not in str(caught.value)
    assert (server.authorized(), server.asked) == ([], [])


def test_passwords_are_sent_to_the_address_that_the_environment_names(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    store.write([record()], params.Tracking(uri="http://127.0.0.1:9", experiment="toy"))
    assert set(server.authorized()) == {f"Authorization: Bearer {SECRET}"}
    assert len(server.authorized()) == len(server.asked) > 0


def test_an_address_of_params_yaml_is_used_where_there_are_no_passwords(server: Server) -> None:
    [(run, word)] = store.write([record()], server.tracking())
    assert (run.run_id, word) == (server.run_id, "recorded")
    assert server.authorized() == []


@pytest.mark.parametrize("kind", ["http", "mlflow-artifacts"])
def test_passwords_are_not_sent_to_where_a_server_says_that_artifacts_are(
    server: Server, second: Server, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = second.uri.removeprefix("http://")
    path = "/api/2.0/mlflow-artifacts/artifacts" if kind == "http" else ""
    server.created = server.later = f"{kind}://{host}{path}/1/{server.run_id}/artifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    server.runs = [server.run(server.created, "RUNNING")]
    for call in (
        lambda: store.write([record()], OWN),
        lambda: store.read_back(OWN, server.run_id, tmp_path / "back"),
    ):
        with pytest.raises(UserError, match="the user name, password or token of the environment would be sent there"):
            call()
    assert (second.authorized(), second.asked) == ([], [])
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    server.runs = []
    store.write([record()], OWN)
    assert second.authorized() == []
    assert len(second.asked) > 0


def test_the_stores_address_is_not_given_to_mlflows_own_command_line_either(
    project: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`MLFLOW_TRACKING_URI="$(lora-repro store)" mlflow` would name a stranger's address in the environment."""
    text = (ROOT / "params.yaml").read_text().replace("  uri: null", f"  uri: {server.uri}")
    (project / "params.yaml").write_text(text)
    assert CliRunner().invoke(cli.app, ["store"]).stdout == f"{server.uri}\n"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    shown = CliRunner().invoke(cli.app, ["store"])
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "if you trust it" in shown.stderr


def test_mlflow_leaves_the_environment_as_it_is(server: Server, tmp_path: Path) -> None:
    """An address that it exported would count as the user's own the next time."""
    before = {name: value for name, value in os.environ.items() if name.endswith("_URI")}
    store.write([record()], server.tracking())
    store.read_back(server.tracking(), server.run_id, tmp_path / "back")
    assert {name: value for name, value in os.environ.items() if name.endswith("_URI")} == before


# Pages


@pytest.mark.parametrize("path", ["", "/", "/in/a/folder/"])
def test_a_server_is_shown_by_its_page_of_the_experiment(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("//", f"//me:{SECRET}@") + path)
    expected = f"{server.uri}{path.rstrip('/')}/#/experiments/1"
    assert store.shown(OWN) == store.view(OWN) == expected


def test_a_server_that_does_not_answer_is_shown_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    assert store.shown(OWN) == "http://127.0.0.1:9/#/experiments"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store.shown(OWN) == address.shown(OWN)


# What a store says of runs


FORGED = "a run\nall agreed\r\x0b\x85\u2028all agreed"


def test_no_text_of_a_store_begins_a_line_of_ours(tmp_path: Path) -> None:
    run = written()
    change("runs", "name", FORGED)
    for key in (NOTE, SWEEP, "more"):
        with store.opened(OWN) as client:
            client.set_tag(run, key, FORGED)
    (root() / run / "artifacts" / "adapter").mkdir()
    (root() / run / "artifacts" / "adapter" / "x\u2028all agreed").write_text("")
    [stored] = store.stored(OWN)
    faults = seal.faults(stored, store.read_back(OWN, run, tmp_path / "back"), tmp_path / "back")
    assert "artifacts/adapter/x all agreed was added" in faults
    told = store.line(stored, OWN)
    for text in (stored.name, *stored.tags.values(), *faults, told):
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize("run_id", ["x; rm -rf ~", "--help", f"{RUN}0", RUN.upper(), "../../x", ""])
def test_a_run_whose_id_mlflow_would_not_make_is_refused(server: Server, run_id: str) -> None:
    """Commands to paste hold it, and places in the store."""
    server.run_id = run_id
    server.runs = [server.run(server.created)]
    with pytest.raises(UserError, match="MLflow makes no such ids"):
        store.stored(server.tracking())


@pytest.mark.parametrize("seeds", ['["../../../victim"]', '"../victim"', "{", "true", "[1.5]", "[true]", "null"])
def test_seeds_that_are_no_numbers_lead_nowhere(seeds: str) -> None:
    stored = Stored(RUN, "a-run", "FINISHED", {}, {"seeds": seeds}, {})
    with pytest.raises(UserError, match="its seeds are not a list of whole numbers"):
        _ = stored.seeds


@pytest.mark.parametrize("manifest", ["[]", "1", '"x"', "null"])
def test_a_manifest_that_is_none_is_a_fault(tmp_path: Path, manifest: str) -> None:
    (tmp_path / seal.MANIFEST).write_text(manifest)
    pinned = {seal.SEAL: hashlib.sha256(manifest.encode()).hexdigest()}
    faults = seal.faults(Stored(RUN, "a-run", "FINISHED", pinned, {}, {}), {}, tmp_path)
    assert faults == ["artifacts/manifest.json is not a manifest"]
