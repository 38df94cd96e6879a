#!/usr/bin/env bash
# Sets .venv up if need be, then runs tools/demo.py: trains, counts and explains small models, and writes
# runs/demo/index.html.
#
#   tools/demo.sh [--no-detection] [OPTIONS OF tools/demo.py]
set -euo pipefail
export MOE_ZOO_DEMO_CALLED_AS=$0
CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

detection=()
for argument in "$@"; do
    case $argument in
        --no-detection) detection=(--no-detection) ;;
        -h | --help)
            if [[ -e .venv/moe_zoo_setup ]]; then
                exec .venv/bin/python tools/demo.py --help
            fi
            sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"
            exit
            ;;
    esac
done

tools/setup.sh ${detection[@]+"${detection[@]}"}
exec .venv/bin/python tools/demo.py "$@"
