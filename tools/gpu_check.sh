#!/usr/bin/env bash
# Does Topwork work on this machine's card, and how fast? One command, less than eight minutes, nothing installed.
#
#     bash tools/gpu_check.sh [OUT] [--only kernels,llama8b] [--tiny]
#
# OUT (or the variable OUT, else benchmarks/results/h200) gets summary.md, a JSON file for each part, and log.txt. What
# the machine lacks is taken from wheels in .whl, made beforehand by tools/gpu_wheels.sh. See docs/gpu.md.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/h200}
if [[ $# -gt 0 && $1 != -* ]]; then
    out=$1
    shift
fi
python=${PYTHON:-python3}
path=$PWD/src:$PWD/tools:$PWD/benchmarks:$PWD/tests
if compgen -G '.whl/*.whl' >/dev/null && [[ $("$python" -c 'import sys; print(sys.version_info[:2] == (3, 12))') == True ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
    path=$path:$site
fi
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 "$python" tools/gpu_check.py "$out" "$@"
