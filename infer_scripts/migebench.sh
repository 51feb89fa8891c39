#!/bin/sh
# MIGEBench with the official settings: sh infer_scripts/migebench.sh [DATA [MODEL [OUTPUT]]]
# DATA: folder of EurekaTian/MIGEBench, or that name (the default) to fetch it from the hub.
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
model="${2:-output/pretrained_models/mige}"
output="${3:-output/migebench}"
python tools/prepare_benchmark.py migebench --data "${1:-EurekaTian/MIGEBench}" --output "$output/benchmark"
python infer_scripts/infer.py --model "$model" --records "$output/benchmark/records.jsonl" --output "$output" \
    --size native ${LORA:+--lora "$LORA"}
echo "next: python tools/extract_entities.py --results $output"
echo "then: python tools/evaluate.py --benchmark migebench --results $output --entities $output/entities"
