"""The figure of speed against deviation: a dot a mode, with the full-size model's speed and a trained one's deviation.

    python benchmarks/plot_speed.py deviation.jsonl inference.jsonl docs/speed.png

The files are those of bench_deviation.py (--output) and bench_inference.py (--output, cases edit/25/..., some with
their own number of steps: edit/25/compiled@20). A mode with so many steps stands in the figure if both files have it;
of several lines the last counts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg  # extra: pip install 'mige[ablation]'
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

TIMED = "edit/25/"
FULL, APPROXIMATE = "#0072B2", "#D55E00"  # of Okabe and Ito, told apart by the colour-blind
LEGEND = {FULL: ("all blocks and branches at every step", "o"), APPROXIMATE: ("approximate steps or numbers", "D")}
OFFSETS = [(side * x, y) for x in (9, 16, 26) for y in (0, 9, -9, 16, -16, 26, -26, 38, -38, 52, -52)
           for side in (1, -1)]  # of a label from its dot, in points  # fmt: skip
HOW_TO_READ = (
    "reuse N: the middle blocks of the DiT only every N-th step.\n"
    "vae16: the VAE in bfloat16.  Where no steps are named: {usual}.  Bars: 95 % intervals of the mean.\n"
    "Weights: bfloat16 for speed; for deviation float32, but in the mode bfloat16."
)


def joined(deviations: Sequence[dict], speeds: Sequence[dict]) -> list[dict]:
    """The deviation lines whose mode and steps were timed, with speed and its device; without the reference's own."""
    timed, device = {}, ""
    for line in speeds:
        device = line.get("device", device)  # a run's first line
        if line.get("case", "").startswith(TIMED) and "images_a_second" in line:
            mode = frozenset(line["case"].removeprefix(TIMED).split("+"))
            timed[mode, line["steps"]] = {"images_a_second": line["images_a_second"], "timed_on": device}
    found = {}
    for line in deviations:
        key = options(line) - {"bfloat16"}, line["steps"]  # the full-size model always is bfloat16
        is_reference = (line["mode"], line["steps"]) == ("compiled", line["reference_steps"])
        if "psnr" in line and key in timed and not is_reference:
            found[line["mode"], line["steps"]] = line | timed[key]
    return list(found.values())


def options(line: dict) -> frozenset[str]:
    return frozenset(line["mode"].split("+"))


def colour(line: dict) -> str:
    return FULL if options(line) <= {"compiled", "bfloat16"} else APPROXIMATE


def label(line: dict, usual: int) -> str:
    """Such as "30 steps", "reuse 2"; steps are named where they are not the usual ones, or all there is."""
    words = [option.replace("reuse", "reuse ") for option in line["mode"].split("+") if option != "compiled"]
    many = [f"{line['steps']} steps"] if not words or line["steps"] != usual or "bfloat16" in words else []
    return ", ".join([*many, *([" + ".join(words)] if words else [])])


def plot(lines: Sequence[dict], path: Path) -> None:
    figure = Figure(figsize=(10, 6.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    fewer = sorted((line for line in lines if options(line) == {"compiled"}), key=lambda line: line["steps"])
    [through] = axis.plot(*_places(fewer), color=FULL, linewidth=1, alpha=0.4)
    for shade, (name, mark) in LEGEND.items():
        own = [line for line in lines if colour(line) == shade]
        reach = [[abs(line["psnr_interval"][side] - line["psnr"]) for line in own] for side in (0, 1)]
        style = {"color": shade, "fmt": mark, "markersize": 7, "elinewidth": 1, "capsize": 0}
        axis.errorbar(*_places(own), yerr=reach, label=name, **style)
    axis.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60) if _between(tick, lines)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.margins(x=0.12, y=0.12)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    one, timed_on = lines[0], " and ".join(dict.fromkeys(line["timed_on"] for line in lines))
    axis.set_xlabel("images/s of the full-size model →")
    axis.set_ylabel(f"PSNR of {one['model']} to its {one['reference_steps']}-step pictures, dB →")
    axis.set_title(
        f"Speed: full-size model, random weights, 512 px, editing, batch 25, {timed_on}\n"
        f"Deviation: {one['model']}, trained, 128 px, mean of {one['cases']} cases, {one['device']}",
        loc="left",
        fontsize=11,
    )
    axis.legend(loc="upper right", frameon=False)
    figure.supxlabel(HOW_TO_READ.format(usual=_usual(lines)), x=0.01, ha="left", fontsize=8.5, color="0.3")
    figure.draw_without_rendering()  # the places below are of the final layout
    name_dots(axis, lines, through)
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, format="png")
    beside.replace(path)


def _usual(lines: Sequence[dict]) -> int:
    return max(line["steps"] for line in lines)


def _places(lines: Sequence[dict]) -> tuple[list[float], list[float]]:
    return [line["images_a_second"] for line in lines], [line["psnr"] for line in lines]


def _between(tick: float, lines: Sequence[dict]) -> bool:
    speeds, _ = _places(lines)
    return 0.8 * min(speeds) <= tick <= 1.25 * max(speeds)


def name_dots(axis, lines: Sequence[dict], through) -> None:
    """Write every label at the first place around its dot where it covers nothing; far ones hang on a thread."""
    usual, inside = _usual(lines), axis.get_window_extent()
    taken = [axis.get_legend().get_window_extent()]
    for line in lines:
        ends = [axis.transData.transform((line["images_a_second"], end)) for end in line["psnr_interval"]]
        taken.append(Bbox([ends[0] - 8, ends[1] + 8]))
    if len(through.get_xdata()) > 1:
        along = through.get_path().interpolated(40).vertices
        taken += [Bbox([point - 2, point + 2]) for point in axis.transData.transform(along)]
    for line in sorted(lines, key=lambda line: -line["psnr"]):
        dot = line["images_a_second"], line["psnr"]
        name = axis.annotate(label(line, usual), dot, (0, 0), textcoords="offset points", va="center",
                             fontsize=9.5, color=colour(line))  # fmt: skip
        for x, y in OFFSETS:
            name.set(position=(x, y), ha="left" if x > 0 else "right")
            box = name.get_window_extent()
            if inside.x0 <= box.x0 and box.x1 <= inside.x1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        if abs(y) > 10:
            thread = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
            axis.annotate("", dot, (x, y), textcoords="offset points", arrowprops=thread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deviations", type=Path)
    parser.add_argument("speeds", type=Path)
    parser.add_argument("figure", type=Path, help="PNG file to write")
    args = parser.parse_args()
    deviations, speeds = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.startswith("{")]
        for path in (args.deviations, args.speeds)
    )
    lines = joined(deviations, speeds)
    if not lines:
        sys.exit(f"error: no mode with so many steps is in both files; the second needs cases {TIMED}MODE")
    plot(lines, args.figure)


if __name__ == "__main__":
    main()
