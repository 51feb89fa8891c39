#!/bin/sh
# Instruction-based subject-driven editing with the official settings: sh infer_scripts/subject_edit.sh [MODEL [RECORDS [OUTPUT]]]
# LORA=PATH[:SCALE] before it: with these adapters.
set -eu
cd "$(dirname "$0")/.."
python infer_scripts/infer.py \
    --model "${1:-output/pretrained_models/mige}" \
    --records "${2:-example_data/subject_edit.json}" \
    --output "${3:-output/subject_edit}" \
    --task subject_edit \
    --size native ${LORA:+--lora "$LORA"}
