// veripo_cpp::gather_logprobs_{forward,backward,fused} on Hopper: compiled for sm_90a alone.
//
// forward and backward take one thread block per row. fused keeps the row in the shared memory of a cluster of 2 to 8
// blocks, which exchange their sums through distributed shared memory, so that logits are read once and written once.
// Sums are taken in a fixed order: a row's result depends neither on the other rows nor on the run.

#include "gather_logprobs.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cfloat>
#include <tuple>

namespace veripo {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBatch = 4;  // vectors a thread has under way: 32 KiB a block, as latency times bandwidth of an SM needs
constexpr int kMaxCluster = 8;
constexpr int64_t kSharedWanted = 74 << 10;  // a slice of this size leaves room for three blocks on an SM: one loads
constexpr int64_t kSharedMost = 224 << 10;   // while another stores
constexpr float kCoarse = 64;  // float32 of a larger lse is off by more than 2e-6, and with it every probability
constexpr float kLog2E = 1.4426950408889634f;

// N neighbours of a row, moved by one instruction.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T values[N];
};

// 1 / temperature as two floats, so that x / temperature is rounded once.
struct Inverse {
  explicit Inverse(double temperature)
      : high(static_cast<float>(1 / temperature)), low(static_cast<float>(1 / temperature - high)) {}
  __device__ float times(float x, float minus) const { return fmaf(x, low, fmaf(x, high, -minus)); }
  float high, low;
};

// Of e = exp((x - highest) / temperature): how many are 1, the sum of the others (which beside a 1 would be rounded at
// every step), and the sum of e * (x - highest). `highest` starts finite, so that x - highest is never inf - inf; a
// total of 0 at the end means that every logit was -inf.
struct Sums {
  float highest = -FLT_MAX, ones = 0, rest = 0, moment = 0;

  __device__ float total() const { return ones + rest; }

  __device__ void raise(float to, float scale) {
    if (to == highest) return;
    const float step = highest - to, factor = exp2f(step * scale);
    moment = total() == 0 || factor == 0 ? 0 : factor * (moment + total() * step);
    rest = total() * factor;
    ones = 0;
    highest = to;
  }

  template <typename T, int N>
  __device__ void add(const Vector<T, N>& x, float scale) {
    float largest = static_cast<float>(x.values[0]);
#pragma unroll
    for (int i = 1; i < N; ++i) largest = fmaxf(largest, static_cast<float>(x.values[i]));
    if (largest > highest) raise(largest, scale);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float difference = static_cast<float>(x.values[i]) - highest, e = exp2f(difference * scale);
      ones += difference == 0 ? 1 : 0;
      rest += difference == 0 ? 0 : e;
      moment += e == 0 ? 0 : e * difference;
    }
  }

  __device__ void merge(Sums other, float scale) {
    if (other.highest > highest) raise(other.highest, scale);
    other.raise(highest, scale);
    ones += other.ones;
    rest += other.rest;
    moment += other.moment;
  }
};

// The sums of all threads of a block, in every thread.
__device__ Sums block_sums(Sums sums, float scale) {
  __shared__ Sums of_warp[kWarps];
  for (int distance = 16; distance; distance /= 2) {
    Sums other;
    other.highest = __shfl_xor_sync(~0u, sums.highest, distance);
    other.ones = __shfl_xor_sync(~0u, sums.ones, distance);
    other.rest = __shfl_xor_sync(~0u, sums.rest, distance);
    other.moment = __shfl_xor_sync(~0u, sums.moment, distance);
    sums.merge(other, scale);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  Sums whole = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) whole.merge(of_warp[warp], scale);
  return whole;
}

// visit(vector, position) for every vector of a row's `count` vectors, a batch of loads before its visits.
template <typename V, typename Visit>
__device__ void for_each_vector(const V* row, int64_t count, const Visit& visit) {
  for (int64_t start = threadIdx.x; start < count; start += kBatch * kThreads) {
    V batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (start + i * kThreads < count) batch[i] = row[start + i * kThreads];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (start + i * kThreads < count) visit(batch[i], start + i * kThreads);
  }
}

template <typename T, int N>
__device__ Sums row_sums(const T* row, int64_t vocabulary, float scale) {
  Sums sums;
  for_each_vector(reinterpret_cast<const Vector<T, N>*>(row), vocabulary / N,
                  [&](const Vector<T, N>& x, int64_t) { sums.add(x, scale); });
  return block_sums(sums, scale);
}

__device__ double log_total(const Sums& sums) {
  if (sums.total() == 0) return NAN;
  return log1p(static_cast<double>(sums.ones) - 1 + sums.rest);
}

template <typename T>
__device__ float logprob(const T* row, int64_t vocabulary, int64_t token, const Sums& sums, double temperature) {
  if (token < 0 || token >= vocabulary) return NAN;
  return (static_cast<float>(row[token]) - static_cast<double>(sums.highest)) / temperature - log_total(sums);
}

// What the gradient of one row needs: log p = x / temperature - lse - rest.
struct Slopes {
  float lse, rest, weight, entropy_weight, entropy, inverse;
  int64_t token;

