"""YAML 1.2 of strangers: a params file, a recipe, a search, a `dvc.lock`.

Tags that would build objects are refused by ruamel's safe loader. Aliases are refused here: a few lines of them stand
for more values than fit into memory, and every reader of the file, DVC among them, would expand them.
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
    """The content of a YAML file; UserError where it is missing, is not UTF-8, or as of `load`."""
    try:
        return load(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run this in the project folder, or restore it with git") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None


def load(text: str, name: str) -> Any:
    """The content of a YAML text; `name` heads the error.

    `NotYamlError` for a text that is not YAML; UserError for an alias in it.
    """
    return _parsed("load", text, name)


def compose(text: str, name: str) -> Node | None:
    """The nodes of a YAML text with their places in it; UserError as of `load`."""
    node: Node | None = _parsed("compose", text, name)
    return node


class NotYamlError(UserError):
    """A text that is not YAML: half-written, or never YAML."""


class _AliasError(Exception):
    """An alias was met; the argument is its event."""


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
    except Exception as error:  # ruamel meets bad dates, numbers and too deep a nesting with whatever they bring about
        raise NotYamlError(f"{name} is not YAML that can be read ({type(error).__name__}: {error})") from None
