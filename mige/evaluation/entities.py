"""Entities cut out of images: Grounding DINO finds the named object, SAM its outline, the rest becomes black.

MIGEBench's rule (MIGE, section on MIGEBench): box threshold 0.3, text threshold 0.25, the box of the highest score, one
mask, crop to the box. Where nothing is found there is no crop; the original kept the whole image then, which scores
the background.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor, SamModel, SamProcessor

from mige.reports.cases import Case
from mige.reports.page import html_page
from mige.utils.files import append_json_lines, folder_lock, json_lines, read_json_lines, write_text
from mige.utils.images import BadImageError, open_image, save_image
from mige.utils.progress import Progress

DETECTOR, SEGMENTER = "IDEA-Research/grounding-dino-base", "facebook/sam-vit-huge"  # Swin-B and ViT-H, as published
BOX_THRESHOLD, TEXT_THRESHOLD = 0.3, 0.25


@dataclass(frozen=True, eq=False)
class Entity:
    """An object in an image of H x W pixels."""

    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    score: float  # of the detector, above 0.3
    mask: np.ndarray  # bool [H, W]

    def crop(self, image: Image.Image) -> Image.Image:
        """The object on black, cut to its box; the box's last row and column belong to it."""
        alone = np.asarray(image) * self.mask[..., None].astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(mmcv.imcrop(alone, np.array(self.box, dtype=np.float32))))

    def drawn(self, image: Image.Image) -> Image.Image:
        """The image with the mask tinted and the box outlined, for looking."""
        pixels = np.asarray(image).astype(np.float32)
        pixels[self.mask] = 0.5 * pixels[self.mask] + 0.5 * np.array([11, 180, 200], dtype=np.float32)
        marked = Image.fromarray(pixels.astype(np.uint8))
        ImageDraw.Draw(marked).rectangle(self.box, outline=(255, 90, 0), width=max(2, image.width // 200))
        return marked


class EntityFinder:
    """Both networks on a device, in float32. Args: folders or hub names of their weights."""

    def __init__(self, detector: str = DETECTOR, segmenter: str = SEGMENTER, device: str = "cpu"):
        self.device = device
        self.detect_inputs = GroundingDinoProcessor.from_pretrained(detector)
        self.detector = GroundingDinoForObjectDetection.from_pretrained(detector).eval().to(device)
        self.segment_inputs = SamProcessor.from_pretrained(segmenter)
        self.segmenter = SamModel.from_pretrained(segmenter).eval().to(device)

    @torch.inference_mode()
    def find(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Entity | None]:
        """The named object in each RGB image; None where no box scores above the threshold."""
        captions = [caption(name) for name in names]
        inputs = self.detect_inputs(images=list(images), text=captions, padding=True, return_tensors="pt")
        found = self.detect_inputs.post_process_grounded_object_detection(
            self.detector(**inputs.to(self.device)),
            inputs.input_ids,
            threshold=BOX_THRESHOLD,
            text_threshold=TEXT_THRESHOLD,
            target_sizes=[(image.height, image.width) for image in images],
        )
        boxes = [best_box(one["boxes"].tolist(), one["scores"].tolist()) for one in found]
        masks = self._segment([(p, box[0]) for p, box in zip(images, boxes, strict=True) if box])
        return [Entity(*box, next(masks)) if box else None for box in boxes]

    def _segment(self, boxed: Sequence[tuple[Image.Image, Sequence[float]]]):
        if not boxed:
            return iter(())
        images, boxes = zip(*boxed, strict=True)
        inputs = self.segment_inputs(list(images), input_boxes=[[list(box)] for box in boxes], return_tensors="pt")
        output = self.segmenter(**inputs.to(self.device), multimask_output=False)
        masks = self.segment_inputs.post_process_masks(
            output.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
        )
        return iter([mask[0, 0].numpy().astype(bool) for mask in masks])


def caption(name: str) -> str:
    """What Grounding DINO reads: lower case, ended by a full stop."""
    text = name.strip().lower()
    return text if text.endswith(".") else f"{text}."


def best_box(boxes: Sequence[Sequence[float]], scores: Sequence[float]) -> tuple[tuple[float, ...], float] | None:
    """The box of the highest score, with it; None of none."""
    if not boxes:
        return None
    best = max(range(len(scores)), key=lambda i: scores[i])
    return tuple(boxes[best]), scores[best]


def extract(
    rows: Sequence[Mapping[str, Any]], images: Mapping[str, Path], finder: EntityFinder, out: Path, batch: int = 8
) -> tuple[int, int]:
    """Cut the object of every row out of its image; what is done already stays. Returns (found, all).

    Args:
        rows: with an id and the object's name under score.object. images: by id.

    Writes out/crops/ID.png, then a line of out/entities.jsonl (box, score and crop null where nothing was found), and
    out/index.html for looking. Raises FolderInUseError where another process does so in the same folder.
    """
    (out / "crops").mkdir(parents=True, exist_ok=True)
    (out / "marked").mkdir(exist_ok=True)
    with folder_lock(out):
        lines = _cut_out_all(rows, images, finder, out, batch)
        _write_page(lines, images, out)
    return sum(line["crop"] is not None for line in lines), len(lines)


def _cut_out_all(
    rows: Sequence[Mapping[str, Any]], images: Mapping[str, Path], finder: EntityFinder, out: Path, batch: int
) -> list[dict[str, Any]]:
    """The line of every row, in order; those that are not there yet are made and written."""
    path = out / "entities.jsonl"
    done, errors = finished(out)
    for error in errors:
        print(f"warning: {error}; its object is cut out again", file=sys.stderr)
    write_text(path, json_lines(done.values()))
    todo = [row for row in rows if row["id"] not in done]
    with Progress(total=len(todo), unit="image", desc="entities", disable=not todo) as bar:
        for first in range(0, len(todo), batch):
            part = todo[first : first + batch]
            opened = [open_image(images[row["id"]]) for row in part]
            for row, image, entity in zip(
                part, opened, finder.find(opened, [row["score"]["object"] for row in part]), strict=True
            ):
                done[row["id"]] = _save(row, image, entity, out)
            append_json_lines(path, [done[row["id"]] for row in part])
            bar.update(len(part), failed=sum(done[row["id"]]["crop"] is None for row in part))
    return [done[row["id"]] for row in rows]


def finished(out: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The lines of out/entities.jsonl by id whose crop opens; and what else is there, a sentence each."""
    found, errors = read_json_lines(out / "entities.jsonl")
    lines = {}
    for number, line in found:
        where, name = f"{out / 'entities.jsonl'}, line {number}", line.get("id")
        crop = f"crops/{name}.png"
        if (
            not isinstance(name, str)
            or line.get("crop", "") not in (None, crop)
            or not {"score", "object"} <= line.keys()
        ):
            errors.append(f"{where}: no line of an entity")
            continue
        try:
            if line["crop"] is not None:
                open_image(out / crop)
                open_image(out / "marked" / f"{name}.jpg")
            lines[name] = line
        except BadImageError as error:
            errors.append(f"{where}: {error}")
    return lines, errors


def _save(row: Mapping[str, Any], image: Image.Image, entity: Entity | None, out: Path) -> dict[str, Any]:
    line = {"id": row["id"], "object": row["score"]["object"], "box": None, "score": None, "crop": None}
    if entity is None:
        return line
    save_image(entity.crop(image), out / "crops" / f"{row['id']}.png")
    save_image(entity.drawn(image), out / "marked" / f"{row['id']}.jpg", quality=88)
    return line | {"box": list(entity.box), "score": entity.score, "crop": f"crops/{row['id']}.png"}


def _write_page(lines: Sequence[Mapping[str, Any]], images: Mapping[str, Path], out: Path) -> None:
    cases = []
    for line in sorted(lines, key=lambda line: line["crop"] is not None):
        found = line["crop"] is not None
        image = out / "marked" / f"{line['id']}.jpg" if found else images[line["id"]]
        detail = f"score {line['score']:.3f}" if found else f"no box above {BOX_THRESHOLD}"
        shown = out / line["crop"] if found else images[line["id"]]
        cases.append(
            Case(line["id"], "Found" if found else "Not found", line["object"], (("image", image),), shown, detail)
        )
    missed = sum(line["crop"] is None for line in lines)
    note = f"Nothing was found in {missed} of {len(lines)} images ({missed / len(lines):.1%})."
    html_page(cases, out, title="Entities", note=note)
