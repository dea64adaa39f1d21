// veripo_cpp::{resize_frames,frames_to_patches,planes_to_frames,planes_to_patches} on the CPU, frames in parallel.
//
// One pass: a row of the source (converted to RGB where it is not) is filtered across into a ring of rows that the L1
// and L2 caches hold; as soon as the window of an output row is complete it is filtered down and handed to a sink,
// which writes uint8 frames or normalised patches. Nothing of the size of a frame is kept. No result depends on the
// threads.

#include "clones.h"
#include "frames_to_patches.h"
#include "huge_pages.h"

#include <array>
#include <cstring>
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

constexpr int64_t kPad = 32;  // bytes a vector may read or write past the last pixel of a row

int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

bool has_avx2() {
#ifdef VERIPO_AVX2
  return std::strcmp(instruction_set(), "baseline") != 0;
#else
  return false;
#endif
}

// -- rows of the source -----------------------------------------------------------------------------------------------

// Pixels of four bytes, written as two halves: gcc makes better code of those than of four.
VERIPO_CLONES void interleave(const uint8_t* r, const uint8_t* g, const uint8_t* b, uint16_t* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[2 * i] = static_cast<uint16_t>(r[i] | g[i] << 8);
    out[2 * i + 1] = b[i];
  }
}

// Each byte twice: one row of chroma as wide as the luma.
VERIPO_CLONES void double_up(const uint8_t* in, int64_t step, uint8_t* out, int64_t count) {
  if (step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[2 * i] = out[2 * i + 1] = in[i];
  } else if (step == 2) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[2 * i] = out[2 * i + 1] = in[2 * i];
  } else {
    for (int64_t i = 0; i < count; ++i) out[2 * i] = out[2 * i + 1] = in[step * i];
  }
}

VERIPO_CLONES void to_rgb(const uint8_t* y, const uint8_t* u, const uint8_t* v, uint16_t* out, int64_t count,
                          Matrix m) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const int16_t grey = product(static_cast<int16_t>(y[i] - m.black), m.luma);
    const int16_t cu = static_cast<int16_t>(u[i] - 128), cv = static_cast<int16_t>(v[i] - 128);
    const uint16_t r = clamped(static_cast<int16_t>(grey + product(cv, m.red_v)));
    const uint16_t g = clamped(static_cast<int16_t>(grey + product(cu, m.green_u) + product(cv, m.green_v)));
    out[2 * i] = static_cast<uint16_t>(r | g << 8);
    out[2 * i + 1] = clamped(static_cast<int16_t>(grey + product(cu, m.blue_u)));
  }
}

// The pixels of one row, `step` bytes apart; kPad bytes after them may be read.
struct Row {
  const uint8_t* pixels;
  int step;
};

// Room for one converted row and the chroma that belongs to it.
struct Scratch {
  explicit Scratch(int64_t width) : pixels(2 * (width + kPad)), u(width + 1), v(width + 1) {}
  std::vector<uint16_t> pixels;
  std::vector<uint8_t> u, v;
};

// A tensor of bytes as its strides see it.
struct Bytes {
  explicit Bytes(const Tensor& tensor) : data(static_cast<const uint8_t*>(tensor.const_data_ptr())), end(data + 1) {
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
      strides[axis] = tensor.stride(axis);
      end += (tensor.size(axis) - 1) * strides[axis];
    }
  }
  const uint8_t* data;
  const uint8_t* end;  // of the last element
  int64_t strides[4];
};

struct RgbSource {
  explicit RgbSource(const Tensor& frames)
      : count(frames.size(0)), height(frames.size(2)), width(frames.size(3)), bytes(frames) {}

  Row row(int64_t frame, int64_t y, Scratch& scratch) const {
    const uint8_t* const start = bytes.data + frame * bytes.strides[0] + y * bytes.strides[2];
    const int64_t channel = bytes.strides[1], step = bytes.strides[3];
    const bool interleaved = channel == 1 && step == 3;
    if (interleaved && start + 3 * width + kPad <= bytes.end) return {start, 3};
    auto* const copy = reinterpret_cast<uint8_t*>(scratch.pixels.data());
    if (interleaved) {
      std::memcpy(copy, start, 3 * width);
      return {copy, 3};
    }
    if (step == 1) {
      interleave(start, start + channel, start + 2 * channel, scratch.pixels.data(), width);
    } else {
      for (int64_t x = 0; x < width; ++x)
        for (int c = 0; c < 3; ++c) copy[4 * x + c] = start[x * step + c * channel];
    }
    return {copy, 4};
  }

  // Rows of a channel are what a sink reads: nothing has to be taken apart.
  bool planar() const { return bytes.strides[3] == 1; }
  const uint8_t* planes(int64_t frame, int64_t y) const {
    return bytes.data + frame * bytes.strides[0] + y * bytes.strides[2];
  }

  int64_t count, height, width;
  Bytes bytes;
};

