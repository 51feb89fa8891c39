"""Results as files: PNGs that hold their settings, the edited image beside them, and an archive of several."""

import re
import zipfile
from pathlib import Path

from mige.utils.images import save_image
from mige.web.file_store import FileStore, Results
from mige.web.provenance import save_with_settings
from mige.web.request import Made

MAX_WORDS = 6  # of the instruction, in a file's name


def save_results(made: Made, kind: str, store: FileStore) -> Results:
    """Write what was made into a fresh folder of the store; `kind` begins the names of the files."""
    folder, saved, before, archive = store.new_folder(), [], None, None
    words = "-".join(re.findall(r"[a-z0-9]+", made.settings[0]["instruction"].lower())[:MAX_WORDS])[:60]
    for picture, settings in zip(made.pictures, made.settings, strict=True):
        path = folder / f"mige-{kind}-{words or 'image'}-seed-{settings['seed']}.png"
        save_with_settings(picture, path, settings)
        saved.append((store.hand_out(path), f"seed {settings['seed']}"))
    if made.before is not None:
        save_image(made.before, folder / "before.png")
        before = store.hand_out(folder / "before.png")
    if len(saved) > 1:
        archive = folder / f"mige-{kind}-{words or 'image'}.zip"
        with zipfile.ZipFile(archive, "w") as packed:  # PNGs get no smaller
            for path, _ in saved:
                packed.write(path, Path(path).name)
        archive = store.hand_out(archive)
    return Results(tuple(saved), before, archive)
