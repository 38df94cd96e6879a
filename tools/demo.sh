#!/usr/bin/env bash
# Sets .venv up if need be, then runs tools/demo.py: trains, counts and explains small models, and writes
# runs/demo/index.html. Arguments go to tools/demo.py (tools/demo.sh --help lists them).
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

tools/setup.sh
exec .venv/bin/python tools/demo.py "$@"
