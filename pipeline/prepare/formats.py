"""From the records of one file to examples: ACLSum's papers, and tables by column names.

ACLSum's line for a paper becomes three rows, one for each aspect. One of them, as in `out/data/train.jsonl`:

    {"id": "2021.eacl-main.84/approach", "group": "2021.eacl-main.84", "aspect": "approach",
     "source": "Identifying named entities in written text is ... in multiple languages .",
     "target": "They propose an experimental setup where systems are evaluated in an online fashion ...",
     "lead": "Identifying named entities in written text is an essential component ...",
     "references": ["They propose an experimental setup ..."], "history": []}

UserError names the place of a record that does not fit.
"""

import difflib
from collections.abc import Mapping, Sequence

from pipeline.core import params
from pipeline.core.errors import LONGEST_LABEL, UserError, listing
from pipeline.core.records import Example
from pipeline.core.text import lead
from pipeline.prepare.cells import cell, is_empty, label, name, string, targets
from pipeline.prepare.chats import LISTS
from pipeline.sources import tables
from pipeline.sources.account import Account
from pipeline.sources.tables import ABSENT, BUILT_IN, Located, Record

ASPECTS = ("challenge", "approach", "outcome")
OF_A_PAPER = ("id", "title", "sentences", "summary", "highlights", "heuristic_highlights", *BUILT_IN)
"""The fields of ACLSum. The format uses the id, the abstract's sentences and the summary, by its definition."""
MOST_COMPARED = 1000
"""Names among which one close to a missing column is looked for."""


def papers(found: Sequence[Located], account: Account) -> list[Example]:
    """ACLSum (arXiv 2403.05303): the abstract of each paper, and one summary for each of three aspects."""
    rows = []
    for where, paper in found:
        given, summary = paper.get("id"), paper.get("summary")
        if not isinstance(given, str) or not given:
            raise UserError(f"{where}: id must be a string; is this ACLSum's format? Else use data.format: table")
        paper_id = name(given, f"{where}: id", account)
        source, first = _abstract(paper, where, account)
        if not isinstance(summary, Mapping):
            raise UserError(f"{where}: summary must be an object with {', '.join(ASPECTS)}")
        if others := [key for key, text in summary.items() if key not in ASPECTS and not is_empty(text)]:
            raise UserError(
                f"{where}: summary has {tables.named(others)} besides ACLSum's {', '.join(ASPECTS)}: use data.format: "
                "table, with a row for each aspect"
            )
        account.unused.update(key for key, held in paper.items() if key not in OF_A_PAPER and not is_empty(held))
        for aspect in ASPECTS:
            target = string(summary.get(aspect), f"{where}: summary.{aspect}", account)
            rows.append(Example(f"{paper_id}/{aspect}", paper_id, aspect, source, target, first))
    return rows


def _abstract(paper: Record, where: str, account: Account) -> tuple[str, str]:
    """The text of the abstract, and its first sentence."""
    sentences = paper.get("sentences")
    abstract = sentences.get("abstract") if isinstance(sentences, Mapping) else None
    if not isinstance(abstract, list) or not all(isinstance(sentence, str) for sentence in abstract):
        raise UserError(f"{where}: sentences.abstract must be a list of strings")
    return string(" ".join(abstract), f"{where}: sentences.abstract", account), "".join(abstract[:1]).strip()


def table(
    found: Sequence[Located], columns: params.Columns, file: str, split: str, before: int, account: Account
) -> list[Example]:
    """Rows by column names. Rows without ids are numbered, after the `before` rows of earlier files of the split.

    The group stays empty where no column names it. `file` is named by the error for columns that are not there. Columns
    that no name in `columns` names are not used, as the parameters say.
    """
    _require_columns(columns, found, file)
    rows = []
    for number, (where, record) in enumerate(found, start=before + 1):
        source = string(cell(record, columns.source), f"{where}: {columns.source}", account)
        answers = targets(cell(record, columns.target), f"{where}: {columns.target}", account)
        row_id = f"{split}-{number}" if columns.id is None else label(record, columns.id, where, account)
        group = "" if columns.group is None else label(record, columns.group, where, account)
        aspect = "default"
        if columns.aspect is not None:
            aspect = label(record, columns.aspect, where, account, LONGEST_LABEL)
        rows.append(Example(row_id, group, aspect, source, answers[0], lead(source), answers))
    return rows


def _require_columns(columns: params.Columns, found: Sequence[Located], file: str) -> None:
    missing = {
        role: column
        for role, column in columns.model_dump().items()
        if column is not None and all(tables.value(record, column) is ABSENT for _, record in found)
    }
    shape = tables.shape(list(found))
    if shape and isinstance(cell(found[0][1], columns.source), Mapping):
        raise UserError(f"{file}: {columns.source} holds an object, not a text: {shape}")
    if missing and found:
        there = tables.columns(found)
        own = [column for column in there if column not in BUILT_IN]
        problems = []
        for role, column in missing.items():
            close = difflib.get_close_matches(column, own[:MOST_COMPARED], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"data.columns.{role} = '{column}': no such column{hint}")
        if set(LISTS) & set(there):
            problems.append("these are conversations: data.format: chat makes source and target of them")
        elif shape:
            problems.append(shape)
        raise listing(problems, f"{file} has the columns {tables.named(there)}")
