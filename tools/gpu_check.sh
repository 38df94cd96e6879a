#!/usr/bin/env bash
# Checks on a GPU, in under 10 minutes, what the tests check on a CPU, and writes one JSON to attach to an issue.
#
#   tools/gpu_check.sh [OUT.json] [PYTEST ARGUMENTS]
#
# Every model against the CPU in float32, bfloat16 and mixed precision, several ranks over NCCL, every detector config,
# short runs, and times beside dense twins. OUT.json (default: gpu_check.json) has versions, device, every check with
# pass, fail or skip and its difference to the CPU, and the times. After 9 minutes what is left is skipped, and said so.
# Exit code 0: nothing failed. 1: something did, see the JSON. 2: there is no CUDA here, or no torch.
# PYTHON=/path/to/python chooses the Python (default: .venv/bin/python where tools/setup.sh made it, else python3).
# MOE_ZOO_GPU_DEVICE=cpu rehearses all of it on the CPU, smaller.
# Example: tools/gpu_check.sh gpu_check.json -k vmoe
set -euo pipefail
home=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

out=gpu_check.json
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"
    exit
elif [[ $# -gt 0 && $1 != -* ]]; then
    out=$1
    shift
fi
[[ $out == *.json ]] || fail "OUT '$out': name the file that is to be written *.json."
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x $home/.venv/bin/python ]]; then python=$home/.venv/bin/python; fi
# 0: there is CUDA, or none is wanted; 3: there is none; anything else: there is no torch, or no pytest
state=0
"$python" -c '
import os, sys
import pytest, torch
wanted = os.environ.get("MOE_ZOO_GPU_DEVICE", "cuda").startswith("cuda")
sys.exit(3 if wanted and not torch.cuda.is_available() else 0)' 2>/dev/null || state=$?
if [[ $state -eq 3 ]]; then
    fail 'torch sees no CUDA device here, which is what this checks; MOE_ZOO_GPU_DEVICE=cpu rehearses it on the CPU.'
elif [[ $state -ne 0 ]]; then
    fail "$python has no torch or no pytest: run tools/setup.sh, or name another by PYTHON=/path/to/python."
fi
mkdir -p -- "$(dirname -- "$out")"
MOE_ZOO_GPU_REPORT=$(CDPATH='' cd -- "$(dirname -- "$out")" && pwd)/$(basename -- "$out")
export MOE_ZOO_GPU_REPORT
export MOE_ZOO_GPU_DEVICE=${MOE_ZOO_GPU_DEVICE:-cuda}
export PYTHONPATH=$home/tests:$home${PYTHONPATH:+:$PYTHONPATH}
cd -- "$home"
code=0
"$python" -m pytest -q -p gpu_report -p no:cacheprovider tests/test_gpu.py "$@" || code=$?
if [[ $code -le 1 ]]; then printf 'written: %s\n' "$out"; fi
if [[ $code -ne 0 ]]; then exit 1; fi