  __device__ float at(float x, int64_t position, const Inverse& by) const {
    const float log_p = by.times(x, lse) - rest, p = exp2f(log_p * kLog2E);
    const float kept = position == token ? -expm1f(log_p) : -p;  // 1 - p would lose the digits of a confident token
    const float spread = p == 0 ? 0 : p * (log_p + entropy);
    return (weight * kept - entropy_weight * spread) * inverse;
  }

  template <typename T, int N>
  __device__ Vector<T, N> of(const Vector<T, N>& x, int64_t first, const Inverse& by) const {
    Vector<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.values[i] = static_cast<T>(at(static_cast<float>(x.values[i]), first + i, by));
    return result;
  }
};

// lse as a sum of two floats.
__device__ void set_normalizer(Slopes& slopes, const Sums& sums, double temperature) {
  const double lse = sums.highest / temperature + log_total(sums);
  slopes.lse = static_cast<float>(lse);
  slopes.rest = static_cast<float>(lse - slopes.lse);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* logits, int64_t row_stride, int64_t vocabulary, Strided<int64_t> tokens, double temperature,
                   float scale, float* logprobs, float* entropy, float* lse) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * row_stride;
  const Sums sums = row_sums<T, N>(x, vocabulary, scale);
  if (threadIdx.x == 0) {
    logprobs[row] = logprob(x, vocabulary, tokens[row], sums, temperature);
    entropy[row] = log_total(sums) - sums.moment / sums.total() / temperature;
    lse[row] = sums.highest / temperature + log_total(sums);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* logits, int64_t row_stride, int64_t vocabulary, Strided<int64_t> tokens,
                    Strided<float> lse, Strided<float> entropy, Strided<float> dlogprobs, Strided<float> dentropy,
                    double temperature, float scale, Inverse inverse, T* dlogits) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * row_stride;
  Slopes slopes{lse[row], 0, dlogprobs[row], dentropy[row], entropy[row], inverse.high, tokens[row]};
  if (fabsf(slopes.lse) >= kCoarse) set_normalizer(slopes, row_sums<T, N>(x, vocabulary, scale), temperature);
  auto* out = reinterpret_cast<Vector<T, N>*>(dlogits + row * vocabulary);
  for_each_vector(reinterpret_cast<const Vector<T, N>*>(x), vocabulary / N,
                  [&](const Vector<T, N>& part, int64_t i) { out[i] = slopes.of(part, i * N, inverse); });
}

// One cluster per row; block `rank` holds `slice` elements of it, from rank * slice on.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    fused_kernel(const T* logits, int64_t row_stride, int64_t vocabulary, int64_t slice, Strided<int64_t> tokens,
                 Strided<float> coefficient, double temperature, float scale, Inverse inverse, float* logprobs,
                 T* dlogits) {
  using Part = Vector<T, N>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Sums partial, of_rank[kMaxCluster];
  auto* kept = reinterpret_cast<Part*>(memory);
  const cg::cluster_group cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank(), ranks = cluster.num_blocks();
  const int64_t row = blockIdx.x / ranks, begin = min(rank * slice, vocabulary);
  const int64_t count = min(slice, vocabulary - begin) / N;
  const T* x = logits + row * row_stride;

  Sums sums;
  for_each_vector(reinterpret_cast<const Part*>(x + begin), count, [&](const Part& part, int64_t i) {
    kept[i] = part;
    sums.add(part, scale);
  });
  sums = block_sums(sums, scale);
  if (threadIdx.x == 0) partial = sums;
  cluster.sync();
  if (threadIdx.x < ranks) of_rank[threadIdx.x] = *cluster.map_shared_rank(&partial, threadIdx.x);
  cg::cluster_group::barrier_arrive();  // `partial` may not vanish before the others have read it: see the wait below
  __syncthreads();
  Sums whole = of_rank[0];
  for (unsigned other = 1; other < ranks; ++other) whole.merge(of_rank[other], scale);

  Slopes slopes{0, 0, coefficient[row], 0, 0, inverse.high, tokens[row]};
  set_normalizer(slopes, whole, temperature);
  auto* out = reinterpret_cast<Part*>(dlogits + row * vocabulary + begin);
  for (int64_t i = threadIdx.x; i < count; i += kThreads) out[i] = slopes.of(kept[i], begin + i * N, inverse);
  if (rank == 0 && threadIdx.x == 0) logprobs[row] = logprob(x, vocabulary, tokens[row], whole, temperature);
  cg::cluster_group::barrier_wait();
}

cudaStream_t stream_of(const Tensor& logits) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

bool aligned(const Tensor& matrix) {
  const int64_t row_bytes = matrix.stride(0) * static_cast<int64_t>(matrix.element_size());
  const bool rows = matrix.size(0) < 2 || row_bytes % 16 == 0;
  const int64_t width = matrix.size(1) * static_cast<int64_t>(matrix.element_size());
  return rows && width % 16 == 0 && reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0;
}

