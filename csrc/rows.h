// Loops over a block of one row, written so that the compiler makes SIMD code of each.
//
// Needs -fno-trapping-math: without it gcc branches around a conditional exponential, and those loops stay scalar (the
// gradient took 8 times as long).
#pragma once

#include "clones.h"

#include <limits>

namespace veripo {

constexpr int64_t kBlock = 2048;  // elements: 8 KiB of float32, so that the second look at a block is in the L1 cache

// Multiplication by log2(e) / temperature, in two floats so that its rounding does not tilt the whole row.
struct Exponent {
  explicit Exponent(double temperature)
      : high(static_cast<float>(1.4426950408889634 / temperature)),
        low(static_cast<float>(1.4426950408889634 / temperature - high)),
        smallest(-126.0f / high),
        inverse(static_cast<float>(1.0 / temperature)) {}
  float high, low;
  float smallest;  // differences of logits below it have an exponential under 2^-126
  float inverse;   // 1 / temperature
};

// exp(difference / temperature) for exponent.smallest <= difference, not far above 0; NaN stays NaN.
// 2^t = 2^n 2^f with n the nearest integer, and the polynomial of degree 6 nearest to 2^f on [-1/2, 1/2] in relative
// error (2e-9, below float32's 6e-8; coefficients from iteratively reweighted least squares). Adding `shift` rounds t
// and leaves n + 127 in the low bits, which become the exponent of a float.
inline VERIPO_INLINE float exponential(float difference, const Exponent& exponent) {
  constexpr float shift = 12582912.0f + 127.0f;
  const float rounded = difference * exponent.high + shift;
  float f = difference * exponent.high - (rounded - shift);
  f = f + difference * exponent.low;
  float power = 0.00015353362f;
  power = power * f + 0.0013398875f;
  power = power * f + 0.00961843692f;
  power = power * f + 0.0555033237f;
  power = power * f + 0.240226477f;
  power = power * f + 0.693147182f;
  power = power * f + 1.0f;
  return power * from_bits(to_bits(rounded) << 23);
}

// Sums of e = exp((x - anchor) / temperature). The logits that equal the anchor are counted, not summed: beside a 1 the
// sum of small e would be rounded at every step, and a confident token would lose all digits of 1 - p.
struct Sums {
  double at_anchor;  // how many e are exactly 1
  double rest;       // sum of the other e
  double moment;     // sum of e * (x - anchor)
};

namespace loops {

VERIPO_INLINE inline float block_max(const float* x, int64_t count) {
  float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < count; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

VERIPO_INLINE inline Sums block_sums(const float* x, int64_t count, float anchor, Exponent exponent) {
  float at_anchor = 0, rest = 0, moment = 0;
#pragma omp simd reduction(+ : at_anchor, rest, moment)
  for (int64_t i = 0; i < count; ++i) {
    float difference = x[i] - anchor;
    difference = difference < exponent.smallest ? exponent.smallest : difference;
    const float e = exponential(difference, exponent);
    at_anchor += difference == 0 ? 1.0f : 0.0f;
    rest += difference == 0 ? 0.0f : e;
    moment += e * difference;
  }
  return {at_anchor, rest, moment};
}

// out = p * (slope + rest + curve * log p) with log p = (x - high - low) / temperature, and 0 where p underflows.
VERIPO_INLINE inline void block_gradient(const float* x, float* out, int64_t count, float high, float low, float slope,
                                         float rest, float curve, Exponent exponent) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float difference = (x[i] - high) - low;
    const bool vanishes = difference < exponent.smallest;
    const float bounded = vanishes ? exponent.smallest : difference;
    const float p = vanishes ? 0.0f : exponential(bounded, exponent);
    out[i] = p * (slope + curve * (bounded * exponent.inverse) + rest);
  }
}

VERIPO_INLINE inline void widen(const BFloat16* x, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = from_bits(static_cast<uint32_t>(x[i].bits) << 16);
}

VERIPO_INLINE inline void widen(const Float16* x, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(x[i].bits & 0x7fff) << 13;
    uint32_t bits = to_bits(from_bits(magnitude) * 0x1p112f);  // moves the exponent's bias, of subnormals too
    bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bits;
    out[i] = from_bits(bits | static_cast<uint32_t>(x[i].bits & 0x8000) << 16);
  }
}

VERIPO_INLINE inline void narrow(const float* x, BFloat16* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(x[i]);
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[i].bits = static_cast<uint16_t>(x[i] != x[i] ? 0x7fc0 : nearest_even);
  }
}

VERIPO_INLINE inline void narrow(const float* x, Float16* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(x[i]), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;  // 0.5f has float16's smallest step
    const uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    out[i].bits = static_cast<uint16_t>((magnitude >= 0x47800000 ? infinite : finite) | ((bits >> 16) & 0x8000));
  }
}

}  // namespace loops

VERIPO_CLONES(block_max)
VERIPO_CLONES(block_sums)
VERIPO_CLONES(block_gradient)
VERIPO_CLONES(widen)
VERIPO_CLONES(narrow)

}  // namespace veripo
