#!/bin/sh
# Do the released weights give what the paper says? sh tools/verify_release.sh [MODEL [OUTPUT]]
# First the model itself: keys, file hashes, the numbers of every stage beside known ones. Then every benchmark whose
# data is named before the command, with the official settings, scored as the official scripts save (JPEG):
#   DREAMBENCH=dreambooth EMU_EDIT=facebook/emu_edit_test_set MAGICBRUSH=test MIGEBENCH=EurekaTian/MIGEBench
# CLIP_WEIGHTS, DINO_WEIGHTS, DETECTOR, SEGMENTER: local weights in place of the hub's. A second call resumes.
# OUTPUT/report.md holds what came out. Exit code 3: something differs from what is known.
set -eu
cd "$(dirname "$0")/.."
model="${1:-output/pretrained_models/mige}"
output="${2:-output/verified}"
worst=0

check() {  # go on after "differs" (3), so that the report is whole; end at anything else
    "$@" || { code=$?; [ "$code" = 3 ] && worst=3 || exit "$code"; }
}

score() {  # BENCHMARK RUN [evaluate's further options]
    benchmark="$1"; results="$output/$2"; shift 2
    python tools/evaluate.py --benchmark "$benchmark" --results "$results" --jpeg --label "$(basename "$model")" \
        ${CLIP_WEIGHTS:+--clip-weights "$CLIP_WEIGHTS"} ${DINO_WEIGHTS:+--dino-weights "$DINO_WEIGHTS"} "$@"
}

check python tools/verify_release.py model "$model" --output "$output"
if [ -n "${DREAMBENCH:-}" ]; then
    sh infer_scripts/dreambench.sh "$DREAMBENCH" "$model" "$output/dreambench"
    score dreambench dreambench
fi
if [ -n "${EMU_EDIT:-}" ]; then
    sh infer_scripts/emu_edit.sh "$EMU_EDIT" "$model" "$output/emu_edit"
    score emu_edit emu_edit
fi
if [ -n "${MAGICBRUSH:-}" ]; then
    sh infer_scripts/magicbrush.sh "$MAGICBRUSH" "$model" "$output/magicbrush"
    score magicbrush magicbrush
    sh infer_scripts/magicbrush.sh "$MAGICBRUSH" "$model" "$output/magicbrush_iterative" iterative
    score magicbrush magicbrush_iterative
fi
if [ -n "${MIGEBENCH:-}" ]; then
    sh infer_scripts/migebench.sh "$MIGEBENCH" "$model" "$output/migebench"
    python tools/extract_entities.py --results "$output/migebench" \
        ${DETECTOR:+--detector "$DETECTOR"} ${SEGMENTER:+--segmenter "$SEGMENTER"}
    score migebench migebench --entities "$output/migebench/entities"
fi
if [ -n "${DREAMBENCH:-}${EMU_EDIT:-}${MAGICBRUSH:-}${MIGEBENCH:-}" ]; then
    check python tools/verify_release.py scores "$output"
fi
exit "$worst"
