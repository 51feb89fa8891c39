"""README and docs: what they import, run, link to and count is there."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from safetensors.torch import load_file

from mige import config
from mige.models.build import build_parts

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINES = sorted({line for page in PAGES for line in re.findall(r"^(from mige\b.* import .*)$", page.read_text(), re.M)})


def commands(page: Path) -> list[list[str]]:
    """The words of every command that a page shows, in a fenced `sh` block or indented; not those with "..."."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    lines += re.findall(r"^    ((?:python|sh|make|accelerate|pip) .*)$", text, re.M)
    parts = [part for line in lines if "..." not in line for part in re.split(r" && | \| ", line)]
    found = []
    for part in parts:
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


SHOWN = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("line", LINES)
def test_imports_of_the_docs(line):
    exec(line, {})


def test_readme_shows_the_public_path():
    assert "from mige import MIGEPipeline" in LINES


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=[f"{page.stem}-{' '.join(words)[:60]}" for page, words in SHOWN])
def test_a_command_of_the_docs_is_one_that_its_script_takes(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *rest = words
    if program == "accelerate":  # launch, its own options, a script
        first = next(n for n, word in enumerate(rest) if word.endswith(".py"))
        program, rest = "python", rest[first:]
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), words
    elif program == "sh":
        assert (ROOT / rest[0]).is_file(), words
        if rest[0].endswith("train_mige.sh") and len(rest) > 2:
            config.load(rest[1], [word for word in rest[3:] if "=" in word])  # ConfigError where it does not fit
    elif program in ("pip", "uv") and "-e" in words:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", rest[-1])) <= extras.keys(), words
    elif program in ("python", "python3") and rest[0] != "-m":
        script = ROOT / rest[0]
        assert script.is_file(), words
        if script.parent.name != "benchmarks":
            importlib.import_module(f"mige.cli.{script.stem}").parse(rest[1:])  # SystemExit where it does not fit
    for word in rest:  # what ships, where it is said to be
        if word.startswith(("example_data/", "configs/", "docs/", "output/pretrained_models/mige-mini")):
            assert (ROOT / word).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in names, f"{page.name} links to {link}; there are {sorted(names)}"


def test_the_walks_of_the_architecture_name_what_is_there():
    walks = (ROOT / "docs" / "architecture.md").read_text().split("## The walk")[1:]
    rows = [row.split("|")[2] for walk in walks for row in re.findall(r"^\| \d.*$", walk, re.M)]
    assert len(rows) == 19
    for row in rows:
        names = re.findall(r"`([^`]+)`", row)
        files = [next((ROOT / "mige").rglob(name.rstrip("/")), None) for name in names if re.search(r"\.py$|/$", name)]
        assert None not in files, row
        files = files or [ROOT / "mige" / "inference" / "pipeline.py"]
        for name in (name.removeprefix("pipeline.") for name in names if not re.search(r"\.py$|/$", name)):
            assert any(re.search(rf"def {name}\(", file.read_text()) for file in files if file.is_file()) or re.search(
                rf"def {name}\(", (ROOT / "mige" / "inference" / "pipeline.py").read_text()
            ), row


def test_the_tree_of_the_architecture_is_that_of_the_files():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("## Files")[1].split("```")[1]
    told, folder = set(), ""
    for line in tree.splitlines():
        if name := re.match(r"(\S+/) *", line):
            folder = name[1]
        elif name := re.match(r" +(\S+)( |$)", line):
            told.add(folder + name[1])
    code = ("mige", "benchmarks", "tools", "infer_scripts", "train_scripts", "configs")
    there = {str(path.relative_to(ROOT)) for name in code for path in (ROOT / name).rglob("*.py")}
    there |= {str(path.relative_to(ROOT)) for name in code for path in (ROOT / name).rglob("*.sh")}
    there |= {str(path.relative_to(ROOT)) for path in PAGES if path.name not in ("README.md", "architecture.md")}
    mains = {path for path in there if path.startswith("mige/cli/")}  # of the scripts that are named
    missing = {path for path in there - told - mains if not path.endswith("__init__.py")}
    assert not missing, f"docs/architecture.md has no line for {sorted(missing)}"
    gone = {path for path in told if path.startswith(tuple(f"{name}/" for name in code)) and not (ROOT / path).exists()}
    assert not gone, f"docs/architecture.md names {sorted(gone)}, which are not there"


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readme_counts_parameters_as_they_are():
    rows = re.findall(r"^\| ([^|]+) \| ([\d.,]+) ([MB]) \|", (ROOT / "README.md").read_text(), re.M)
    told = {name: float(number.replace(",", "")) * {"M": 1, "B": 1000}[unit] for name, number, unit in rows}
    parts = {"its DiT": "transformer", "its text encoder": "text_encoder", "its vision tower": "image_encoder",
             "its Q-Former": "qformer", "its fusion and projection": "fusion", "its VAE": "vae"}  # fmt: skip
    counted = {}
    for name, file in (
        ("MIGE, as released", "mige_512"),
        ("MIGE-mini", "mini"),
        ("start of the ablations", "ablation"),
    ):
        built = build_parts(config.load(ROOT / "configs" / f"{file}.py").model, device="meta")
        many = {part: sum(p.numel() for p in module.parameters()) / 1e6 for part, module in built.items()}
        counted[name] = sum(many.values())
        if file == "mige_512":
            counted |= {row: many[part] for row, part in parts.items()}
    adapters = load_file(ROOT / "output" / "pretrained_models" / "mige-mini-turbo" / "adapter_model.safetensors")
    vae = load_file(ROOT / "output" / "pretrained_models" / "mini2-vae" / "diffusion_pytorch_model.safetensors")
    counted["VAE of the second world"] = sum(tensor.numel() for tensor in vae.values()) / 1e6
    counted["its few-step adapters"] = sum(tensor.numel() for tensor in adapters.values()) / 1e6
    assert told.keys() == counted.keys()
    for name, number, unit in rows:  # rounded to as many digits as are given
        step = 10.0 ** -len(number.partition(".")[2]) * (1000 if unit == "B" else 1)
        assert abs(told[name] - counted[name]) <= step / 2, (name, told[name], counted[name])


def test_readme_quick_start_runs(lively, tmp_path, monkeypatch):
    """As written, but for the model (an untrained one) and the number of steps."""
    [block] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert "output/pretrained_models/mige-mini" in block and "num_inference_steps=20" in block
    block = block.replace("output/pretrained_models/mige-mini", str(lively))
    block = block.replace("num_inference_steps=20", "num_inference_steps=1").replace(
        "docs/images", f"{ROOT}/docs/images"
    )
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_citation_is_readable_and_agrees_with_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["preferred-citation"]["title"].split(":")[1].strip() in (ROOT / "README.md").read_text()
