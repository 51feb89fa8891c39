#!/bin/sh
# DreamBench++ with the official settings: sh infer_scripts/dreambench_plus.sh DATA [MODEL [OUTPUT]]
# DATA: the unpacked data of yuangpeng/dreambench_plus, with images/ and captions/.
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
model="${2:-output/pretrained_models/mige}"
output="${3:-output/dreambench_plus}"
python tools/prepare_benchmark.py dreambench_plus --data "${1:?give the data folder of DreamBench++}" \
    --output "$output/benchmark"
python infer_scripts/infer.py --model "$model" --records "$output/benchmark/records.jsonl" --output "$output" \
    --size native ${LORA:+--lora "$LORA"}
echo "next: python tools/judge.py --benchmark dreambench_plus --results $output --judge Qwen/Qwen2.5-VL-7B-Instruct"
