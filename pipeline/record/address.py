"""The address of the MLflow store: which store is meant, and whether `params.yaml` may name it.

MLflow signs its requests to any server with the credentials in the environment. A stranger may have written
`params.yaml`, so an address in it is restricted. The user's own MLFLOW_TRACKING_URI is not.
"""

import os
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

from pipeline.core import params, paths
from pipeline.core.errors import UserError, without_passwords

COMMAND = 'MLFLOW_TRACKING_URI="$(lora-repro store)" mlflow'
"""MLflow's command line on the project's store, for a shell."""

CREDENTIALS = ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH")
"""The endings of the MLFLOW_TRACKING_... variables that sign requests (`mlflow.utils.credentials`)."""
CREDENTIALS_FILE = Path("~/.mlflow/credentials")

SQLITE = re.compile(r"sqlite:///([^?]+)(\?.*)?")
WEB = ("http", "https")


def tracking_uri(tracking: params.Tracking) -> str:
    """The store's address: the user's MLFLOW_TRACKING_URI, else `tracking.uri`, else SQLite in the main repository.

    Relative files are relative to the main repository, wherever an experiment runs. It may hold a password. UserError
    where `params.yaml` names a store that it may not name.
    """
    root = paths.main_repository()
    own = os.environ.get("MLFLOW_TRACKING_URI")
    named = own or tracking.uri or "sqlite:///.mlflow/mlflow.db"
    if file := SQLITE.fullmatch(named):
        named = f"sqlite:///{(root / file[1]).as_posix()}{file[2] or ''}"
    elif re.match(r"[\w+.\-]+:", named) is None and named != "databricks":
        named = (root / named).as_uri()
    if tracking.uri and not own:
        _require_allowed(named, root)
    return named


def shown(tracking: params.Tracking) -> str:
    """The store's address without passwords, to be printed."""
    return without_passwords(tracking_uri(tracking))


def server(tracking: params.Tracking) -> str | None:
    """The address of an MLflow server without credentials, its pages' beginning; None for any other store."""
    store = tracking_uri(tracking)
    if scheme(store) not in WEB:
        return None
    return without_passwords(urlunsplit(urlsplit(store)._replace(query="", fragment=""))).rstrip("/")


def database(tracking: params.Tracking) -> Path | None:
    """The file of a SQLite store; None for any other store."""
    found = SQLITE.fullmatch(tracking_uri(tracking))
    return Path(found[1]) if found else None


def is_missing(tracking: params.Tracking) -> bool:
    """Whether the store is a SQLite file that does not exist yet."""
    file = database(tracking)
    return file is not None and not file.exists()


def home(tracking: params.Tracking) -> Path:
    """The folder on this machine for what belongs to a store: beside its database, else `.mlflow`."""
    file = database(tracking)
    return file.parent if file else paths.main_repository() / ".mlflow"


def is_served(store: str) -> bool:
    """Whether a server is behind the address of a store. A server keeps the artifacts itself."""
    return scheme(store) in WEB or store.startswith("databricks")


def scheme(address: str) -> str:
    """The scheme of an address; `?` for a text that is not an address."""
    try:
        return urlsplit(address).scheme
    except ValueError:
        return "?"


def local_path(location: str) -> Path:
    """The path that MLflow makes of the address of a file."""
    return Path(url2pathname(urlsplit(location).path if location.startswith("file:") else location))


def credentials() -> list[str]:
    """The names of what MLflow would sign requests with: variables of the environment, and its credentials file."""
    names = [f"MLFLOW_TRACKING_{name}" for name in CREDENTIALS]
    found = [name for name in names if os.environ.get(name, "").lower() not in ("", "0", "false")]
    return found + [str(CREDENTIALS_FILE)] * CREDENTIALS_FILE.expanduser().is_file()


def require_unsigned(store: str, named: str) -> None:
    """UserError, which begins with `named`, if MLflow would send credentials to the server `store`."""
    if scheme(store) in WEB and (found := credentials()):
        raise UserError(f"{named}, and MLflow would send {' and '.join(found)} there: {_if_trusted(store)}")


def _require_allowed(store: str, root: Path) -> None:
    """UserError unless `store` is a SQLite file or a folder in the project `root`, or a server without credentials."""
    named = f"tracking.uri of params.yaml is {store}"
    file = SQLITE.fullmatch(store)
    if file or scheme(store) == "file":
        path = Path(file[1]) if file else local_path(store)
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{named}, which is outside of the project: {_if_trusted(store)}")
    elif scheme(store) not in WEB or not urlsplit(store).hostname:
        allowed = "sqlite:///<file in the project>, http://... or https://..."
        raise UserError(f"{named}, but params.yaml may only name {allowed}: {_if_trusted(store)}")
    else:
        require_unsigned(store, named)


def _if_trusted(store: str) -> str:
    return f"set MLFLOW_TRACKING_URI={shlex.quote(without_passwords(store))} if you trust it"