struct YuvSource {
  YuvSource(const Tensor& y, const Tensor& u, const Tensor& v, const Matrix& matrix)
      : count(y.size(0)), height(y.size(1)), width(y.size(2)), y(y), u(u), v(v), matrix(matrix) {}

  Row row(int64_t frame, int64_t line, Scratch& scratch) const {
    const auto at = [&](const Bytes& plane, int64_t row) {
      return plane.data + frame * plane.strides[0] + row * plane.strides[1];
    };
    const uint8_t* luma = at(y, line);
    double_up(at(u, line / 2), u.strides[2], scratch.u.data(), (width + 1) / 2);
    double_up(at(v, line / 2), v.strides[2], scratch.v.data(), (width + 1) / 2);
    uint16_t* const pixels = scratch.pixels.data();
    if (y.strides[2] == 1) {
      to_rgb(luma, scratch.u.data(), scratch.v.data(), pixels, width, matrix);
    } else {
      for (int64_t x = 0; x < width; ++x)
        to_rgb(luma + x * y.strides[2], &scratch.u[x], &scratch.v[x], pixels + 2 * x, 1, matrix);
    }
    return {reinterpret_cast<const uint8_t*>(pixels), 4};
  }

  int64_t count, height, width;
  Bytes y, u, v;
  Matrix matrix;
};

VERIPO_CLONES void deinterleave(Row row, uint8_t* out, int64_t stride, int64_t count) {
  uint8_t *r = out, *g = out + stride, *b = out + 2 * stride;
  const uint8_t* const in = row.pixels;
  if (row.step == 3) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) r[i] = in[3 * i], g[i] = in[3 * i + 1], b[i] = in[3 * i + 2];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) r[i] = in[4 * i], g[i] = in[4 * i + 1], b[i] = in[4 * i + 2];
  }
}

// -- filters ----------------------------------------------------------------------------------------------------------

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

VERIPO_CLONES void down(const uint8_t* const* rows, const int16_t* weights, int64_t taps, int32_t shift, uint8_t* out,
                        int64_t count) {
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

// -- sinks ------------------------------------------------------------------------------------------------------------

struct FrameSink {
  struct Room {
    explicit Room(const FrameSink&) {}
  };

  int64_t together() const { return 1; }

  // planes: uint8 [3, stride], one row of each channel.
  void write(int64_t frame, int64_t y, const uint8_t* planes, int64_t stride, Room&) const {
    for (int64_t c = 0; c < 3; ++c)
      std::memcpy(out + ((frame * 3 + c) * height + y) * width, planes + c * stride, width);
  }

  uint8_t* out;
  int64_t height, width;
};

VERIPO_CLONES void normalise(const uint8_t* levels, float* out, int64_t count, float shift, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = (levels[i] - shift) / scale;
}

VERIPO_CLONES void normalise(const uint8_t* levels, BFloat16* out, int64_t count, float shift, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits((levels[i] - shift) / scale);
    out[i].bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

template <typename T>
struct PatchSink {
  struct Room {
    explicit Room(const PatchSink& sink) : row(sink.width + kPad) {}
    std::vector<T> row;
  };

  int64_t together() const { return order.temporal; }

  void write(int64_t frame, int64_t y, const uint8_t* planes, int64_t stride, Room& room) const {
    for (int c = 0; c < 3; ++c) {
      normalise(planes + c * stride, room.row.data(), width, normal.shift[c], normal.scale[c]);
      if (order.patch == 14) scatter<14>(frame, y, c, room.row.data());
      else if (order.patch == 16) scatter<16>(frame, y, c, room.row.data());
      else scatter<0>(frame, y, c, room.row.data());
    }
  }

  // `patch` is order.patch where the compiler may know it, 0 where it may not.
  template <int patch>
  void scatter(int64_t frame, int64_t y, int c, const T* row) const {
    const int64_t size = patch ? patch : order.patch, token = order.merge * order.merge * order.features();
    T* to = out + order.offset(frame, y, c, 0);
    for (int64_t start = 0; start < width; start += order.merge * size, to += token)
      for (int64_t i = 0; i < order.merge; ++i)
        std::memcpy(to + i * order.features(), row + start + i * size, (patch ? patch : size) * sizeof(T));
  }

  T* out;
  int64_t height, width;
  PatchOrder order;
  Normal normal;
};

// -- one pass ---------------------------------------------------------------------------------------------------------

// Frames [begin, end); those of one time are written row by row in turn, because they share patches.
template <typename Source, typename Sink>
void copy_frames(const Source& source, const Sink& sink, int64_t begin, int64_t end) {
  const int64_t stride = padded(sink.width);
  std::vector<uint8_t> planes(3 * stride);
  Scratch scratch(source.width);
  typename Sink::Room room(sink);
  for (int64_t y = 0; y < sink.height; ++y)
    for (int64_t frame = begin; frame < end; ++frame) {
      const int64_t shown = std::min(frame, source.count - 1);
      if constexpr (requires { source.planar(); }) {
        if (source.planar()) {
          sink.write(frame, y, source.planes(shown, y), source.bytes.strides[1], room);
          continue;
        }
      }
      deinterleave(source.row(shown, y, scratch), planes.data(), stride, source.width);
      sink.write(frame, y, planes.data(), stride, room);
    }
}

template <typename Source, typename Sink>
void filter_frames(const Source& source, const Sink& sink, const Across& across, const Filter& vertical, int64_t begin,
                   int64_t end) {
  const int64_t stride = padded(sink.width), ring = vertical.taps;
  std::vector<uint8_t> rows(ring * 3 * stride), planes(3 * stride);
  std::vector<const uint8_t*> window(vertical.taps);
  Scratch scratch(source.width);
  typename Sink::Room room(sink);
  const auto slot = [&](int64_t y) { return rows.data() + y % ring * 3 * stride; };
  const Down down = fastest_down();
  for (int64_t frame = begin; frame < end; ++frame) {
    int64_t ready = 0;
    for (int64_t y = 0; y < sink.height; ++y) {
      const int64_t first = vertical.first[y], last = first + vertical.count[y] - 1;
      for (ready = std::max(ready, first); ready <= last; ++ready)
        across(source.row(std::min(frame, source.count - 1), ready, scratch), slot(ready), stride);
      for (int64_t tap = 0; tap < vertical.taps; ++tap) window[tap] = slot(std::min(first + tap, last));
      const int64_t taps = (vertical.count[y] + 1) / 2 * 2;
      down(window.data(), &vertical.weights[y * vertical.taps], taps, vertical.shift, planes.data(), 3 * stride);
      sink.write(frame, y, planes.data(), stride, room);
    }
  }
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

// Writes `count` frames to the sink; after the last of the source it is repeated.
template <typename Source, typename Sink>
void run(const Source& source, const Sink& sink, int64_t count) {
  if (source.height == sink.height && source.width == sink.width) {
    torch::stable::parallel_for(0, count / sink.together(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t time = begin; time < end; ++time)
        copy_frames(source, sink, time * sink.together(), (time + 1) * sink.together());
    });
    return;
  }
  const Filters& filters = filters_of({source.height, source.width, sink.height, sink.width});
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    filter_frames(source, sink, filters.across, filters.down, begin, end);
  });
}

