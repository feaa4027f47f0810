#!/usr/bin/env bash
# Run the benchmarks that need a GPU and have no record yet, the most important first, within a time limit.
#
#   benchmarks/gpu.sh DATA OUT MINUTES
#
#   demo        train the demo model at 196 tokens (training/recipes/fashion_mnist_gpu.sh)
#   throughput  training steps of MAE, PCAE and fine-tuning side by side (benchmarks/training.py)
#   engines     every tier in torch, torch.compile, ONNX Runtime and TensorRT (benchmarks/engines.py)
#   questions   PCAE, PTR and elastic training against their alternatives (benchmarks/questions.py)
#
# DATA: a folder of Fashion-MNIST parquet files. OUT: folder for the results, each file under 16 MiB:
# records as JSON and text, weights as float16 in NAME.tar.part-NN (join: cat NAME.tar.part-* | tar x).
# A stage with a record in benchmarks/records/*_gpu-STAGE or in OUT is skipped. An interrupted stage
# continues at the next call on the same machine, from its checkpoints in WORK.
#
# DEVICE=cpu SCALE=tiny is a rehearsal of a minute. PYTHON: the interpreter; it must have the
# dependencies of `.[train]`, but this checkout need not be installed. BUNDLE: a bundle for the engines
# (a ViT-S is 50 MB); without it only torch is timed. SEEDS ("0 1 2") and JOBS (4 in parallel) apply to
# the questions.
set -euo pipefail
if [ $# -ne 3 ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi
data=$(realpath "$1") minutes=$3
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} scale=${SCALE:-gpu}
work=${WORK:-/tmp/pcae-gpu-$scale}
export PYTHONPATH=$PWD:$PWD/training:$PWD/export${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PCAE_TRAIN="$python -m pcae_training.cli"
mkdir -p "$work"
end=$(($(date +%s) + minutes * 60))
reserve_s=30 # for saving and packing

left_s() { echo $((end - $(date +%s) - reserve_s)); }

# within STAGE COMMAND…: run a command within the remaining time; 0 if it completed successfully
within() {
  local stage=$1 seconds code=0
  shift
  seconds=$(left_s)
  if [ "$seconds" -le 0 ]; then
    echo "$stage: no time left"
    return 1
  fi
  timeout --signal=TERM --kill-after=25 "$seconds" "$@" >>"$out/$stage.log" 2>&1 || code=$?
  [ $code = 0 ] && return
  if [ $code = 124 ] || [ $code = 143 ] || [ $code = 3 ]; then
    echo "$stage: stopped at the time limit; the next call continues it"
  else
    echo "$stage: failed with exit code $code, see $stage.log" >&2
    failed=1
  fi
  return 1
}

awaits() {
  [ ! -e "$out/$1.json" ] && ! compgen -G "benchmarks/records/*_gpu-$1" >/dev/null
}

# weights FOLDER NAME: pack a checkpoint as float16, in parts
weights() {
  rm -rf "$work/packed" "$out/$2".tar.part-*
  mkdir -p "$work/packed/$2"
  cp "$1"/checkpoint/*.json "$work/packed/$2"
  "$python" - "$1/checkpoint/model.safetensors" "$work/packed/$2/model.safetensors" <<'PYTHON'
import sys
from safetensors.torch import load_file, save_file

weights = {name: tensor.half() for name, tensor in load_file(sys.argv[1]).items()}
save_file(weights, sys.argv[2], metadata={"format": "pt"})
PYTHON
  tar -C "$work/packed" -c "$2" | split -b 15m -d - "$out/$2.tar.part-"
}

demo() {
  local flags=(--device "$device") budgets=1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.25
  if [ "$scale" = tiny ]; then
    flags+=(--split 'train[:96]' --epochs 1 --batch-size 32 --precision fp32)
    export HOLDOUT=32 WIDTH=8 HEADS=2
  fi
  within demo training/recipes/fashion_mnist_gpu.sh "$data" "$work/demo" "${flags[@]}" || return 0
  weights "$work/demo/finetuned" demo
  within demo $PCAE_TRAIN evaluate "$work/demo/finetuned" --data "$data" --split test \
    --budgets "$budgets" --device "$device" --json "$work/demo.json" || return 0
  cp "$work/demo/finetuned/metrics.jsonl" "$out/demo.metrics.jsonl"
  mv "$work/demo.json" "$out/demo.json"
}

throughput() {
  local flags=(--batch-size 256 --precision bf16 --rounds 9 --steps 10)
  [ "$scale" = tiny ] && flags=(--batch-size 2 --width 64 --rounds 2 --image-size 64)
  within throughput "$python" benchmarks/training.py --device "$device" "${flags[@]}" \
    --json "$work/throughput.json" || return 0
  mv "$work/throughput.json" "$out/throughput.json"
}

engines() {
  local flags=(--device "$device") bundle=${BUNDLE:-}
  [ "$scale" = tiny ] && flags+=(--model tiny --batches 1,2 --rounds 3 --no-compile)
  if [ -n "$bundle" ]; then
    flags+=(--bundle "$bundle")
    if "$python" -c 'import tensorrt' 2>/dev/null; then
      within engines "$python" -m pcae_export.cli tensorrt "$bundle" --max-batch 64 || return 0
    fi
  fi
  within engines "$python" benchmarks/engines.py "${flags[@]}" --json "$work/engines.json" ||
    return 0
  mv "$work/engines.json" "$out/engines.json"
}

questions() {
  local flags=(--data "$data" --work "$work/questions" --scale "$scale" --device "$device") seconds
  flags+=(--seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-4}" --report "$out/questions.partial.json")
  seconds=$(left_s)
  [ "$seconds" -gt 0 ] || { echo "questions: no time left"; return 0; }
  within questions "$python" benchmarks/questions.py "${flags[@]}" \
    --minutes "$(((seconds - 20) / 60))" || return 0
  mv "$out/questions.partial.json" "$out/questions.json"
}

failed=0
for stage in demo throughput engines questions; do
  if awaits $stage; then
    echo "$stage: $(left_s) s left"
    $stage
  else
    echo "$stage: already recorded"
  fi
done
exit $failed
