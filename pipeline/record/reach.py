"""Whether the store can be used, asked before anything is computed: a server is otherwise first met at the very end."""

import configparser
import os
import socket
import sqlite3
import tempfile
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.record import address

PLUGINS = ("AUTH", "AWS_SIGV4")
"""The endings of the MLFLOW_TRACKING_... variables that leave the signature of a request to a plugin."""
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Where servers of databases listen, unless the address of a store says otherwise."""
SECONDS_TO_ANSWER = 2.0
KEPT = "The results are kept in out/, and `dvc repro -s track` records them once the store can be used"


def require_reachable(tracking: params.Tracking, seconds: float = SECONDS_TO_ANSWER) -> None:
    """UserError if nothing can be recorded in the store now. It is found out within `seconds`, without MLflow.

    A server must answer, and must accept the credentials that MLflow would send. A server of a database must accept a
    connection. A SQLite file or a folder must be writable. Nothing is left behind.
    """
    store = address.tracking_uri(tracking)
    if (file := address.database(tracking)) is not None:
        _require_database(file)
    elif address.scheme(store) == "file":
        _require_writable(address.local_path(store))
    else:
        _within(seconds, store)
        _require_writable(address.home(tracking))  # of the lock


def _require_database(file: Path) -> None:
    """UserError unless a SQLite file can be written, or made. One that another process is writing can be."""
    _require_writable(file.parent)
    if not file.exists():
        return
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=0)) as opened:
            opened.execute("PRAGMA schema_version")
            opened.execute("BEGIN IMMEDIATE")
            opened.rollback()
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise UserError(f"the MLflow store {file} refused: {error}. Mend or move the file. {KEPT}") from None


def _require_writable(folder: Path) -> None:
    """UserError unless files can be written in a folder. If it does not exist: in the nearest one above it."""
    there = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"the MLflow store in {folder} cannot be written ({there}: {why}): make it writable, or set "
            "MLFLOW_TRACKING_URI to another store"
        ) from None


def _within(seconds: float, store: str) -> None:
    """UserError unless the server of a store answers in time.

    The question has a thread of its own, since looking up a name has no time limit.
    """
    found: list[str] = []
    signed = _signed() if address.scheme(store) in address.WEB else {}

    def ask() -> None:
        found.append(
            _asked(store, seconds, signed) if address.scheme(store) in address.WEB else _connected(store, seconds)
        )

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    fault = found[0] if found else f"does not answer within {seconds:g} s"
    if fault:
        raise UserError(
            f"the MLflow store {store} {fault}: start it, or correct MLFLOW_TRACKING_URI, tracking.uri or the "
            f"credentials. {KEPT}"
        )


def _connected(store: str, seconds: float) -> str:
    """Why a server of a database accepts no connection; empty if it does, or if its address names no server."""
    try:
        parts = urlsplit(store)
        host, port = parts.hostname, parts.port or PORTS.get(parts.scheme.partition("+")[0])
    except ValueError as error:
        return f"has no valid address ({error})"
    if not host or not port:
        return ""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return ""
    except OSError as error:
        return f"does not answer ({error.strerror or error})"


def _asked(store: str, seconds: float, signed: Mapping[str, Any]) -> str:
    """Why a server at `store` is not usable; empty if it is.

    The question is one that needs credentials. A server that does not know it must at least say that it is well.
    Answers that send on to another server are not followed: it would get the credentials.
    """
    import requests  # MLflow's own client: the same proxies, certificates and .netrc

    fault = ""
    for path in ("api/2.0/mlflow/experiments/search?max_results=1", "health"):
        asked = f"{store.rstrip('/')}/{path}"
        try:
            with requests.get(asked, timeout=seconds, allow_redirects=False, stream=True, **signed) as answer:
                status, reason, onward = answer.status_code, answer.reason, answer.headers.get("Location")
        except requests.exceptions.Timeout:
            return f"does not answer within {seconds:g} s"
        except (requests.exceptions.RequestException, OSError, ValueError) as error:
            return f"does not answer ({type(error).__name__})"
        if status in (401, 403):
            # A signature by a plugin is MLflow's own, and cannot be made here.
            return "" if _by_plugin() else f"refuses the credentials ({status} {reason})"
        if onward and 300 <= status < 400:
            there = urlsplit(urljoin(asked, onward))
            if there[:2] == urlsplit(asked)[:2]:
                return ""
            return f"sends on to {there.scheme}://{there.hostname}, which is another address"
        if status < 400:
            return ""
        fault = fault or f"answers {status} {reason}"
        if status != 404:
            break
    return fault


def _by_plugin() -> bool:
    return any(os.environ.get(f"MLFLOW_TRACKING_{name}", "").lower() not in ("", "0", "false") for name in PLUGINS)


def _signed() -> dict[str, Any]:
    """What `requests` needs to sign a request as MLflow would. A password comes before a token."""
    given = {name: os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD", "TOKEN")}
    stored = configparser.ConfigParser()
    try:
        stored.read(address.CREDENTIALS_FILE.expanduser(), encoding="utf-8")
        own = stored["mlflow"] if stored.has_section("mlflow") else {}
        name, password = (given[key] or own.get(f"mlflow_tracking_{key.lower()}") for key in ("USERNAME", "PASSWORD"))
    except (configparser.Error, UnicodeDecodeError, OSError):
        raise UserError(f"{address.CREDENTIALS_FILE} is not a file of MLflow credentials: mend or remove it") from None
    found: dict[str, Any] = {}
    if name and password:
        found["auth"] = (name.encode(), password.encode())
    elif given["TOKEN"]:
        found["headers"] = {"Authorization": f"Bearer {given['TOKEN']}"}
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        found["verify"] = False
    elif certificates := os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
        found["verify"] = certificates
    if own_certificate := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        found["cert"] = own_certificate
    return found
