#!/usr/bin/env bash
# compute-sanitizer over every CUDA kernel at small sizes: memcheck, racecheck, initcheck, synccheck.
#
#   scripts/sanitize_cuda.sh build FOLDER    the checkers, for sm_90a; needs nvcc, no GPU
#   scripts/sanitize_cuda.sh run FOLDER [TOOL...]
#                                            needs an sm_90 GPU; fails on any finding or wrong result
#
# Three checkers are plain CUDA, the fourth is the op `encode` in fp16 and in FP8, from Python with
# torch and the library. SECONDS_EACH bounds one tool over one checker (600); a tool that did not
# finish counts as failed. JOBS run at a time (4).
set -uo pipefail
cd "$(dirname "$0")/.."
action=${1:?build or run} folder=${2:?folder}
shift 2
mkdir -p "$folder"
kernels=csrc/kernels/cuda
checkers=("kernels_check" "small_check 2" "gemm_variants check few" "encoder")

build() {
    local flags=(-std=c++20 -O2 --expt-relaxed-constexpr -DFT_WITH_SM90 -Icsrc
        -gencode=arch=compute_90a,code=sm_90a)
    # cuBLASLt's header is the toolkit's or the nvidia-cublas package's.
    local headers=() header builds=() one status=0
    for header in "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/nvidia/*/include; do
        [ -f "$header/cublasLt.h" ] && headers=(-isystem "$header")
    done
    benchmarks/cuda/build_gemm_variants.sh "$folder/gemm_variants" "${headers[@]}" &
    builds+=($!)
    nvcc "${flags[@]}" -o "$folder/small_check" benchmarks/cuda/small_bench.cu \
        $kernels/small_*_sm90.cu $kernels/{small_plan,runtime}.cpp &
    builds+=($!)
    nvcc "${flags[@]}" -o "$folder/kernels_check" benchmarks/cuda/{kernels_check,kernels_api,fp8_gemm}.cu \
        $kernels/attention*.cu $kernels/gemm_fp8*_sm90.cu $kernels/{layer_norm,embedding,activation,padding,pooling,narrow}.cu \
        $kernels/runtime.cpp &
    builds+=($!)
    for one in "${builds[@]}"; do
        wait "$one" || status=1
    done
    return $status
}

# One tool over one checker: a line that begins with ok or FAILED.
examine() {
    local tool=$1 checker=$2 log program status
    log=$folder/$tool-${checker%% *}.log
    program=$folder/$checker
    # Without torch's memory pool every tensor has bounds of its own.
    [ "$checker" = encoder ] && program="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 python3 benchmarks/cuda/encoder_check.py"
    # shellcheck disable=SC2086  # the checker's arguments are words of their own
    timeout "${SECONDS_EACH:-600}" compute-sanitizer --tool "$tool" --target-processes all \
        --error-exitcode 9 $program >"$log" 2>&1
    status=$?
    if [ $status = 0 ]; then
        echo "ok $tool $checker: $(grep -a 'SUMMARY' "$log" | tail -1 | sed 's/^=* *//')"
    else
        echo "FAILED $tool $checker ($status), see $log"
        grep -a -m 8 '^=========' "$log"
    fi
}

run() {
    local tool checker
    [ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
    : >"$folder/found"
    for tool in "$@"; do
        for checker in "${checkers[@]}"; do
            while [ "$(jobs -pr | wc -l)" -ge "${JOBS:-4}" ]; do wait -n; done
            examine "$tool" "$checker" | tee -a "$folder/found" &
        done
    done
    wait
    ! grep -q '^FAILED' "$folder/found"
}

case $action in
build | run) "$action" "$@" ;;
*) echo "usage: $0 build|run FOLDER [TOOL...]" >&2 && exit 2 ;;
esac
