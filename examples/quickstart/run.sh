#!/usr/bin/env bash
# From a bare machine to a model that REINFORCE++ has taught to work its sums out, on two CPU cores.
#   bash examples/quickstart/run.sh [section.name=value ...]     e.g. run.seed=1 parallel.tp=1 parallel.pp=2 run.steps=5
# Any setting of run.yaml can be given; it holds for the warm-up and for the training.
set -euo pipefail

start=$SECONDS
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/examples/quickstart
work=$root/build/quickstart
run_dir=$work/run
seed=0
for setting in "$@"; do
    case $setting in
        run.seed=*) seed=${setting#run.seed=} ;;
        run.dir=*) run_dir=$(realpath -m "${setting#run.dir=}") ;;
        *=*) ;;
        *)
            echo "run.sh: '$setting' is not a setting; write section.name=value, e.g. run.seed=1" >&2
            exit 2
            ;;
    esac
done

say() { printf '\n== %s (%d s since the start)\n' "$*" $((SECONDS - start)); }

bash "$root/tools/bootstrap.sh"
bin=$(dirname "$(readlink -f "${RPP_VENV:-$root/.venv}")/x")/bin
export OMP_NUM_THREADS=1

say "1/4 a tiny Qwen3 with random weights, and its problems"
"$bin/python" "$here/make_assets.py" "$work" --seed "$seed"

rm -rf "$work/warm" "$work/warm-up"
say "2/4 supervised warm-up: worked solutions mixed with bare answers, through the Megatron policy"
"$bin/rpp" sft "$here/run.yaml" "$@" model.hf="$work/model" sft.out="$work/warm" run.dir="$work/warm-up"

say "3/4 REINFORCE++ on Megatron-Core and SGLang"
"$bin/rpp" train "$here/run.yaml" "$@" run.dir="$run_dir" run.resume=never

say "4/4 what has changed"
"$bin/python" "$here/summary.py" "$run_dir" --total-s $((SECONDS - start))
