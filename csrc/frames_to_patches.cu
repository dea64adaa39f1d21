// veripo_cpp::{resize_frames,frames_to_patches,planes_to_frames,planes_to_patches} in CUDA: compiled for sm_90a alone.
//
// One thread makes the three values of one output pixel: it filters every source row of its window across, in
// registers, and those sums down. That filters a row across about 4 times when shrinking (taps over scale), and writes
// nothing but the result; neighbours share their reads in the L1 cache. Rounds where the CPU does, to the same bits.

#include "frames_to_patches.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

namespace veripo::frames {
namespace {

constexpr int kThreads = 128;

const uint8_t* bytes_of(const Tensor& tensor) { return static_cast<const uint8_t*>(tensor.const_data_ptr()); }

struct Level3 {
  int32_t r, g, b;
};

struct RgbSource {
  explicit RgbSource(const Tensor& frames)
      : count(frames.size(0)), height(frames.size(2)), width(frames.size(3)), data(bytes_of(frames)),
        strides{frames.stride(0), frames.stride(1), frames.stride(2), frames.stride(3)} {}
  __device__ Level3 pixel(int64_t frame, int64_t y, int64_t x) const {
    const uint8_t* at = data + frame * strides[0] + y * strides[2] + x * strides[3];
    return {at[0], at[strides[1]], at[2 * strides[1]]};
  }
  int64_t count, height, width;
  const uint8_t* data;
  int64_t strides[4];
};

struct Plane {
  explicit Plane(const Tensor& plane)
      : data(bytes_of(plane)), strides{plane.stride(0), plane.stride(1), plane.stride(2)} {}
  __device__ int16_t at(int64_t frame, int64_t row, int64_t column) const {
    return data[frame * strides[0] + row * strides[1] + column * strides[2]];
  }
  const uint8_t* data;
  int64_t strides[3];
};

struct YuvSource {
  YuvSource(const Tensor& y, const Tensor& u, const Tensor& v, const Matrix& matrix)
      : count(y.size(0)), height(y.size(1)), width(y.size(2)), y(y), u(u), v(v), m(matrix) {}
  __device__ Level3 pixel(int64_t frame, int64_t row, int64_t x) const {
    const int16_t grey = product(y.at(frame, row, x) - m.black, m.luma);
    const int16_t cu = u.at(frame, row / 2, x / 2) - 128, cv = v.at(frame, row / 2, x / 2) - 128;
    return {clamped(grey + product(cv, m.red_v)), clamped(grey + product(cu, m.green_u) + product(cv, m.green_v)),
            clamped(grey + product(cu, m.blue_u))};
  }
  int64_t count, height, width;
  Plane y, u, v;
  Matrix m;
};

struct FrameSink {
  __device__ void write(int64_t frame, int64_t y, int64_t x, int channel, uint8_t level) const {
    out[((frame * 3 + channel) * height + y) * width + x] = level;
  }
  uint8_t* out;
  int64_t height, width;
};

template <typename T>
struct PatchSink {
  __device__ void write(int64_t frame, int64_t y, int64_t x, int channel, uint8_t level) const {
    const float value = __fdiv_rn(level - normal.shift[channel], normal.scale[channel]);
    out[order.offset(frame, y, channel, x / order.patch) + x % order.patch] = static_cast<T>(value);
  }
  T* out;
  int64_t height, width;
  PatchOrder order;
  Normal normal;
};

// One axis of the filter, in device memory.
struct Taps {
  const int32_t *first, *count;
  const int16_t* weights;
  int64_t taps;
  int32_t shift;
};

template <typename Source, typename Sink>
__global__ void __launch_bounds__(kThreads) copy_kernel(Source source, Sink sink, int64_t pixels) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pixels) return;
  const int64_t x = index % sink.width, y = index / sink.width % sink.height, frame = index / sink.width / sink.height;
  const Level3 level = source.pixel(min(frame, source.count - 1), y, x);
  sink.write(frame, y, x, 0, level.r);
  sink.write(frame, y, x, 1, level.g);
  sink.write(frame, y, x, 2, level.b);
}

