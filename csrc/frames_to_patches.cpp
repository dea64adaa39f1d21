// veripo_cpp::{resize_frames,frames_to_patches,planes_to_frames,planes_to_patches} on the CPU, frames in parallel.
//
// One pass: a row of the source (converted to RGB where it is not) is filtered across into a ring of rows that the L1
// and L2 caches hold; as soon as the window of an output row is complete it is filtered down and handed to a sink,
// which writes uint8 frames or normalised patches. Nothing of the size of a frame is kept. No result depends on the
// threads.

#include "clones.h"
#include "frame_filters.h"
#include "frame_rows.h"
#include "frames_to_patches.h"
#include "huge_pages.h"

#include <cstring>

namespace veripo::frames {
namespace {

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

namespace loops {

VERIPO_INLINE inline void normalise(const uint8_t* levels, float* out, int64_t count, float shift, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = (levels[i] - shift) / scale;
}

VERIPO_INLINE inline void normalise(const uint8_t* levels, BFloat16* out, int64_t count, float shift, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits((levels[i] - shift) / scale);
    out[i].bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

}  // namespace loops

VERIPO_CLONES(normalise)

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
    if (out.scalar_type() == ScalarType::Float) write(static_cast<float*>(data));
    else write(static_cast<BFloat16*>(data));
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
