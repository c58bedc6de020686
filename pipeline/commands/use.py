"""Recipes: named experiments. A recipe replaces values of `params.default.yaml`; the result is `params.yaml`.

    about: One line for `lora-repro use`.
    source: arXiv 2305.14314, section 5.2
    needs: {hub: true, gpu_gb: 18}
    params:
      lora: {r: 64, alpha: 16}

Sections, and mappings whose keys the schema fixes (files, limits, holdout, words), are merged key by key. Every other
value, such as `instructions`, `columns` or a list, replaces the default's value as a whole.

The result does not depend on the previous `params.yaml`, except for `runtime` and `tracking`: they describe the user's
machine and stay, byte by byte. Values are replaced inside the default's text, so that comments and all other values
stay where they are.
"""

import difflib
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from rich.console import Console
from rich.text import Text
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from pipeline.core import git, params, paths, records, yaml12
from pipeline.core.errors import UserError, listing, printable
from pipeline.core.progress import say
from pipeline.model.shape import Shape

DEFAULT = Path("params.default.yaml")
FOLDER = Path("recipes")
MACHINE = params.UNDECLARED
"""The sections that belong to the user's machine. No recipe sets them."""

LINE_WIDTH = 120
SECONDS_FOR_NVIDIA_SMI = 10.0

Content = Mapping[str, Any]


class Needs(params.Section):
    """What a recipe needs beyond a package index and a CPU."""

    hub: bool = False
    licence: list[str] = Field(default_factory=list)
    """Pages on which the user must accept a licence first."""
    gpu_gb: Annotated[float, Field(gt=0)] | None = None
    """The prediction of `lora-repro plan` for the stage that needs most, with runtime.keep_dequantized: false."""
    model: Shape | None = None
    """The architecture, for the prediction before the model is downloaded."""

    def __str__(self) -> str:
        gpu = f"GPU {self.gpu_gb:g} GB" if self.gpu_gb else ""
        return ", ".join(filter(None, ["hub" if self.hub else "", "licence" if self.licence else "", gpu]))


class Recipe(params.Section):
    about: Annotated[str, Field(min_length=1, pattern=r"^[^\n]*$")]
    source: Annotated[str, Field(min_length=1)]
    needs: Needs
    params: dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A YAML file: its text, its content, and its nodes, which know their places in the text."""

    path: Path
    text: str

    @cached_property
    def content(self) -> Any:
        return yaml12.load(self.text, str(self.path))

    @cached_property
    def root(self) -> MappingNode:
        root = yaml12.compose(self.text, str(self.path))
        assert isinstance(root, MappingNode)
        return root


@dataclass(frozen=True)
class Choice:
    """A recipe and its result: `content` holds all sections but those of `MACHINE`."""

    name: str
    recipe: Recipe
    document: Document
    content: dict[str, Any]


# The command


def show() -> None:
    """Print a line for each recipe: a mark if `params.yaml` holds it, its name, its needs, its purpose."""
    default, now = _default(), _now()
    here = _experiment(now.content) if now else None
    choices = [_choice(path, default) for path in _files().values()]
    if not choices:
        raise UserError(f"{FOLDER}/ holds no recipes: restore the folder with git")
    wants = {choice.name: _needs_in_short(choice) for choice in choices}
    names, needs = max(map(len, wants)), max(map(len, wants.values()))
    for choice in choices:
        mark = "*" if choice.content == here else " "
        say(f"{mark} {choice.name:{names}}  {wants[choice.name]:{needs}}  {choice.recipe.about}")
    say("\n* the recipe in params.yaml. `lora-repro use <name>` writes another; --dry-run shows what would change.")


def apply(name: str, force: bool = False, dry_run: bool = False) -> None:
    """Write `params.yaml` from a recipe, and print the changes, the recipe's needs, and the next command.

    `name` is the name of a recipe in `recipes/`, or the path of a file. UserError if `params.yaml` holds changes that
    neither a recipe nor git has, unless `force`. With `dry_run` nothing is written.
    """
    default, now = _default(), _now()
    choice = _choice(_path(name), default)
    text = result(choice, default, now)
    lost = None if force else _only_here(now, choice, default)
    if lost and not dry_run:
        raise lost
    _print_diff(now.text if now else "", text, choice.name)
    if now and text == now.text:
        say(f"params.yaml holds recipe {choice.name} already: nothing changes")
    elif dry_run:
        say("nothing was written (--dry-run)" + (f"; it would be refused: {lost}" if lost else ""))
    else:
        records.write_text(paths.PARAMS, text)
        say(f"params.yaml is now recipe {choice.name}: {choice.recipe.about}")
    for line in _needs_at_length(choice):
        say(line)
    if not dry_run:
        say("next   dvc repro")


def experiment(name: str, machine: params.Params) -> params.Params:
    """The parameters of a recipe, by name or path, with the sections of `MACHINE` from `machine`."""
    choice = _choice(_path(name), _default())
    mine = {section: getattr(machine, section).model_dump() for section in MACHINE}
    return params.check(choice.content | mine, str(choice.document.path))


def stated_shape(name: str) -> Shape | None:
    """The architecture that a recipe, by name or path, states; None if it states none."""
    return _choice(_path(name), _default()).recipe.needs.model


def shape_of(source: str) -> Shape | None:
    """The architecture that any recipe of the project states for a model's source; None if none does."""
    default = _default()
    for path in _files().values():
        try:
            choice = _choice(path, default)
        except UserError:  # reported when that recipe is used
            continue
        if choice.recipe.needs.model and choice.content["model"]["source"] == source:
            return choice.recipe.needs.model
    return None


