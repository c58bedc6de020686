"""A result as files that others can load: the adapter, merged weights or GGUF, with a model card and a record of all.

Only what the run of `dvc.lock` left is exported: outputs, parameters and code are compared by content first. Of several
seeds the one with the lowest validation loss is taken, as for the registry; a choice by test scores would flatter it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from pipeline import gguf
from pipeline.core import contracts, params, paths, records, stage
from pipeline.core.contracts import QuantizedFacts, TrainingSummary
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.core.records import Decoding
from pipeline.export import card, merge, ollama
from pipeline.fetch import fetch
from pipeline.lora import adapter
from pipeline.model import checkpoint
from pipeline.record import current
from pipeline.record.origin import Origin
from pipeline.score.comparison import Comparison

RECORD, README = "export.json", "README.md"
What = Literal["adapter", "merged", "gguf"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command was given: `kind` and `joined` are for GGUF, `with_base` for an adapter (None: unless it is on
    the hub)."""

    what: What
    seed: int | None
    kind: str | None
    joined: bool
    with_base: bool | None

    @property
    def stored(self) -> str | None:
        """The type of a GGUF file; None of other forms."""
        return (self.kind or "Q8_0") if self.what == "gguf" else None

    def check(self) -> None:
        """UserError for an option that would be of no effect."""
        if self.what != "gguf" and (self.kind or self.joined):
            raise UserError(f"{'--type' if self.kind else '--merged'} is for gguf: {self.what} has no such choice")
        if self.what != "adapter" and self.with_base is not None:
            raise UserError(f"--base and --no-base are for adapter: {self.what} holds its base in any case")
        if self.kind and self.kind not in params.GGUF_TYPES:
            raise UserError(f"--type {self.kind}: a GGUF file is written as {', '.join(params.GGUF_TYPES)}")


def write(asked: Asked, destination: Path, overwrite: bool) -> None:
    """Write the export to a folder, whole or not at all.

    UserError for outputs that are missing or not of this experiment, a seed that was not trained, and a folder that is
    there already, unless it is an earlier export, nothing else lies in it, and `overwrite` is set.
    """
    asked.check()
    stage.set_environment()
    given = params.load()
    try:
        _require_room(destination, overwrite)
    except (OSError, RuntimeError) as error:
        raise _unwritable(destination, error) from None
    current.require_current("nothing is exported:")
    comparison = Comparison.read()
    seed = _seed(asked.seed, given.seeds)
    if asked.what == "gguf":
        gguf.refuse(paths.QUANTIZED)
    origin = Origin.read(given.seeds)
    with _written(destination) as folder:
        base, words = _write(asked, seed, given, folder)
        measured, why_not = _measured(asked, seed, given, folder)
        files = _files(folder)
        content = card.Content(
            what="gguf-merged" if asked.what == "gguf" and asked.joined else asked.what,
            seed=seed,
            given=given,
            base=base,
            base_words=words,
            files=files,
            measured=measured,
            why_not_measured=why_not,
            comparison=comparison,
            origin=origin,
            run=card.run_of(given, origin.digest),
            licences=card.licences(given),
            command=_command(asked, seed),
        )
        records.write_text(folder / README, card.render(content))
        records.write_json(
            folder / RECORD,
            {
                "what": content.what,
                "seed": seed,
                "type": asked.stored,
                "digest": origin.digest,
                "commit": origin.commit,
                "difference": contracts.content(measured),
                "files": {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in files.items()},
            },
        )
    if measured:
        say(
            f"export: validation loss {measured.loss_measured:.4f} as measured, {measured.loss:.4f} of these "
            f"files; the same likeliest token at {100 * measured.same:.2f} % of {measured.tokens:,}"
        )
        if loss := card.loss(measured):
            say(f"export: {loss}")
    size = sum(size for size, _ in files.values())
    say(f"export: {asked.what} of seed {seed}, {size / 1e6:,.1f} MB in {destination}; {README} says how to load it")


def _require_room(destination: Path, overwrite: bool) -> None:
    if destination.resolve().is_relative_to(paths.OUT.resolve()):
        raise UserError(f"{destination} lies in {paths.OUT}, which is DVC's: export to another folder")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    own = _of_an_export(destination)
    if own is None:
        raise UserError(f"{destination} is there and no export of this command: name a new folder, or an empty one")
    if not overwrite:
        raise UserError(f"{destination} holds an export already: name another folder, or add --overwrite")
    files = (file for file in destination.rglob("*") if file.is_symlink() or not file.is_dir())
    others = sorted({file.relative_to(destination).as_posix() for file in files} - own)
    if others:
        raise listing(
            [*others[:5], *([f"and {len(others) - 5} more"] if len(others) > 5 else [])],
            f"{destination} holds what no export wrote and --overwrite would remove: move it, or name another folder",
        )


def _of_an_export(folder: Path) -> set[str] | None:
    """The files that an earlier export wrote there, by its own record; None where there is no such record."""
    try:
        record = records.read_json(folder / RECORD)
        return {*record["files"], README, RECORD} if record["digest"] else None
    except (UserError, OSError, LookupError, TypeError):
        return None


def _seed(wanted: int | None, seeds: list[int]) -> int:
    if wanted is not None and wanted not in seeds:
        raise UserError(f"--seed {wanted}: trained were {', '.join(map(str, seeds))} (seeds in {paths.PARAMS})")
    if wanted is not None:
        return wanted
    return min(seeds, key=lambda seed: contracts.read(paths.training_summary(seed), TrainingSummary).kept_loss)


