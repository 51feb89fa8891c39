"""Public names of all packages have docstrings, and those that take or give tensors say their shapes.

`WITHOUT` lists what still lacks one, by `package/file.py:name`. It may only become shorter: a name that has its
docstring by now, or is gone, fails the test too.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SHAPE = re.compile(r"\[[^\]]*\]|\bshapes?\b", re.I)  # [B, 4, h, w], [N], or where the shape follows from
WITHOUT: dict[str, set[str]] = {"docstring": set(), "shape": set()}

FILES = sorted((ROOT / "mige").rglob("*.py"))


def public(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """The public classes, functions and methods of a file, by qualified name."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def has_tensors(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether an argument, the result or, in a dataclass, a field is annotated as a tensor."""
    if isinstance(node, ast.ClassDef):
        fields = [inner.annotation for inner in node.body if isinstance(inner, ast.AnnAssign)]
    else:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        fields = [argument.annotation for argument in arguments] + [node.returns]
    return any("Tensor" in re.findall(r"\w+", ast.unparse(field)) for field in fields if field is not None)


def lacks(path: Path) -> dict[str, set[str]]:
    """The names of a file without a docstring, and those with tensors whose docstring has no shape."""
    found: dict[str, set[str]] = {"docstring": set(), "shape": set()}
    source = path.read_text().splitlines()
    for name, node in public(path):
        said = ast.get_docstring(node)
        full = f"{path.relative_to(ROOT / 'mige')}:{name}"
        if said is None:
            found["docstring"].add(full)
        elif has_tensors(node):
            fields = ""
            if isinstance(node, ast.ClassDef):  # a field's shape may stand beside it
                last = max(inner.end_lineno for inner in node.body)
                fields = "\n".join(line.partition("#")[2] for line in source[node.lineno - 1 : last])
            if not SHAPE.search(f"{said}\n{fields}"):
                found["shape"].add(full)
    return found


@pytest.mark.parametrize("kind", WITHOUT)
def test_public_names_say_what_they_are(kind):
    found = set().union(*(lacks(path)[kind] for path in FILES))
    assert not found - WITHOUT[kind], f"without a {kind}: {sorted(found - WITHOUT[kind])}"
    assert not WITHOUT[kind] - found, f"take off the list: {sorted(WITHOUT[kind] - found)}"


def test_what_is_missing_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("test_docstrings.ROOT", tmp_path)
    file = tmp_path / "mige" / "a.py"
    file.parent.mkdir()
    file.write_text(
        "def plain(x): pass\n"
        'def tensors(x: Tensor) -> int:\n    "Of x."\n'
        'def shaped(x: "Tensor | None"):\n    "Of x, [B]."\n'
        'class Batch:\n    "Some."\n    x: Tensor\n    def step(self): pass\n    def _own(self): pass\n'
        'class Fields:\n    "Some."\n    x: Tensor  # [B, 4]\n'
    )
    assert lacks(file) == {"docstring": {"a.py:plain", "a.py:Batch.step"}, "shape": {"a.py:tensors", "a.py:Batch"}}
