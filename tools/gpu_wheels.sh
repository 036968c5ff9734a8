#!/usr/bin/env bash
# Fill .whl with what a bare machine for tools/gpu_check.sh lacks: CPython 3.12 on Linux, x86-64, with torch already.
#
#     bash tools/gpu_wheels.sh
#
# Fails where they and the checkout are more than 64 MiB, which is what such a machine takes. .whl is not kept in git.
set -euo pipefail
cd "$(dirname "$0")/.."
most=$((64 * 1024 * 1024))
python=${PYTHON:-python3}
# the others' versions stand in constraints.txt
wheels=(pydantic pydantic_core annotated_types==0.8.0 typing_inspection==0.4.5 typing_extensions==4.16.0 bitsandbytes)
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
    manylinux1_x86_64)
rm -rf .whl
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]/#/--platform=}" --constraint constraints.txt -d .whl "${wheels[@]}"
sum() { awk '{bytes += $1} END {printf "%d", bytes}'; }
checkout=$(git ls-files -z --cached --others --exclude-standard | xargs -0 -n 1 du -b | sum)
carried=$(du -b .whl/*.whl | sum)
ls -l .whl
echo "wheels $((carried >> 20)) MiB and checkout $((checkout >> 20)) MiB, together $(((carried + checkout) >> 20)) of 64"
if ((carried + checkout > most)); then
    echo "that is too much: take a wheel out of the list in $0" >&2
    exit 1
fi
