#!/usr/bin/env bash
# The demo model: a small ViT on Fashion-MNIST, 28 x 28 pixels in 196 patches, on two CPU cores.
#
# Command:  training/recipes/fashion_mnist_two_cores.sh DATA OUT
# Cost:     some hours on two cores; bfloat16 (AVX512-BF16) makes them about 1.8 times as fast
# Result:   top-1 on the test images 91.43 % at keep ratio 1.0, 87.15 % at 0.2
#           (benchmarks/records/2026-11-26_demo and 2026-11-27_demo: phase 3 was stopped at epoch
#           1.33 of 2, and phase 4 learnt from a teacher of 8 epochs)
#
# DATA is a folder of Fashion-MNIST parquet files, or zalando-datasets/fashion_mnist on the hub. All
# choices are made on 5,000 training images held out, the same ones in all phases (same seed).
# Phases 1 and 2 train at patch size 4 (49 patches, several times as many images/s), at keep ratio 1
# alone. Phase 3 resizes patch and position embeddings to patch size 2 (196 patches, as in the paper)
# and trains all keep ratios; phase 4 anneals the smallest ones further. All learn from a small CNN.
set -euo pipefail
data=$1 out=$2
teacher=$out/teacher.onnx
common=(--batch-size 128 --clip 1 --layer-decay 1 --label-smoothing 0 --crop 0 --randaugment 0
  --mixup 0 --cutmix 0 --drop-path 0 --holdout 5000 --precision auto --teacher "$teacher")
plain=(--patch-size 4 --keep 1.0 --epochs 14 --shift 2 --erase 0.25 --weight-ema 0.999)
elastic=(--patch-size 2 --sampling one --shift 1 --erase 0 --teacher-share 0.6)

mkdir -p "$out"
python "$(dirname "$0")/fashion_mnist_teacher.py" "$data" "$teacher"

pcae-train finetune --data "$data" --out "$out/plain" --image-size 28 --width 128 --depth 12 \
  --heads 2 --lr 1e-3 --teacher-share 0.5 "${plain[@]}" "${common[@]}"

pcae-train finetune --data "$data" --out "$out/plain2" --init "$out/plain" \
  --lr 8e-4 --teacher-share 0.7 "${plain[@]}" "${common[@]}"

pcae-train finetune --data "$data" --out "$out/elastic" --init "$out/plain2" \
  --budgets 1.0,0.7,0.5,0.35,0.25,0.2 --budget-probabilities 1.0=0.25 --ramp-start 0 \
  --ramp-length 0.15 --epochs 2 --lr 6e-4 --weight-ema 0.998 "${elastic[@]}" "${common[@]}"

pcae-train finetune --data "$data" --out "$out/final" --init "$out/elastic" \
  --budgets 1.0,0.5,0.3,0.2 --budget-probabilities 1.0=0.25,0.5=0.2,0.3=0.3,0.2=0.25 \
  --ramp-start 0 --ramp-length 0 --epochs 1 --lr 3e-4 --weight-ema 0.99 "${elastic[@]}" "${common[@]}"
