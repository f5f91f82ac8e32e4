#!/usr/bin/env bash
# Makes or reuses the virtual environment that the tests and the examples run in: .venv in the project root.
# Safe to run at any time and by several at once; does nothing in a fraction of a second when all is in place.
# An install that was interrupted, or was made for another folder, is thrown away and made anew.
#   RPP_VENV    another place for the environment        RPP_PYTHON  the Python to make it from
# pip's own variables work: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives torch's CPU build.
set -euo pipefail

pythons=(3.11 3.12 3.13) # setup.py and megatron_rpp/doctor.py name the same ones
torch_pin=torch==2.13.0
torch_version=${torch_pin#torch==}
cpu_index=https://download.pytorch.org/whl/cpu

# Measured in MB for each build of torch.
declare -A environment_mb=([CPU]=3000 [CUDA]=6300)
declare -A download_mb=([CPU]=700 [CUDA]=3100)
declare -A temporary_mb=([CPU]=700 [CUDA]=2100) # pip removes these files after each of its steps

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RPP_VENV:-$root/.venv}
stamp=$venv/.rpp-stamp
unfinished=$venv/.rpp-unfinished
log=$venv/bootstrap.log
python="" # what the environment is made from, set by find_python with its minor version
python_minor=""

say() { printf '[bootstrap] %s\n' "$*" >&2; }

fail() { # fail LINE... : says each line, then ends
    local line
    for line in "$@"; do say "$line"; done
    exit 1
}

gb() { printf '%d.%d GB' $(($1 / 1000)) $(($1 % 1000 / 100)); }

is_accepted() { [[ -n $1 && " ${pythons[*]} " == *" $1 "* ]]; }

# examine PYTHON: prints "MINOR FULL STATE PATH", and nothing for one that does not run or has no wheels.
examine() {
    "$1" -c '
import sys, sysconfig
try:
    import ensurepip, venv
    state = "complete"
except ImportError:
    state = "no-venv"
if sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    minor, full = "%d.%d" % sys.version_info[:2], "%d.%d.%d" % sys.version_info[:3]
    print(minor, full, state, sys._base_executable)
' </dev/null 2>/dev/null || true
}

# Prints the Pythons to try. PATH may hold several of one name, of which the first may start nothing.
list_candidates() {
    local name path real
    local -A known=()
    if [[ -n ${RPP_PYTHON:-} ]]; then
        echo "$RPP_PYTHON"
        return
    fi
    [[ ! -x $venv/bin/python ]] || echo "$venv/bin/python" # an environment that is made anew keeps its Python
    while read -r path; do
        real=$(readlink -f "$path")
        [[ -n ${known[$real]:-} ]] || echo "$path"
        known[$real]=yes
    done < <(for name in python3 "${pythons[@]/#/python}"; do type -aP "$name" || true; done)
}

