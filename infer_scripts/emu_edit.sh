#!/bin/sh
# Emu Edit with the official settings: sh infer_scripts/emu_edit.sh [DATA [MODEL [OUTPUT]]]
# DATA: folder of facebook/emu_edit_test_set, or that name (the default) to read it from the hub.
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
model="${2:-output/pretrained_models/mige}"
output="${3:-output/emu_edit}"
python tools/prepare_benchmark.py emu_edit --data "${1:-facebook/emu_edit_test_set}" --output "$output/benchmark"
python infer_scripts/infer.py --model "$model" --records "$output/benchmark/records.jsonl" --output "$output" \
    --size native ${LORA:+--lora "$LORA"}
echo "next: python tools/evaluate.py --benchmark emu_edit --results $output"