def result(choice: Choice, default: Document, now: Document | None) -> str:
    """The new text of `params.yaml`: the recipe over the default, with the sections of `MACHINE` from `now`.

    UserError for values that the schema does not allow, and for YAML that cannot be replaced in the default's text.
    """
    kept = {section: now.content[section] for section in MACHINE if now and section in now.content}
    expected = default.content | choice.content | kept
    params.check(expected, f"{choice.document.path} with {' and '.join(MACHINE)} of {paths.PARAMS}")
    text = _spliced(choice, default)
    for section in kept:
        assert now is not None
        text = _with_section_of(now.text, text, section)
    if Document(paths.PARAMS, text).content != expected:
        raise UserError(
            f"{choice.document.path} cannot be written into {default.path}: write plain block style, without anchors, "
            f"and in {paths.PARAMS} start the lines of {' and '.join(MACHINE)} with their names"
        )
    return text


# Reading


def _default() -> Document:
    try:
        return Document(DEFAULT, DEFAULT.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{DEFAULT} is missing: run this in the project folder, or restore it with git") from None


def _now() -> Document | None:
    """`params.yaml`, if there is one; UserError if it holds no sections."""
    if not paths.PARAMS.exists():
        return None
    now = Document(paths.PARAMS, paths.PARAMS.read_text(encoding="utf-8"))
    if not isinstance(now.content, Mapping):
        raise UserError(
            f"{paths.PARAMS} holds no sections: restore it with `git checkout {paths.PARAMS}`, or remove it"
        )
    return now


def _files() -> dict[str, Path]:
    """Each recipe of the project by its name, the default first."""
    found = sorted(FOLDER.glob("*.yaml"), key=lambda path: (path.stem != "default", path.stem))
    return {path.stem: path for path in found}


def _path(name: str) -> Path:
    """The file of a recipe, by name or path; UserError if there is none."""
    files = _files()
    if name in files:
        return files[name]
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.name != name:
        if not path.is_file():
            raise UserError(f"recipe {name}: there is no such file")
        return path
    close = difflib.get_close_matches(name, files, n=3) or [known for known in files if name in known or known in name]
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(files)}"
    raise UserError(f"no recipe is called {name}; {hint} (`lora-repro use` lists them; a path to a file works too)")


