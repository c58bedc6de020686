"""What the docs promise is there: every test that a page names exists."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
NAMED = re.compile(r"`(tests/\w+\.py)((?:::\w+)*)`(?: \(`(\w+)`\))?")


def test_there_are_pages() -> None:
    assert {"security.md", "faults.md", "README.md"} <= {page.name for page in PAGES}
    assert len(NAMED.findall((ROOT / "docs" / "security.md").read_text(encoding="utf-8"))) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    missing = []
    for file, names, part in NAMED.findall(page.read_text(encoding="utf-8")):
        text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
        for name in names.split("::")[1:]:
            if not re.search(rf"^\s*(?:class|def) {name}\b", text, re.MULTILINE):
                missing.append(f"{file}::{name}")
        if not text or (part and not re.search(rf"def test_\w*{part}", text)):
            missing.append(f"{file} {part}")
    assert missing == []
