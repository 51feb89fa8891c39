"""Rows of .json and .jsonl files, with every error named by file and line; nothing is raised for what a file holds."""

import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mige.data.records import Issue
from mige.utils.path_hints import path_hint

Rows = list[tuple[int, Any]]
Line = tuple[int, int, str]
"""Number of a line and its position among those that are not blank, both from 1, and its text."""


def read_rows(file: Path) -> tuple[Rows, list[Issue]]:
    """The rows of a file with their numbers from 1, and the errors of the file and of its rows as JSON."""
    where = str(file)
    if file.suffix.lower() not in (".json", ".jsonl"):
        return [], [Issue(where, f"unknown kind of file {file.suffix!r}", "give a .json or .jsonl file")]
    try:
        text = file.read_text(encoding="utf-8-sig")  # a byte order mark is legal and skipped
    except UnicodeDecodeError as error:
        return [], [_not_utf8(where, file.read_bytes()[:4], error)]
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path, or one the locale cannot spell
        reason = error.strerror if isinstance(error, OSError) else error
        return [], [Issue(where, f"cannot be read: {reason}", path_hint(file) or "check the path and its permissions")]
    if "\0" in text[:4]:  # no JSON begins so
        zeros = "a file of zero bytes" if not text.strip("\0") else "not UTF-8 but UTF-16 or UTF-32 without its mark"
        return [], [Issue(where, zeros, "fetch it again, or save it as UTF-8")]
    if not text.strip():
        return [], [Issue(where, "the file is empty", "write at least one record")]
    return _parse_lines(where, text) if file.suffix.lower() == ".jsonl" else _parse_list(where, text)


def type_name(value: Any) -> str:
    """The JSON name of a value's type, with the value: for messages."""
    names = {bool: "a boolean", dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)} ({reprlib.repr(value)})"