def _choice(path: Path, default: Document) -> Choice:
    document = Document(path, path.read_text(encoding="utf-8"))
    recipe = _recipe(document)
    content = _merged(default.content, recipe.params, params.Params)
    params.check(content, f"{path} over {default.path}")
    if recipe.needs.hub != any(map(_is_on_hub, itertools.chain(*_sources(content).values()))):
        where = "not on the hub" if recipe.needs.hub else "on the hub"
        raise UserError(f"{path}: needs.hub = {recipe.needs.hub}, but its sources are {where}")
    return Choice(path.stem, recipe, document, _experiment(content))


def _recipe(document: Document) -> Recipe:
    if not isinstance(document.content, Mapping):
        raise UserError(f"{document.path} is not a recipe: it must hold {', '.join(Recipe.model_fields)}")
    try:
        recipe = Recipe.model_validate(document.content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        raise listing(problems, f"{document.path} is not a recipe:") from None
    if mine := [section for section in MACHINE if section in recipe.params]:
        raise UserError(
            f"{document.path}: params.{mine[0]} describes the machine, not the experiment: leave it out here, and set "
            f"it in {paths.PARAMS}, where every recipe keeps it"
        )
    return recipe


def _experiment(content: Content) -> dict[str, Any]:
    """All sections but those of `MACHINE`."""
    return {section: value for section, value in content.items() if section not in MACHINE}


# Laying a recipe over the default


def _merged(default: Content, over: Content, schema: type[params.Section]) -> dict[str, Any]:
    merged = dict(default)
    for key, value in over.items():
        inner = _keys_of(schema, key)
        if inner and isinstance(value, Mapping) and isinstance(default.get(key), Mapping):
            value = _merged(default[key], value, inner)
        merged[key] = value
    return merged


def _keys_of(schema: type[params.Section], key: str) -> type[params.Section] | None:
    """The schema of the mapping at `key`, if its keys are fixed and it cannot be null."""
    field = schema.model_fields.get(key)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, params.Section) else None


Edit = tuple[int, int, str]


def _spliced(choice: Choice, default: Document) -> str:
    """The default's text with the recipe's values in place of its own."""
    over = next(value for key, value in choice.document.root.value if key.value == "params")
    text = default.text
    edits = _edits(default.root, over, choice.document.text, params.Params)
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _edits(base: MappingNode, over: MappingNode, written: str, schema: type[params.Section]) -> Iterator[Edit]:
    """The replacements (start, end, new text) in the default's text, each from behind a key's name to the end of its
    value. `written` is the recipe's text."""
    places = {key.value: (key, value) for key, value in base.value}
    for key, value in over.value:
        base_key, base_value = places[key.value]
        inner = _keys_of(schema, key.value)
        if inner and isinstance(value, MappingNode) and isinstance(base_value, MappingNode):
            yield from _edits(base_value, value, written, inner)
        elif not _same(value, base_value):
            column = base_key.start_mark.column
            lines = _Layout(written).behind_key(value, column, key.value, flow=bool(base.flow_style))
            yield base_key.end_mark.index, _end(base_value), f"\n{' ' * column}".join(lines)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, however they are written."""
    if type(one) is not type(other) or str(one.tag) != str(other.tag):
        return False
    if isinstance(one, ScalarNode):
        return bool(one.value == other.value)
    if len(one.value) != len(other.value):
        return False
    if isinstance(one, SequenceNode):
        return all(map(_same, one.value, other.value))
    return all(_same(a, b) and _same(x, y) for (a, x), (b, y) in zip(one.value, other.value, strict=True))


def _end(node: Any) -> int:
    """Where a value ends. The parser would let a block end at the next key, behind that key's comment."""
    if isinstance(node, ScalarNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(node, MappingNode) else last)


