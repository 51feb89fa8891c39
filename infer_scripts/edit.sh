#!/bin/sh
# Instruction-based editing with the official settings: sh infer_scripts/edit.sh [MODEL [RECORDS [OUTPUT]]]
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
python infer_scripts/infer.py \
    --model "${1:-output/pretrained_models/mige}" \
    --records "${2:-example_data/edit.json}" \
    --output "${3:-output/edit}" \
    --task edit \
    --size native ${LORA:+--lora "$LORA"}
