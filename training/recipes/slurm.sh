#!/bin/bash
# Training on several nodes under Slurm: one torchrun per node, one process per GPU.
#
# Command:  sbatch --nodes 2 --gpus-per-node 8 training/recipes/slurm.sh pretrain --data DATA --out RUN …
# Cost:     that of the command it runs
# Result:   not run on a cluster yet; a test runs it with two processes on one machine and kills one
#
# RUN must be visible to all nodes. Submit the same line again after a failure or when the time limit
# has ended the job: all processes save and stop two minutes before the limit.
#SBATCH --job-name=pcae-train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

meeting=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Otherwise torchrun's restarts share one store with addresses of dead processes, which new processes
# may try to reach until they time out after minutes (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# exec, so that Slurm signals torchrun, which forwards the signal
exec srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$meeting:29400" \
    -m pcae_training.cli "$@" --resume-or-begin
