"""The README's file tree names every file of the project, and nothing else."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "mige", "infer_scripts", "train_scripts", "tools", "benchmarks", "docs")


def tree() -> set[str]:
    """Paths in the tree: a name ending in "/" opens a folder, indented names belong to it."""
    block = re.search(r"## Files\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    paths, folder = set(), ""
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        else:
            paths.add(folder + name)
    return paths


def test_every_file_has_a_line_and_every_line_a_file():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    files = {
        file
        for file in listed.stdout.decode().split()
        if file.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and file.endswith((".py", ".sh", ".md"))
    }
    named = {path for path in tree() if path.endswith((".py", ".sh", ".md"))}
    assert named - files == set(), "in the tree, but no such file"
    assert {file for file in files - named if not file.endswith("__init__.py")} == set(), "not in the tree"


def test_a_file_imports_only_from_files_above_it():
    block = (ROOT / "README.md").read_text()
    order = re.findall(r"^  (\w+)\.py ", block.split("\nmige/ ")[1].split("\ninfer_scripts/")[0], re.MULTILINE)
    assert len(order) > 15
    for place, module in enumerate(order):
        text = (ROOT / "mige" / f"{module}.py").read_text()
        imported = set(re.findall(r"^from mige\.(\w+) import", text, re.MULTILINE))
        for names in re.findall(r"^from mige import (.+)$", text, re.MULTILINE):
            imported |= set(re.findall(r"\w+", names))
        assert imported & set(order) <= set(order[:place]), module
