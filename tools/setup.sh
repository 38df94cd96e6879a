#!/usr/bin/env bash
# Makes .venv beside the README, or finishes or updates it; where it is up to date nothing is installed.
#
#   tools/setup.sh [--detection | --no-detection] [--bench]
#
# --no-detection leaves out detectron2 and what it needs; later runs keep that choice until --detection is given.
# --bench adds the mixture-of-experts layers of others, which tools/benchmark.py times beside ours.
# PYTHON=/path/to/python3.12 tools/setup.sh chooses the Python that makes .venv (default: python3 of your PATH).
# A torch that this Python already has is used as it is. An interrupted run is finished by the next one.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

torch_pins=(torch==2.14.1 torchvision==0.29.1)
# The Python part of detectron2: a third-party build of upstream's a59f0563, reviewed file by file, so bound by its hash.
detectron2_pin='sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561'
# timm's own tests, which our models have to pass, come with its source distribution only.
timm_pin='timm==1.0.31 --hash=sha256:baa0b333339c46d3d6d4965d99b69f5053afed71210e8f433d7ea5ee6a18f0ec'
# Layers of others, then what they import. One of them pins an old torch, so that nothing may follow what they ask for.
bench_pins=(
    pytorch-mixtures==0.1.5 mixture-of-experts==0.2.3 st-moe-pytorch==0.1.8 soft-moe-pytorch==0.1.9
    einops==0.8.2 beartype==0.23.1 CoLT5-attention==0.11.2 local-attention==1.10.0
)
venv_python=.venv/bin/python
stamp=.venv/moe_zoo_setup  # written last: holds what was set up, and that it was finished
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
version() { "$1" -c 'import platform; print("Python", platform.python_version())' 2>/dev/null || echo 'nothing that runs'; }
package_version() { $venv_python -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null || true; }
torch_version() { "$1" -c 'import torch; from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true; }

# The Python that makes .venv: the one asked for, or the first on the PATH that will do.
choose_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is $(version "$PYTHON"); moe_zoo runs on 3.11, 3.12 and 3.13."
        python=$PYTHON
        return
    fi
    for candidate in python3 python python3.13 python3.12 python3.11; do
        if supported "$candidate"; then
            python=$candidate
            return
        fi
    done
    fail "moe_zoo runs on Python 3.11, 3.12 and 3.13, but python3 here is $(version python3);" \
        'install one of them, or name it: PYTHON=/path/to/python3.12 tools/setup.sh'
}

