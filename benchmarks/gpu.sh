#!/usr/bin/env bash
# Nine minutes of one CUDA machine, without network: the tests marked gpu, then what training reaches there (gpu.py).
#
#   benchmarks/gpu.sh --out DIR                  DIR gets tests.txt and gpu-NAME.json, also if it has to end early
#   benchmarks/gpu.sh --out DIR --only PHASE...  these alone (tests, 124m, 1b, ...); others in DIR stay as they are
#   benchmarks/gpu.sh --out DIR --dry-run        the same script on a CPU with tiny shapes, to see that it works
#
# PYTHON=...   the interpreter (default: .venv/bin/python if there is one, else python3)
# WHEELS=DIR   what it lacks, as wheels: unpacked into a directory of this call alone
# LIMIT=530    seconds in all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

limit=${LIMIT:-530} out='' options=()
while (($#)); do
    case $1 in
        --out) out=${2:?gpu.sh: --out needs a directory}; shift 2 ;;
        --dry-run) limit=110; options+=(--dry-run); shift ;;
        --only)
            options+=(--only); shift
            while (($#)) && [[ $1 != --* ]]; do options+=("$1"); shift; done ;;
        *) echo "gpu.sh: unknown option $1: --out DIR, --only PHASE..., --dry-run" >&2; exit 2 ;;
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

status=0
timeout -k 5 $((limit - SECONDS)) \
    "$PYTHON" benchmarks/gpu.py --out "$out" --seconds $((limit - SECONDS - 10)) "${options[@]}" || status=$?
echo "${SECONDS} s, exit code $status"
exit "$status"
