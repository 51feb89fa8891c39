"""Small files in the exact layouts of the four judged benchmarks."""

import json
from io import BytesIO
from pathlib import Path

import datasets
from evaluation_files import image, save

KINDS = ("background_change", "subject-add")


def cell(seed: int, size: tuple[int, int] = (48, 32)) -> dict:
    """A parquet cell with an image in it."""
    encoded = BytesIO()
    image(seed, size).save(encoded, "PNG")
    return {"bytes": encoded.getvalue(), "path": None}


def gedit(root: Path) -> Path:
    """stepfun-ai/GEdit-Bench: data/train-*.parquet, each instruction in English and in Chinese."""
    table: dict[str, list] = {}
    for n in range(3):
        for language, text in (("en", f"make the sky number {n}"), ("cn", "把天空变红")):
            row = {"task_type": KINDS[n % 2], "key": f"{n:032x}", "instruction": text, "instruction_language": language}
            row |= {"input_image": cell(n), "input_image_raw": cell(n, (96, 64)), "Intersection_exist": n > 0}
            for name, value in row.items():
                table.setdefault(name, []).append(value)
    features = {name: datasets.Value("string") for name in table} | {"Intersection_exist": datasets.Value("bool")}
    features |= {"input_image": datasets.Image(), "input_image_raw": datasets.Image()}
    return _parquet(root, table, features)


def omnicontext(root: Path) -> Path:
    """OmniGen2/OmniContext: data/train-*.parquet with a list of images a row."""
    rows = [
        ("single_object", "Place the toy on a beach.", 1),
        ("multi_character", "The man from image 2 hugs the woman from image 1.", 2),
        ("scene_character", "Put the man of the first image into the room.", 2),
    ]
    table = {
        "key": [f"{n:04d}" for n in range(3)],
        "task_type": [kind for kind, _, _ in rows],
        "instruction": [text for _, text, _ in rows],
        "instruction_language": ["en"] * 3,
        "input_images": [[cell(10 * n + i) for i in range(count)] for n, (_, _, count) in enumerate(rows)],
    }
    features = {name: datasets.Value("string") for name in table} | {"input_images": datasets.List(datasets.Image())}
    return _parquet(root, table, features)


def _parquet(root: Path, table: dict, features: dict) -> Path:
    (root / "data").mkdir(parents=True)
    file = root / "data" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).to_parquet(file)
    return root


def imgedit(root: Path) -> Path:
    """basic_edit.json beside Benchmark/singleturn, the originals in folders by topic."""
    edits = {
        "1082": ("animal/000342021.jpg", "Change the tortoise's shell to a smooth surface.", "adjust"),
        "673": ("style/000278574.jpg", "Transfer the image into a woodblock-print style.", "style"),
        "628": ("daily object/000276684.jpg", "Replace the boot in the image with a mug.", "replace"),
    }
    for n, (name, _, _) in enumerate(edits.values()):
        save(root / "Benchmark" / "singleturn" / name, n, (64, 48))
    rows = {key: {"id": name, "prompt": text, "edit_type": kind} for key, (name, text, kind) in edits.items()}
    (root / "basic_edit.json").write_text(json.dumps(rows, indent=4))
    return root


def dreambench_plus(root: Path) -> Path:
    """images/**/NN.jpg and captions/**/NN.txt, the subject in the first line of nine prompts."""
    subjects = {"live_subject/animal/00": "kitten", "object/00": "Toy Car", "style/00": "oil painting"}
    for n, (place, subject) in enumerate(subjects.items()):
        save(root / "images" / f"{place}.jpg", n, (64, 64))
        caption = root / "captions" / f"{place}.txt"
        caption.parent.mkdir(parents=True)
        said = "a scene" if subject == "oil painting" else f"a {subject}"
        caption.write_text("\n".join([subject, *(f"{said} with thing {k}" for k in range(9))]) + "\n")
    return root
