"""A blind sheet for people: two outputs for each test row, A and B, and which of them is better.

Which one is the tuned model's is decided by a hash of the seed and the row's id, so the sheet does not tell, and no key
has to be kept. When a filled sheet is read, its texts must be those of this folder.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core import params, records
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.report import wording
from pipeline.score import side_by_side
from pipeline.score.estimates import Estimate, Judged
from pipeline.score.reference_lines import spread
from pipeline.score.side_by_side import Row

HEADER = ("id", "source", "question", "A", "B", "better")
CHOICES = {"a": "A", "b": "B", "=": "=", "": ""}
"""What may stand in the column `better`, in any case; empty: not judged."""


@dataclass(frozen=True, slots=True)
class Votes:
    """How often people preferred tuned, base, or neither; how many rows of the sheet have no vote."""

    tuned: int
    base: int
    ties: int
    empty: int


def write(path: Path, count: int, seed: int, given: params.Params) -> None:
    """Write a sheet of `count` test rows, evenly spread among those whose two outputs differ.

    UserError if the file exists, if outputs are missing, or if no two outputs differ.
    """
    if path.exists():
        raise UserError(f"{path} exists, and may hold people's work: name another file")
    rows = side_by_side.read(given.seeds)
    differing = [row for row in rows if row.base.text.strip() != row.tuned[0].text.strip()]
    if not differing:
        raise UserError("base and tuned write the same for every test row: there is nothing to judge")
    chosen = spread(differing, count)
    instructions = given.prompt.instructions
    table = [
        (
            row.example.id,
            row.example.source,
            instructions.get(row.example.aspect, instructions.get("default", row.example.aspect)),
            *_shown(row, seed),
            "",
        )
        for row in chosen
    ]
    records.write_text(path, "\ufeff" + records.csv_text(HEADER, table))  # spreadsheets read UTF-8 by this mark
    same = len(rows) - len(differing)
    say(
        f"{path}: {len(chosen)} of {len(rows)} test rows ({same} have the same two outputs). Write A, B or = into the "
        f"column “better”, then run: lora-repro blind --read {path} --seed {seed}"
    )


def read(path: Path, seed: int, given: params.Params) -> None:
    """Print how often people preferred the tuned model, with an interval over groups.

    UserError, which names every line, for a sheet that cannot be read, or that shows other texts than this folder's.
    """
    votes, scores, groups = counted(_rows(path), side_by_side.read(given.seeds), seed)
    judged = len(scores)
    if not judged:
        raise UserError(f"{path} has no vote: write A, B or = into the column “better”")
    left = f"; {votes.empty} rows have no vote" if votes.empty else ""
    say(f"tuned {votes.tuned}, base {votes.base}, neither {votes.ties} of {judged} judged rows{left}")
    if len(set(groups)) < 2:
        say("all judged rows are of one group: there is no interval")
        return
    # In points above an even vote, so that zero is no preference.
    rate = Estimate.ratios(100 * np.array(scores)[:, None] - 50, np.ones(judged), groups)
    found = Judged(rate, given.compare)
    one = found.deciding(0)
    words = {"higher": "tuned is preferred", "lower": "base is preferred", "none": "no preference is shown"}
    level = f"{100 * given.compare.confidence:g} % interval"
    say(
        f"{words.get(found.direction(0), 'too few groups for a verdict')}: tuned wins {50 + one.value:.0f} % (a tie "
        f"counts half), {level} {max(0.0, 50 + one.low):.0f} to {min(100.0, 50 + one.high):.0f} %, p "
        f"{wording.probability(found.p_values[0])}, over {len(set(groups))} groups"
    )


def counted(sheet: Sequence[dict[str, str]], rows: Sequence[Row], seed: int) -> tuple[Votes, list[float], list[str]]:
    """The votes, and of each judged row its score (1: tuned, 0.5: neither, 0: base) and group. UserError as `read`."""
    by_id = {row.example.id: row for row in rows}
    scores, groups, problems, seen = [], [], [], set()
    for line, one in enumerate(sheet, start=2):
        name, choice = one["id"].removeprefix("'"), one["better"].strip().lower()
        row = by_id.get(name) or by_id.get(one["id"])
        if row is None:
            problems.append(f"line {line}: {one['id']!r} is no test row")
        elif row.example.id in seen:
            problems.append(f"line {line}: {name!r} stands twice")
        elif choice not in CHOICES:
            problems.append(f"line {line}: better = {one['better']!r}, which is not A, B, = or empty")
        elif [_plain(one["A"]), _plain(one["B"])] != [_plain(text) for text in _shown(row, seed)]:
            problems.append(f"line {line}: A and B are not this experiment's outputs in the order of seed {seed}")
        elif choice:
            tuned = "b" if _tuned_is_b(name, seed) else "a"
            scores.append(0.5 if choice == "=" else float(choice == tuned))
            groups.append(row.example.group)
        if row is not None:
            seen.add(row.example.id)
    if problems:
        raise listing(problems, "the sheet does not fit this folder:")
    votes = Votes(scores.count(1.0), scores.count(0.0), scores.count(0.5), len(sheet) - len(scores))
    return votes, scores, groups


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a sheet as any spreadsheet writes CSV. UserError if it is missing, or has other columns."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: name the filled sheet") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as CSV in UTF-8") from None
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if missing := [name for name in HEADER if name not in (reader.fieldnames or ())]:
        raise UserError(f"{path} has no column {', '.join(missing)}: name a sheet that `lora-repro blind` has written")
    return [{name: one[name] or "" for name in HEADER} for one in reader]


def _shown(row: Row, seed: int) -> tuple[str, str]:
    """The outputs as A and B."""
    texts = row.base.text.strip(), row.tuned[0].text.strip()
    return texts if _tuned_is_b(row.example.id, seed) else texts[::-1]


def _tuned_is_b(name: str, seed: int) -> bool:
    return bool(hashlib.sha256(f"{seed}/{name}".encode()).digest()[0] % 2)


def _plain(text: str) -> str:
    """A text without what a spreadsheet may change: white space, and the apostrophe before a formula."""
    return " ".join(text.removeprefix("'").split())
