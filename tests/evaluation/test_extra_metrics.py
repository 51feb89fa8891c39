"""Preservation and further backbones: independent formulas, random weights of the real classes, columns."""

import json
import math
from pathlib import Path

import evaluation_files as files
import numpy as np
import pytest
import timm
import torch
from conftest import run_here
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import correlate1d
from torch import nn
from transformers import CLIPTokenizer, SiglipConfig, SiglipModel

from mige.evaluation import backbones, preservation
from mige.utils.errors import UserError
from mige.utils.images import open_image

LEFT = np.zeros((64, 96), dtype=bool)
LEFT[:, :48] = True


def pair() -> tuple[Image.Image, Image.Image]:
    """Two images of 96 x 64 px that differ in their right halves alone."""
    a, b = np.asarray(files.image(1, (96, 64))), np.array(files.image(1, (96, 64)))
    b[:, 48:] = np.asarray(files.image(2, (96, 64)))[:, 48:]
    return Image.fromarray(a), Image.fromarray(b)


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_psnr_by_hand():
    a, b = pair()
    error = np.square(np.asarray(a) / 255.0 - np.asarray(b) / 255.0)
    assert preservation.psnr(a, b) == pytest.approx(-10 * math.log10(error.mean()), abs=1e-4)
    assert preservation.psnr(a, b, ~LEFT) == pytest.approx(-10 * math.log10(error[:, 48:].mean()), abs=1e-4)
    assert preservation.psnr(a, a) == preservation.psnr(a, b, LEFT) == 100


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Wang et al. 2004, eq. 13, channel by channel, mirrored at the border."""
    x = np.arange(11) - 5
    window = np.exp(-(x**2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            values = correlate1d(values, window, axis=axis, mode="mirror")
        return values

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))


def test_ssim_against_an_independent_computation():
    a, b = pair()
    local = ssim_map(np.asarray(a) / 255.0, np.asarray(b) / 255.0)
    assert preservation.ssim(a, b) == pytest.approx(local.mean(), abs=2e-4)
    assert preservation.ssim(a, b, LEFT) == pytest.approx(local[:, :48].mean(), abs=2e-4)
    assert preservation.ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert preservation.ssim(a, b, LEFT) > 0.95 > preservation.ssim(a, b) > preservation.ssim(a, b, ~LEFT)


FEATURES = nn.Sequential(  # of AlexNet, as Krizhevsky's second paper (2014) has it, for an independent computation
    nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
    nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
    nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
)  # fmt: skip


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    """Random weights under torchvision's names."""
    torch.manual_seed(0)
    for layer in FEATURES:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save({f"features.{key}": value for key, value in FEATURES.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def lpips(alexnet) -> preservation.Lpips:
    return preservation.Lpips(alexnet)


@torch.no_grad()
def distances(lpips: preservation.Lpips, a: Image.Image, b: Image.Image) -> list[torch.Tensor]:
    """Zhang et al. 2018, eq. 1, a map a layer: unit features after each of five ReLUs, weighted squared differences."""
    mean, std = (torch.tensor(c)[:, None, None] for c in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 127.5 - 1 for i in (a, b)])
    x, maps = (x - mean) / std, []
    for number, layer in enumerate(FEATURES):
        x = layer(x)
        if number in (1, 4, 7, 9, 11):
            unit = x / x.norm(dim=1, keepdim=True).clamp_min(1e-10)
            weight = lpips.network.lins[len(maps)].model[-1].weight[0]  # [C, 1, 1], learnt, as published
            maps.append(((unit[0] - unit[1]).square() * weight).sum(dim=0))
    return maps


def test_lpips_against_an_independent_computation(lpips):
    a, b = pair()
    maps = distances(lpips, a, b)
    assert lpips(a, b) == pytest.approx(float(sum(one.mean() for one in maps)), rel=1e-4)
    large = [nn.functional.interpolate(one[None, None], (64, 96), mode="bilinear")[0, 0] for one in maps]
    assert lpips(a, b, LEFT) == pytest.approx(float(sum(large)[:, :48].mean()), rel=1e-4)
    assert lpips(a, a) == 0 and lpips(a, b, LEFT) < lpips(a, b) < lpips(a, b, ~LEFT)


def test_lpips_of_other_weights_is_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no weights of torchvision's AlexNet"):
        preservation.Lpips(tmp_path / "other.pth")


# ---- backbones -------------------------------------------------------------------------------------------------------

SMALL = {"depth": 1, "embed_dim": 64, "num_heads": 2}


@pytest.fixture
def small_dino(tmp_path, monkeypatch):
    """DINOv2 or DINOv3 of one block with random weights in a file, by the real class: (name) -> path."""

    def make(name: str) -> Path:
        timm_name, options, transform = backbones.DINO[name]
        monkeypatch.setitem(backbones.DINO, name, (timm_name, {**options, **SMALL}, transform))
        torch.manual_seed(0)
        path = tmp_path / f"{timm_name}.safetensors"
        save_file(timm.create_model(timm_name, num_classes=0, **options, **SMALL).state_dict(), path)
        return path

    return make


@pytest.mark.parametrize("name, tokens", [("DINOv2 ViT-B/14", 257), ("DINOv3 ViT-B/16", 261)])
def test_newer_dinos_give_their_class_token(small_dino, name, tokens):
    network = backbones.Dino(name, str(small_dino(name)))
    levels = network.transform.levels(files.image(3, (300, 200)))[None]
    with torch.no_grad():
        found = network.model.forward_features(network.transform.pixels(levels))
    assert found.shape == (1, tokens, 64)  # a class token, four registers of DINOv3, the patches
    assert torch.allclose(network.encode(levels)[0], found[0, 0], atol=1e-6)


def test_transforms_are_those_of_the_releases():
    image = files.image(4, (300, 200))
    v2, v3 = (backbones.DINO[name][2] for name in ("DINOv2 ViT-B/14", "DINOv3 ViT-B/16"))
    cut = image.resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240))
    assert (v2.levels(image).numpy() == np.asarray(cut)).all()
    assert (v3.levels(image).numpy() == np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR))).all()
    assert v3.words == "squeezed to 256 x 256 (bilinear)"
    assert v2.words == "shorter side to 256 (bicubic), centre crop 224"