// body.operator()<T, N>() with the element type of logits, and N elements in 16 bytes, or 1 where rows are not aligned.
template <typename Body>
void with_vector(const Tensor& logits, bool wide, const Body& body) {
  const auto of_type = [&]<typename T>() {
    wide ? body.template operator()<T, 16 / sizeof(T)>() : body.template operator()<T, 1>();
  };
  if (logits.scalar_type() == ScalarType::Float) of_type.template operator()<float>();
  if (logits.scalar_type() == ScalarType::BFloat16) of_type.template operator()<__nv_bfloat16>();
  if (logits.scalar_type() == ScalarType::Half) of_type.template operator()<__half>();
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& token_ids, double temperature) {
  check(logits, token_ids, temperature);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor logprobs = float_vector(logits), entropy = float_vector(logits), lse = float_vector(logits);
  if (logits.size(0) == 0) return {logprobs, entropy, lse};
  with_vector(logits, aligned(logits), [&]<typename T, int N>() {
    forward_kernel<T, N><<<logits.size(0), kThreads, 0, stream_of(logits)>>>(
        const_data<T>(logits), logits.stride(0), logits.size(1), strided<int64_t>(token_ids), temperature,
        kLog2E / temperature, data<float>(logprobs), data<float>(entropy), data<float>(lse));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {logprobs, entropy, lse};
}

void launch_backward(const Tensor& logits, const Tensor& token_ids, const Tensor& lse, const Tensor& entropy,
                     const Tensor& dlogprobs, const Tensor& dentropy, double temperature, const Tensor& dlogits) {
  with_vector(logits, aligned(logits) && aligned(dlogits), [&]<typename T, int N>() {
    backward_kernel<T, N><<<logits.size(0), kThreads, 0, stream_of(logits)>>>(
        const_data<T>(logits), logits.stride(0), logits.size(1), strided<int64_t>(token_ids), strided<float>(lse),
        strided<float>(entropy), strided<float>(dlogprobs), strided<float>(dentropy), temperature, kLog2E / temperature,
        Inverse(temperature), data<T>(dlogits));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor backward(const Tensor& logits, const Tensor& token_ids, const Tensor& lse, const Tensor& entropy,
                const Tensor& dlogprobs, const Tensor& dentropy, double temperature) {
  check_backward(logits, token_ids, lse, entropy, dlogprobs, dentropy, temperature);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor dlogits = matrix_like(logits);
  if (logits.size(0) > 0)
    launch_backward(logits, token_ids, lse, entropy, dlogprobs, dentropy, temperature, dlogits);
  return dlogits;
}

// Blocks per row and elements per block (a multiple of 16 bytes); 0 blocks where a row does not fit.
std::tuple<int, int64_t> cluster_of(const Tensor& logits) {
  const int64_t bytes = logits.size(1) * static_cast<int64_t>(logits.element_size());
  const auto slice = [&](int blocks) { return (bytes + 16 * blocks - 1) / (16 * blocks) * 16; };
  int blocks = 2;
  while (blocks < kMaxCluster && slice(blocks) > kSharedWanted) blocks *= 2;
  return {slice(blocks) <= kSharedMost ? blocks : 0, slice(blocks) / static_cast<int64_t>(logits.element_size())};
}

std::tuple<Tensor, Tensor> fused(const Tensor& logits, const Tensor& token_ids, const Tensor& coefficient,
                                 double temperature) {
  check(logits, token_ids, temperature);
  check_vector("coefficient", coefficient, ScalarType::Float, logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor dlogits = matrix_like(logits);
  const auto [blocks, slice] = cluster_of(logits);
  if (logits.size(0) == 0) return {float_vector(logits), dlogits};
  if (blocks == 0) {  // a row of more than 1.75 MiB: two reads
    const auto [logprobs, entropy, lse] = forward(logits, token_ids, temperature);
    Tensor zeros = torch::stable::new_zeros(logits, {logits.size(0)}, ScalarType::Float);
    launch_backward(logits, token_ids, lse, entropy, coefficient, zeros, temperature, dlogits);
    return {logprobs, dlogits};
  }
  Tensor logprobs = float_vector(logits);
  with_vector(logits, aligned(logits) && aligned(dlogits), [&]<typename T, int N>() {
    const auto kernel = fused_kernel<T, N>;
    const int shared_bytes = static_cast<int>(slice * sizeof(T));
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(logits.size(0) * blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_of(logits);
    config.attrs = &attribute;
    config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, const_data<T>(logits), logits.stride(0), logits.size(1), slice,
                                      strided<int64_t>(token_ids), strided<float>(coefficient), temperature,
                                      static_cast<float>(kLog2E / temperature), Inverse(temperature),
                                      data<float>(logprobs), data<T>(dlogits)));
  });
  return {logprobs, dlogits};
}

STABLE_TORCH_LIBRARY_IMPL(veripo_cpp, CUDA, library) {
  library.impl("gather_logprobs_forward", TORCH_BOX(&forward));
  library.impl("gather_logprobs_backward", TORCH_BOX(&backward));
  library.impl("gather_logprobs_fused", TORCH_BOX(&fused));
}

}  // namespace
}  // namespace veripo
