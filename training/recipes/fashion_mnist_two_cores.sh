#!/usr/bin/env bash
# The demo model: a ViT of DeiT-Ti's sizes on Fashion-MNIST, 28 x 28, on two CPU cores.
#
#   training/recipes/fashion_mnist_two_cores.sh DATA OUT
#
# DATA is a folder of Fashion-MNIST parquet files (or the hub name zalando-datasets/fashion_mnist).
# First at patch 4 (49 tokens, three times as many images a second), then patch and position
# embeddings are resized to patch 2 (196 tokens, the paper's own geometry) and trained on; the last
# two epochs without augmentation. The second phase stops in the middle of its schedule: on two cores
# its end would not have come in time, and the third one anneals instead.
# Every choice is made on 5,000 training images held out (the same ones in all phases: same seed).
# Cost: 1.8 hours of training steps on two shared cores. Result: 88.70 % of the test images at keep
# ratio 1.0, 87.73 % at 0.25 (benchmarks/records/2026-11-23_demo). That run's trainer drew its random
# numbers another way; the settings below are the same.
set -euo pipefail
data=$1 out=$2
common=(--batch-size 64 --sampling one --clip 1 --min-lr 0 --layer-decay 1 --label-smoothing 0.05
  --crop 0 --randaugment 0 --erase 0 --mixup 0 --cutmix 0 --drop-path 0 --precision bf16)
all=1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3

pcae-train finetune --data "$data" --out "$out/patch4" --image-size 28 --patch-size 4 \
  --width 192 --depth 12 --heads 3 --budgets 1.0,0.8,0.6,0.5,0.4 \
  --epochs 6 --lr 1e-3 --shift 2 "${common[@]}"

pcae-train finetune --data "$data" --out "$out/patch2" --init "$out/patch4" --patch-size 2 \
  --budgets $all --ramp-start 0 --ramp-length 0 --epochs 4 --stop-after 2 --lr 8e-4 "${common[@]}"

pcae-train finetune --data "$data" --out "$out/final" --init "$out/patch2" \
  --budgets $all --ramp-start 0 --ramp-length 0 --epochs 2 --lr 5e-4 --no-flip "${common[@]}"
