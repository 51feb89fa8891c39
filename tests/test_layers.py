"""Over all syntax trees: imports point only downwards (docs/architecture.md, "Layers"), and budgets are kept."""

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


# ---- budgets ---------------------------------------------------------------------------------------------------------

FILE, CLASS, FUNCTION = 300, 200, 50  # lines; of classes and functions without their docstrings
OVER = {  # what is longer, and why
    "cli/infer.py: _parser": "a line an option",
    "inference/steps.py: denoise": "what a step may change, in one place with the steps",
    "training/trainer.py: Trainer": "one training step is read from top to bottom, with all that it keeps",
}


def lengths(text: str) -> dict[str, tuple[int, int]]:
    """Name -> lines and budget, of every class and function of a file; "" is the file."""
    found = {"": (text.count("\n"), FILE)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = [one for one in ast.walk(node) if isinstance(one, ast.FunctionDef | ast.ClassDef)]
            said = [one.body[0] for one in inside if ast.get_docstring(one) is not None]
            lines = node.end_lineno - node.lineno + 1 - sum(one.end_lineno - one.lineno + 1 for one in said)
            budget = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
            found[node.name] = max(found.get(node.name, (0, 0)), (lines, budget))
    return found


def test_files_classes_and_functions_keep_their_budgets():
    over = {}
    for path in FILES:
        for name, (lines, budget) in lengths(path.read_text()).items():
            if lines > budget:
                where = f"{path.relative_to(ROOT / 'mige')}: {name}".removesuffix(": ")
                over[where] = f"{lines} lines, {budget} at most"
    assert not over.keys() - OVER.keys(), {name: over[name] for name in over.keys() - OVER.keys()}


def test_lengths_are_without_docstrings():
    text = 'class A:\n    """One.\n\n    Two.\n    """\n\n    def f(self):\n        """Three."""\n        return 1\n'
    assert lengths(text) == {"": (9, FILE), "A": (4, CLASS), "f": (2, FUNCTION)}
