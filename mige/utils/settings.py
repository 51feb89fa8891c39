"""What a value of a config must be: types, ranges, names; each refusal says key, value and what was expected."""

import ast
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from fractions import Fraction
from typing import Any, get_args, get_origin, get_type_hints

from mige.utils.errors import UserError


class ConfigError(UserError, ValueError):
    """A config with an unknown, missing or contradictory key; the message names it."""


RENAMED = {
    "accumulate": "gradient_accumulation_steps",
    "clip": "max_grad_norm",
    "lr_batch": "lr_reference_batch",
    "start": "pretrained",
    "param_dtype": "precision",
    "weights": "precision",
}
"""Former keys of the section `train` -> today's; a config with a former one is refused by name."""

_EXPECTED = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def check_types(section: Any, where: str) -> None:
    """Raise ConfigError for a value that is not what its field says."""
    for name, hint in get_type_hints(type(section)).items():
        check_type(f"{where}.{name}", getattr(section, name), hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError for a value that is not of the type `hint`; an int is a float, None what allows it."""
    options = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in options:
        return
    plain, or_none = options[0], ", or None" if len(options) > 1 else ""
    kind = get_origin(plain) or plain
    if kind in _EXPECTED:
        number = type(value) in (int, float) and abs(value) <= sys.float_info.max  # neither NaN nor infinite
        if not (number if kind is float else type(value) is kind):
            raise ConfigError(f"{name} is {value!r}, expected {_EXPECTED[kind]}{or_none}")
        return
    inner = get_args(plain)
    if issubclass(kind, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}, expected a dict")
        if inner[1] is float:
            for key, one in value.items():
                check_type(f"{name}.{key}", one, float)
        return
    if not isinstance(value, list | tuple):
        if isinstance(value, str) and value.lstrip().startswith("["):  # an override that is no literal stays text
            raise ConfigError(
                f"{name} is the text {value!r}, expected a list of plain values; "
                'a dict is written {"file": "a.jsonl"}'
            )
        raise ConfigError(f"{name} is {value!r}, expected a list, such as [{value!r}]")
    for number, one in enumerate(value):
        check_type(f"{name}[{number}]", one, inner[0])


def at_least(name: str, got: float, least: float) -> None:
    """Raise ConfigError for a number below `least`."""
    if got < least:
        raise ConfigError(f"{name} is {got}, expected at least {least}")


def positive(name: str, got: Any) -> None:
    """Raise ConfigError for anything but a number above 0."""
    check_type(name, got, float)
    if got <= 0:
        raise ConfigError(f"{name} is {got}, expected a number above 0")


def positive_fraction(name: str, got: Any) -> None:
    """Raise ConfigError for anything but a number above 0, or a fraction as text, such as "1/3"."""
    if not isinstance(got, str):
        positive(name, got)
        return
    try:
        fits = float(Fraction(got)) > 0
    except (ValueError, ArithmeticError):
        fits = False
    if not fits:
        raise ConfigError(f'{name} is {got!r}, expected a number above 0, or a fraction such as "1/3"')


def within(name: str, got: float, low: float, high: float) -> None:
    """Raise ConfigError for a number that is not from `low` to `high`."""
    if not low <= got <= high:
        raise ConfigError(f"{name} is {got}, expected {low} to {high}")


def one_of(name: str, got: str, known: Sequence[str]) -> None:
    """Raise ConfigError for a word that is not among the known ones."""
    if got not in known:
        raise ConfigError(f"{name} is {got!r}, expected one of {', '.join(known)}")


def agree(name: str, got: int, other: str, expected: int) -> None:
    """Raise ConfigError where two sizes of the model differ."""
    if got != expected:
        raise ConfigError(f"model: {name} is {got}, but {other} is {expected}: make them equal")


def check_grids(name: str, grids: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError for anything but different pairs (rows, columns) of whole numbers from 1 on, 127 at most."""
    if len(grids) > 127:  # the number of a record's shape is a signed byte
        raise ConfigError(f"{name} has {len(grids)} shapes, expected at most 127")
    for number, grid in enumerate(grids):
        if len(grid) != 2 or min(grid) < 1:
            raise ConfigError(f"{name}[{number}] is {grid!r}, expected rows and columns of patches, such as [28, 36]")
        if list(grid) in map(list, grids[:number]):
            raise ConfigError(f"{name}[{number}] is {grid!r}, which is there already: name each shape once")


def refuse_unknown(unknown: Set[str], where: str, known: Iterable[str]) -> None:
    """Raise ConfigError for keys that nothing reads; one of `RENAMED` is told its new name."""
    for key in sorted(unknown & RENAMED.keys()):
        if RENAMED[key] in known:
            raise ConfigError(f"{where}: the key {key!r} is now {RENAMED[key]!r}")
    if unknown:
        raise ConfigError(f"{where}: unknown key(s) {sorted(unknown)}; known are {sorted(known)}")


def refuse_missing(missing: Set[str], where: str) -> None:
    """Raise ConfigError for keys that are not given."""
    if missing:
        raise ConfigError(f"{where}: missing key(s) {sorted(missing)}")


def apply_override(data: dict, override: str, where: str) -> None:
    """Set `a.b.c=value` in nested dicts; only a key that is there can be overridden."""
    path, separator, text = override.partition("=")
    *parents, last = path.split(".")
    for key in parents:
        data = data.get(key) if isinstance(data, dict) else None
    if parents == ["train"] and last in RENAMED:
        raise ConfigError(f"{where}: cannot override {override!r}: train.{last} is now train.{RENAMED[last]}")
    if not separator or not isinstance(data, dict) or last not in data:
        raise ConfigError(f"{where}: cannot override {override!r}: expected an existing section.key=value")
    try:
        data[last] = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # not Python syntax: plain text, as in mode=full
        data[last] = text
