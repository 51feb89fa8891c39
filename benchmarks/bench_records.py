"""Records of any number: seconds until a training has them, and what each of its processes then takes of memory.

    python benchmarks/bench_records.py --folder output/bench    # 2.28 M and 100 M records; a CPU is enough
    python benchmarks/bench_records.py --folder output/bench --records 20000 --simulated 50000
    python benchmarks/bench_records.py --folder output/bench --start FOLDER  # whole trainings of a step too (make tiny)

It runs in the root of the repository.

`--records` are written as JSON Lines and converted as a training does it. `--simulated` is a converted file of 50,000
records whose Arrow batches are repeated: what is opened and read is as long as a real one, but nobody has converted it.
Memory is that which no other process shares, in MB (10^6 bytes): USS, and of it what was written to, "dirty"; its
growth over the same process with a set of one record, after `--reads` records at random places in the order of samples.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
from harness import Machine, Report, parser
from torch.utils.data import DataLoader, Dataset

from mige.data.dataset import JointDataset, Mixture
from mige.data.mapping import map_records
from mige.training.data import check_set

BATCH = 50_000
ROOT_OF_IMAGES = Path("example_data")
EVERY = 251  # reads between two looks at the memory, at all phases of a file's being opened anew
DATA = argparse.Namespace(check_images=False, skip_bad=False, size=512)


def rows(many: int) -> Iterator[dict]:
    """Edits of example photographs."""
    photos = [f"images/{name}.jpg" for name in ("cat", "coffee", "pagoda", "rocket")]
    for number in range(many):
        source, target = photos[number % len(photos)], photos[(number + 1) % len(photos)]
        yield {"id": f"{number:08d}", "multi_prompt": f"make<imagehere>blue {number}",
               "entity_path": [source], "source_path": [source], "image": target, "task": "edit"}  # fmt: skip


def write_rows(file: Path, many: int) -> Path:
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows(many))
    return file


def repeat(file: Path, times: int) -> Path:
    """Make the converted file of these records hold them so many times."""
    arrow = map_records(file, root=ROOT_OF_IMAGES).records.file
    table = datasets.Dataset.from_file(str(arrow)).data.table.combine_chunks()
    beside = arrow.with_suffix(".part")  # the file is mapped: it must not be written over
    with datasets.arrow_writer.ArrowWriter(path=str(beside), writer_batch_size=BATCH) as writer:
        for _ in range(times):
            writer.write_table(table, writer_batch_size=len(table))
        writer.finalize()
    beside.replace(arrow)
    source = arrow.with_name("source.json")
    told = json.loads(source.read_text())
    told["sizes"][arrow.name] = arrow.stat().st_size
    source.write_text(json.dumps(told))
    return arrow


def joint(file: Path) -> JointDataset:
    """The dataset of a training, without a tokenizer, for its records."""
    shape = dict(seed=0, size=512, latent_shape=(4, 64, 64), vision_size=224)
    return JointDataset(Mixture([check_set(map_records(file, root=ROOT_OF_IMAGES), DATA)], [1.0]), None, **shape)


class Records(Dataset):
    """Sample index -> what this process has of its own after the record was read, now and then (see `own_bytes`)."""

    def __init__(self, data: JointDataset, asked: int):
        self.data, self.asked = data, asked

    def __len__(self) -> int:
        return self.asked

    def __getitem__(self, index: int) -> tuple[int, int] | None:
        self.data.record(index)
        return own_bytes() if index % EVERY == 0 else None


def own_bytes() -> tuple[int, int]:
    """USS and private dirty pages of this process."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    clean, dirty = (1024 * int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))
    return clean + dirty, dirty


def measure(file: Path, reads: int, workers: int) -> dict:
    """In a fresh process: seconds until the first record, and the largest own memory of it and of its workers."""
    started = time.perf_counter()
    data = joint(file)
    opened = time.perf_counter() - started
    data.record(0)
    first = time.perf_counter() - started
    peaks = {"main": [own_bytes()], "workers": []}
    started = time.perf_counter()
    for index in range(1, 2000):
        data.record(index)
    each = (time.perf_counter() - started) / 2000
    peaks["main"] += [one for one in map(Records(data, reads).__getitem__, range(reads)) if one]
    for batch in DataLoader(Records(data, reads), 100, num_workers=workers, collate_fn=list):
        peaks["workers"] += [one for one in batch if one]
    largest = {who: [max(kind) for kind in zip(*own, strict=True)] for who, own in peaks.items()}
    return {"records": len(data.mixture.sets[0]), "open_s": round(opened, 2), "first_record_s": round(first, 2),
            "record_us": round(1e6 * each), "peaks": largest}  # fmt: skip


def in_fresh_process(file: Path, args: argparse.Namespace) -> dict:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, file, args.reads, args.workers).result()


def first_step_seconds(file: Path, start: Path) -> float:
    """Of a training, from the command until the numbers of its first step are written; then it is ended."""
    one = {"file": str(file), "root": str(ROOT_OF_IMAGES), "weight": 1.0}
    run = file.with_suffix(".run")
    options = [f"data.sets=[{one}]", "data.check_images=False", "train.log_every=1", f"train.pretrained={str(start)!r}"]
    command = [sys.executable, "train_scripts/train_mige.py", "configs/tiny.py", "--output", run, *options]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as training:
        while not (run / "metrics.jsonl").exists():
            assert training.poll() is None, "the training has ended before its first step"
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        training.kill()
    return round(seconds, 1)


def add(report: Report, case: dict, found: dict, empty: dict) -> None:
    """A line: memory as growth over the set of one record, MB."""
    peaks, least = found.pop("peaks"), empty["peaks"]
    for who in peaks:
        for kind, name in enumerate(("uss", "dirty")):
            case[f"{who}_{name}_mb"] = round((peaks[who][kind] - least[who][kind]) / 1e6, 1)
    report.add(case | found)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.set_defaults(device="cpu")
    made.add_argument("--folder", type=Path, required=True, help="a new folder, removed at the end")
    made.add_argument("--records", type=int, default=2_280_000)
    made.add_argument("--simulated", type=int, default=100_000_000)
    made.add_argument("--start", type=Path, help="a checkpoint that configs/tiny.py can start from")
    made.add_argument("--reads", type=int, default=20_000)
    made.add_argument("--workers", type=int, default=2)
    return made.parse_args(argv)


def main() -> None:
    args = parse()
    machine = Machine(args.device)
    report = Report(machine, args.output)
    args.folder.mkdir(parents=True)
    datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"] = str(args.folder / "cache")
    try:
        one = write_rows(args.folder / "one.jsonl", 1)
        empty = in_fresh_process(one, args)
        step = lambda file: {} if args.start is None else {"first_step_s": first_step_seconds(file, args.start)}  # noqa: E731
        report.add({"case": "one record"} | step(one))
        real = write_rows(args.folder / "real.jsonl", args.records)
        converting = machine.seconds(lambda: map_records(real, root=ROOT_OF_IMAGES))
        size = {"json_gb": round(real.stat().st_size / 1e9, 2), "convert_s": round(converting, 1)}
        add(report, {"case": "real"} | size | step(real), in_fresh_process(real, args), empty)
        some = write_rows(args.folder / "some.jsonl", BATCH)
        arrow = repeat(some, args.simulated // BATCH)
        size = {"arrow_gb": round(arrow.stat().st_size / 1e9, 2)}
        add(report, {"case": "simulated"} | size | step(some), in_fresh_process(some, args), empty)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
