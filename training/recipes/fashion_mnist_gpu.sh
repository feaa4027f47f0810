#!/usr/bin/env bash
# The demo model on one GPU: a ViT of DeiT-Ti's size on Fashion-MNIST, 28 x 28 pixels in patches of 2
# (196 tokens, as in the paper). PCAE pretraining, then fine-tuning for all budgets.
#
# Command:  training/recipes/fashion_mnist_gpu.sh DATA OUT [FLAGS of both phases, such as --device cuda]
# Cost:     intended for about 12 minutes of an H200
# Result:   not measured yet; benchmarks/gpu.sh runs this recipe
#
# DATA is a folder of Fashion-MNIST parquet files, or zalando-datasets/fashion_mnist on the hub. All
# choices are made on 5,000 training images held out. A phase that has finished in OUT is skipped; one
# that was stopped is resumed. WIDTH, HEADS and HOLDOUT make the model small, for a trial run.
set -euo pipefail
data=$1 out=$2
shift 2
train=(${PCAE_TRAIN:-pcae-train})

# phase NAME COMMAND…: start or resume one run in OUT/NAME
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

trap : TERM # the current run saves and exits with a code that ends this script
mkdir -p "$out"
phase pretrained pretrain --method pcae --image-size 28 --patch-size 2 \
  --width "${WIDTH:-192}" --heads "${HEADS:-3}" --depth 12 \
  --epochs 60 --batch-size 512 --lr 1.5e-3 --crop 0.5 --precision bf16 "$@"

phase finetuned finetune --init "$out/pretrained" --holdout "${HOLDOUT:-5000}" \
  --budgets 1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.25 --epochs 60 --batch-size 512 --lr 1.5e-3 \
  --layer-decay 0.8 --drop-path 0.1 --crop 0 --shift 2 --randaugment 0 --erase 0.25 \
  --mixup 0.2 --cutmix 0.5 --precision bf16 "$@"
