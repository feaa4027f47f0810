#!/usr/bin/env bash
# The demo model: a ViT of DeiT-Ti's size on Fashion-MNIST, 28 x 28 pixels, on two CPU cores.
#
# Command:  training/recipes/fashion_mnist_two_cores.sh DATA OUT
# Cost:     1.8 hours of training steps on two shared cores
# Result:   top-1 on the test images 88.70 % at keep ratio 1.0, 87.73 % at 0.25
#           (benchmarks/records/2026-11-23_demo; that run drew its random numbers differently, with
#           the same settings)
#
# DATA is a folder of Fashion-MNIST parquet files, or zalando-datasets/fashion_mnist on the hub. All
# choices are made on 5,000 training images held out, the same ones in all phases (same seed).
# Phase 1 trains at patch size 4 (49 tokens, three times as many images/s). Phase 2 resizes patch and
# position embeddings to patch size 2 (196 tokens, as in the paper) and stops in the middle of its
# schedule, because two cores do not reach its end in the time available. Phase 3 anneals instead: two
# epochs without augmentation.
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
