// veripo_cpp::copy_slices in CUDA: one launch for all slices, and one that reads the targets back; compiled for sm_90a
// alone, not yet run on a GPU.
//
// A block takes a tile of one slice, which it finds in a table by binary search. Elements move in vectors of 16 bytes
// where both ends allow it, a batch of loads under way at a time. Sums wrap modulo 2^64, so that the order in which
// blocks add theirs changes nothing.

#include "copy_slices.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstring>

namespace veripo::slices {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBatch = 4;  // vectors a thread has under way
constexpr int64_t kTile = kThreads * kBatch;

// A slice, how many of its elements are moved together, and how many tiles the slices before it have.
struct Entry {
  Slice slice;
  int32_t width;
  int64_t first_tile;
};

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T values[N];
};

template <typename To>
struct Round {
  template <typename From>
  __device__ static To of(From value) {
    return static_cast<To>(value);
  }
};

template <>
struct Round<__nv_bfloat16> {
  __device__ static __nv_bfloat16 of(float value) { return __float2bfloat16(value); }
  __device__ static __nv_bfloat16 of(__nv_bfloat16 value) { return value; }
};

template <>
struct Round<__half> {
  __device__ static __half of(float value) { return __float2half_rn(value); }
  __device__ static __half of(__half value) { return value; }
};

// Sum of the words of 16 bits of an element.
template <typename T>
__device__ int64_t words(T value) {
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
    uint16_t word;
    memcpy(&word, reinterpret_cast<const char*>(&value) + 2 * i, 2);
    sum += word;
  }
  return sum;
}

// A tile of kBatch vectors a thread; with kWrite it is written to the target, without it the target is only read.
template <typename From, typename To, int N, bool kWrite>
__device__ int64_t move_tile(const Slice& slice, int64_t tile) {
  const uint32_t per_row = static_cast<uint32_t>(slice.columns / N);
  const int64_t first = tile * kTile, vectors = slice.rows * per_row;
  const int64_t first_row = first / per_row;
  const uint32_t first_column = static_cast<uint32_t>(first % per_row);
  const From* const from = static_cast<const From*>(slice.from);
  To* const to = static_cast<To*>(slice.to);
  __builtin_assume(__isGlobal(from) && __isGlobal(to));  // pointers from a table could lie anywhere
  Vector<From, N> loaded[kBatch];
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const uint32_t place = i * kThreads + threadIdx.x, at = first_column + place;
    if (first + place >= vectors) continue;
    const int64_t offset = (first_row + at / per_row) * (kWrite ? slice.from_stride : slice.to_stride) +
                           static_cast<int64_t>(at % per_row) * N;
    if constexpr (kWrite) loaded[i] = *reinterpret_cast<const Vector<From, N>*>(from + offset);
    else loaded[i] = *reinterpret_cast<const Vector<From, N>*>(to + offset);
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const uint32_t place = i * kThreads + threadIdx.x, at = first_column + place;
    if (first + place >= vectors) continue;
    Vector<To, N> rounded;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      rounded.values[j] = Round<To>::of(loaded[i].values[j]);
      sum += words(rounded.values[j]);
    }
    const int64_t offset = (first_row + at / per_row) * slice.to_stride + static_cast<int64_t>(at % per_row) * N;
    if constexpr (kWrite) *reinterpret_cast<Vector<To, N>*>(to + offset) = rounded;
  }
  return sum;
}

// N elements together, or one where the entry says so.
template <typename From, typename To, int N, bool kWrite>
__device__ int64_t move_tile(const Entry& entry, int64_t tile) {
  if (entry.width == 1) return move_tile<From, To, 1, kWrite>(entry.slice, tile);
  return move_tile<From, To, N, kWrite>(entry.slice, tile);
}

