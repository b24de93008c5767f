#!/usr/bin/env bash
# Serves SmolLM2-135M-Instruct (or MODEL) by `transformers serve`, an OpenAI-compatible endpoint on this machine, until it is ended.
# What the server needs besides the library goes into a virtual environment of its own, beside the one that it builds on.
# Usage: scripts/judge_server.sh [PORT] [MODEL]      the model's name in requests is that of the folder which it prints
set -euo pipefail
port=${1:-8123} model=${2:-smollm2-135m-instruct}
base=${VENV:-.venv} own=${JUDGE_VENV:-runs/judge-server}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_WAIT_POLICY=PASSIVE
if ! "$own/bin/python" -c "import fastapi, openai, uvicorn" 2>/dev/null; then
  "$base/bin/python" -m venv "$own"
  site() { "$1/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))"; }
  echo "import site; site.addsitedir('$(site "$base")')" >"$(site "$own")/base.pth"
  "$own/bin/python" -m pip install --quiet -c constraints.txt fastapi openai uvicorn >&2
fi
folder=$("$own/bin/python" -c "import sys; from distalign.models.policy import find_model; print(find_model(sys.argv[1]).path)" "$model")
echo "model $folder, url http://127.0.0.1:$port/v1"
exec "$own/bin/python" -m transformers.cli.transformers serve "$folder" --host 127.0.0.1 --port "$port" --device cpu
