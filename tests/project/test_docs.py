"""What the docs promise is there: every test that a page names exists."""

import re
from pathlib import Path

import pytest

from tests import ROOT

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
NAMED = re.compile(r"`(tests/[\w/]+\.py)((?:::\w+)*)`(?: \(`(\w+)`\))?")


def test_there_are_pages() -> None:
    assert {"security.md", "faults.md", "README.md", "CONTRIBUTING.md"} <= {page.name for page in PAGES}
    assert len(NAMED.findall((ROOT / "docs" / "security.md").read_text(encoding="utf-8"))) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    missing = [file for file, _, _ in NAMED.findall(page.read_text(encoding="utf-8")) if not (ROOT / file).is_file()]
    for file, names, part in NAMED.findall(page.read_text(encoding="utf-8")):
        text = (ROOT / file).read_text(encoding="utf-8") if file not in missing else ""
        wanted = [rf"^\s*(?:class|def) {name}\b" for name in names.split("::")[1:]]
        wanted += [rf"def test_\w*{part}"] if part else []
        missing += [f"{file} {pattern}" for pattern in wanted if not re.search(pattern, text, re.MULTILINE)]
    assert missing == []
