#!/bin/sh
# Train: sh train_scripts/train_mige.sh [CONFIG [RUN [section.key=value ...]]]
#
# LAUNCH chooses the accelerate config: cpu, one_gpu, ddp, fsdp2 (configs/accelerate/), or zero2 (accelerate_config.yaml).
# Several machines: set MACHINES, RANK (of this machine, from 0), MAIN_ADDRESS and, if need be, MAIN_PORT on each.
set -eu
cd "$(dirname "$0")/.."
config="${1:-configs/mige_512.py}"
run="${2:-output/runs/$(basename "$config" .py)}"
[ $# -lt 2 ] || shift
[ $# -lt 1 ] || shift

gpus=$(python -c "import torch; print(torch.cuda.device_count())")
case "${LAUNCH:-$gpus}" in
    0 | cpu) file=configs/accelerate/cpu.yaml; processes=1 ;;
    1 | one_gpu) file=configs/accelerate/one_gpu.yaml; processes=1 ;;
    ddp | fsdp2) file="configs/accelerate/$LAUNCH.yaml"; processes=$gpus ;;
    *) file=accelerate_config.yaml; processes=$gpus ;;
esac
machines="${MACHINES:-1}"
exec accelerate launch --config_file "$file" \
    --num_processes "$((processes * machines))" --num_machines "$machines" --machine_rank "${RANK:-0}" \
    --main_process_ip "${MAIN_ADDRESS:-127.0.0.1}" --main_process_port "${MAIN_PORT:-29500}" \
    train_scripts/train_mige.py "$config" --output "$run" "$@"
