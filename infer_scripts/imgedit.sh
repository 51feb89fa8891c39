#!/bin/sh
# ImgEdit-Bench, the basic suite: sh infer_scripts/imgedit.sh DATA [MODEL [OUTPUT]]
# DATA: folder with basic_edit.json (of PKU-YuanGroup/ImgEdit) and the originals (Benchmark.tar of sysuyy/ImgEdit).
# Results have their source's aspect ratio, at the model's area.
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
model="${2:-output/pretrained_models/mige}"
output="${3:-output/imgedit}"
python tools/prepare_benchmark.py imgedit --data "${1:?give the folder of basic_edit.json and the originals}" \
    --output "$output/benchmark"
python infer_scripts/infer.py --model "$model" --records "$output/benchmark/records.jsonl" --output "$output" \
    --size source ${LORA:+--lora "$LORA"}
echo "next: python tools/judge.py --benchmark imgedit --results $output --judge Qwen/Qwen2.5-VL-7B-Instruct"