@dataclass(frozen=True)
class _Layout:
    """Writes a recipe's values in place of the default's.

    Numbers and quotes stay as the recipe writes them (1e-3 stays 1e-3); braces and brackets stay if they fit into the
    line. Lines are returned relative to the column at which their block starts.
    """

    written: str

    def behind_key(self, node: Any, column: int, key: str, flow: bool = False) -> list[str]:
        """The text behind `key`, which starts at `column`: the rest of its line, then the lines of a block below it."""
        if flow or self._fits(node, column + len(f"{key}: ")):
            return [f": {self._inline(node, in_flow=flow)}"]
        return [":", *(f"  {line}" for line in self._block(node, column + 2))]

    def _block(self, node: Any, column: int) -> list[str]:
        lines = []
        if isinstance(node, SequenceNode):
            for item in node.value:
                first, *rest = [self._inline(item)] if self._fits(item, column + 2) else self._block(item, column + 2)
                lines += [f"- {first}", *(f"  {line}" for line in rest)]
        else:
            for key, value in node.value:
                name = self._inline(key)
                first, *rest = self.behind_key(value, column, name)
                lines += [name + first, *rest]
        return lines

    def _fits(self, node: Any, column: int) -> bool:
        """Whether a value continues the line that ends at `column`. A mapping or list does if the recipe writes it in
        braces or brackets and the line has room for it."""
        if isinstance(node, ScalarNode) or not node.value:
            return True
        return bool(node.flow_style) and column + len(self._inline(node)) <= LINE_WIDTH

    def _inline(self, node: Any, in_flow: bool = False) -> str:
        if isinstance(node, ScalarNode):
            return self._scalar(node, in_flow)
        if isinstance(node, SequenceNode):
            return f"[{', '.join(self._inline(item, in_flow=True) for item in node.value)}]"
        pairs = [f"{self._inline(key, in_flow=True)}: {self._inline(value, in_flow=True)}" for key, value in node.value]
        return f"{{{', '.join(pairs)}}}"

    def _scalar(self, node: Any, in_flow: bool) -> str:
        text = self.written[node.start_mark.index : node.end_mark.index]
        if "\n" in text or node.style in ("|", ">") or (in_flow and not node.style and re.search(r"[,\[\]{}]", text)):
            return json.dumps(node.value, ensure_ascii=False)
        return text or "null"


def _with_section_of(source: str, text: str, section: str) -> str:
    """`text` with the lines of one section copied from `source`."""
    lines, own = text.splitlines(keepends=True), source.splitlines(keepends=True)
    place, taken = _section(lines, section), _section(own, section)
    if taken is None or place is None:
        return text
    lines[place] = [line if line.endswith("\n") else f"{line}\n" for line in own[taken]]
    return "".join(lines)


def _section(lines: Sequence[str], section: str) -> slice | None:
    """The lines of a top-level section: its name, and everything indented below it."""
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{section}:")), None)
    if start is None:
        return None
    end = next((i for i in range(start + 1, len(lines)) if lines[i].strip() and not lines[i][0].isspace()), len(lines))
    while not lines[end - 1].strip():
        end -= 1
    return slice(start, end)


# Changes that would be lost


def _only_here(now: Document | None, choice: Choice, default: Document) -> UserError | None:
    """The refusal, if neither a recipe nor git's HEAD has the content of `params.yaml`; else None."""
    if now is None:
        return None
    here = _experiment(now.content)
    changes = {}
    for name, content in _known(choice, default):
        if content == here:
            return None
        changes[name] = _changes(content, here)
    nearest = min(changes, key=lambda name: len(changes[name]))
    return listing(
        [
            *changes[nearest],
            f"keep it with `git commit {paths.PARAMS}` or as a new recipe in {FOLDER}/, or overwrite it with --force",
        ],
        f"{paths.PARAMS} holds changes that are in no recipe and no commit. Compared with {nearest}:",
    )


def _known(choice: Choice, default: Document) -> Iterator[tuple[str, Content]]:
    """Contents that can be restored, by the name that the refusal gives them; the cheapest first."""
    yield f"recipe {choice.name}", choice.content
    head = _head()
    if isinstance(head, Mapping):
        yield "git's HEAD", _experiment(head)
    for path in _files().values():
        try:
            yield f"recipe {path.stem}", _choice(path, default).content
        except UserError:  # reported when that recipe is used, or all are listed
            continue


def _head() -> Any:
    """The content of `params.yaml` at git's HEAD; None without git, a commit, or YAML there."""
    text = git.ask("show", f"HEAD:./{paths.PARAMS}")
    try:
        return None if text is None else Document(Path("HEAD"), text).content
    except UserError:
        return None


