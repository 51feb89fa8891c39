#!/bin/sh
# Subject-driven generation with the official settings: sh infer_scripts/subject.sh [MODEL [RECORDS [OUTPUT]]]
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
python infer_scripts/infer.py \
    --model "${1:-output/pretrained_models/mige}" \
    --records "${2:-example_data/subject.json}" \
    --output "${3:-output/subject}" \
    --task subject \
    --size native ${LORA:+--lora "$LORA"}
