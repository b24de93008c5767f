#!/usr/bin/env bash
# On one GPU, in some eight minutes: the tests that need one, and each benchmark in bfloat16 on a model of 1.2 billion
# random weights, beside TRL and generate. Figures go to OUT (by default runs/gpu), log and JSON; the card and the versions
# stand in each file. Usage: scripts/gpu.sh [PYTHON]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python} out=${OUT:-runs/gpu}
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
mkdir -p "$out"
nvidia-smi >"$out/card.txt"
part() { # NAME SECONDS COMMAND …: a part that fails or runs late does not stop the others
  local name=$1 limit=$2; shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $?, $SECONDS s so far"
}
cuda=(--device cuda --dtype bfloat16 --models llama-1b)
part tests 150 "$python" -m pytest -q tests/training/test_cuda.py
part throughput 120 "$python" benchmarks/throughput.py "${cuda[@]}" --workloads tldr,chat --settings fast \
  --against trl_best --token-budget 16384 --trl-batch 8 --rounds 3 --json "$out/throughput.json"
part onpolicy 150 "$python" benchmarks/onpolicy.py "${cuda[@]}" --methods rkl,rlhf --trl-batch 64 --rounds 3 \
  --json "$out/onpolicy.json"
part generation 90 "$python" benchmarks/generation.py --model llama-1b --device cuda --samples 1,8 --rounds 3 \
  --json "$out/generation.json"
