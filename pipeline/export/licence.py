"""The licence that a source states. Nothing is guessed: a licence that is not stated is not known.

A wheel states it in its metadata (packaging.python.org, core metadata: License-Expression, License, or a classifier), a
GGUF file in its header (`general.license`), a repository on the hub or a folder in the YAML of its README.md.
"""

from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

from pipeline.core.errors import UserError
from pipeline.fetch import gguf_header
from pipeline.sources import source

LONGEST = 64
"""The most characters in the name of a licence. Some wheels have the whole text in its place."""
MOST_METADATA = 2**20
"""The most bytes of a wheel's metadata that are read. The fields come first, a page about the package follows."""


@dataclass(frozen=True, slots=True)
class Stated:
    """The `name` of a licence (None: not known), and `where` the source states it, or why it is not known."""

    name: str | None
    where: str

    @property
    def identifier(self) -> str:
        """The name in the hub's form: in lower case, or `unknown`."""
        return self.name.lower() if self.name else "unknown"

    def __str__(self) -> str:
        return f"{self.name} ({self.where})" if self.name else f"not known ({self.where})"


def stated(name: str, sha256: str | None, *, kind: Literal["model", "dataset"], key: str) -> Stated:
    """The licence that a source states. A missing wheel is downloaded; if that fails, the licence is not known."""
    try:
        if name.startswith("hf:"):
            return _of_repository(name, kind)
        with source.resolved(name, sha256, kind=kind, key=key) as found:
            if found.is_file() and found.suffix.lower() == ".gguf" and (of_file := _of_gguf(found)):
                return Stated(of_file, "general.license of the GGUF file")
            if (found / "README.md").is_file() and (of_card := _of_card(found / "README.md")):
                return Stated(of_card, "README.md of the folder")
        if name.startswith("pip:"):
            with source.wheel(name, sha256, key=key) as archive:
                of_wheel = _of_wheel(archive)
            return Stated(of_wheel, "metadata of the wheel" if of_wheel else "the wheel's metadata name none")
    except UserError as error:
        return Stated(None, f"the source cannot be read here: {str(error).splitlines()[0]}")
    return Stated(None, "the source states none")


def _of_wheel(archive: ZipFile) -> str | None:
    found = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    if len(found) != 1:
        return None
    with archive.open(found[0]) as file:
        fields = HeaderParser().parsestr(file.read(MOST_METADATA).decode("utf-8", "replace"))
    for field in ("License-Expression", "License"):
        value = (fields.get(field) or "").strip()
        if value and len(value) <= LONGEST and "\n" not in value:
            return value
    said = [value.rpartition(" :: ")[2] for value in fields.get_all("Classifier", []) if value.startswith("License ::")]
    return said[0] if len(said) == 1 else None


def _of_gguf(file: Path) -> str | None:
    try:
        return _named(gguf_header.read(file).values.get("general.license"))
    except (ValueError, OSError):
        return None


def _of_card(file: Path) -> str | None:
    from huggingface_hub import ModelCard

    try:
        return _named(ModelCard.load(file).data.get("license"))
    except Exception:  # a stranger's file can raise anything
        return None


def _of_repository(name: str, kind: str) -> Stated:
    """The licence in README.md at the pinned revision, the only file asked for that is not part of the content."""
    from huggingface_hub import hf_hub_download

    repository, _, rest = name.removeprefix("hf:").partition("@")
    try:
        file = hf_hub_download(repository, "README.md", repo_type=kind, revision=rest.partition("/")[0])
    except Exception as error:  # its transport errors share no base class
        return Stated(None, f"the hub could not be asked: {type(error).__name__}")
    found = _of_card(Path(file))
    return Stated(found, "README.md of the repository" if found else "the repository's README.md names none")


def _named(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) and 0 < len(value.strip()) <= LONGEST else None
