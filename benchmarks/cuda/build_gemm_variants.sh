#!/bin/sh
# Builds benchmarks/cuda/gemm_variants.cu for sm_90a: build_gemm_variants.sh OUTPUT [nvcc options]
set -eu
out=$1
shift
cd "$(dirname "$0")/../.."
kernels=csrc/kernels/cuda
exec nvcc -std=c++20 -O3 --expt-relaxed-constexpr -DFT_WITH_SM90 -Icsrc "$@" \
  -gencode=arch=compute_90a,code=sm_90a -o "$out" benchmarks/cuda/gemm_variants.cu \
  $kernels/runtime.cpp $kernels/cublaslt.cpp $kernels/gemm.cpp $kernels/gemm_sm90.cpp \
  $kernels/gemm_linear_sm90.cu $kernels/gemm_norm_sm90.cu $kernels/gemm_split_sm90.cu \
  $kernels/gemm_fp8_sm90.cu $kernels/gemm_fp8_norm_sm90.cu \
  $kernels/gemm_tall_half_sm90.cu $kernels/gemm_tall_bfloat16_sm90.cu $kernels/activation.cu $kernels/layer_norm.cu -ldl
