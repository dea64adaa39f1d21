// What the CPU and the CUDA half of veripo_cpp::{resize_frames,frames_to_patches} (each also into a given tensor: _out)
// and {planes_to_frames,planes_to_patches} share: the checks at the door, the weights of the filter, and where a pixel
// goes in the order of patches.
//
// Letters: T frames, H and W sides in pixels, N patches. Definition: veripo_kernels/frames.py.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#ifdef __CUDACC__
#define VERIPO_BOTH __host__ __device__
#else
#define VERIPO_BOTH
#endif

namespace veripo::frames {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxSide = 1 << 20;  // pixels; offsets inside a row of pixels are int32

// Antialiased bicubic weights of one axis, as torch and Pillow have them for uint8: the cubic with a = -1/2, stretched
// by the scale when shrinking, normalised in float64, then rounded to integers of the most bits that int16 holds.
struct Filter {
  Filter(int64_t from, int64_t to);
  int64_t taps = 0;  // of the widest window, rounded up to a multiple of 4
  int32_t shift = 0;  // a weight w means w / 2^shift
  std::vector<int32_t> first, count;  // [to]: the window of each output
  std::vector<int16_t> weights;       // [to, taps], zero after the window
};

inline double cubic(double x) {
  x = std::fabs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
}

inline Filter::Filter(int64_t from, int64_t to) : first(to), count(to) {
  const double scale = static_cast<double>(from) / to, stretch = std::max(scale, 1.0);
  std::vector<double> exact;
  std::vector<int64_t> start(to);
  double largest = 0;
  for (int64_t i = 0; i < to; ++i) {
    const double centre = scale * (i + 0.5);
    const int64_t low = std::max<int64_t>(static_cast<int64_t>(centre - 2 * stretch + 0.5), 0);
    const int64_t high = std::min(static_cast<int64_t>(centre + 2 * stretch + 0.5), from);
    first[i] = static_cast<int32_t>(low);
    count[i] = static_cast<int32_t>(high - low);
    taps = std::max<int64_t>(taps, (high - low + 3) / 4 * 4);
    start[i] = static_cast<int64_t>(exact.size());
    double total = 0;
    for (int64_t j = low; j < high; ++j) {
      exact.push_back(cubic((j - centre + 0.5) * (1 / stretch)));
      total += exact.back();
    }
    for (int64_t j = start[i]; j < start[i] + count[i]; ++j) largest = std::max(largest, exact[j] /= total);
  }
  while (shift < 22 && static_cast<int64_t>(0.5 + largest * (1 << (shift + 1))) < 1 << 15) ++shift;
  weights.assign(to * taps, 0);
  for (int64_t i = 0; i < to; ++i)
    for (int64_t j = 0; j < count[i]; ++j) {
      const double scaled = exact[start[i] + j] * (1 << shift);
      weights[i * taps + j] = static_cast<int16_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
}

VERIPO_BOTH inline uint8_t to_level(int32_t sum, int32_t shift) {
  const int32_t level = (sum + (1 << shift >> 1)) >> shift;
  return static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
}

// Integer YCbCr -> RGB: a weight w means w / 2^13. luma belongs to y - black, the others to u - 128 and v - 128. Every
// product is cut off by itself, as in swscale's SIMD code.
struct Matrix {
  int16_t black, luma, red_v, green_u, green_v, blue_u;
};

VERIPO_BOTH inline int16_t product(int16_t difference, int16_t weight) {
  return static_cast<int16_t>(static_cast<int16_t>(difference * 8) * weight >> 16);  // one vpmulhw
}

VERIPO_BOTH inline uint8_t clamped(int16_t level) {
  return static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
}

// The order of the vision tower: [time, row of merged tokens, column of them, m, m | channel, frame in time, p, p].
struct PatchOrder {
  int64_t height, width, patch, merge, temporal;

  VERIPO_BOTH int64_t features() const { return 3 * temporal * patch * patch; }
  VERIPO_BOTH int64_t per_time() const { return (height / patch) * (width / patch); }
  // Offset of the first of the `patch` neighbours in row y that belong to column `column` of patches.
  VERIPO_BOTH int64_t offset(int64_t frame, int64_t y, int64_t channel, int64_t column) const {
    const int64_t row = y / patch, across = width / patch;
    const int64_t token = (row / merge) * (across / merge) + column / merge;
    const int64_t in_token = row % merge * merge + column % merge;
    const int64_t index = frame / temporal * per_time() + token * merge * merge + in_token;
    return index * features() + ((channel * temporal + frame % temporal) * patch + y % patch) * patch;
  }
};

inline void check_size(int64_t height, int64_t width) {
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= kMaxSide && width <= kMaxSide, "height and width must be 1 to ",
                  kMaxSide, ", got ", height, " x ", width);
}

inline void check_frames(const Tensor& frames, int64_t height, int64_t width) {
  STD_TORCH_CHECK(frames.scalar_type() == ScalarType::Byte && frames.dim() == 4 && frames.size(0) > 0 &&
                      frames.size(1) == 3, "frames must be uint8 [T, 3, H, W] with T > 0");
  check_size(frames.size(2), frames.size(3));
  check_size(height, width);
}

inline void check_planes(const Tensor& y, const Tensor& u, const Tensor& v, const std::vector<int64_t>& matrix,
                         int64_t height, int64_t width) {
  for (const Tensor* plane : {&y, &u, &v})
    STD_TORCH_CHECK(plane->scalar_type() == ScalarType::Byte && plane->dim() == 3 && plane->size(0) == y.size(0) &&
                        plane->size(0) > 0 && plane->get_device() == y.get_device() && plane->is_cuda() == y.is_cuda(),
                    "y, u and v must be uint8 [T, rows, columns] on one device with the same T > 0");
  check_size(y.size(1), y.size(2));
  check_size(height, width);
  for (const Tensor* plane : {&u, &v})
    STD_TORCH_CHECK(plane->size(1) == (y.size(1) + 1) / 2 && plane->size(2) == (y.size(2) + 1) / 2,
                    "u and v must have half the rows and columns of y, rounded up");
  STD_TORCH_CHECK(matrix.size() == 6, "matrix must have 6 numbers, got ", matrix.size());
}

inline Matrix matrix_of(const std::vector<int64_t>& values) {
  for (const int64_t value : values)
    STD_TORCH_CHECK(value == static_cast<int16_t>(value), "matrix must hold numbers of 16 bits, got ", value);
  const auto at = [&](int i) { return static_cast<int16_t>(values[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

inline PatchOrder patch_order(int64_t height, int64_t width, const std::vector<double>& mean,
                              const std::vector<double>& std, int64_t patch, int64_t merge, int64_t temporal,
                              ScalarType dtype) {
  STD_TORCH_CHECK(mean.size() == 3 && std.size() == 3, "mean and std must have 3 numbers each");
  STD_TORCH_CHECK(patch > 0 && merge > 0 && temporal > 0 && patch <= kMaxSide && merge <= kMaxSide &&
                      temporal <= kMaxSide, "patch_size, merge_size and temporal_patch_size must be positive");
  STD_TORCH_CHECK(height % (patch * merge) == 0 && width % (patch * merge) == 0,
                  "height and width must be multiples of ", patch * merge, ", got ", height, " x ", width);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype must be float32 or bfloat16");
  return {height, width, patch, merge, temporal};
}

// A level as the tower reads it: (level - 255 mean) / (255 std), all in float32.
struct Normal {
  Normal(const std::vector<double>& mean, const std::vector<double>& std) {
    for (int c = 0; c < 3; ++c) {
      shift[c] = static_cast<float>(mean[c]) * 255.0f;
      scale[c] = static_cast<float>(std[c]) * 255.0f;
    }
  }
  float shift[3], scale[3];
};

inline int64_t times_of(const Tensor& frames, int64_t temporal) { return (frames.size(0) + temporal - 1) / temporal; }

inline Tensor empty_frames(const Tensor& like, int64_t height, int64_t width) {
  return torch::stable::new_empty(like, {like.size(0), 3, height, width});
}

inline Tensor empty_patches(const Tensor& like, const PatchOrder& order, ScalarType dtype) {
  return torch::stable::new_empty(like, {times_of(like, order.temporal) * order.per_time(), order.features()}, dtype);
}

// First byte of a tensor, and the one after its last.
inline std::pair<const uint8_t*, const uint8_t*> extent(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  const auto* const begin = static_cast<const uint8_t*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * tensor.element_size()};
}

inline void check_out(const Tensor& out, const Tensor& frames, const std::vector<int64_t>& shape, const char* what) {
  bool fits = out.dim() == static_cast<int64_t>(shape.size()) && out.is_contiguous() &&
              out.is_cuda() == frames.is_cuda() && out.get_device() == frames.get_device();
  for (size_t axis = 0; fits && axis < shape.size(); ++axis) fits = out.size(axis) == shape[axis];
  STD_TORCH_CHECK(fits, "out must be contiguous ", what, " on the device of frames");
  const auto [out_begin, out_end] = extent(out);
  const auto [begin, end] = extent(frames);
  STD_TORCH_CHECK(out_end <= begin || end <= out_begin, "out must not share memory with frames");
}

// The ops of a device: its sources of pixels, and `Write`, whose fresh() makes memory ready for a result and whose
// frames() and patches() run its loops or kernels.
template <typename Rgb, typename Yuv, typename Write>
struct Ops {
  static Tensor resize_frames(const Tensor& frames, int64_t height, int64_t width) {
    check_frames(frames, height, width);
    Tensor out = Write::fresh(empty_frames(frames, height, width));
    Write::frames(Rgb(frames), out);
    return out;
  }

  static void resize_frames_out(const Tensor& frames, const Tensor& out) {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.dim() == 4, "out must be uint8 [T, 3, H, W]");
    check_frames(frames, out.size(2), out.size(3));
    check_out(out, frames, {frames.size(0), 3, out.size(2), out.size(3)}, "[T, 3, H, W]");
    Write::frames(Rgb(frames), out);
  }

  static Tensor frames_to_patches(const Tensor& frames, int64_t height, int64_t width, std::vector<double> mean,
                                  std::vector<double> std, int64_t patch_size, int64_t merge_size,
                                  int64_t temporal_patch_size, ScalarType dtype) {
    check_frames(frames, height, width);
    const auto order = patch_order(height, width, mean, std, patch_size, merge_size, temporal_patch_size, dtype);
    Tensor out = Write::fresh(empty_patches(frames, order, dtype));
    Write::patches(Rgb(frames), order, Normal(mean, std), out);
    return out;
  }

  static void frames_to_patches_out(const Tensor& frames, int64_t height, int64_t width, std::vector<double> mean,
                                    std::vector<double> std, int64_t patch_size, int64_t merge_size,
                                    int64_t temporal_patch_size, const Tensor& out) {
    check_frames(frames, height, width);
    const auto order =
        patch_order(height, width, mean, std, patch_size, merge_size, temporal_patch_size, out.scalar_type());
    check_out(out, frames, {times_of(frames, order.temporal) * order.per_time(), order.features()}, "[N, features]");
    Write::patches(Rgb(frames), order, Normal(mean, std), out);
  }

  static Tensor planes_to_frames(const Tensor& y, const Tensor& u, const Tensor& v, int64_t height, int64_t width,
                                 std::vector<int64_t> matrix) {
    check_planes(y, u, v, matrix, height, width);
    Tensor out = Write::fresh(empty_frames(y, height, width));
    Write::frames(Yuv(y, u, v, matrix_of(matrix)), out);
    return out;
  }

  static Tensor planes_to_patches(const Tensor& y, const Tensor& u, const Tensor& v, int64_t height, int64_t width,
                                  std::vector<int64_t> matrix, std::vector<double> mean, std::vector<double> std,
                                  int64_t patch_size, int64_t merge_size, int64_t temporal_patch_size,
                                  ScalarType dtype) {
    check_planes(y, u, v, matrix, height, width);
    const auto order = patch_order(height, width, mean, std, patch_size, merge_size, temporal_patch_size, dtype);
    Tensor out = Write::fresh(empty_patches(y, order, dtype));
    Write::patches(Yuv(y, u, v, matrix_of(matrix)), order, Normal(mean, std), out);
    return out;
  }
};

}  // namespace veripo::frames
