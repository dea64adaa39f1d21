// Where the pixels of veripo_cpp's frame ops come from on the CPU: rows of RGB, read where they lie or converted.
#pragma once

#include "clones.h"
#include "frames_to_patches.h"

#include <cstring>
#include <tuple>
#include <vector>

namespace veripo::frames {
namespace {

constexpr int64_t kPad = 32;  // bytes a vector may read or write past the last pixel of a row

int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

// The pixels of one row, `step` bytes apart; kPad bytes after them may be read.
struct Row {
  const uint8_t* pixels;
  int step;
};

namespace loops {

// Pixels of four bytes, written as two halves: gcc makes better code of those than of four.
VERIPO_INLINE inline void interleave(const uint8_t* r, const uint8_t* g, const uint8_t* b, uint16_t* out,
                                     int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[2 * i] = static_cast<uint16_t>(r[i] | g[i] << 8);
    out[2 * i + 1] = b[i];
  }
}

// Each byte twice: one row of chroma as wide as the luma.
VERIPO_INLINE inline void double_up(const uint8_t* in, int64_t step, uint8_t* out, int64_t count) {
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

VERIPO_INLINE inline void to_rgb(const uint8_t* y, const uint8_t* u, const uint8_t* v, uint16_t* out, int64_t count,
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

VERIPO_INLINE inline void deinterleave(Row row, uint8_t* out, int64_t stride, int64_t count) {
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

}  // namespace loops

VERIPO_CLONES(interleave)
VERIPO_CLONES(double_up)
VERIPO_CLONES(to_rgb)
VERIPO_CLONES(deinterleave)

// Room for one converted row and the chroma that belongs to it.
struct Scratch {
  explicit Scratch(int64_t width) : pixels(2 * (width + kPad)), u(width + 1), v(width + 1) {}
  std::vector<uint16_t> pixels;
  std::vector<uint8_t> u, v;
};

// A tensor of bytes as its strides see it.
struct Bytes {
  explicit Bytes(const Tensor& tensor) {
    std::tie(data, end) = extent(tensor);
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) strides[axis] = tensor.stride(axis);
  }
  const uint8_t *data, *end;
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
        loops::to_rgb(luma + x * y.strides[2], &scratch.u[x], &scratch.v[x], pixels + 2 * x, 1, matrix);
    }
    return {reinterpret_cast<const uint8_t*>(pixels), 4};
  }

  int64_t count, height, width;
  Bytes y, u, v;
  Matrix matrix;
};

}  // namespace
}  // namespace veripo::frames
