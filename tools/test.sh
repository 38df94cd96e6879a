#!/usr/bin/env bash
# Sets .venv up if need be, then runs the linter and the tests.
#
#   tools/test.sh [--all] [PYTEST ARGUMENTS]
#
# Without --all: what fits 4 minutes on 2 cores. With it: everything, at most 15 minutes; tests that want CUDA skip
# themselves where there is none. Without PYTEST ARGUMENTS the test files are shared among up to 4 processes.
# Example: tools/test.sh tests/test_cards.py -k twin
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

select=(-m 'not slow and not gpu')
arguments=()
for argument in "$@"; do
    case $argument in
        --all) select=() ;;
        -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"; exit ;;
        *) arguments+=("$argument") ;;
    esac
done

if [[ ${#arguments[@]} -eq 0 ]]; then
    # By file, because fixtures that train are made once a file; more processes want more memory than they save time.
    arguments=(-n auto --maxprocesses 4 --dist loadfile)
fi

tools/setup.sh
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest ${select[@]+"${select[@]}"} "${arguments[@]}"
