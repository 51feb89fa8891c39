#!/bin/sh
# GEdit-Bench, its English rows: sh infer_scripts/gedit.sh [DATA [MODEL [OUTPUT]]]
# DATA: folder of stepfun-ai/GEdit-Bench, or that name (the default) to read it from the hub.
# Results have their source's aspect ratio, as the benchmark's own example has it, at the model's area.
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
model="${2:-output/pretrained_models/mige}"
output="${3:-output/gedit}"
python tools/prepare_benchmark.py gedit --data "${1:-stepfun-ai/GEdit-Bench}" --output "$output/benchmark"
python infer_scripts/infer.py --model "$model" --records "$output/benchmark/records.jsonl" --output "$output" \
    --size source ${LORA:+--lora "$LORA"}
echo "next: python tools/judge.py --benchmark gedit --results $output --judge Qwen/Qwen2.5-VL-7B-Instruct"
