#!/usr/bin/env bash
# Nine minutes of one CUDA machine, without network: the tests marked gpu, then GPT-2's shape, eager and compiled.
#
#   benchmarks/gpu.sh --out DIR             DIR gets tests.txt and gpu-NAME.json, also if it has to end early
#   benchmarks/gpu.sh --out DIR --dry-run   the same script on a CPU with tiny shapes, to see that it works
#
# PYTHON=...   the interpreter (default: .venv/bin/python if there is one, else python3)
# WHEELS=DIR   what it lacks, as wheels: unpacked into a directory of this call alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

limit=520 tests=240 out='' dry_run=()
while (($#)); do
    case $1 in
        --out) out=${2:?gpu.sh: --out needs a directory}; shift 2 ;;
        --dry-run) limit=60 tests=30 dry_run=(--dry-run); shift ;;
        *) echo "gpu.sh: unknown option $1: --out DIR, --dry-run" >&2; exit 2 ;;
    esac
done
[[ $out ]] || { echo 'gpu.sh: where to? --out DIR' >&2; exit 2; }
mkdir -p "$out"

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "$WHEELS"/*.whl
    PYTHONPATH="$scratch/site:$PYTHONPATH"
fi
"$PYTHON" benchmarks/gpu.py "${dry_run[@]}"  # what is missing is said here, in one line

status=0
timeout "$tests" "$PYTHON" -m pytest tests/gpu -m gpu -W default -p no:cacheprovider --basetemp "$scratch/tests" 2>&1 |
    tee "$out/tests.txt" || status=$?
"$PYTHON" benchmarks/gpu.py --out "$out" --seconds $((limit - SECONDS)) "${dry_run[@]}" || status=$?
echo "${SECONDS} s, exit code $status"
exit "$status"
