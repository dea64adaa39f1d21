// The two directions of veripo_cpp's resize on the CPU: rows of pixels across, then rows of bytes down.
//
// Written with AVX2 products of 16-bit pairs, because gcc multiplies 32-bit numbers in such loops; scalar elsewhere.
#pragma once

#include "frame_rows.h"

#include <array>
#include <optional>

#if defined(__x86_64__) && defined(__GNUC__) && (defined(VERIPO_DISPATCHED) || defined(__AVX2__))
#include <immintrin.h>
#ifdef __AVX2__
#define VERIPO_AVX2  // the whole file is compiled for it or for more: gcc inlines no intrinsics into a lower target
#else
#define VERIPO_AVX2 __attribute__((target("arch=x86-64-v3")))
#endif
#endif

namespace veripo::frames {
namespace {

bool has_avx2() {
#ifdef VERIPO_AVX2
  return instruction_set() >= Isa::avx2;
#else
  return false;
#endif
}

// Filters rows of pixels across: in [width] pixels, out uint8 [3, stride].
class Across {
 public:
  Across(int64_t from, int64_t to) : filter_(from, to), width_(to), simd_(has_avx2()) {
    if (simd_) spread(from);
  }

  void operator()(Row row, uint8_t* out, int64_t stride) const {
#ifdef VERIPO_AVX2
    if (simd_) return row.step == 3 ? simd<3>(row.pixels, out, stride) : simd<4>(row.pixels, out, stride);
#endif
    row.step == 3 ? scalar<3>(row.pixels, out, stride) : scalar<4>(row.pixels, out, stride);
  }

 private:
  struct alignas(32) Group {
    int16_t weights[16];
  };

  // Four taps of a pixel as the products want them: w0 w1 four times, then w2 w3 four times. A window that would end
  // beyond the row starts earlier, with weights of zero in front.
  void spread(int64_t from) {
    const int64_t taps = filter_.taps, columns = (width_ + 3) / 4 * 4;
    first_.resize(columns);
    spread_.resize(columns * taps / 4);
    auto* const weights = reinterpret_cast<int16_t*>(spread_.data());
    for (int64_t x = 0; x < width_; ++x) {
      first_[x] = std::min<int32_t>(filter_.first[x], std::max<int64_t>(from - taps, 0));
      const int64_t early = filter_.first[x] - first_[x];
      for (int64_t i = 0; i < taps * 4; ++i) {
        const int64_t tap = i / 16 * 4 + i % 16 / 8 * 2 + i % 2 - early;
        weights[x * taps * 4 + i] = tap < 0 ? 0 : filter_.weights[x * taps + tap];
      }
    }
  }

  template <int step>
  void scalar(const uint8_t* pixels, uint8_t* out, int64_t stride) const {
    for (int64_t x = 0; x < width_; ++x) {
      const uint8_t* const window = pixels + filter_.first[x] * step;
      const int16_t* const weights = &filter_.weights[x * filter_.taps];
      int32_t sums[3] = {};
      for (int64_t tap = 0; tap < filter_.count[x]; ++tap)
        for (int c = 0; c < 3; ++c) sums[c] += weights[tap] * window[tap * step + c];
      for (int c = 0; c < 3; ++c) out[c * stride + x] = to_level(sums[c], filter_.shift);
    }
  }

#ifdef VERIPO_AVX2
  template <int step>
  VERIPO_AVX2 void simd(const uint8_t* pixels, uint8_t* out, int64_t stride) const {
    constexpr char o = -1;
    const __m256i pick =
        step == 3 ? _mm256_setr_epi8(0, o, 3, o, 1, o, 4, o, 2, o, 5, o, o, o, o, o,
                                     6, o, 9, o, 7, o, 10, o, 8, o, 11, o, o, o, o, o)
                  : _mm256_setr_epi8(0, o, 4, o, 1, o, 5, o, 2, o, 6, o, o, o, o, o,
                                     8, o, 12, o, 9, o, 13, o, 10, o, 14, o, o, o, o, o);
    const __m128i planar = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i shift = _mm_cvtsi32_si128(filter_.shift);
    const __m256i half = _mm256_set1_epi32(1 << filter_.shift >> 1);
    const int64_t groups = filter_.taps / 4;
    const auto* weights = reinterpret_cast<const __m256i*>(spread_.data());
    for (int64_t x = 0; x < width_; x += 4) {
      __m256i sums[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* window = pixels + first_[x + i] * step;
        __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int64_t group = 0; group < groups; ++group, window += 4 * step) {
          const __m256i four = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(window)));
          const __m256i products = _mm256_madd_epi16(_mm256_shuffle_epi8(four, pick), _mm256_load_si256(weights++));
          sum = _mm256_add_epi32(sum, products);
        }
        sums[i] = sum;
      }
      const __m256i low = _mm256_add_epi32(_mm256_permute2x128_si256(sums[0], sums[1], 0x20),
                                           _mm256_permute2x128_si256(sums[0], sums[1], 0x31));
      const __m256i high = _mm256_add_epi32(_mm256_permute2x128_si256(sums[2], sums[3], 0x20),
                                            _mm256_permute2x128_si256(sums[2], sums[3], 0x31));
      const __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(_mm256_add_epi32(low, half), shift),
                                               _mm256_sra_epi32(_mm256_add_epi32(high, half), shift));
      const __m256i bytes = _mm256_packus_epi16(words, words);
      const __m128i quad = _mm_shuffle_epi8(
          _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)), planar);
      const int32_t r = _mm_cvtsi128_si32(quad), g = _mm_extract_epi32(quad, 1), b = _mm_extract_epi32(quad, 2);
      std::memcpy(out + x, &r, 4);
      std::memcpy(out + stride + x, &g, 4);
      std::memcpy(out + 2 * stride + x, &b, 4);
    }
  }
