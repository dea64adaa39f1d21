#!/bin/bash
# Two nodes of eight GPUs: sbatch configs/slurm.sh --config configs/recipes/veripo.yaml --run-dir /shared/runs/veripo-7b
# Run folder, data, checkpoints and cache.folder must be paths that all nodes see. See docs/ranks.md.
#SBATCH --job-name=veripo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -eu

GPUS=8
HOURS=23.5   # ends itself with a checkpoint before Slurm ends the job; submit it again and it goes on
RUN=
CONFIG=
previous=
for argument in "$@"; do
    case $previous in
    --run-dir) RUN=$argument ;;
    --config) CONFIG=$argument ;;
    esac
    case $argument in
    --run-dir=*) RUN=${argument#*=} ;;
    --config=*) CONFIG=${argument#*=} ;;
    esac
    previous=$argument
done
[ -n "$RUN" ] && [ -n "$CONFIG" ] || { echo "slurm.sh: name --config FILE and --run-dir DIR" >&2; exit 2; }

RESUME=
[ -f "$RUN/config.yaml" ] && RESUME=--resume   # a job that was requeued or submitted again goes on
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((${SLURM_CPUS_ON_NODE:-64} / GPUS))

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=none torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" --shutdown-timeout 300 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m veripo_fast train --train.max-hours "$HOURS" "$@" $RESUME