struct Write {
  static Tensor fresh(Tensor out) { return on_huge_pages(std::move(out)); }

  template <typename Source>
  static void frames(const Source& source, const Tensor& out) {
    run(source, FrameSink{static_cast<uint8_t*>(out.mutable_data_ptr()), out.size(2), out.size(3)}, source.count);
  }

  template <typename Source>
  static void patches(const Source& source, const PatchOrder& order, const Normal& normal, const Tensor& out) {
    const int64_t count = (source.count + order.temporal - 1) / order.temporal * order.temporal;
    const auto write = [&]<typename T>(T* values) {
      run(source, PatchSink<T>{values, order.height, order.width, order, normal}, count);
    };
    void* const data = out.mutable_data_ptr();
    out.scalar_type() == ScalarType::Float ? write(static_cast<float*>(data)) : write(static_cast<BFloat16*>(data));
  }
};

using OnCpu = Ops<RgbSource, YuvSource, Write>;

STABLE_TORCH_LIBRARY_FRAGMENT(veripo_cpp, library) {
  library.def("resize_frames(Tensor frames, int height, int width) -> Tensor");
  library.def(
      "frames_to_patches(Tensor frames, int height, int width, float[] mean, float[] std, int patch_size, "
      "int merge_size, int temporal_patch_size, ScalarType dtype) -> Tensor");
  library.def("resize_frames_out(Tensor frames, Tensor(a!) out) -> ()");
  library.def(
      "frames_to_patches_out(Tensor frames, int height, int width, float[] mean, float[] std, int patch_size, "
      "int merge_size, int temporal_patch_size, Tensor(a!) out) -> ()");
  library.def("planes_to_frames(Tensor y, Tensor u, Tensor v, int height, int width, int[] matrix) -> Tensor");
  library.def(
      "planes_to_patches(Tensor y, Tensor u, Tensor v, int height, int width, int[] matrix, float[] mean, float[] std, "
      "int patch_size, int merge_size, int temporal_patch_size, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(veripo_cpp, CPU, library) {
  library.impl("resize_frames", TORCH_BOX(&OnCpu::resize_frames));
  library.impl("frames_to_patches", TORCH_BOX(&OnCpu::frames_to_patches));
  library.impl("resize_frames_out", TORCH_BOX(&OnCpu::resize_frames_out));
  library.impl("frames_to_patches_out", TORCH_BOX(&OnCpu::frames_to_patches_out));
  library.impl("planes_to_frames", TORCH_BOX(&OnCpu::planes_to_frames));
  library.impl("planes_to_patches", TORCH_BOX(&OnCpu::planes_to_patches));
}

}  // namespace
}  // namespace veripo::frames
