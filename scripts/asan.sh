#!/bin/sh
# Builds the CPU kernels with address and undefined-behaviour sanitizers and runs their driver once
# for each instruction set; those that this processor lacks run in emulation. The same for what reads
# an encoder's specification and for the plans of the few-token encoder on GPUs. No Torch involved.
set -eu
cd "$(dirname "$0")/.."
out=${ASAN_BUILD_DIR:-build/asan}
cxx=${CXX:-c++}
mkdir -p "$out"
# A 64-byte vector passed between functions warns where the processor has no such register.
flags="-std=c++20 -O1 -g -Icsrc -Wall -Wextra -Wno-psabi -DFT_EMULATE_ISAS -pthread"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
grep -qw avx2 /proc/cpuinfo 2>/dev/null && avx2="-mavx2 -mfma -mf16c" || avx2=""
sources="csrc/tests/cpu_kernels_test.cpp csrc/kernels/cpu/*.cpp"
for source in $sources; do
  object="$out/$(basename "$source" .cpp).o"
  case $source in
    *_avx2.cpp) extra=$avx2 ;;
    *) extra="" ;;
  esac
  echo "$cxx $flags $extra -c $source -o $object"
done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I{} sh -c '{}'
objects=""
for source in $sources; do objects="$objects $out/$(basename "$source" .cpp).o"; done
# shellcheck disable=SC2086
$cxx $flags $objects -o "$out/cpu_kernels_test"
# shellcheck disable=SC2086
$cxx $flags csrc/tests/encoder_spec_test.cpp -o "$out/encoder_spec_test"
"$out/encoder_spec_test"
# shellcheck disable=SC2086
$cxx $flags csrc/tests/small_plan_test.cpp csrc/kernels/cuda/small_plan.cpp -o "$out/small_plan_test"
"$out/small_plan_test"
for isa in portable avx2 avx2_vnni avx512 avx512_vnni avx512_bf16 amx; do
  FT_HANDLER_CPU_ISA=$isa "$out/cpu_kernels_test"
done
