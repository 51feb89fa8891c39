#!/bin/sh
# Train: sh train_scripts/train_mige.sh [CONFIG [RUN [section.key=value ...]]]
#
# LAUNCH chooses how: cpu, one_gpu, ddp, fsdp2 (configs/accelerate/), or zero2 (accelerate_config.yaml); PROCESSES how many
# on this machine (default: its GPUs). Several machines: set MACHINES, RANK (of this machine, from 0), MAIN_ADDRESS and,
# if need be, MAIN_PORT on each. Relative paths start at the repository's root.
#
# SIGTERM or Ctrl-C saves a checkpoint and exits with code 75: the same command resumes. A second Ctrl-C: 130, at once.
set -eu
cd "$(dirname "$0")/.."
config="${1:-configs/mige_512.py}"
run="${2:-output/runs/$(basename "$config" .py)}"
[ $# -lt 2 ] || shift
[ $# -lt 1 ] || shift
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python -m mige.training.launch "$config" --output "$run" "$@"
