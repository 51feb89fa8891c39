#!/bin/sh
# OmniContext with the official settings: sh infer_scripts/omnicontext.sh [DATA [MODEL [OUTPUT]]]
# DATA: folder of OmniGen2/OmniContext, or that name (the default) to read it from the hub.
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
model="${2:-output/pretrained_models/mige}"
output="${3:-output/omnicontext}"
python tools/prepare_benchmark.py omnicontext --data "${1:-OmniGen2/OmniContext}" --output "$output/benchmark"
python infer_scripts/infer.py --model "$model" --records "$output/benchmark/records.jsonl" --output "$output" \
    --size native ${LORA:+--lora "$LORA"}
echo "next: python tools/judge.py --benchmark omnicontext --results $output --judge Qwen/Qwen2.5-VL-7B-Instruct"
