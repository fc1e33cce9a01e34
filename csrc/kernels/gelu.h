// GELU, x Phi(x), as every kernel of the library computes it, and what its approximation by a tanh
// and SiLU share.
//
// With y = |x| and Q(y) = Phi(-y), GELU is x (1 - Q(y)) for positive x and x Q(y) for negative x:
// no difference of nearly equal numbers, so that the left tail keeps its digits. Q(y) is
// 2^polynomial(y), since log2 Q is smooth. What the polynomial is off by, times ln 2, is the
// relative error of Q, and at most that of GELU.
//
// The bound, for every kernel and type (docs/kernels.md): before it is rounded to its type a result
// is off by at most 2^-10 of itself wherever it is a normal number of the type and not below
// 2^-120; smaller ones may be zero.
#pragma once

namespace ft {

// Coefficients of 1, y, y^2, ... for results of each type. The last ones are negative: Q vanishes
// for large y.

// Least largest error of Q up to 13.05, where bfloat16 ends: 5.3e-4.
struct GeluBFloat16 {
  static constexpr float kCoefficients[] = {-1.00074208f,   -1.14329398f,   -0.472424060f,
                                            -0.0446832851f, 5.52439364e-3f, -4.27054329e-4f,
                                            1.83455595e-5f, -3.32132203e-7f};
};
// The same up to 4.6, beyond the last normal number of float16: 1.1e-4.
struct GeluFloat16 {
  static constexpr float kCoefficients[] = {-1.00015056f,   -1.14877474f,   -0.464962184f,
                                            -0.0476331674f, 5.65326214e-3f, -3.03203182e-4f};
};
// Up to 13.05: 1.1e-4, and GELU itself off by at most 2.8e-7.
struct GeluFloat32 {
  static constexpr float kCoefficients[] = {
      -0.999972403f,   -1.15141475f,   -0.458078086f,   -0.0544108786f, 8.80379044e-3f,
      -1.04212330e-3f, 8.52828962e-5f, -4.50953394e-6f, 1.37492179e-7f, -1.82604221e-9f};
};

// GELU's approximation x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), is
// x / (1 + 2^-(x (kGeluTanhLinear + kGeluTanhCubic x^2))), and SiLU is x / (1 + 2^-(x log2(e))).
// Both are off by at most 2^-10 of themselves, or (on the CPU) 2^-16, wherever they are
// a normal number of the type and not below 2^-119. ReLU is exact.
constexpr float kGeluTanhLinear = 2.30220820f;
constexpr float kGeluTanhCubic = 0.102943240f;

}  // namespace ft
