"""What README and docs import is there."""

import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = sorted({line for page in PAGES for line in re.findall(r"^(from mige\b.* import .*)$", page.read_text(), re.M)})


@pytest.mark.parametrize("line", LINES)
def test_imports_of_the_docs(line):
    exec(line, {})


def test_readme_shows_the_public_path():
    assert "from mige import MIGEPipeline" in LINES
