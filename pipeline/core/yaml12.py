"""YAML 1.2 that strangers may have written: a params file, a recipe, a search, a `dvc.lock`.

ruamel's safe loader refuses tags that would build objects. This module also refuses aliases: a few lines of them can
expand to more values than fit into memory, in every program that reads the file, such as DVC.
"""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node

from pipeline.core.errors import UserError


def read(path: Path) -> Any:
    """The content of a YAML file. UserError if it is missing or not UTF-8, or if `load` raises it."""
    try:
        return load(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run this in the project folder, or restore it with git") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None


def load(text: str, name: str) -> Any:
    """The content of a YAML text. `name` stands at the head of errors.

    Raises `NotYamlError` for a text that is not YAML, and UserError for an alias.
    """
    return _parsed("load", text, name)


def compose(text: str, name: str) -> Node | None:
    """The nodes of a YAML text, with their positions. Raises what `load` raises."""
    node: Node | None = _parsed("compose", text, name)
    return node


class NotYamlError(UserError):
    """The text is not YAML, or was cut off."""


class _AliasError(Exception):
    """The text has an alias. The argument is its event."""


class _WithoutAliases(Composer):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            raise _AliasError(self.parser.peek_event())
        return super().compose_node(parent, index)


def _parsed(how: str, text: str, name: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _WithoutAliases
    try:
        return getattr(yaml, how)(text)
    except _AliasError as met:
        [event] = met.args
        raise UserError(
            f"{name}:{event.start_mark.line + 1}: the alias *{event.anchor} stands for another part of the file: write "
            "that part out, since aliases of aliases expand without end"
        ) from None
    except YAMLError as error:
        raise NotYamlError(f"{name} is not YAML: {error}") from None
    except Exception as error:  # ruamel lets the errors of bad dates, bad numbers and deep nesting through
        raise NotYamlError(f"{name} cannot be read as YAML ({type(error).__name__}: {error})") from None
