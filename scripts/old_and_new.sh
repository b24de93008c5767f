#!/usr/bin/env bash
# Is this tree as fast as an older commit? Both take turns with the same opponents (tuned TRL; `generate`), each with its own benchmarks.
#   bash scripts/old_and_new.sh COMMIT [ROUNDS]
set -euo pipefail
cd "$(dirname "$0")/.."
commit=$1 rounds=${2:-3} python=$PWD/.venv/bin/python out=$PWD/runs/bench
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"
old=$(mktemp -d)
git worktree add --quiet --detach "$old" "$commit"
trap 'git worktree remove --force "$old"' EXIT
for round in $(seq "$rounds"); do
    for name in old new; do
        tree=$PWD
        [ "$name" = old ] && tree=$old
        (cd "$tree/benchmarks" && PYTHONPATH=$tree/src "$python" throughput.py --models smollm2-135m --workloads tldr \
            --settings lean --against trl_best --rounds 1 --json "$out/$name-throughput-$round.json")
        (cd "$tree/benchmarks" && PYTHONPATH=$tree/src "$python" generation.py --samples 8 --rounds 1 --json "$out/$name-generation-$round.json")
    done
done
