#!/usr/bin/env bash
# PMLE and DPO on the helpful part of HH (or any file of pairs) with SmolLM2-135M and LoRA, 20 steps each; prints held-out
# accuracy before and after. Usage: scripts/hh.sh hh_helpful.jsonl.gz
set -euo pipefail
pairs=${1:?usage: scripts/hh.sh PAIRS}
PATH="$PWD/.venv/bin:$PATH"
for method in pmle dpo; do
  distalign train pairs --method "$method" --data "$pairs" \
    --set name=hh --set training.eval_steps=20 --overwrite --json "runs/hh-$method.json"
  python - "runs/hh/train/$method/metrics.jsonl" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
for row in rows:
    if "eval_loss" in row:
        print(f"step {row['step']}: held-out loss {row['eval_loss']:.4f}, accuracy {row['eval_rewards/accuracies']:.3f}")
PY
done
