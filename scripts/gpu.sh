#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, test, time. Ends within LIMIT seconds, with a short table last.
#   PYTHON=python3 scripts/gpu.sh [pytest arguments]
# OUT     where the full logs and a copy of the new results go (build/gpu)
# LIMIT   seconds for everything (570); the tests get at most 45 % of it
# BENCH   arguments of benchmarks.run
set -uo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-build/gpu}")
limit=${LIMIT:-570}
bench=${BENCH:---cases p3d63 --passes infer,train --batch 32 --implementations p3d_kernels,eager,compile}
mkdir -p "$out"
touch "$out/started"
export PYTHONUNBUFFERED=1 P3D_BUILD_CUDA=${P3D_BUILD_CUDA:-1}
report="" failed=0

# step NAME SECONDS COMMAND...: runs it into $out/NAME.log; an interrupt at the limit lets it say how far it came
step() {
    local name=$1 seconds=$2 begun=$SECONDS status=passed
    shift 2
    echo "== $name"
    timeout --signal=INT --kill-after=15 "$seconds" "$@" >"$out/$name.log" 2>&1
    case $? in
    0) ;;
    124 | 137) status="out of time ($seconds s)" failed=1 ;;
    *) status=FAILED failed=1 ;;
    esac
    [ "$status" = passed ] || { grep -E "^(\[gw[0-9]+\] .*)?(FAILED|ERROR)" "$out/$name.log"; tail -n 40 "$out/$name.log"; }
    report+=$(printf '%-10s %-24s %4d s  %s' "$name" "$status" $((SECONDS - begun)) "$out/$name.log")$'\n'
    [ "$status" = passed ]
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu: PyTorch finds no GPU on this machine" >&2
    exit 1
fi
step build "$limit" "$python" setup.py build_ext --inplace &&
    step spills "$limit" "$python" scripts/check_spills.py
step info 60 "$python" -m p3d_kernels info
jobs=$(nproc)
step tests $((limit * 45 / 100)) "$python" -m pytest -v -n $((jobs > 8 ? 8 : jobs)) -ra "$@" # -v names a failure at once: time may run out
# shellcheck disable=SC2086 # the arguments are words
step bench $((limit > SECONDS + 20 ? limit - SECONDS - 20 : 1)) "$python" -m benchmarks.run $bench

(cd benchmarks && find results -newer "$out/started" -type f -exec cp --parents -t "$out" {} +) 2>/dev/null
cat "$out/info.log"
echo
tail -n 1 "$out/tests.log"
grep -v '^\s*$' "$out/bench.log" | tail -n 25
echo
printf '%s' "$report"
exit $failed
