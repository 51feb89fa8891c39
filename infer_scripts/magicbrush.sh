#!/bin/sh
# MagicBrush's test split: sh infer_scripts/magicbrush.sh DATA [MODEL [OUTPUT [iterative]]]
# DATA: the test archive, unpacked. Every turn starts from its own source; with "iterative" from the result before it.
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
model="${2:-output/pretrained_models/mige}"
output="${3:-output/magicbrush${4:+_iterative}}"
mkdir -p "$output"
python tools/prepare_benchmark.py magicbrush --data "${1:?give the folder of the test archive}" \
    --output "$output/benchmark" ${4:+--iterative "$output"}
for records in "$output"/benchmark/*.jsonl; do  # records.jsonl, or turn_1, turn_2, ... in this order
    python infer_scripts/infer.py --model "$model" --records "$records" --output "$output" --size native ${LORA:+--lora "$LORA"}
done
echo "next: python tools/evaluate.py --benchmark magicbrush --results $output"