make_venv() {
    choose_python
    [[ -w . ]] || fail "$PWD cannot be written to by $(id -un), and .venv has to be made there."
    local system=() ours
    if [[ -n $(torch_version "$python") ]]; then
        system=(--system-site-packages)
    fi
    say "Making .venv with $(version "$python") ($(command -v "$python"))"
    "$python" -m venv ${system[@]+"${system[@]}"} .venv \
        || fail "'$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv."
    if [[ -n ${system[*]-} && -z $(torch_version $venv_python) ]]; then
        # That Python is itself a virtual environment, whose packages --system-site-packages does not reach.
        ours=$($venv_python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        "$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' > "$ours/torch_of_caller.pth"
    fi
}

# Says what comes over the network before it does. Figures: x86-64 Linux, wheels of November 2026.
announce() {
    local rest='timm, onnxruntime, scikit-learn, matplotlib, ruff, pytest and EfficientNet-Lite0 weights' megabytes=200
    if [[ $detection == detection ]]; then
        rest="detectron2 with its companions, $rest"
        megabytes=290
    fi
    if [[ -n $torch ]]; then
        say "Using the torch $torch that is already there."
        say "Downloading at most $megabytes MB: $rest. About 1 minute at 100 Mbit/s."
    else
        say "Downloading about 3 GB for torch and its CUDA libraries, and $megabytes MB for $rest."
        say 'About 6 minutes at 100 Mbit/s, 6 GB on disk.'
    fi
    say 'What pip has in its cache is not downloaded again; an interrupted set-up is finished by the next run.'
}

install_packages() {
    local extras=demo,weights,export,dev wanted=("${torch_pins[@]}") constraints=.venv/constraints.txt
    if [[ $detection == detection ]]; then extras+=,detection; fi
    : > $constraints
    if [[ -n $torch ]]; then
        wanted=(torch torchvision)
        say "torch==$torch" > $constraints  # keeps it: torchvision is then chosen to fit
    fi
    $venv_python -m pip install -c $constraints "${wanted[@]}" -e ".[$extras]"
}

# Staged and moved into place as the last step, so that a detectron2 that can be imported is a complete one.
install_detectron2() {
    local share=.venv/share/detectron2 staged site
    if $venv_python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("detectron2") is None)'; then
        return
    fi
    staged=$share/staged
    site=$($venv_python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    rm -rf $share
    mkdir -p $staged
    say "$detectron2_pin" > $share/requirements.txt
    # The wheel calls itself a cp310 one; its Python part runs on 3.11 to 3.13.
    $venv_python -m pip install --no-deps --only-binary=:all: --python-version 3.10 --implementation cp --abi none \
        --platform any --target $staged --require-hashes -r $share/requirements.txt \
        || fail 'detectron2 could not be installed; run this again, or with --no-detection.'
    rm -f $staged/detectron2/_C*.so  # compiled by the uploader: nobody can review it, and nothing here needs it
    mv $staged/tools $share/tools    # upstream's scripts: as a package called `tools` they would shadow everybody's own
    rm -rf "$site"/sal_detectron2-*.dist-info
    mv $staged/*.dist-info "$site"/
    mv $staged/detectron2 "$site"/
    rm -rf $staged
    detectron2_origin=', the Python part of sal-detectron2 0.7.2; its compiled file was removed, its scripts lie in '$share/tools
}

fetch_timm_tests() {
    local share=.venv/share/timm staged=.venv/share/timm/staged
    if [[ -f $share/tests/test_models.py ]]; then
        return
    fi
    rm -rf $share
    mkdir -p $staged
    say "$timm_pin" > $staged/requirements.txt
    $venv_python -m pip download --no-deps --no-binary=:all: --require-hashes -d $staged -r $staged/requirements.txt \
        && tar -xzf $staged/timm-*.tar.gz -C $staged --strip-components=1 \
        && mv $staged/tests $share/tests \
        && rm -rf $staged
}

install_bench() {
    local pin missing=()
    for pin in "${bench_pins[@]}"; do
        if [[ $(package_version "${pin%%==*}") != "${pin##*==}" ]]; then missing+=("$pin"); fi
    done
    if [[ ${#missing[@]} -eq 0 ]]; then
        say 'Set-up: the layers of others for tools/benchmark.py are there, nothing to install.'
        return
    fi
    say "Downloading at most 2 MB for tools/benchmark.py: ${missing[*]}."
    $venv_python -m pip install --no-deps "${missing[@]}" \
        || fail 'the layers of others could not be installed; the benchmarks run without them, or run this again.'
}

detection= bench=
for argument in "$@"; do
    case $argument in
        --detection) detection=detection ;;
        --no-detection) detection=no-detection ;;
        --bench) bench=bench ;;
        -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"; exit ;;
        *) fail "tools/setup.sh does not know '$argument'; it takes --detection, --no-detection, --bench or --help." ;;
    esac
done
before=$(cat $stamp 2>/dev/null || true)
detection=${detection:-${before%% *}}
detection=${detection:-detection}
now="$detection $(cat pyproject.toml tools/setup.sh | cksum) $PWD"
if [[ -x $venv_python && -n ${PYTHON:-} && $(version "$PYTHON") != "$(version $venv_python)" ]]; then
    say "PYTHON=$PYTHON is not used: .venv is of $(version $venv_python). Remove .venv to make it anew."
fi
# Without detection is a part of with it: nothing is taken away.
if [[ ($before == "$now" || $before == "detection ${now#* }") && -x $venv_python ]]; then
    say 'Set-up: .venv is up to date, nothing to install.'
    if [[ -n $bench ]]; then install_bench; fi
    exit
fi

# An interrupted `python -m venv` is repaired by another one.
$venv_python -m pip --version >/dev/null 2>&1 || make_venv
supported $venv_python \
    || fail ".venv is of $(version $venv_python); moe_zoo runs on 3.11, 3.12 and 3.13: remove .venv and run this again."
[[ -w .venv ]] || fail "$PWD/.venv cannot be written to by $(id -un): run this as $(stat -c %U .venv), or remove .venv."
torch=$(torch_version $venv_python)
announce
install_packages
detectron2_origin=', which was there already and is left alone'
if [[ $detection == detection ]]; then install_detectron2; fi
if fetch_timm_tests; then
    say "$now" > $stamp.part
    mv $stamp.part $stamp
else
    say "timm's source distribution could not be fetched: its tests are skipped, and the next run tries again."
fi

if [[ -n $bench ]]; then install_bench; fi

$venv_python - "$detection" "$detectron2_origin" <<'PYTHON'
import sys
from importlib.metadata import version

what = ', '.join(f'{name} {version(name)}' for name in ('torch', 'torchvision', 'timm'))
detection, origin = sys.argv[1:]
if detection == 'detection':
    import detectron2
    what += f', detectron2 {detectron2.__version__}{origin}'
else:
    what += '; without detectron2 (--no-detection)'
print(f'Set-up finished in .venv: Python {sys.version.split()[0]}, {what}.')
PYTHON