def _write(asked: Asked, seed: int, given: params.Params, folder: Path) -> tuple[str | None, str]:
    """Write the files; the name of the base among them, None for none, and what it holds in words."""
    trained = paths.adapter(seed)
    if asked.stored is not None:
        return _write_gguf(asked.stored, asked.joined, trained, given, folder)
    if asked.what == "merged":
        model, words = merge.base()
        _save(merge.merged(model, trained), folder)
        _settings(seed).save_pretrained(folder)
        return None, f"{words}; the adapter was added in float32, and the sum rounded once"
    with_base = asked.with_base if asked.with_base is not None else card.hub(given.model.source) is None
    found = card.hub(given.model.source)
    _settings(seed).save_pretrained(folder)
    for name in (adapter.WEIGHTS, adapter.CONFIG):
        shutil.copyfile(trained / name, folder / name)
    config = records.read_json(folder / adapter.CONFIG)
    where = {"base_model_name_or_path": "base" if with_base or not found else found[0]}
    if found and not with_base:
        where["revision"] = found[1]
    records.write_json(folder / adapter.CONFIG, config | where)
    if not with_base:
        return None, ""
    model, words = merge.base()
    _save(model, folder / "base")
    return "base", words


def _save(model: Any, folder: Path) -> None:
    model.config._name_or_path = ""
    # How to decode is the run's: the defaults of the base's authors would come in between.
    model.generation_config = type(model.generation_config)(eos_token_id=model.config.eos_token_id)
    model.save_pretrained(folder)
    checkpoint.tokenizer(paths.BASE).save_pretrained(folder)


def _settings(seed: int) -> Any:
    """How the run decoded, as a model's generation configuration: of the record what transformers has a name for."""
    from transformers import GenerationConfig

    recorded = contracts.read(paths.decoding(paths.variant(seed)), Decoding).generation
    return GenerationConfig(**{name: recorded[name] for name in GenerationConfig().to_dict() if name in recorded})


def _write_gguf(kind: str, joined: bool, trained: Path, given: params.Params, folder: Path) -> tuple[str | None, str]:
    method = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts).method
    words = "the base as it was trained on" + (f" ({method}, unpacked)" if method != "none" else "")
    if joined:
        model, lora = f"model-{kind}.gguf", None
        gguf.write_merged(paths.QUANTIZED, trained, folder / model, kind)
        words += f", with the adapter added in float32, written as {gguf.stored(kind)}"
    else:
        model, lora = f"base-{kind}.gguf", "adapter-F32.gguf"
        gguf.write_base(paths.QUANTIZED, folder / model, kind)
        gguf.write_adapter(trained, paths.QUANTIZED, folder / lora, "F32")
        words += f", written as {gguf.stored(kind)}, and of the adapter in F32, which llama.cpp applies"
    tokens = given.prompt.max_tokens + given.generation.max_new_tokens
    text = ollama.modelfile(model, lora, paths.QUANTIZED, given.generation, tokens)
    records.write_text(folder / "Modelfile", text)
    return model, words


def _measured(asked: Asked, seed: int, given: params.Params, folder: Path) -> tuple[merge.Difference | None, str]:
    """The exported files, read again, beside the model whose scores the report has; else why that is not measured."""
    import torch

    cpu = torch.device("cpu")
    if asked.what == "gguf":
        try:
            other = fetch.gguf(next(file for file in folder.glob("*.gguf") if not file.name.startswith("adapter")))
        except UserError as error:  # llama.cpp reads more than transformers does
            return None, str(error).replace("model.source = ", "")
    elif asked.what == "merged":
        other = checkpoint.pretrained(folder, cpu)
    elif (folder / "base").is_dir():
        other = checkpoint.pretrained(folder / "base", cpu)
    else:
        return None, "the base is not among these files"
    if asked.what == "adapter" or (asked.what == "gguf" and not asked.joined):
        from peft import PeftModel

        # llama.cpp's own adapter file holds the same numbers: this measures what the base was written as.
        other = PeftModel.from_pretrained(other, folder if asked.what == "adapter" else paths.adapter(seed))
    trees = merge.rows(given.prompt)
    return merge.difference(merge.as_measured(seed, given.runtime), other.eval(), trees), ""


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): (file.stat().st_size, records.sha256_file(file)) for file in found}


def _command(asked: Asked, seed: int) -> str:
    """The command that writes the same files again."""
    words = ["lora-repro export", asked.what, "DEST", f"--seed {seed}"]
    if asked.what == "gguf":
        words += [f"--type {asked.stored}", *(["--merged"] if asked.joined else [])]
    if asked.with_base is not None:
        words.append("--base" if asked.with_base else "--no-base")
    return " ".join(words)


@contextmanager
def _written(destination: Path) -> Iterator[Path]:
    """A folder beside the destination that takes its place if, and only if, the block succeeds.

    It and what is in it have the modes that the umask gives: libraries make some files for their owner alone.
    """
    try:
        place = destination.resolve()  # where a link leads, which stays
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        folder, usual = made / "export", made / "usual"
        folder.mkdir()
        usual.touch()
    except (OSError, RuntimeError) as error:
        raise _unwritable(destination, error) from None
    try:
        yield folder
        try:
            for file in folder.rglob("*"):
                if file.is_file():
                    file.chmod(usual.stat().st_mode)
            if place.exists():
                shutil.rmtree(place)
            folder.replace(place)
        except OSError as error:
            raise _unwritable(destination, error) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _unwritable(destination: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot write {destination} ({error}): name a folder within one that you may write to; it is made beside, and "
        "put in place when it is whole"
    )
