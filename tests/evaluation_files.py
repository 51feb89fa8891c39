"""Small files in the exact layouts of the four benchmarks, and random networks in the layouts of the real ones."""

import json
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    SwinConfig,
)

from mige.evaluation.benchmarks.rows import SINGLE_IMAGE

PROMPTS = ("in the jungle", "on top of a wooden floor", *(f"with thing {n} in the background" for n in range(21)))


def image(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A smooth random RGB image, width x height."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, seed: int, size: tuple[int, int] = (40, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(seed, size).save(path)


def dreambench(root: Path) -> Path:
    """google/dreambooth: dataset/<subject>/NN.jpg and prompts_and_classes.txt."""
    folder = root / "dataset"
    names = {subject: "dog" if "dog" in subject and "_" not in subject else "vase" for subject in SINGLE_IMAGE}
    for n, (subject, number) in enumerate(SINGLE_IMAGE.items()):
        for m in {number, "00", "01"}:
            save(folder / subject / f"{m}.jpg", 10 * n + int(m))
    lines = [f"'a {{0}} {{1}} {prompt}'.format(unique_token, class_token)" for prompt in PROMPTS]
    lines += [f"'a {colour} {{0}} {{1}}'.format(unique_token, class_token)" for colour in ("red", "wet")]
    block = "prompt_list = [\n" + ",\n".join(lines) + "\n]\n"
    table = "\n".join(f"{subject},{name}" for subject, name in names.items())
    prompts = f"Prompts\n\nObject Prompts\n\n{block}\nLive Subject Prompts\n\n{block}"
    text = f"Classes\n\nsubject_name,class\n{table}\n\n{prompts}"
    (folder / "prompts_and_classes.txt").write_text(text)
    return root


def emu_edit(root: Path, rows: int = 6, size: tuple[int, int] = (64, 64)) -> Path:
    """facebook/emu_edit_test_set: data/validation-*.parquet with images embedded; the last captions are equal."""

    def cell(seed: int) -> dict:
        encoded = BytesIO()
        image(seed, size).save(encoded, "PNG")
        return {"bytes": encoded.getvalue(), "path": None}

    table = {
        "instruction": [f"make the sky number {n}" for n in range(rows)],
        "image": [cell(n) for n in range(rows)],
        "task": ["global", "add"] * (rows // 2),
        "split": ["validation"] * rows,
        "idx": list(range(rows)),
        "hash": [f"{n:x}" for n in range(rows)],
        "input_caption": ["a dog"] * rows,
        "output_caption": [f"a cat {'x' * n}" for n in range(rows - 1)] + ["a dog"],
    }
    features = datasets.Features(
        {name: datasets.Value("string") for name in table} | {"image": datasets.Image(), "idx": datasets.Value("int64")}
    )
    (root / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    return root


def magicbrush(root: Path, local: bool = False) -> Path:
    """The unpacked test archive: one session of two turns, one of one; with global captions, or local ones too."""
    sessions, captions = {}, {}
    for image_id, turns in (("139", 2), ("30", 1)):
        names = [f"{image_id}-input.png"] + [f"{image_id}-output{n}.png" for n in range(1, turns + 1)]
        for n, name in enumerate(names):
            save(root / "images" / image_id / name, int(image_id) + n)
        sessions[image_id] = [
            {"input": names[n], "mask": f"{image_id}-mask{n + 1}.png", "output": names[n + 1], "instruction": f"do {n}"}
            for n in range(turns)
        ]
        captions[image_id] = {name: f"a scene {n}" for n, name in enumerate(names)}
    (root / "edit_sessions.json").write_text(json.dumps(sessions))
    for kind in ("global", "local") if local else ("global",):
        (root / f"{kind}_descriptions.json").write_text(json.dumps(captions))
    return root


def migebench(root: Path, rows: int = 3) -> Path:
    """EurekaTian/MIGEBench: two files of rows with placeholder paths, and their folders."""
    for k, kind in enumerate(("add", "replace")):
        lines = []
        for n in range(rows):
            for m, part in enumerate(("entity", "mask", "source", "target")):
                save(root / f"{kind}_{part}" / f"{n}.png", 100 * k + 10 * n + m)
            entity, source, target = (
                f"/path/to/MIGEBench/{kind}_{part}/{n}.png" for part in ("entity", "source", "target")
            )
            order = [entity, source] if kind == "add" else [source, entity]
            prompt = "add the<imagehere>to<imagehere>" if kind == "add" else "replace it in<imagehere>with<imagehere>"
            lines.append({"image": target, "source_path": [source], "entity_path": order, "multi_prompt": prompt,
                          "entity_path_white": [], "mask_path": [f"/path/to/MIGEBench/{kind}_mask/{n}.png"],
                          "caption": "a room", "target_caption": "a room with a dog", "object": "Dog", "idx": n,
                          "crop": None, "width": 40, "height": 32})  # fmt: skip
        (root / f"{kind}_bench.json").write_text(json.dumps(lines))
    return root


def clip(folder: Path) -> Path:
    """A random CLIP of one layer, with a tokenizer of letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789,.'")
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: n for n, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    last = len(vocabulary) - 1
    ids = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(vocabulary), **ids},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def dino(path: Path) -> Path:
    """DINO's ViT-S/16 with random weights."""
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model("vit_small_patch16_224.dino", num_classes=0).state_dict(), path)
    return path


def grounding_dino(folder: Path) -> Path:
    """A random Grounding DINO of one layer everywhere."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "dog", "cat", "a"]
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    text = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
                          window_size=4, out_indices=[2, 3, 4])  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config={"model_type": "bert", **text, "intermediate_size": 16, "max_position_embeddings": 64},
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, max_text_len=16, num_feature_levels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    small = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    GroundingDinoProcessor(small, tokenizer).save_pretrained(folder)
    return folder


def sam(folder: Path) -> Path:
    """A random SAM of one layer everywhere."""
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8, "mlp_dim": 16, "global_attn_indexes": [0], "window_size": 2,
              "num_pos_feats": 4}  # fmt: skip
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4, "image_embedding_size": 4}
    decoder = {
        "hidden_size": 8,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    torch.manual_seed(0)
    SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    ).save_pretrained(folder)
    pixels = SamImageProcessor(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32},
                               mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16})  # fmt: skip
    SamProcessor(pixels).save_pretrained(folder)
    return folder