def _changes(old: Content, new: Content) -> list[str]:
    """The values that differ, as `lora.r = 8 (16)`, with the old value in brackets."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    missing = object()
    return [
        f"{key} = {after.get(key, 'nothing')!r} ({before.get(key, 'nothing')!r})"
        for key in {**before, **after}
        if before.get(key, missing) != after.get(key, missing)
    ]


def _leaves(content: Content, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


# Output


def _print_diff(old: str, new: str, name: str) -> None:
    """Print a unified diff, in colours on a terminal."""
    console = Console(soft_wrap=True, highlight=False)
    colours = {"+": "green", "-": "red", "@": "cyan"}
    title = f"{paths.PARAMS} (recipe {name})"
    for line in difflib.unified_diff(old.splitlines(), new.splitlines(), str(paths.PARAMS), title, lineterm=""):
        console.print(Text(printable(line), style=colours.get(line[0], "")))


def _sources(content: Content) -> dict[str, list[str]]:
    """The sources of data and model, as lists."""
    given = {key: content[key]["source"] for key in ("data", "model")}
    return {key: [one] if isinstance(one, str) else one for key, one in given.items()}


def _is_on_hub(source: str) -> bool:
    return source.startswith("hf:")


def _is_local(source: str) -> bool:
    return not source.startswith(("pip:", "hf:"))


def _needs_in_short(choice: Choice) -> str:
    own = [f"own {key}" for key, sources in _sources(choice.content).items() if any(map(_is_local, sources))]
    return ", ".join(filter(None, [str(choice.recipe.needs), *own])) or "package index"


def _needs_at_length(choice: Choice) -> Iterator[str]:
    needs, sources = choice.recipe.needs, _sources(choice.content)
    everything = [source for given in sources.values() for source in given]
    general = [probe["source"] for probe in choice.content["forget"]["probes"]]
    if any(source.startswith("pip:") for source in everything):
        yield "needs  a package index (PyPI or a mirror)"
    elif any(source.startswith("pip:") for source in general):
        yield "needs  a package index, for the text of forget; not with forget.probes: []"
    if hub := [source.removeprefix("hf:") for source in everything if _is_on_hub(source)]:
        yield f"needs  the Hugging Face hub (huggingface.co), for {' and '.join(hub)}"
    for page in needs.licence:
        yield f"needs  the licence accepted on {page}, then `hf auth login` or HF_TOKEN"
    for key, given in sources.items():
        for source in filter(_is_local, given):
            there = "found" if Path(source).expanduser().exists() else "not there yet"
            yield f"needs  your {key} in {source} ({there}); with {key}.sha256: null the error names its digest"
    if needs.gpu_gb:
        yield f"needs  a GPU with {needs.gpu_gb:g} GB: {_gpu_found(needs.gpu_gb)}"
        if needs.model:
            packed = choice.content["quantize"]["method"] in params.FOUR_BITS
            setting = " with runtime.keep_dequantized: false" if packed else ""
            yield f"memory {needs.gpu_gb:g} GB at most{setting}, as predicted: lora-repro plan {choice.name}"


def _gpu_found(gb: float) -> str:
    """The largest GPU that `nvidia-smi` reports, compared with `gb`. torch knows more, but takes seconds to import."""
    found = gpus()
    if not found:
        return "warning, no NVIDIA GPU was found"
    name, most = max(found, key=lambda one: one[1])
    return (
        f"{name} with {most:.0f} GB found" if most >= gb else f"warning, the largest here is {name} with {most:.0f} GB"
    )


def gpus() -> list[tuple[str, float]]:
    """Name and memory, in GB of 10^9 bytes, of each NVIDIA GPU; empty without `nvidia-smi`."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return []
    try:
        printed = subprocess.run(
            command, capture_output=True, check=True, encoding="utf-8", timeout=SECONDS_FOR_NVIDIA_SMI
        ).stdout
        rows = [line.rsplit(",", 1) for line in printed.splitlines() if line.strip()]
        return [(name.strip(), float(mib) * 2**20 / 1e9) for name, mib in rows]
    except (subprocess.SubprocessError, OSError, ValueError):
        return []
