#!/usr/bin/env bash
# The tests against other versions of the libraries than those pinned: by default the newest, else those named.
#   scripts/newest.sh
#   scripts/newest.sh transformers==5.20.0 -- tests/rollout tests/engine
set -euo pipefail
cd "$(dirname "$0")/.."
packages=()
while [[ $# -gt 0 && $1 != -- ]]; do packages+=("$1"); shift; done
[[ ${1:-} == -- ]] && shift
[[ ${#packages[@]} -gt 0 ]] || packages=(transformers peft accelerate datasets)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
.venv/bin/python -m pip install --quiet --no-deps --target "$place" "${packages[@]}"
export PYTHONPATH="$place${PYTHONPATH:+:$PYTHONPATH}"
.venv/bin/python -c "
from importlib.metadata import version
print(*(f'{name} {version(name)}' for name in ('transformers', 'peft', 'accelerate', 'datasets')), sep=', ')"
.venv/bin/python -m pytest -n "${WORKERS:-3}" --dist worksteal "$@"
