"""What the address and the answers of an MLflow store may not do: a stranger can have written either.

MLflow goes wherever a store says that artifacts lie, and signs requests to any address with what the environment holds.
Here it is held to the store's own folder, and to the address that the user named. It is imported inside functions, as
in `pipeline.record.store`.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline.core.errors import UserError, without_passwords

CREDENTIALS = ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH")
"""What `MLFLOW_TRACKING_...` in the environment signs requests with (`mlflow.utils.credentials`)."""
CREDENTIALS_FILE = Path("~/.mlflow/credentials")

WEB = ("http", "https")

MOVE = (
    "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); "
    '[d.execute(f"update {t} set {c} = replace({c}, ?, ?)", sys.argv[2:]) '
    'for t, c in (("experiments", "artifact_location"), ("runs", "artifact_uri"))]; d.commit()'
)
"""Python that gives the artifacts of a SQLite store another address."""


def is_run_id(text: str) -> bool:
    """Whether it is an id as MLflow makes them for runs."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def served(store: str) -> bool:
    """Whether a server is behind the address of a store, which then keeps the artifacts itself."""
    return _scheme(store) in WEB or store.startswith("databricks")


def credentials() -> list[str]:
    """What there is here that MLflow would sign its requests to a server with."""
    names = [f"MLFLOW_TRACKING_{name}" for name in CREDENTIALS]
    found = [name for name in names if os.environ.get(name, "").lower() not in ("", "0", "false")]
    return found + [str(CREDENTIALS_FILE)] * CREDENTIALS_FILE.expanduser().is_file()


def require_address(uri: str, root: Path) -> None:
    """UserError where `tracking.uri` of params.yaml, made absolute, may not name this store.

    It may name a SQLite file or a folder in the main repository `root`, and a server that no password would be sent to.
    The user's own MLFLOW_TRACKING_URI may say anything.
    """
    named, trusted = f"tracking.uri of params.yaml is {uri}", _if_trusted(uri)
    file = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", uri)
    if file or _scheme(uri) == "file":
        path = Path(file[1]) if file else _local(uri)
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{named}, outside of the project: {trusted}")
    elif _scheme(uri) not in WEB or not urlsplit(uri).hostname:
        taken = "sqlite:///<file in the project>, http://... and https://..."
        raise UserError(f"{named}, and only {taken} are taken from there: {trusted}")
    else:
        require_unsigned(uri, named)


def require_unsigned(uri: str, named: str) -> None:
    """UserError, begun by `named`, where MLflow would sign requests to a server that the environment does not name."""
    if _scheme(uri) in WEB and (found := credentials()):
        raise UserError(f"{named}, and MLflow would send {' and '.join(found)} there: {_if_trusted(uri)}")


def _if_trusted(uri: str) -> str:
    return f"set MLFLOW_TRACKING_URI={shlex.quote(without_passwords(uri))} if you trust it"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where the artifacts of the store at the address `store` may lie: `root` is its own folder on this machine.

    `database` is the file of a SQLite store.
    """

    store: str
    root: Path
    database: Path | None

    def require_experiment(self, location: str) -> None:
        """UserError unless runs of an experiment whose artifacts are at `location` may be written."""
        if self._on_this_machine(location):
            self._require_inside(location, _local(location))

    def require_run(self, location: str) -> None:
        """UserError unless artifacts of a run that are at `location` may be read and written."""
        if self._on_this_machine(location):
            # The root itself belongs to all runs.
            self._require_inside(location, _local(location).resolve().parent)

    @contextlib.contextmanager
    def confined(self) -> Iterator[None]:
        """Within, MLflow reaches no artifacts but those that `require_run` allows.

        A server can answer one thing to us and another to MLflow: so each address is looked at where MLflow uses it.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories

        known: dict[str, Callable[..., Any]] = get_registered_artifact_repositories()
        usual = dict(known)

        def checked(make: Callable[..., Any]) -> Callable[..., Any]:
            def repository(location: str, **given: Any) -> Any:
                self.require_run(location)
                return make(location, **given)

            return repository

        # These two only look up another address.
        known.update({kind: checked(make) for kind, make in usual.items() if kind not in ("runs", "models")})
        try:
            yield
        finally:
            known.update(usual)

    def delete(self, run: Any) -> None:
        """Delete the artifacts of a run where they are its own: below `root`, or at the server's, in `<id>/artifacts`.

        Elsewhere they stay, and belong to a deleted run.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        location, run_id = str(run.info.artifact_uri), str(run.info.run_id)
        if _is_local(location):
            path = _local(location).resolve()
            own = not served(self.store) and path.is_relative_to(self.root.resolve())
        else:
            path = Path(urlsplit(location).path)
            own = served(self.store) and _scheme(location) == "mlflow-artifacts"
        if own and is_run_id(run_id) and path.parts[-2:] == (run_id, "artifacts"):
            # Not every artifact store can delete.
            with contextlib.suppress(MlflowException, NotImplementedError, OSError):
                get_artifact_repository(location, tracking_uri=self.store).delete_artifacts()

    def _on_this_machine(self, location: str) -> bool:
        """Whether artifacts are in a folder here; UserError for a place that no artifacts are kept in, or that secrets
        would be sent to."""
        from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories

        says = f"the MLflow store {self.store} says that artifacts are kept in {location}"
        if _is_local(location):
            if served(self.store):
                raise UserError(
                    f"{says}, which is on this machine: nothing is read or written there. Have the server keep them "
                    "itself (`mlflow server --artifacts-destination ...`), or give another tracking.experiment"
                )
            return True
        kind = _scheme(location)
        if kind not in get_registered_artifact_repositories() or kind in ("runs", "models"):
            raise UserError(f"{says}, which is no place for them: nothing is read or written there")
        if kind in (*WEB, "mlflow-artifacts") and credentials() and not self._at_the_server(location):
            raise UserError(
                f"{says}, another address than the store's: the user name, password or token of the environment would "
                "be sent there, so nothing is read or written there"
            )
        return False

    def _at_the_server(self, location: str) -> bool:
        """Whether requests for artifacts go to the store's own address."""
        there, here = urlsplit(location), urlsplit(self.store)
        if re.search(r"[\s\\]", location) or here.scheme not in WEB:
            return False
        if there.scheme == "mlflow-artifacts" and not there.netloc:
            return True
        same = there.netloc.lower() == here.netloc.rpartition("@")[2].lower()
        return same and there.scheme in (here.scheme, "mlflow-artifacts")

    def _require_inside(self, location: str, path: Path) -> None:
        if path.resolve().is_relative_to(self.root.resolve()):
            return
        told = ""
        if self.database is not None:
            before = re.sub(r"/[0-9a-f]{32}/artifacts/?$", "", location)
            words = ["python", "-c", MOVE, str(self.database), before, self.root.as_uri()]
            told = f"If the project was moved, this tells its store so:\n  {shlex.join(words)}\nElse "
        raise UserError(
            f"the MLflow store {self.store} says that artifacts are kept in {location}, and its own are in "
            f"{self.root}: nothing is read or written there.\n{told}give another tracking.experiment"
        )


def _scheme(address: str) -> str:
    try:
        return urlsplit(address).scheme
    except ValueError:  # it is no address
        return "?"


def _is_local(location: str) -> bool:
    """Whether MLflow takes it for a path: a scheme of one letter is a drive's."""
    kind = _scheme(location)
    return kind == "file" or (len(kind) <= 1 and kind != "?")


def _local(location: str) -> Path:
    """The path that MLflow makes of an address of a file."""
    return Path(url2pathname(urlsplit(location).path if location.startswith("file:") else location))
