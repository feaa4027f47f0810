#!/bin/bash
# Training on several nodes under Slurm: one torchrun a node, one process a GPU.
#
#   sbatch --nodes 2 --gpus-per-node 8 training/recipes/slurm.sh pretrain --data DATA --out RUN …
#
# RUN lies where every node sees it. The same line goes on after a failure or the end of the time: two
# minutes before it all processes save and stop. Not yet run on a cluster; a test runs it with two
# processes on one machine, one of which is killed.
#SBATCH --job-name=pcae-train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

meeting=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# else torchrun's restarts share one store, in which addresses of the dead stand: the new processes may
# then try to reach those, and end after minutes (torch 2.13)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# exec: the signal is for torchrun, which passes it on
exec srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$meeting:29400" \
    -m pcae_training.cli "$@" --resume-or-begin
