"""Repositories of `hf:` sources: downloaded into the hub's own cache, and checked against the hub's digests."""

import glob
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pipeline.core import records
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.sources.address import Repo, digest, missing

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""A checkpoint in the Hugging Face layout, without copies in other formats, which many repositories hold beside it."""


def fetch(wanted: Repo, kind: Literal["model", "dataset"], key: str) -> dict[str, Path]:
    """Download what is not in the hub's cache yet, and return the wanted files there.

    The keys are the paths from the wanted folder, or '' for one file. UserError if the hub refuses or cannot be
    reached, or the repository does not hold what is wanted.
    """
    from huggingface_hub import snapshot_download

    whole_model = kind == "model" and not wanted.path
    allowed = list(MODEL_FILES) if whole_model else None
    if wanted.path:
        allowed = [glob.escape(wanted.path), f"{glob.escape(wanted.path)}/*"]
    name = f"{wanted.id}@{wanted.revision}"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{wanted.id}"
    say(f"{name}: fetching what is not yet in the hub's cache")
    try:
        snapshot = Path(
            snapshot_download(
                wanted.id,
                repo_type=kind,
                revision=wanted.revision,
                allow_patterns=allowed,
                ignore_patterns=["*/*"] if whole_model else None,
            )
        )
    except Exception as error:  # the library's transport errors share no base class
        raise UserError(_why_hub_failed(error, name, page, key)) from error
    names = list(records.files(snapshot))
    # An earlier download may have left other files of this revision in the snapshot: they are not chosen.
    chosen = names
    if whole_model:
        chosen = [name for name in names if "/" not in name and any(fnmatchcase(name, like) for like in MODEL_FILES)]
    elif wanted.path:
        chosen = [name for name in names if name == wanted.path or name.startswith(f"{wanted.path}/")]
    if wanted.path and not chosen:
        raise missing(wanted.path, names, key, name)
    if whole_model and not any(name.endswith(".safetensors") for name in chosen):
        raise UserError(f"{key}.source: {name} holds no .safetensors at its top: name a GGUF file in it, or convert it")
    top = f"{wanted.path}/" if wanted.path else ""
    return {name.removeprefix(top) if name != wanted.path else "": snapshot / name for name in chosen}


def here(wanted: Repo) -> Path | None:
    """The place in the hub's cache of what a source names, if it was downloaded before; None without a network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = f"models--{wanted.id.replace('/', '--')}"
    place = Path(HF_HUB_CACHE, folder, "snapshots", wanted.revision, *([wanted.path] if wanted.path else []))
    return place if place.exists() else None


def require_announced(found: Mapping[str, Path], place: Path, key: str, source: str) -> None:
    """UserError unless each file at `place` has the digest under which the hub's cache keeps it.

    The hub announces this digest for the file at this revision: sha256 for large files, git's sha1 for others. So a
    download or a disk that corrupted a file is noticed, and a mirror that passes on the hub's digests but other
    content. A mirror that announces its own digests is not noticed: only `sha256` in the parameters does that.
    """
    for name, path in found.items():
        blob = path.readlink().name if path.is_symlink() else ""
        file = place / name
        if re.fullmatch("[0-9a-f]{64}", blob):
            actual = records.sha256_file(file)
        elif re.fullmatch("[0-9a-f]{40}", blob):
            actual = records.git_blob(file)
        else:  # a disk without links, or a server that is not the hub
            raise UserError(
                f"{key}.source = '{source}': the hub's digest of {path} is not known here: pin the content with "
                f"{key}.sha256: {digest(place, key, source)}"
            )
        if actual != blob:
            raise UserError(
                f"{key}.source = '{source}': {path} is not what the hub announced ({blob}, and it is {actual}): remove "
                "the file and the link's target, and run again to download it; if that does not help, do not use the "
                "server that HF_ENDPOINT names"
            )


def _why_hub_failed(error: Exception, name: str, page: str, key: str) -> str:
    from huggingface_hub import errors

    access = "`hf auth login` or set HF_TOKEN"
    offline = f"connect once; if {page} asks for a licence, accept it there, then {access}"
    remedies: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, f"accept its licence on {page}, then {access}"),
        (errors.RepositoryNotFoundError, f"check the name on {page}; for a private repository, {access}"),
        (errors.RevisionNotFoundError, f"check the revision: {page} has no such commit"),
        (errors.OfflineModeIsEnabled, f"HF_HUB_OFFLINE is set and the cache does not hold it: unset it, and {offline}"),
        (errors.LocalEntryNotFoundError, f"the hub cannot be reached, or HF_HUB_OFFLINE is set: {offline}"),
    ]
    remedy = next((remedy for kind, remedy in remedies if isinstance(error, kind)), "check the network and disk space")
    reason = str(error).strip().split("\n", 1)[0]
    return f"{key}.source: cannot fetch {name} ({type(error).__name__}: {reason}). {remedy}, or use a local path"
