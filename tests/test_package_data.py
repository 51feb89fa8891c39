"""What an installed package needs besides Python files is in the wheel."""

import tomllib
from pathlib import Path

from conftest import ROOT


def test_every_other_file_of_the_package_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for package, globs in declared.items() for glob in globs
              for path in Path(ROOT, *package.split(".")).glob(glob)}  # fmt: skip
    linked = {path for path in packed if "configs" in path.relative_to(ROOT).parts}  # rglob passes links by
    there = {path for path in (ROOT / "mige").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there == packed - linked
    configs = {path for path in (ROOT / "configs").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.resolve() for path in linked} == configs
