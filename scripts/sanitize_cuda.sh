#!/usr/bin/env bash
# compute-sanitizer over every CUDA kernel at small sizes: memcheck, racecheck, initcheck.
#
#   scripts/sanitize_cuda.sh build FOLDER    the three checkers, for sm_90a; needs nvcc, no GPU
#   scripts/sanitize_cuda.sh run FOLDER [TOOL...]
#                                            needs an sm_90 GPU; fails on any finding or wrong result
#
# SECONDS_EACH bounds one tool over one checker (600); a tool that did not finish counts as failed.
set -uo pipefail
cd "$(dirname "$0")/.."
action=${1:?build or run} folder=${2:?folder}
shift 2
mkdir -p "$folder"
kernels=csrc/kernels/cuda

build() {
    local flags=(-std=c++20 -O2 --expt-relaxed-constexpr -DFT_WITH_SM90 -Icsrc
        -gencode=arch=compute_90a,code=sm_90a)
    # cuBLASLt's header is the toolkit's or the nvidia-cublas package's.
    local headers=()
    for header in "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/nvidia/*/include; do
        [ -f "$header/cublasLt.h" ] && headers=(-isystem "$header")
    done
    benchmarks/cuda/build_gemm_variants.sh "$folder/gemm_variants" "${headers[@]}" &&
        nvcc "${flags[@]}" -o "$folder/small_check" benchmarks/cuda/small_bench.cu \
            $kernels/small_*_sm90.cu $kernels/{small_plan,runtime}.cpp &&
        nvcc "${flags[@]}" -o "$folder/kernels_check" benchmarks/cuda/kernels_check.cu \
            benchmarks/cuda/kernels_api.cu $kernels/attention*.cu \
            $kernels/{layer_norm,embedding,activation,padding,pooling}.cu $kernels/runtime.cpp
}

run() {
    local tool log status=0
    [ $# -gt 0 ] || set -- memcheck racecheck initcheck
    for tool in "$@"; do
        for checker in "kernels_check" "small_check 2" "gemm_variants check few"; do
            log=$folder/$tool-${checker%% *}.log
            # shellcheck disable=SC2086  # the checker's arguments are words of their own
            if timeout "${SECONDS_EACH:-600}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$folder"/$checker >"$log" 2>&1; then
                echo "$tool $checker: $(grep -a 'SUMMARY' "$log" | tail -1 | sed 's/^=* *//')"
            else
                echo "$tool $checker: FAILED ($?), see $log"
                status=1
            fi
        done
    done
    return $status
}

case $action in
build | run) "$action" "$@" ;;
*) echo "usage: $0 build|run FOLDER [TOOL...]" >&2 && exit 2 ;;
esac