template <typename Source, typename Sink>
__global__ void __launch_bounds__(kThreads) filter_kernel(Source source, Sink sink, Taps across, Taps down,
                                                          int64_t pixels) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pixels) return;
  const int64_t x = index % sink.width, y = index / sink.width % sink.height, frame = index / sink.width / sink.height;
  const int64_t from = min(frame, source.count - 1);
  const int16_t* const row_weights = across.weights + x * across.taps;
  Level3 total{0, 0, 0};
  for (int32_t j = 0; j < down.count[y]; ++j) {
    Level3 sum{0, 0, 0};
    for (int32_t i = 0; i < across.count[x]; ++i) {
      const Level3 level = source.pixel(from, down.first[y] + j, across.first[x] + i);
      sum.r += row_weights[i] * level.r;
      sum.g += row_weights[i] * level.g;
      sum.b += row_weights[i] * level.b;
    }
    const int32_t weight = down.weights[y * down.taps + j];
    total.r += weight * to_level(sum.r, across.shift);
    total.g += weight * to_level(sum.g, across.shift);
    total.b += weight * to_level(sum.b, across.shift);
  }
  sink.write(frame, y, x, 0, to_level(total.r, down.shift));
  sink.write(frame, y, x, 1, to_level(total.g, down.shift));
  sink.write(frame, y, x, 2, to_level(total.b, down.shift));
}

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A filter in the memory of the device: the tensor owns what the pointers show.
struct DeviceFilter {
  DeviceFilter(int64_t from, int64_t to, const Tensor& like) {
    const Filter filter(from, to);
    const int64_t windows = to * sizeof(int32_t), bytes = 2 * windows + filter.weights.size() * sizeof(int16_t);
    Tensor host = torch::stable::empty({bytes}, ScalarType::Byte);
    auto* const to_fill = static_cast<uint8_t*>(host.mutable_data_ptr());
    std::memcpy(to_fill, filter.first.data(), windows);
    std::memcpy(to_fill + windows, filter.count.data(), windows);
    std::memcpy(to_fill + 2 * windows, filter.weights.data(), filter.weights.size() * sizeof(int16_t));
    memory = torch::stable::to(host, like.device());
    const auto* data = static_cast<const uint8_t*>(memory.const_data_ptr());
    taps = {reinterpret_cast<const int32_t*>(data), reinterpret_cast<const int32_t*>(data + windows),
            reinterpret_cast<const int16_t*>(data + 2 * windows), filter.taps, filter.shift};
  }
  Tensor memory;
  Taps taps;
};

template <typename Source, typename Sink>
void run(const Source& source, const Sink& sink, int64_t count, const Tensor& like) {
  const int64_t pixels = count * sink.height * sink.width, blocks = (pixels + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "the result has too many pixels for one launch: ", pixels);
  if (source.height == sink.height && source.width == sink.width) {
    copy_kernel<<<blocks, kThreads, 0, stream_of(like)>>>(source, sink, pixels);
  } else {
    const DeviceFilter across(source.width, sink.width, like), down(source.height, sink.height, like);
    filter_kernel<<<blocks, kThreads, 0, stream_of(like)>>>(source, sink, across.taps, down.taps, pixels);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Write {
  static Tensor fresh(Tensor out) { return out; }

  template <typename Source>
  static void frames(const Source& source, const Tensor& out) {
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    run(source, FrameSink{static_cast<uint8_t*>(out.mutable_data_ptr()), out.size(2), out.size(3)}, source.count, out);
  }

  template <typename Source>
  static void patches(const Source& source, const PatchOrder& order, const Normal& normal, const Tensor& out) {
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    const int64_t count = (source.count + order.temporal - 1) / order.temporal * order.temporal;
    const auto write = [&]<typename T>(T* values) {
      run(source, PatchSink<T>{values, order.height, order.width, order, normal}, count, out);
    };
    void* const data = out.mutable_data_ptr();
    if (out.scalar_type() == ScalarType::Float) write(static_cast<float*>(data));
    else write(static_cast<__nv_bfloat16*>(data));
  }
};

using OnCuda = Ops<RgbSource, YuvSource, Write>;

STABLE_TORCH_LIBRARY_IMPL(veripo_cpp, CUDA, library) {
  library.impl("resize_frames", TORCH_BOX(&OnCuda::resize_frames));
  library.impl("frames_to_patches", TORCH_BOX(&OnCuda::frames_to_patches));
  library.impl("resize_frames_out", TORCH_BOX(&OnCuda::resize_frames_out));
  library.impl("frames_to_patches_out", TORCH_BOX(&OnCuda::frames_to_patches_out));
  library.impl("planes_to_frames", TORCH_BOX(&OnCuda::planes_to_frames));
  library.impl("planes_to_patches", TORCH_BOX(&OnCuda::planes_to_patches));
}

}  // namespace
}  // namespace veripo::frames
