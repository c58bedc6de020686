"""Whether the store can be used, asked before anything is computed: a server is otherwise first met at the very end."""

import base64
import os
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pipeline.core import params, records
from pipeline.core.errors import UserError
from pipeline.record import address

SECONDS = 2.0
SQLITE = b"SQLite format 3\0"
OTHER_MEANS = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH",
               "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH")  # fmt: skip
"""Variables by which MLflow signs its requests, or meets its server, in a way that is not repeated here."""


def require_reachable(tracking: params.Tracking) -> bool:
    """UserError if the store cannot be used: a server that does not answer or refuses, a file that cannot be written.

    Returns whether that could be asked. A database behind a server, and a server that requests are signed for by other
    means than a name and a password or a token, are not asked.
    """
    store = address.tracking_uri(tracking)
    file = address.database(tracking)
    if file is not None:
        _require_writable(file)
        _require_sqlite(file)
    elif address.scheme(store) == "file":
        _require_writable(address.local_path(store) / "0")
    elif address.scheme(store) in address.WEB and not any(map(os.environ.get, OTHER_MEANS)):
        _require_answer(store, tracking)
    else:
        return False
    return True


def _require_answer(store: str, tracking: params.Tracking) -> None:
    shown = address.shown(tracking)
    parts = urlsplit(store)
    host = parts.netloc.rpartition("@")[2]
    query = f"experiment_name={quote(tracking.experiment)}"
    path = f"{parts.path.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name"
    request = Request(urlunsplit((parts.scheme, host, path, query, "")), headers=_authorization(store))
    remedy = "start it, or correct the address; MLFLOW_TRACKING_URI= (empty) and tracking.uri: null record here"
    try:
        with build_opener(_Stay).open(request, timeout=SECONDS):
            return
    except HTTPError as error:
        with error:
            _require_known(error, shown)
    except (URLError, OSError, HTTPException, ValueError) as error:
        why = getattr(error, "reason", error)
        raise UserError(f"the MLflow server {shown} does not answer ({why}): {remedy}") from None


def _require_known(answer: HTTPError, shown: str) -> None:
    """UserError unless the answer is MLflow's for an experiment that is not there yet: 404, in JSON."""
    if answer.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise UserError(
            f"the MLflow server {shown} refuses the credentials ({answer.code}): set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if answer.code != HTTPStatus.NOT_FOUND or "json" not in answer.headers.get("Content-Type", ""):
        raise UserError(
            f"the server {shown} does not answer as MLflow does ({answer.code} {answer.reason}): correct the address"
        )


class _Stay(HTTPRedirectHandler):
    """Follows no redirect: the credentials are for this server."""

    def redirect_request(self, *_: object) -> None:
        return None


def _authorization(store: str) -> dict[str, str]:
    """The header that MLflow would send: a name and a password, of the environment or the address, or a token."""
    parts = urlsplit(store)
    name = os.environ.get("MLFLOW_TRACKING_USERNAME") or unquote(parts.username or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or unquote(parts.password or "")
    if name or password:
        return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _require_writable(file: Path) -> None:
    there = next(one for one in (file, *file.parents) if one.exists())
    if there != file and not there.is_dir():
        raise UserError(f"the MLflow store {file} would be in {there}, which is no folder: name another place")
    if not os.access(there, os.W_OK):
        raise UserError(f"the MLflow store: {there} cannot be written, so nothing could be recorded: allow it")


def _require_sqlite(file: Path) -> None:
    if file.is_dir():
        raise UserError(f"the MLflow store {file} is a folder, and no SQLite database: name a file")
    if file.is_file():
        with records.opened(file) as opened:
            start = opened.read(len(SQLITE))
        if start not in (b"", SQLITE):
            raise UserError(f"the MLflow store {file} is not a SQLite database: name another file")