#endif

  Filter filter_;
  int64_t width_;
  bool simd_;
  std::vector<int32_t> first_;
  std::vector<Group> spread_;
};

// Weighted sum of `taps` rows of `count` bytes, count a multiple of kPad.
using Down = void (*)(const uint8_t* const* rows, const int16_t* weights, int64_t taps, int32_t shift, uint8_t* out,
                      int64_t count);

namespace loops {

VERIPO_INLINE inline void down(const uint8_t* const* rows, const int16_t* weights, int64_t taps, int32_t shift,
                               uint8_t* out, int64_t count) {
  for (int64_t start = 0; start < count; start += kPad) {
    int32_t sums[kPad] = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* const row = rows[tap] + start;
#pragma omp simd
      for (int64_t i = 0; i < kPad; ++i) sums[i] += weights[tap] * row[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < kPad; ++i) out[start + i] = to_level(sums[i], shift);
  }
}

}  // namespace loops

VERIPO_CLONES(down)

#ifdef VERIPO_AVX2
VERIPO_AVX2 void down_avx2(const uint8_t* const* rows, const int16_t* weights, int64_t taps, int32_t shift,
                           uint8_t* out, int64_t count) {
  const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << shift >> 1);
  const __m128i by = _mm_cvtsi32_si128(shift);
  for (int64_t start = 0; start < count; start += kPad) {
    __m256i sums[4] = {half, half, half, half};
    for (int64_t tap = 0; tap < taps; tap += 2) {
      int32_t pair;
      std::memcpy(&pair, weights + tap, 4);
      const __m256i by_pair = _mm256_set1_epi32(pair);
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[tap] + start));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[tap + 1] + start));
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      const __m256i words[4] = {_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
                                _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
      for (int i = 0; i < 4; ++i) sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(words[i], by_pair));
    }
    for (int i = 0; i < 4; ++i) sums[i] = _mm256_sra_epi32(sums[i], by);
    const __m256i low = _mm256_packs_epi32(sums[0], sums[1]), high = _mm256_packs_epi32(sums[2], sums[3]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + start), _mm256_packus_epi16(low, high));
  }
}
#endif

Down fastest_down() {
#ifdef VERIPO_AVX2
  if (has_avx2()) return down_avx2;
#endif
  return down;
}

using Sizes = std::array<int64_t, 4>;  // height and width before, then after

struct Filters {
  explicit Filters(const Sizes& sizes) : sizes(sizes), across(sizes[1], sizes[3]), down(sizes[0], sizes[2]) {}
  Sizes sizes;
  Across across;
  Filter down;
};

// Kept for the thread's next call: a video comes frame by frame, and making them is an eighth of resizing a small one.
const Filters& filters_of(const Sizes& sizes) {
  thread_local std::optional<Filters> last;
  if (!last || last->sizes != sizes) last.emplace(sizes);
  return *last;
}

}  // namespace
}  // namespace veripo::frames
