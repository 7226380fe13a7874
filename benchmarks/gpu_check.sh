#!/usr/bin/env bash
# Everything that needs a GPU, in one call under ten minutes: correctness, sanitizer, timings.
#
#   bash benchmarks/gpu_check.sh [FOLDER FOR LOGS]
#
# Figure 2 and the exact Fisher of all of MovieLens-1M are added where FISHERKERN_DATA has it.
# Needs Python with torch and triton, nvcc, pybind11; no network. Correctness comes first, and
# nothing is timed if it fails. The CSVs in benchmarks/results are appended to.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
logs=${1:-$(mktemp -d)}
mkdir -p "$logs"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

step() { # NAME LIMIT_SECONDS COMMAND...
  local name=$1 limit=$2 status
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1
  status=$?
  tail -n 6 "$logs/$name.log"
  if ((status != 0)); then
    echo "== $name FAILED with status $status; see $logs/$name.log"
    failed=1
  fi
  return "$status"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 2
# A kernel is compiled for this GPU alone; a few seconds instead of one arch after another.
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 2
step build 180 env FISHERKERN_CUDA=1 FISHERKERN_CUDA_ARCHS="$arch" "$python" setup.py -q build_ext --inplace
# "auto" is PyTorch until PROVEN in fisherkern/ops/_dispatch.py says otherwise; both kinds are asked for.
for backend in triton cuda; do
  step "correctness-$backend" 120 env FISHERKERN_BACKEND=$backend \
    "$python" benchmarks/gpu_correctness.py || exit 1
done
export FISHERKERN_BACKEND=cuda

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "sanitizer-$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" benchmarks/gpu_correctness.py --small
  done
else
  echo "== compute-sanitizer is not on this machine: not run"
fi

step bench-segment 60 "$python" benchmarks/bench_segment.py --sequences 4096
step bench-head 120 "$python" benchmarks/bench_head.py --items 3706 1000000 \
  --sequences 4096 --widths 64 128 256 --dtype bfloat16
if [[ -e "${FISHERKERN_DATA:-}/ml-1m.txt" ]]; then
  trained=(--data ml-1m --max-len 200 --epochs 2 --out "$logs/trained")
  step bench-fisher 90 "$python" benchmarks/bench_fisher.py "${trained[@]}" --limit 2
  step bench-fisher-all 60 "$python" benchmarks/bench_fisher.py "${trained[@]}" --sequences 6040 \
    --only exact --repeats 3
else
  echo "== FISHERKERN_DATA has no ml-1m.txt: no Fisher is timed"
fi
exit "$failed"
