#!/bin/sh
#SBATCH --job-name=mige
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Train on several machines under Slurm: sbatch train_scripts/slurm.sh [CONFIG [RUN [section.key=value ...]]]
#
# One task a machine starts one process a GPU (train_mige.sh); the first machine is where they meet. 300 s before the
# time is up the training is asked to stop: it saves and ends with code 75, and the job is put back into the queue, where
# the same command resumes. LAUNCH and the like are passed on. Start it in the repository's root.
set -u
export MACHINES="$SLURM_JOB_NUM_NODES"
MAIN_ADDRESS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MAIN_ADDRESS
code=0
srun --kill-on-bad-exit=0 sh -c 'RANK="$SLURM_NODEID" exec sh train_scripts/train_mige.sh "$@"' sh "$@" || code=$?
[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
