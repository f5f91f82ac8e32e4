#!/usr/bin/env bash
# Makes or reuses the virtual environment that the tests and the examples run in: .venv in the project root.
# Safe to run at any time and by several at once; does nothing in a fraction of a second when all is in place.
# An install that was interrupted, or was made for another folder, is thrown away and made anew.
#   RPP_VENV    another place for the environment        RPP_PYTHON  another Python 3.11
# pip's own variables work: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu fetches the small CPU build of torch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RPP_VENV:-$root/.venv}
stamp=$venv/.rpp-stamp
unfinished=$venv/.rpp-unfinished
log=$venv/bootstrap.log

say() { printf '[bootstrap] %s\n' "$*" >&2; }

is_usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate candidates=(python3.11 python3 /usr/bin/python3.11 /usr/local/bin/python3.11)
    [[ -z ${RPP_PYTHON:-} ]] || candidates=("$RPP_PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    say "no usable Python 3.11 was found (tried: ${candidates[*]}); the pinned packages are for 3.11."
    say "Install it with its venv module, e.g. 'apt-get install python3.11 python3.11-venv', or set RPP_PYTHON=/path/to/python3.11."
    exit 1
}

wanted_stamp() {
    printf '%s\n' "$root"
    cat "$root"/requirements/{cpu,dev}.txt "$root"/setup.py "$root"/tools/bootstrap.sh | sha256sum
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

exec 9<"$root/requirements/cpu.txt"
flock -n 9 || { say "another bootstrap is at work, waiting for it"; flock 9; }

is_ready() {
    [[ -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]] && "$venv/bin/python" -I -c 'import megatron_rpp, megatron_rpp_patches' 2>/dev/null
}

is_ready && exit 0

if [[ -d $venv && ! -e $venv/pyvenv.cfg && ! -e $unfinished && -n $(ls -A "$venv") ]]; then
    say "$venv holds something that is not a virtual environment; set RPP_VENV to another place"
    exit 1
fi
if [[ -e $unfinished ]] || { [[ -f $stamp ]] && [[ $(head -n 1 "$stamp") != "$root" ]]; }; then
    say "$venv is unfinished or belongs to another folder, making it anew"
    rm -rf "$venv"
elif [[ -d $venv ]] && ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    say "$venv has no working Python 3.11, making it anew"
    rm -rf "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off)
if [[ ! -d $venv ]]; then
    python=$(find_python)
    mkdir -p "$venv"
    touch "$unfinished"
    step "virtual environment in $venv from $("$python" -c 'import sys; print(sys.executable)')" "$python" -m venv "$venv"
fi
touch "$unfinished"
rm -f "$stamp"
step "pinned packages (about two minutes the first time)" \
    "${pip[@]}" --no-deps -r "$root/requirements/cpu.txt" -r "$root/requirements/dev.txt"
step "what torch still needs on this host" "${pip[@]}" torch==2.13.0
step "megatron_rpp, editable" "${pip[@]}" --no-deps --no-build-isolation --editable "$root"
wanted_stamp >"$stamp"
rm -f "$unfinished"
say "ready: $venv/bin/rpp"
