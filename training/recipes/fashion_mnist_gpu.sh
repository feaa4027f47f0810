#!/usr/bin/env bash
# The demo model on one GPU: a ViT of DeiT-Ti's sizes at 196 tokens, the paper's own geometry, on
# Fashion-MNIST (28 x 28 in patches of 2). Pretrained by PCAE, then fine-tuned for every budget.
#
#   training/recipes/fashion_mnist_gpu.sh DATA OUT [FLAGS for both, such as --resume]
#
# DATA is a folder of Fashion-MNIST parquet files (or the hub name zalando-datasets/fashion_mnist).
# Every choice is made on 5,000 training images held out. A phase that OUT holds already is not run
# again; one that was stopped goes on. WIDTH, HEADS and HOLDOUT make it small, for a trial.
# Cost: meant for about 12 minutes of an H200. Result: not run yet, see benchmarks/gpu.sh.
set -euo pipefail
data=$1 out=$2
shift 2
train=(${PCAE_TRAIN:-pcae-train})

# phase NAME COMMAND…: one run in OUT/NAME, begun or gone on with
phase() {
  local name=$1 resume=()
  shift
  [ -e "$out/$name.done" ] && return
  if [ -e "$out/$name/checkpoint" ] || [ -e "$out/$name/.checkpoint.old" ]; then
    resume=(--resume)
  fi
  "${train[@]}" "$@" --data "$data" --out "$out/$name" "${resume[@]}"
  touch "$out/$name.done"
}

trap : TERM # the run at hand saves itself; its exit code then ends this
mkdir -p "$out"
phase pretrained pretrain --method pcae --image-size 28 --patch-size 2 \
  --width "${WIDTH:-192}" --heads "${HEADS:-3}" --depth 12 \
  --epochs 60 --batch-size 512 --lr 1.5e-3 --crop 0.5 --precision bf16 "$@"

phase finetuned finetune --init "$out/pretrained" --holdout "${HOLDOUT:-5000}" \
  --budgets 1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.25 --epochs 60 --batch-size 512 --lr 1.5e-3 \
  --layer-decay 0.8 --drop-path 0.1 --crop 0 --shift 2 --randaugment 0 --erase 0.25 \
  --mixup 0.2 --cutmix 0.5 --precision bf16 "$@"