template <bool kWrite>
__device__ int64_t move_tile(const Entry& entry, int64_t tile) {
  switch (entry.slice.kind) {
    case Kind::four_bytes: return move_tile<float, float, 4, kWrite>(entry, tile);
    case Kind::to_bfloat16:
      if constexpr (kWrite) return move_tile<float, __nv_bfloat16, 8, kWrite>(entry, tile);
      break;
    case Kind::to_float16:
      if constexpr (kWrite) return move_tile<float, __half, 8, kWrite>(entry, tile);
      break;
    case Kind::two_bytes: break;
  }
  return move_tile<__half, __half, 8, kWrite>(entry, tile);  // bits that stay as they are, or are only read
}

// Adds the checksum of all tiles to *total.
template <bool kWrite>
__global__ void __launch_bounds__(kThreads) slices_kernel(const Entry* entries, int32_t count,
                                                          unsigned long long* total) {
  int32_t low = 0, high = count;  // the last entry that begins at or before this tile
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (entries[middle].first_tile <= blockIdx.x) low = middle;
    else high = middle;
  }
  const Entry entry = entries[low];
  int64_t sum = move_tile<kWrite>(entry, blockIdx.x - entry.first_tile);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffff, sum, distance);
  __shared__ int64_t of_warps[kWarps];
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  int64_t of_block = 0;
  for (int warp = 0; warp < kWarps; ++warp) of_block += of_warps[warp];
  atomicAdd(total, static_cast<unsigned long long>(of_block));
}

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// How many elements of a slice 16 bytes of the target hold, or 1 where a row of either end does not begin at such a
// boundary.
int32_t width_of(const Slice& slice) {
  const bool wide_source = slice.kind != Kind::two_bytes, wide_target = slice.kind == Kind::four_bytes;
  const int64_t width = wide_target ? 4 : 8, from_bytes = wide_source ? 4 : 2, to_bytes = wide_target ? 4 : 2;
  const auto fits = [&](const void* data, int64_t stride, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (slice.rows == 1 || stride * bytes % 16 == 0);
  };
  const bool aligned = fits(slice.from, slice.from_stride, from_bytes) && fits(slice.to, slice.to_stride, to_bytes);
  return aligned && slice.columns % width == 0 ? static_cast<int32_t>(width) : 1;
}

Tensor copy_slices(std::vector<Tensor> sources, std::vector<Tensor> targets) {
  const std::vector<Slice> slices = slices_of(sources, targets);
  const torch::stable::accelerator::DeviceGuard guard(targets[0].get_device_index());
  Tensor sums = torch::stable::new_zeros(targets[0], {2}, ScalarType::Long);
  if (slices.empty()) return sums;
  const int64_t bytes = static_cast<int64_t>(slices.size() * sizeof(Entry));
  Tensor host = torch::stable::empty({bytes}, ScalarType::Byte);
  auto* const entries = static_cast<Entry*>(host.mutable_data_ptr());
  int64_t tiles = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    const int32_t width = width_of(slices[i]);
    entries[i] = {slices[i], width, tiles};
    tiles += (slices[i].rows * (slices[i].columns / width) + kTile - 1) / kTile;
  }
  STD_TORCH_CHECK(tiles < int64_t{1} << 31, "the slices have too many elements for one launch");
  const Tensor table = torch::stable::to(host, targets[0].device());
  const auto* const on_device = static_cast<const Entry*>(table.const_data_ptr());
  auto* const totals = static_cast<unsigned long long*>(sums.mutable_data_ptr());
  const auto blocks = static_cast<unsigned>(tiles);
  const auto count = static_cast<int32_t>(slices.size());
  slices_kernel<true><<<blocks, kThreads, 0, stream_of(targets[0])>>>(on_device, count, totals);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  slices_kernel<false><<<blocks, kThreads, 0, stream_of(targets[0])>>>(on_device, count, totals + 1);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return sums;
}

STABLE_TORCH_LIBRARY_IMPL(veripo_cpp, CUDA, library) { library.impl("copy_slices", TORCH_BOX(&copy_slices)); }

}  // namespace
}  // namespace veripo::slices
