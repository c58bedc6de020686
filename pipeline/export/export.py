"""A result as files for other programs: the adapter, merged weights or GGUF, with a card and a record of the files.

Only a result that agrees with `dvc.lock` is exported: outputs, parameters and code are compared by content first. Of
several seeds it is the one with the lowest validation loss, as in the registry: a choice by test scores would flatter
it.
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
    """The options of the command.

    For GGUF, `kind` is the type and `joined` merges the adapter into the file. For an adapter, `with_base` adds its
    base (None: unless its reader can have it from the hub).
    """

    what: What
    seed: int | None
    kind: str | None
    joined: bool
    with_base: bool | None

    @property
    def stored(self) -> str | None:
        """The type of the GGUF file; None for other formats."""
        return (self.kind or "Q8_0") if self.what == "gguf" else None

    def includes_base(self, given: params.Params) -> bool:
        """Whether the base stands beside an adapter. UserError if it must and is not wanted.

        bitsandbytes quantizes a base of the hub again to the same values. For gptq and hqq, no program of the reader
        does that.
        """
        only_here = given.quantize.method in params.GROUPED
        if only_here and self.with_base is False:
            raise UserError(
                f"--no-base with quantize.method = {given.quantize.method!r}: whoever loads the adapter has no other "
                "way to the weights that it was trained on; leave --no-base out"
            )
        if self.with_base is not None:
            return self.with_base
        return only_here or card.hub(given.model.source) is None

    def check(self) -> None:
        """UserError for an option that would have no effect."""
        if self.what != "gguf" and (self.kind or self.joined):
            raise UserError(f"{'--type' if self.kind else '--merged'} is for gguf: {self.what} has no such choice")
        if self.what != "adapter" and self.with_base is not None:
            raise UserError(f"--base and --no-base are for adapter: {self.what} holds its base in any case")
        if self.kind and self.kind not in params.GGUF_TYPES:
            raise UserError(f"--type {self.kind}: a GGUF file is written as {', '.join(params.GGUF_TYPES)}")


def write(asked: Asked, destination: Path, overwrite: bool) -> None:
    """Write the export to a folder, whole or not at all.

    UserError if outputs are missing or do not agree with `dvc.lock`, if the seed was not trained, and if the folder is
    neither new nor empty. With `overwrite`, it may be an earlier export without files of the user.
    """
    # 1. Whatever can be refused before anything is written.
    asked.check()
    if asked.what != "gguf":
        paths.require_utf8(destination.absolute(), "cannot export to")
    stage.set_environment()
    given = params.load()
    asked.includes_base(given)
    try:
        _require_room(destination, overwrite)
    except (OSError, RuntimeError) as error:
        raise _unwritable(destination, error) from None
    current.require_current("nothing is exported:")
    comparison = Comparison.read()
    seed = _seed(asked.seed, given.seeds)
    if asked.what == "gguf":
        gguf.refuse(paths.QUANTIZED)
        gguf.refuse_adapter(paths.adapter(seed))
    origin = Origin.read(given.seeds)
    # 2. The files, their card and their record.
    with _written(destination) as folder:
        base, words = _write(asked, seed, given, folder)
        measured, why_not = _measured(asked, seed, given, folder)
        content = card.Content(
            what="gguf-merged" if asked.what == "gguf" and asked.joined else asked.what,
            seed=seed,
            given=given,
            base=base,
            base_words=words,
            files=_files(folder),
            measured=measured,
            why_not_measured=why_not,
            comparison=comparison,
            origin=origin,
            run=card.run_of(given, origin.digest),
            licences=card.licences(given),
            command=_command(asked, seed),
        )
        records.write_text(folder / README, card.render(content))
        records.write_json(folder / RECORD, _record(content, asked.stored))
    # 3. What there is now.
    if measured:
        say(
            f"export: validation loss {measured.loss_measured:.4f} as measured, {measured.loss:.4f} of these "
            f"files; the same likeliest token at {100 * measured.same:.2f} % of {measured.tokens:,}"
        )
        if loss := card.loss(measured):
            say(f"export: {loss}")
    size = sum(size for size, _ in content.files.values())
    say(f"export: {asked.what} of seed {seed}, {size / 1e6:,.1f} MB in {destination}; {README} says how to load it")


def _record(content: card.Content, stored: str | None) -> dict[str, Any]:
    """The content of `RECORD`, by which a later export recognizes this one."""
    return {
        "what": content.what,
        "seed": content.seed,
        "type": stored,
        "digest": content.origin.digest,
        "commit": content.origin.commit,
        "difference": contracts.content(content.measured),
        "files": {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in content.files.items()},
    }


def _require_room(destination: Path, overwrite: bool) -> None:
    if destination.resolve().is_relative_to(paths.OUT.resolve()):
        raise UserError(f"{destination} is in {paths.OUT}, which DVC manages: export to another folder")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    own = _of_an_export(destination)
    if own is None:
        raise UserError(f"{destination} exists and is not an export of this command: name a new or empty folder")
    if not overwrite:
        raise UserError(f"{destination} already holds an export: name another folder, or add --overwrite")
    files = (file for file in destination.rglob("*") if file.is_symlink() or not file.is_dir())
    others = sorted({file.relative_to(destination).as_posix() for file in files} - own)
    if others:
        raise listing(
            [*others[:5], *([f"and {len(others) - 5} more"] if len(others) > 5 else [])],
            f"{destination} holds files that no export wrote and --overwrite would remove: move them elsewhere",
        )


def _of_an_export(folder: Path) -> set[str] | None:
    """The files that an earlier export wrote there, by its record; None if there is no such record."""
    try:
        record = records.read_json(folder / RECORD)
        return {*record["files"], README, RECORD} if record["digest"] else None
    except (UserError, OSError, LookupError, TypeError):
        return None


def _seed(wanted: int | None, seeds: list[int]) -> int:
    if wanted is not None and wanted not in seeds:
        raise UserError(f"--seed {wanted} was not trained: give one of {', '.join(map(str, seeds))}")
    if wanted is not None:
        return wanted
    return min(seeds, key=lambda seed: contracts.read(paths.training_summary(seed), TrainingSummary).kept_loss)


def _write(asked: Asked, seed: int, given: params.Params, folder: Path) -> tuple[str | None, str]:
    """Write the files. Returns the name of the base among them (None: it is not), and in words what it holds."""
    trained = paths.adapter(seed)
    if asked.stored is not None:
        return _write_gguf(asked.stored, asked.joined, trained, given, folder)
    if asked.what == "merged":
        model, words = merge.base()
        _save(merge.merged(model, trained), folder)
        _settings(seed).save_pretrained(folder)
        return None, f"{words}; the adapter was added in float32, and the sum rounded once"
    with_base, found = asked.includes_base(given), card.hub(given.model.source)
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
    model.config.name_or_path = ""
    # Without the defaults of the base's authors, which would change how the run decoded.
    model.generation_config = type(model.generation_config)(eos_token_id=model.config.eos_token_id)
    model.save_pretrained(folder)
    checkpoint.tokenizer(paths.BASE).save_pretrained(folder)


def _settings(seed: int) -> Any:
    """How the run decoded, as transformers' generation configuration."""
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
    text = ollama.modelfile(model, lora, paths.QUANTIZED, given.generation, tokens, given.prompt.thinking)
    records.write_text(folder / "Modelfile", text)
    return model, words


def _measured(asked: Asked, seed: int, given: params.Params, folder: Path) -> tuple[merge.Difference | None, str]:
    """Compare the exported files, read again, with the model that was scored; else the reason why not."""
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

        # llama.cpp's adapter file holds the same numbers, so only the base can differ.
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
    """Yield a folder beside the destination that takes its place if, and only if, the block succeeds.

    All files get the modes of the umask. Libraries make some that only their owner may read.
    """
    try:
        place = destination.resolve()  # a link to a folder stays
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
        f"cannot write {destination} ({error}): name a folder inside one that you may write to; the export is made "
        "beside it and moved there when it is complete"
    )
