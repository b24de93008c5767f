#!/usr/bin/env bash
# A smoke test of the recipe tldr: its six methods, two steps each, on SmolLM2-135M with a small adapter, short responses and
# a frozen reward model. It shows that every part runs; in two steps nothing is learned.
# Usage: scripts/tldr.sh scitldr_pairs.jsonl.gz
set -euo pipefail
pairs=${1:?usage: scripts/tldr.sh PAIRS}
PATH="$PWD/.venv/bin:$PATH"
run=runs/tldr-smoke
settings=(
  name=tldr-smoke data.prompts=null data.held_out=0.3 data.limit=60 data.eval_limit=8 data.max_length=320
  'lora={r: 8, alpha: 16, layers: 4}'
  'reward={train: {init: scratch, backbone: frozen}}'
  rollout.max_completion_length=16 rollout.missing_end.rule=none
  training.max_steps=2 training.per_device_train_batch_size=2 training.eval_steps=2 training.use_cpu=true
  'evaluation={prompts: 4, samples: 1, max_new_tokens: 16, temperature: 0.7}' health.prompts=2 token_budget=1024
)
# What a method's own training says comes before training.
for method in rebel pd rlhf rkl; do settings+=("methods.$method.training.max_steps=2"); done
for method in dpo rlhf rkl; do settings+=("methods.$method.training.per_device_train_batch_size=2"); done
flags=()
for setting in "${settings[@]}"; do flags+=(--set "$setting"); done
distalign compare tldr --model smollm2-135m-instruct --data "$pairs" "${flags[@]}" --json "runs/tldr-smoke.json"
python - "$run" <<'PY'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
results = json.loads((run / "results.json").read_text(encoding="utf-8"))
for name in results["settings"]["methods"]:
    rows = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = ", ".join(f"{row['loss']:.4g}" for row in rows if "loss" in row)
    evals = ", ".join(f"{row['eval_loss']:.4f}" for row in rows if "eval_loss" in row)
    print(f"{name}: training loss {losses}; held-out loss {evals}; {results['seconds'][name]:.0f} s")
PY
