"""Imports point only downwards (docs/architecture.md, "Layers"), over the syntax trees of all files of the package."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"tasks", "utils"},
    {"config"},
    {"diffusion", "reports"},
    {"models"},
    {"checkpoints", "data"},
    {"inference", "evaluation"},
    {"training"},
    {"mini"},
    {"web"},
    {"cli"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FORMER_PLACES = {"fusion", "pipeline", "sampler"}  # version 0.1.0's names
FILES = [
    path for path in sorted((ROOT / "mige").rglob("*.py")) if path.stem not in FORMER_PLACES or len(path.parts) > 2
]


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Modules below mige that a file imports, anywhere in it: "models.vae", "tasks"; "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(n.removeprefix("mige").removeprefix(".") for n in found if n.split(".")[0] == "mige")


def unit(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(ROOT / "mige").parts[0].removesuffix(".py")


def test_imports_point_downwards():
    wrong = []
    for path in FILES:
        own = unit(path)
        if own in FORMER_PLACES | {"__init__"}:
            continue
        for name in imports(path):
            other = name.split(".")[0]
            if other in ("", "__version__", own):
                continue
            if other in FORMER_PLACES and path.name == "pipeline.py":
                continue  # saved folders name them
            assert other in LAYER, f"{path} imports mige.{name}, which has no layer"
            if not (LAYER[other] < LAYER[own] and (other != "mini" or own == "cli")):
                wrong.append(f"{path.relative_to(ROOT)} imports mige.{name}")
    assert not wrong


def test_no_circle_inside_a_package():
    for names in LAYERS:
        for package in names:
            files = [path for path in FILES if unit(path) == package]
            modules = {".".join(path.relative_to(ROOT / "mige").with_suffix("").parts): path for path in files}
            uses = {
                name: {m for m in modules if m != name and any(i == m or i.startswith(m + ".") for i in imports(path))}
                for name, path in modules.items()
            }
            while uses:
                free = [name for name, used in uses.items() if not used & uses.keys()]
                assert free, f"mige/{package} has a circle among {sorted(uses)}"
                for name in free:
                    del uses[name]


def test_every_unit_has_a_layer():
    assert {unit(path) for path in FILES} - FORMER_PLACES - {"__init__"} == LAYER.keys() - (
        set() if (ROOT / "mige" / "cli").is_dir() else {"cli"}
    )
