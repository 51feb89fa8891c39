"""The command `mige`: what it finds by itself, what it refuses, and its wheel in an empty environment elsewhere."""

import json
import shutil
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from processes import environment, run_program

from mige.cli import main, places, train_mige, web_demo
from mige.web.provenance import read_settings

ORIENTATION = 274  # the EXIF tag; 6: turn it 90 degrees clockwise
CAT = ROOT / "example_data" / "images" / "cat.jpg"
MINI = ROOT / "output" / "pretrained_models" / "mige-mini"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory without models, and no model in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MIGE_MODEL", raising=False)
    monkeypatch.setattr(places, "MODELS", Path("output/pretrained_models"))
    monkeypatch.setattr(places, "CONFIGS", ROOT / "configs")
    return tmp_path


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edit", str(CAT), "a"], "name its folder with --model or MIGE_MODEL, or fetch the released one with `mige d"),
        (["generate", "a"], "or fetch the released one with `mige download`"),
        (["edit", str(CAT), "a", "--model", "m", "--output", "a.jpg"], "expected a name that ends in .png"),
        (["edit", str(CAT), "a", "--model", "m", "--output", "there.png"], "there.png is already there"),
        (["edit", str(CAT), "a", "--model", "m", "--output", "no/a.png"], "no is no folder"),
        (["paint"], "invalid choice: 'paint'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(elsewhere, capsys, arguments, words):
    (elsewhere / "there.png").write_bytes(b"mine")
    with pytest.raises(SystemExit) as end:
        main.main(arguments)
    assert end.value.code == 2 and words in capsys.readouterr().err
    assert (elsewhere / "there.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edit", "missing.jpg", "a"], "missing.jpg is no file"),
        (["edit", str(CAT), "a", "--mask", "missing.png"], "missing.png is no file"),
        (["edit", str(CAT), "a", "--size", "12"], "size is '12', expected 'source', 'native', an aspect ratio such as"),
        (
            ["edit", str(CAT), "a", "--size", "native", "--long-side", "64"],
            "long_side is 64, but the size is given too",
        ),
        (["edit", str(CAT), "put image 3 there"], "names image 3, but 1 came"),
        (["generate", "a<imagehere>", "--subject", str(CAT), str(CAT)], "1 times <imagehere> for 2 images"),
        (["edit", str(CAT), "a"], "nowhere: no such folder"),
    ],
)
def test_what_is_wrong_with_images_and_words_is_one_line(elsewhere, arguments, words):
    with pytest.raises(SystemExit, match=words):
        main.main([*arguments, "--model", "./nowhere"])


def test_serving_without_any_model_names_download(elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(web_demo, "MINI", Path("not-here"))
    with pytest.raises(SystemExit):
        web_demo.parse([])
    assert "mige download" in capsys.readouterr().err


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_the_model_is_the_named_one_then_the_environments_then_what_was_downloaded(elsewhere, monkeypatch):
    assert places.model(None) is None
    (elsewhere / "output/pretrained_models/mige").mkdir(parents=True)
    assert places.model(None) == "output/pretrained_models/mige"
    assert places.model(None, elsewhere) == str(elsewhere)
    monkeypatch.setenv("MIGE_MODEL", "theirs")
    assert places.model(None, elsewhere) == "theirs" and places.model("mine", elsewhere) == "mine"


def test_a_config_is_found_from_any_folder_and_ones_own_comes_first(elsewhere):
    for name in ("configs/tiny.py", "tiny.py"):
        assert train_mige.parse([name, "--output", "run"]).config.samefile(ROOT / "configs" / "tiny.py")
        assert places.config(Path(name)).is_file()
    (elsewhere / "tiny.py").write_text("")
    assert places.config(Path("tiny.py")) == Path("tiny.py")
    assert places.config(Path("none.py")) == Path("none.py")


@pytest.mark.processes
def test_help_is_there_before_anything_heavy():
    look = "import sys; from mige.cli import main\ntry: main.main(['--help'])\nfinally: print(sorted(sys.modules))"
    done = run_program(sys.executable, "-c", look)
    assert done.returncode == 0 and all(f"\n  {name} " in done.stdout for name in main.COMMANDS)
    for heavy in ("torch", "numpy", "transformers", "diffusers", "gradio", "PIL"):
        assert f"'{heavy}'" not in done.stdout


# ---- what is made ----------------------------------------------------------------------------------------------------


def test_an_image_is_made_with_adapters_and_says_so(elsewhere):
    subject, student = ROOT / "docs" / "images" / "subject-1.png", f"{MINI}-turbo:0.5"
    arguments = ["generate", "a<imagehere>on a red background", "--subject", str(subject), "--model", str(MINI)]
    assert main.main([*arguments, "--lora", student, "--steps", "1", "--device", "cpu"]) == 0
    settings = read_settings(elsewhere / "generated.png")
    assert (settings["model"], settings["steps"]) == ("mige-mini + mige-mini-turbo:0.5", 1)


def test_the_size_is_the_photographs_or_the_asked_one(elsewhere):
    """A portrait that lies in its file and is turned by EXIF, a 3:1 panorama, the square, ratios and pasting back."""
    upright = Image.open(CAT).crop((0, 0, 225, 300))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("portrait.png", exif=exif)
    Image.open(CAT).resize((450, 150)).save("panorama.png")

    def size(*arguments: str) -> tuple[tuple[int, int], tuple[int, int]]:
        fast = ["--model", str(MINI), "--steps", "1", "--device", "cpu", "--output", "made.png"]
        main.main([*arguments, *fast])
        with Image.open("made.png") as made:
            size = made.size
        kept = read_settings(Path("made.png"))
        Path("made.png").unlink()
        return size, (kept["width"], kept["height"])

    as_source = (0, 0)
    assert size("edit", "portrait.png", "a") == ((120, 160), as_source)
    assert size("edit", "panorama.png", "a") == ((216, 72), as_source)
    assert size("edit", "panorama.png", "a", "--size", "native") == ((128, 128), (128, 128))
    assert size("edit", "panorama.png", "a", "--long-side", "96") == ((96, 32), (96, 32))
    assert size("edit", "portrait.png", "a", "--paste-back") == ((225, 300), as_source)
    assert size("generate", "a cup", "--size", "3:2") == ((168, 112), (168, 112))
    assert size("generate", "a cup") == ((128, 128), as_source)
    with pytest.raises(SystemExit, match="height and width must be multiples of 8 px, got 100 x 100"):
        size("edit", "panorama.png", "a", "--size", "100x100")


# ---- the wheel -------------------------------------------------------------------------------------------------------


def pathless() -> dict[str, str]:
    return {name: value for name, value in environment().items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The program `mige` of a wheel, in an environment that has it and this one's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mige", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = run_program(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    assert made.returncode == 0, made.stderr
    [wheel] = folder.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT) for path in (ROOT / "mige").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    wanted |= {"mige" / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.[py][ya]*") if path.is_file()}
    assert {str(path) for path in wanted if "__pycache__" not in path.parts} <= names
    place = folder / "environment"
    venv.create(place, symlinks=True, with_pip=False)
    # An editable install leaves its egg-info in the checkout: on the path, pip would take it for the installed one.
    done = run_program(*pip, "--python", place, "install", "--no-deps", "--no-index", wheel, cwd=folder, env=pathless())
    assert done.returncode == 0, done.stderr
    [packages] = place.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")  # behind its own
    return place / "bin" / "mige"


@pytest.mark.processes
@pytest.mark.slow
def test_the_wheel_makes_an_image_in_another_folder(installed, tmp_path):
    shutil.copy(CAT, tmp_path / "photo.jpg")
    shutil.copytree(MINI, tmp_path / "mige-mini")
    env = pathless() | {"MIGE_MODEL": "mige-mini"}
    done = run_program(installed, "edit", "photo.jpg", "make it night", "--steps", 2, "--device", "cpu",
                       cwd=tmp_path, env=env)  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("photo-edited.png: made in "), done.stderr
    with Image.open(tmp_path / "photo-edited.png") as image, Image.open(CAT) as photo:
        assert image.size == (168, 112) and image.convert("RGB").tobytes() != photo.resize((168, 112)).tobytes()
    settings = read_settings(tmp_path / "photo-edited.png")
    assert (settings["task"], settings["model"], settings["steps"], settings["seed"]) == ("edit", "mige-mini", 2, 0)
    look = "import json, mige; from mige import config; from mige.cli import places\n"
    look += "config.load(places.config(__import__('pathlib').Path('configs/mige_512.py')), [])\n"
    look += "print(json.dumps([mige.__file__, str(places.CONFIGS)]))"
    done = run_program(installed.parent / "python", "-c", look, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert all(str(installed.parents[1]) in path for path in json.loads(done.stdout.splitlines()[-1]))