class _Decoder:
    """Decodes JSON by the standard's word and collects what Python would let through, or end with another error."""

    def __init__(self):
        self.problems: list[str] = []
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._integer,
            parse_float=self._float,
            parse_constant=self._constant,
        )

    def decode(self, text: str) -> Any:
        """A whole text; problems are collected, JSONDecodeError is raised."""
        return self._guarded(lambda: self._json.decode(text))

    def element(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends; -1 where that cannot be known."""
        return self._guarded(lambda: self._json.raw_decode(text, start)) or (None, -1)

    def _guarded(self, decode: Any) -> Any:
        self.problems.clear()
        try:
            return decode()
        except RecursionError:
            self.problems.append("nested too deep to be read")
            return None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.problems.append(f"the field {reprlib.repr(twice)} appears twice in one object")
        return fields

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python's limit on digits
            self.problems.append(f"a number of {len(digits)} digits")
            return 0

    def _float(self, text: str) -> float:
        if math.isinf(value := float(text)):
            self.problems.append(f"{reprlib.repr(text)}, a number beyond every float")
        return value

    def _constant(self, name: str) -> float:
        self.problems.append(f"{name}, which is no JSON")
        return 0.0


def _parse_list(where: str, text: str) -> tuple[Rows, list[Issue]]:
    decoder = _Decoder()
    try:
        rows = decoder.decode(text)
    except json.JSONDecodeError as error:
        if _are_lines(text):
            message = "it holds JSON Lines (an object a line), not one list"
            return [], [Issue(where, message, "name it .jsonl, or put the records in [ ] with commas")]
        return [], [_malformed(where, error.lineno, error)]
    if decoder.problems:
        return _located(where, text)
    if not isinstance(rows, list):
        hint = "put the records in [ ], or name the file .jsonl where each line is a record"
        return [], [Issue(where, f"the top level is {type_name(rows)}, expected a list", hint)]
    if not rows:
        return [], [Issue(where, "the list is empty", "write at least one record")]
    return list(enumerate(rows, 1)), []


def _located(where: str, text: str) -> tuple[Rows, list[Issue]]:
    """The rows of a list in which something is odd, read one by one to find where."""
    rows, issues = [], []
    for number, start, row, problems in _elements(text):
        line = text.count("\n", 0, start) + 1
        issues += [_odd(f"{where}, line {line}", problem) for problem in problems]
        if not problems:
            rows.append((number, row))
    return rows, issues


def _elements(text: str) -> Iterator[tuple[int, int, Any, list[str]]]:
    """Number from 1, place, value and problems of each element of a list; of anything else, the whole as one."""
    decoder, number = _Decoder(), 0
    place = _skip_blanks(text, 0)
    is_list = text[place] == "["
    place += is_list
    while (place := _skip_blanks(text, place)) < len(text) and text[place] != "]":
        if text[place] == ",":
            place = _skip_blanks(text, place + 1)
        number += 1
        value, end = decoder.element(text, place)
        yield number, place, value, list(decoder.problems)
        if end < 0 or not is_list:  # where an element without an end stops is not known: the rest is not read
            return
        place = end


def _skip_blanks(text: str, place: int) -> int:
    return re.compile(r"[ \t\r\n]*").match(text, place).end()


def line_blocks(file: Path, size: int) -> Iterator[list[Line]] | None:
    """The lines of a .jsonl file, up to `size` at a time, for `parse_lines`: a file of any length in little memory.

    None for what `read_rows` is to be asked about: another kind of file, or one that is odd from its first line on.
    Raises UnicodeDecodeError on the way, of which `read_rows` tells the place.
    """
    if file.suffix.lower() != ".jsonl":
        return None
    try:
        with file.open(encoding="utf-8-sig") as opened:
            if "\0" in opened.read(4):
                return None
            opened.seek(0)
            first = next(filter(str.strip, opened), "")
        if type(_Decoder().decode(first)) is list:
            return None
    except (OSError, ValueError):  # JSONDecodeError and UnicodeDecodeError among them
        return None
    return _line_blocks(file, size)


def _line_blocks(file: Path, size: int) -> Iterator[list[Line]]:
    with file.open(encoding="utf-8-sig") as opened:
        lines = ((number, line) for number, line in enumerate(opened, 1) if line.strip())
        counted = ((number, position, line.removesuffix("\n")) for position, (number, line) in enumerate(lines, 1))
        while block := list(itertools.islice(counted, size)):
            yield block


def parse_lines(where: str, lines: Iterable[Line]) -> tuple[Rows, list[Issue]]:
    """The rows of lines, each with its position, and the errors of lines that hold none. where: names the file."""
    rows, issues, decoder = [], [], _Decoder()
    for number, position, line in lines:
        try:
            row = decoder.decode(line)
        except json.JSONDecodeError as error:
            issues.append(_malformed(where, number, error))
            continue
        issues += [_odd(f"{where}, line {number}", problem) for problem in decoder.problems]
        if not decoder.problems:
            rows.append((position, row))
    return rows, issues


def _parse_lines(where: str, text: str) -> tuple[Rows, list[Issue]]:
    # Not splitlines(): it would also break at U+2028, which a JSON string may hold. Blank lines are no rows.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    decoder = _Decoder()
    try:
        first = decoder.decode(lines[0][1])
    except json.JSONDecodeError:
        if _is_list_or_spread(text):
            message = "it holds one JSON value over several lines, not an object a line"
            return [], [Issue(where, message, "name it .json (a list of records), or write a record a line")]
    else:
        if isinstance(first, list) and len(lines) == 1 and not decoder.problems:
            return [], [Issue(where, "it holds one JSON list, not an object a line", "name it .json")]
    return parse_lines(where, ((number, position, line) for position, (number, line) in enumerate(lines, 1)))


def _are_lines(text: str) -> bool:
    """Whether the first lines are objects each, as in JSON Lines."""
    lines = [line for line in text.split("\n", 50)[:50] if line.strip()]
    return len(lines) > 1 and all(_loads(line) is dict for line in lines[:2])


def _is_list_or_spread(text: str) -> bool:
    return _loads(text) in (list, dict)


def _loads(text: str) -> type | None:
    """The type of a JSON text, None for what is none."""
    try:
        return type(_Decoder().decode(text))
    except json.JSONDecodeError:
        return None


def _malformed(where: str, line: int, error: json.JSONDecodeError) -> Issue:
    return Issue(f"{where}, line {line}, column {error.colno}", f"malformed JSON: {error.msg}", "correct it there")


def _odd(where: str, problem: str) -> Issue:
    return Issue(where, f"malformed JSON: {problem}", "correct the record")


def _not_utf8(where: str, head: bytes, error: UnicodeDecodeError) -> Issue:
    if head.startswith(b"\x1f\x8b"):
        return Issue(where, "a gzip archive, no text", "unpack it and give the file inside")
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return Issue(where, "not UTF-8 but UTF-32, by its byte order mark", "save the file as UTF-8")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Issue(where, "not UTF-8 but UTF-16, by its byte order mark", "save the file as UTF-8")
    line = error.object.count(b"\n", 0, error.start) + 1
    return Issue(where, f"not UTF-8: {error.reason} at byte {error.start}, line {line}", "save the file as UTF-8")
