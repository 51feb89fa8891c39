#!/bin/sh
# DreamBench with the official settings: sh infer_scripts/dreambench.sh DATA [MODEL [OUTPUT]]
# DATA: a checkout of google/dreambooth. Pictures go to OUTPUT/images; a second call goes on where the first stopped.
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
model="${2:-output/pretrained_models/mige}"
output="${3:-output/dreambench}"
python tools/prepare_benchmark.py dreambench --data "${1:?give the folder of google/dreambooth}" \
    --output "$output/benchmark"
python infer_scripts/infer.py --model "$model" --records "$output/benchmark/records.jsonl" --output "$output" \
    --size native ${LORA:+--lora "$LORA"}
echo "next: python tools/evaluate.py --benchmark dreambench --results $output"