# Sets python and python_minor to the first Python that can make the environment, or ends with how to get one.
find_python() {
    local candidate minor full state path found="" incomplete=""
    while read -r candidate; do
        read -r minor full state path <<<"$(examine "$candidate")"
        if is_accepted "$minor" && [[ $state == complete ]]; then
            python=$path
            python_minor=$minor
            return
        elif is_accepted "$minor"; then
            incomplete=${incomplete:-$candidate $minor}
        else
            [[ -z $found ]] || found+=", "
            found+="$candidate (${minor:+Python }${full:-does not run, or is not a standard CPython})"
        fi
    done < <(list_candidates)
    if [[ -n $incomplete ]]; then
        minor=${incomplete##* }
        candidate=${incomplete% *}
        fail "$candidate (Python $minor) cannot make virtual environments: its module venv or ensurepip is missing." \
            "On Debian and Ubuntu, run 'sudo apt-get install python$minor-venv', then this command again." \
            "Otherwise set RPP_PYTHON to another Python 3.11, 3.12 or 3.13."
    fi
    [[ -z ${RPP_PYTHON:-} ]] || fail "Python 3.11, 3.12 or 3.13 is needed, but RPP_PYTHON is $found." \
        "Set RPP_PYTHON to one of these versions, or unset it to search PATH."
    fail "Python 3.11, 3.12 or 3.13 is needed. Found on PATH: ${found:-no Python}." \
        "Get one in any of these ways, then run this command again:" \
        "  apt:   sudo apt-get install python3-venv (Debian 12, 13, Ubuntu 24.04) or python3.11-venv (Ubuntu 22.04)" \
        "  uv:    uv venv --seed --python 3.12 '$venv'" \
        "  conda: conda create -y -n rpp python=3.12 && conda activate rpp"
}

# Prints the minor version of the environment's Python; nothing when it does not run or has no pip.
environment_minor() {
    "$venv/bin/python" -I -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

wanted_stamp() {
    printf '%s\n' "$root"
    cat "$root"/requirements/{cpu,dev}.txt "$root"/setup.py "$root"/tools/bootstrap.sh | sha256sum
}

is_ready() {
    [[ -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]] &&
        "$venv/bin/python" -I -c 'import megatron_rpp, megatron_rpp_patches' 2>/dev/null
}

step() { # step MESSAGE COMMAND... : one line with its time; the command's output only when it fails
    local message=$1 start=$SECONDS
    shift
    printf '[bootstrap] %s ... ' "$message" >&2
    if ! "$@" >>"$log" 2>&1; then
        printf 'failed\n' >&2
        tail -n 30 "$log" >&2
        say "failed: $*"
        say "the whole log is $log; the next run starts afresh."
        exit 1
    fi
    printf '%d s\n' $((SECONDS - start)) >&2
}

# Sets build to the build of torch that pip will choose. pip lists the versions in the order of its preference:
# 2.13.0+cpu comes before 2.13.0.
find_build() {
    local versions chosen pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
    if ! versions=$("${pip[@]}" index versions torch 2>>"$log"); then
        grep '^ERROR' "$log" >&2 || true
        fail "pip found no torch for this Python. Is there a network? 'pip config list' shows pip's index."
    fi
    versions=$(sed -n 's/^Available versions: //p' <<<"$versions" | tr -d ' ' | tr ',' '\n')
    chosen=$(grep -m 1 -E "^${torch_version//./\\.}(\+|$)" <<<"$versions" || true)
    if [[ $chosen == *+cpu* ]]; then build=CPU; else build=CUDA; fi # PyPI's wheels are built for CUDA
}

has_gpu() { [[ -n $(ls -d /dev/nvidia[0-9]* 2>/dev/null) ]]; } # by the device files, as megatron_rpp/host.py

say_what_is_fetched() {
    say "will download up to $(gb "${download_mb[$build]}")" \
        "(torch $torch_version, $build build, and about 110 other packages) and take $(gb "${environment_mb[$build]}") in $venv"
    if [[ $build == CUDA ]] && ! has_gpu; then
        say "This host has no GPU. The CPU build of torch does the same here with" \
            "$(gb "${download_mb[CPU]}") to download and $(gb "${environment_mb[CPU]}") on disk." \
            "To get it, press Ctrl-C, run the next line, and run this command again."
        if [[ -z ${PIP_EXTRA_INDEX_URL:-} ]]; then
            say "  export PIP_EXTRA_INDEX_URL=$cpu_index"
        else
            say "  export PIP_EXTRA_INDEX_URL=\"\$PIP_EXTRA_INDEX_URL $cpu_index\""
        fi
    fi
}

# Compares what each file system has to hold with what it has free. The three folders may share one.
check_disk() {
    local cache use what mb path free mount short=""
    local -A needed=() available=() uses=()
    cache=$("$venv/bin/python" -m pip cache dir 2>/dev/null) || cache="" # fails where pip's cache is off
    for use in "${environment_mb[$build]} environment $venv" \
        "${temporary_mb[$build]} temporary ${TMPDIR:-/tmp}" \
        ${cache:+"${download_mb[$build]} cache $cache"}; do
        read -r mb what path <<<"$use"
        uses[$what]="$(gb "$mb") for $path"
        while [[ ! -e $path ]]; do path=$(dirname "$path"); done
        read -r free mount < <(df -k --output=avail,target "$path" | tail -n 1) || continue
        needed[$mount]=$((${needed[$mount]:-0} + mb))
        available[$mount]=$((free * 1024 / 1000000))
    done
    for mount in "${!needed[@]}"; do
        if ((needed[$mount] > available[$mount])); then
            short=yes
            say "not enough disk space on $mount: $(gb "${needed[$mount]}") needed," \
                "$(gb "${available[$mount]}") free"
        fi
    done
    [[ -n $short ]] || return 0
    what="${uses[environment]} (RPP_VENV), ${uses[temporary]} (TMPDIR)"
    [[ -z $cache ]] || what+=", ${uses[cache]} (PIP_CACHE_DIR)"
    fail "In all: $what." \
        "Free some space, or set the variable in parentheses to a folder on another disk." \
        "PIP_NO_CACHE_DIR=1 turns pip's cache off."
}

exec 9<"$root/requirements/cpu.txt"
flock -n 9 || { say "another bootstrap is at work, waiting for it"; flock 9; }

if [[ -n ${RPP_PYTHON:-} ]]; then
    find_python
    minor=$(environment_minor)
    if is_accepted "$minor" && [[ $minor != "$python_minor" && ! -e $unfinished ]]; then
        fail "$venv has Python $minor, but RPP_PYTHON is Python $python_minor." \
            "Remove that folder, set RPP_VENV to another one, or unset RPP_PYTHON."
    fi
fi
is_ready && exit 0

if [[ -d $venv && ! -e $venv/pyvenv.cfg && ! -e $unfinished && -n $(ls -A "$venv") ]]; then
    fail "$venv holds something that is not a virtual environment; set RPP_VENV to another place"
fi
outdated=""
if [[ -e $unfinished ]] || { [[ -f $stamp ]] && [[ $(head -n 1 "$stamp") != "$root" ]]; }; then
    outdated="is unfinished or belongs to another folder"
elif [[ -d $venv ]] && ! is_accepted "$(environment_minor)"; then
    outdated="has no working Python 3.11, 3.12 or 3.13 with pip"
    [[ -f $stamp || -z $(ls -A "$venv") ]] || fail "$venv $outdated, and this script did not make it." \
        "Remove it, or set RPP_VENV to another folder. 'uv venv' puts pip into an environment with --seed."
fi
[[ -d $venv && -z $outdated ]] || [[ -n $python ]] || find_python
if [[ -n $outdated ]]; then
    say "$venv $outdated, making it anew"
    rm -rf "$venv"
fi
if [[ ! -d $venv ]]; then
    mkdir -p "$venv"
    touch "$unfinished"
    step "virtual environment in $venv from $python" "$python" -m venv "$venv"
fi
if ! compgen -G "$venv/lib/python3*/site-packages/torch-$torch_version*.dist-info" >/dev/null; then
    find_build
    say_what_is_fetched
    check_disk
fi
touch "$unfinished"
rm -f "$stamp"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off)
step "pinned packages (a few minutes the first time)" \
    "${pip[@]}" --no-deps -r "$root/requirements/cpu.txt" -r "$root/requirements/dev.txt"
step "what torch still needs on this host" "${pip[@]}" "$torch_pin"
step "megatron_rpp, editable" "${pip[@]}" --no-deps --no-build-isolation --editable "$root"
wanted_stamp >"$stamp"
rm -f "$unfinished"
say "ready: $venv/bin/rpp"
