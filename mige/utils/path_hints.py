"""Why a path leads nowhere, and what to write instead."""

import os
import re
import sys
import unicodedata
from pathlib import Path
from urllib.parse import unquote

_ADDRESS = re.compile(r"(?:^|/)(https?|ftp|s3|gs|hf|data|file):", re.IGNORECASE)  # Path folds // into /


def path_hint(path: Path) -> str | None:
    """What to do about `path`, which does not exist; None where nothing better is known than to correct it."""
    text = str(path)
    if address := _ADDRESS.search(text):
        scheme = address.group(1).lower()
        if scheme == "file":
            return "it is a file:// address: write the plain path behind it"
        return f"it is an address ({scheme}:): addresses are not fetched; download the image and give its path"
    if any(part.startswith("~") for part in path.parts):
        return "~ is not expanded here: write the home folder out"
    if not text.isascii() and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        return f"Python reads paths as {sys.getfilesystemencoding()} here: set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
    if os.path.islink(text):  # noqa: PTH114 - it raises nothing, whatever the text
        return f"it is a link to {path.readlink()}, which is not there"
    for name, other in _other_spellings(text).items():
        if other != text and Path(other).exists():
            return f"{name}: write {other}"
    if "\\" in text:
        return "it has backslashes, which separate no folders here: write /"
    if (found := _like_named(path)) is not None:
        return f"did you mean {found}? Upper and lower case and accents must agree"
    if missing := _missing_folder(path):
        return f"the folder {missing} does not exist"
    return None


def _other_spellings(text: str) -> dict[str, str]:
    return {
        "it has backslashes, which separate no folders here": text.replace("\\", "/"),
        "it leads through a folder that does not exist": os.path.normpath(text),
        "it leads through a folder that does not exist, with backslashes": os.path.normpath(text.replace("\\", "/")),
        "it begins or ends with blanks or quotes": str(
            Path(text).with_name(Path(text).name.strip(" \t\r\n\"'") or "_")
        ),
        "it is written for the web": unquote(text),
    }


def _like_named(path: Path) -> Path | None:
    """A file beside `path` whose name differs in case or in how accents are composed only."""

    def folded(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    if not path.parent.is_dir():
        return None
    return next((entry for entry in path.parent.iterdir() if folded(entry.name) == folded(path.name)), None)


def _missing_folder(path: Path) -> Path | None:
    """The first folder on the way that does not exist."""
    missing = [parent for parent in path.parents if not parent.exists()]
    return missing[-1] if missing else None
