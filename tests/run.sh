#!/usr/bin/env bash
# The whole test suite on a CPU, one pytest process for each tier, fast tiers first and two at a time.
#
#   tests/run.sh                   every tier below
#   tests/run.sh unit guards       the named ones
#   tests/run.sh unit -- -k clip   what follows -- goes to pytest
#   RPP_TEST_LANES=1 tests/run.sh  one tier at a time, its output as it comes; otherwise it is shown when a tier ends
#
# A tier that collects no test has failed, and so has one that only skips when CI=true. The last line counts all tests.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
all_tiers=(guards unit patches dist e2e mcore sglang slurm)
limit_s=3000 # of one tier: a hang must not take the whole of CI's time

tiers=()
while (($#)) && [[ $1 != -- ]]; do
    tiers+=("$1")
    shift
done
(($#)) && shift # the --
((${#tiers[@]})) || tiers=("${all_tiers[@]}")
for tier in "${tiers[@]}"; do
    if [[ ! " ${all_tiers[*]} " == *" $tier "* ]]; then
        echo "no tier $tier; there are: ${all_tiers[*]}" >&2
        exit 2
    fi
done

bash "$root/tools/bootstrap.sh" || exit 1
cd "$root" || exit 1
python=${RPP_VENV:-$root/.venv}/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tiers start several processes on the same cores
lanes=${RPP_TEST_LANES:-2}
((lanes > ${#tiers[@]})) && lanes=${#tiers[@]}

tally=$(mktemp -d)
trap 'rm -rf "$tally"' EXIT

# Runs one tier and leaves "passed failed skipped seconds note" in $tally/TIER.result.
run_tier() {
    local tier=$1 start=$SECONDS code p f s note=""
    shift
    printf '\n== %s\n' "$tier"
    timeout --foreground --signal=INT --kill-after=60 "$limit_s" "$python" -m pytest "tests/$tier" -q --tally "$tally/$tier" "$@"
    code=$?
    read -r p f s <<<"$(cat "$tally/$tier" 2>/dev/null || echo 0 0 0)"
    case $code in
        0) ;;
        1) ((f)) || { f=1 note="pytest failed outside its tests"; } ;;
        5) f=1 note="collected no test" ;;
        124 | 137) f=$((f + 1)) note="did not end within $limit_s s" ;;
        *) f=$((f ? f : 1)) note="pytest ended with code $code" ;;
    esac
    if ((code == 0 && p == 0)) && [[ ${CI:-} == true ]]; then
        f=$((f + 1)) note="only skipped, in CI"
    fi
    echo "$p $f $s $((SECONDS - start)) $note" >"$tally/$tier.result"
}

# Takes the next tier that no other lane has taken, until there is none. mkdir succeeds for one of them only.
run_lane() {
    local tier
    for tier in "${tiers[@]}"; do
        mkdir "$tally/$tier.taken" 2>/dev/null || continue
        if ((lanes == 1)); then
            run_tier "$tier" "$@"
        else
            run_tier "$tier" "$@" >"$tally/$tier.log" 2>&1
            flock "$tally" cat "$tally/$tier.log"
        fi
    done
}

if ((lanes == 1)); then
    run_lane "$@"
else
    echo "running ${tiers[*]}: $lanes at a time, the output of each when it ends"
    set -m # a process group for each lane, so that Ctrl-C can be passed on to all of it
    pids=()
    for ((lane = 0; lane < lanes; lane++)); do
        run_lane "$@" &
        pids+=($!)
    done
    trap 'for pid in "${pids[@]}"; do kill -INT -- "-$pid" 2>/dev/null; done; wait; exit 130' INT TERM
    wait "${pids[@]}"
    set +m
fi

passed=0 failed=0 skipped=0 report=""
for tier in "${tiers[@]}"; do
    read -r p f s seconds note <<<"$(cat "$tally/$tier.result" 2>/dev/null || echo "0 1 0 0 has no result")"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    report+=$(printf '%-8s %5d passed %4d failed %4d skipped %6d s  %s' "$tier" "$p" "$f" "$s" "$seconds" "$note")$'\n'
done

printf '\n%s' "$report"
printf '%-8s %5d s\n' "in all" "$SECONDS"
printf '%d passed, %d failed%s\n' "$passed" "$failed" "$( ((skipped)) && printf ', %d skipped' "$skipped")"
((failed == 0))
