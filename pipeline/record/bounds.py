"""The places where MLflow may read, write and delete artifacts.

MLflow follows whatever location a store names for its artifacts. A stranger may have written the store, so MLflow is
held to the store's own folder on this machine and, with credentials in the environment, to the store's own server.
MLflow is imported inside functions, as in `pipeline.record.store`.
"""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.record import address
from pipeline.record.address import WEB, local_path, scheme
from pipeline.record.runs import is_run_id

REFERENCES = ("runs", "models")
"""Schemes of locations that only refer to another location."""

MOVE = (
    "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); "
    '[d.execute(f"update {t} set {c} = replace({c}, ?, ?)", sys.argv[2:]) '
    'for t, c in (("experiments", "artifact_location"), ("runs", "artifact_uri"))]; d.commit()'
)
"""Python that changes the location of all artifacts of a SQLite store: its file, the old location, the new one."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where the artifacts of the store at the address `store` may be.

    `root` is the store's own folder on this machine, `database` the file of a SQLite store.
    """

    store: str
    root: Path
    database: Path | None

    @classmethod
    def of(cls, tracking: params.Tracking) -> "Bounds":
        """The bounds of the project's store; UserError as of `address.tracking_uri`."""
        return cls(address.tracking_uri(tracking), address.home(tracking) / "artifacts", address.database(tracking))

    def require_experiment(self, location: str) -> None:
        """UserError unless runs may be written to an experiment whose artifacts are at `location`."""
        if self._is_on_this_machine(location):
            self._require_inside(location, local_path(location))

    def require_run(self, location: str) -> None:
        """UserError unless the artifacts of a run at `location` may be read and written."""
        if self._is_on_this_machine(location):
            # Not the root itself: it belongs to all runs.
            self._require_inside(location, local_path(location).resolve().parent)

    @contextlib.contextmanager
    def confined(self) -> Iterator[None]:
        """Inside the block, MLflow reaches only artifacts that `require_run` allows.

        A server can give MLflow another location than us, so each location is checked where MLflow uses it.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories

        known: dict[str, Callable[..., Any]] = get_registered_artifact_repositories()
        usual = dict(known)

        def checked(make: Callable[..., Any]) -> Callable[..., Any]:
            def repository(location: str, **given: Any) -> Any:
                self.require_run(location)
                return make(location, **given)

            return repository

        known.update({kind: checked(make) for kind, make in usual.items() if kind not in REFERENCES})
        try:
            yield
        finally:
            known.update(usual)

    def delete(self, run: Any) -> None:
        """Delete the artifacts of an MLflow run if they are at `<id>/artifacts`, below `root` or at the server.

        Artifacts in any other place stay.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        location, run_id = str(run.info.artifact_uri), str(run.info.run_id)
        if _is_local(location):
            path = local_path(location).resolve()
            own = not address.is_served(self.store) and path.is_relative_to(self.root.resolve())
        else:
            path = Path(urlsplit(location).path)
            own = address.is_served(self.store) and scheme(location) == "mlflow-artifacts"
        if own and is_run_id(run_id) and path.parts[-2:] == (run_id, "artifacts"):
            # Not every artifact store can delete.
            with contextlib.suppress(MlflowException, NotImplementedError, OSError):
                get_artifact_repository(location, tracking_uri=self.store).delete_artifacts()

    def _is_on_this_machine(self, location: str) -> bool:
        """UserError if `location` cannot hold artifacts, or if credentials would be sent to another server."""
        from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories

        says = f"the MLflow store {self.store} says that artifacts are kept in {location}"
        if _is_local(location):
            if address.is_served(self.store):
                raise UserError(
                    f"{says}, a folder of this machine: nothing is read or written there. Let the server keep them "
                    "(`mlflow server --artifacts-destination ...`), or give another tracking.experiment"
                )
            return True
        kind = scheme(location)
        if kind not in get_registered_artifact_repositories() or kind in REFERENCES:
            raise UserError(f"{says}, where no artifacts can be: nothing is read or written there")
        if kind in (*WEB, "mlflow-artifacts") and address.credentials() and not self._is_at_the_server(location):
            raise UserError(
                f"{says}, which is not the store's own server: the user name, password or token of the environment "
                "would be sent there, so nothing is read or written there"
            )
        return False

    def _is_at_the_server(self, location: str) -> bool:
        """Whether requests for artifacts go to the store's own server."""
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
        remedy = "give another tracking.experiment"
        if self.database is not None:
            before = re.sub(r"/[0-9a-f]{32}/artifacts/?$", "", location)
            words = ["python", "-c", MOVE, str(self.database), before, self.root.as_uri()]
            remedy = f"If the project was moved, update its store:\n  {shlex.join(words)}\nElse {remedy}"
        raise UserError(
            f"the MLflow store {self.store} says that artifacts are kept in {location}, but its own folder is "
            f"{self.root}: nothing is read or written there.\n{remedy}"
        )


def _is_local(location: str) -> bool:
    """Whether MLflow takes a location for a path. A scheme of one letter is a drive."""
    kind = scheme(location)
    return kind == "file" or (len(kind) <= 1 and kind != "?")
