#!/usr/bin/env bash
# The proof on a bare GPU machine: no network, nothing installed but Python, torch, Triton and pytest.
#
#   benchmarks/gpu.sh FOLDER [--dry-run] [STAGE ...]
#
# Builds the extensions, runs the GPU tests, a few of them under compute-sanitizer, the numerics report, the benchmark with
# every SDPA backend by name, and of what the CUDA extension has kernels for on these, in that order, each stage within
# its time. FOLDER gets the raw results, each stage's log and status, and summary.md. Run again with the same FOLDER, it
# goes on where it stopped: a stage that passed is not repeated. STAGE names the ones to run, else all do. --dry-run runs
# a miniature of each, without a GPU, to show that this script works.
#
# Environment: PYTHON (python3); COMMIT, what the results are filed under where there is no git.
# Exit status: 0 when every stage passed, now or before.
set -uo pipefail

STAGES=(build tests sanitizer numerics bench cuda full)
declare -A SECONDS_OF=([build]=240 [tests]=300 [sanitizer]=240 [numerics]=90 [bench]=480 [cuda]=300 [full]=590)

BY_CUDA='^(fp16|bf16)-.*-(dense|causal|decode)-'

usage() {
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

dry=
folder=
chosen=()
for argument in "$@"; do
    case $argument in
    --dry-run) dry=1 ;;
    -*) usage ;;
    *)
        if [[ -z $folder ]]; then
            folder=$argument
        elif [[ -v SECONDS_OF[$argument] ]]; then
            chosen+=("$argument")
        else
            usage
        fi
        ;;
    esac
done
[[ -n $folder ]] || usage
[[ ${#chosen[@]} -gt 0 ]] || chosen=("${STAGES[@]}")

mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH=src PYTHONUNBUFFERED=1
export python=${PYTHON:-python3}

# A small selection under each of compute-sanitizer's tools. Allocations are torch's own, one by one: in a pool, what
# lies beyond a tensor is memory too.
sanitize() {
    local tool
    for tool in memcheck racecheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -m gpu -q -x -p no:cacheprovider tests/kernels/test_sanitized.py || return
    done
}
export -f sanitize

# The command of a stage, in the array `command`.
command_of() {
    case $1${dry:+ dry} in
    build) command=("$python" setup.py build_ext --inplace) ;;
    tests) command=("$python" -m pytest -m gpu -q -p no:cacheprovider) ;;
    sanitizer) command=(sanitize) ;;
    numerics) command=("$python" -m benchmarks numerics --out "$folder/numerics") ;;
    bench) command=("$python" -m benchmarks --out "$folder/bench") ;;
    cuda) command=("$python" -m benchmarks --backend cuda --only "$BY_CUDA" --out "$folder/cuda") ;;
    full) command=("$python" -m benchmarks --full --out "$folder/full") ;;
    "build dry") command=("$python" setup.py --name) ;;
    "tests dry") command=("$python" -m pytest -m gpu -q -p no:cacheprovider tests/test_benchmarks.py) ;;
    "sanitizer dry") command=("$python" -m pytest -m gpu -q -p no:cacheprovider tests/kernels/test_sanitized.py) ;;
    "numerics dry") command=("$python" -m benchmarks numerics --quick --out "$folder/numerics") ;;
    "bench dry") command=("$python" -m benchmarks --quick --only fp32 --out "$folder/bench") ;;
    "cuda dry") command=("$python" -m benchmarks --quick --only "$BY_CUDA" --out "$folder/cuda") ;;
    "full dry") command=("$python" -m benchmarks --quick --only fp16 --out "$folder/full") ;;
    esac
}

# Whether the stage's last run was of the same command, and passed.
passed() {
    local status seconds last
    command_of "$1"
    IFS=$'\t' read -r status seconds last 2>/dev/null <"$folder/$1.status" || return 1
    [[ $status == 0 && $last == "${command[*]}" ]]
}

run_stage() {
    local stage=$1 started=$SECONDS status
    command_of "$stage"
    timeout --kill-after=10 "${SECONDS_OF[$stage]}" bash -c '"$@"' "$stage" "${command[@]}" >"$folder/$stage.log" 2>&1
    status=$?
    if [[ $status == 124 && -f $folder/$stage/results.jsonl ]]; then
        "$python" -m benchmarks report "$folder/$stage" >>"$folder/$stage.log" 2>&1 # of what was measured in time
    fi
    printf '%s\t%s\t%s\n' "$status" "$((SECONDS - started))" "${command[*]}" >"$folder/$stage.status"
    echo "$stage: exit status $status after $((SECONDS - started)) s ($stage.log)"
}

summarise() {
    local stage status seconds last
    echo "# GPU run${dry:+ (dry)}"
    echo
    echo "commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv,noheader 2>/dev/null
    echo
    echo "| stage | exit status (124: out of time) | seconds | command |"
    echo "| --- | --- | --- | --- |"
    for stage in "${STAGES[@]}"; do
        status="not run" seconds="" last=""
        [[ ! -f $folder/$stage.status ]] || IFS=$'\t' read -r status seconds last <"$folder/$stage.status"
        echo "| $stage | $status | $seconds | $last |"
    done
    for stage in "${STAGES[@]}"; do
        [[ -f $folder/$stage.log ]] || continue
        printf '\n## The end of %s.log\n\n```\n%s\n```\n' "$stage" "$(tail -n 15 "$folder/$stage.log")"
    done
}

for stage in "${chosen[@]}"; do
    if passed "$stage"; then
        echo "$stage: passed before"
    else
        run_stage "$stage"
    fi
    summarise >"$folder/summary.md"
done

for stage in "${chosen[@]}"; do
    passed "$stage" || exit 1
done