@pytest.fixture
def siglip(tmp_path) -> Path:
    """A random SigLIP of one layer, with a tokenizer of letters."""
    files.clip(tmp_path / "siglip")  # its tokenizer
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "siglip")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 16}
    torch.manual_seed(0)
    config = SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8})
    SiglipModel(config).save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip"


def test_siglips_features_are_the_models(siglip):
    network = backbones.Siglip("SigLIP 2 B/16", str(siglip))
    image, text = files.image(5), "A red dog."
    levels = network.transform.levels(image)[None]
    squeezed = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert (levels[0].numpy() == squeezed).all()
    pixels = torch.from_numpy(squeezed.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    tokens = network.tokenizer(["a red dog."], padding="max_length", max_length=64, return_tensors="pt").input_ids
    assert tokens.shape == (1, 64)
    with torch.no_grad():
        out = SiglipModel.from_pretrained(siglip).eval()(input_ids=tokens, pixel_values=pixels)
    for own, theirs in ((network.encode(levels), out.image_embeds), (network.texts([text]), out.text_embeds)):
        assert torch.allclose(own / own.norm(dim=1, keepdim=True), theirs, atol=1e-5)


# ---- the tool --------------------------------------------------------------------------------------------------------


def test_the_tool_adds_columns(tmp_path, small_dino, siglip, alexnet):
    """MagicBrush with masks: kept outside of them, changed inside; a column a backbone, named in the protocol."""
    data, out = files.magicbrush(tmp_path / "data"), tmp_path / "r"
    done = run_here("tools/prepare_benchmark.py", "magicbrush", "--data", data, "--output", out / "benchmark")
    assert done.returncode == 0
    size = (96, 64)
    for folder in (data / "images").iterdir():
        for path in folder.glob("*-*.png"):
            files.save(path, 1, size)
    for name in ("139-1", "139-2", "30-1"):
        image_id, turn = name.split("-")
        mask = np.zeros((64, 96, 4), dtype=np.uint8)
        mask[..., 3] = np.where(LEFT, 255, 0)  # transparent, so changed, on the right
        Image.fromarray(mask).save(data / "images" / image_id / f"{image_id}-mask{turn}.png")
        made = np.asarray(files.image(1, size)).copy()
        made[:, 48:] = 255 - made[:, 48:]
        (out / "images").mkdir(exist_ok=True)
        Image.fromarray(made).save(out / "images" / f"{name}.png")
    done = run_here("tools/prepare_benchmark.py", "magicbrush", "--data", data, "--output", out / "benchmark")
    arguments = ["--clip-weights", files.clip(tmp_path / "clip"), "--dino-weights",
                 files.dino(tmp_path / "dino.safetensors"), "--device", "cpu", "--lpips-weights", alexnet]  # fmt: skip
    also = [f"DINOv2 ViT-B/14={small_dino('DINOv2 ViT-B/14')}", f"SigLIP 2 B/16={siglip}"]
    done = run_here("tools/evaluate.py", "--benchmark", "magicbrush", "--results", out, *arguments, "--also", *also,
                    "--preservation", "psnr", "ssim", "lpips")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row, *_) = map(json.loads, (out / "evaluation" / "samples.jsonl").read_text().splitlines())
    scores = row["model"]
    assert scores["PSNR outside"] == 100 and scores["PSNR inside"] < 20 and row["target"]["PSNR"] == 100
    assert scores["SSIM outside"] > scores["SSIM"] > scores["SSIM inside"]
    assert scores["LPIPS outside"] < scores["LPIPS"] < scores["LPIPS inside"] and row["target"]["LPIPS"] == 0
    assert {"DINO", "DINOv2", "CLIP-I", "SigLIP2-I", "SigLIP2-T (global captions)"} <= scores.keys()
    expected = preservation.ssim(open_image(out / "images" / "139-1.png"), files.image(1, size), ~LEFT)
    assert scores["SSIM inside"] == pytest.approx(expected)
    protocol = json.loads((out / "evaluation" / "report.json").read_text())["protocol"]
    assert "shorter side to 256" in protocol["DINOv2 ViT-B/14"] and "LPIPS inside" in protocol["preservation"]
    assert "DINOv2" in done.stdout and "PSNR outside" in (out / "evaluation" / "report.html").read_text()


@pytest.mark.parametrize(
    "given, said",
    [(["--also", "DINOv9"], "'DINOv9', expected one of DINOv2 ViT-B/14"),
     (["--also", "DINOv2 ViT-B/14=./no.pth"], "./no.pth: no such file"),
     (["--preservation", "psnr"], "neither true images nor sources")],
)  # fmt: skip
def test_what_cannot_be_added_is_refused(tmp_path, given, said):
    data, out = files.dreambench(tmp_path / "data"), tmp_path / "r"
    run_here("tools/prepare_benchmark.py", "dreambench", "--data", data, "--output", out / "benchmark")
    for row in map(json.loads, (out / "benchmark" / "records.jsonl").read_text().splitlines()):
        (out / "images").mkdir(exist_ok=True)
        (out / "images" / f"{row['id']}.png").touch()  # is not opened
    done = run_here("tools/evaluate.py", "--benchmark", "dreambench", "--results", out, "--device", "cpu", *given)
    assert done.returncode and said in done.stderr
