// What the CPU and the CUDA half of veripo_cpp::gather_logprobs share: the checks at the door and the views of tensors.
//
// Letters: T rows, V vocabulary; z = logits / temperature, p = softmax(z), H = entropy of p in nats.
// Definition: reference.gather_logprobs and reference.entropy in veripo_kernels. Only the LibTorch stable ABI is used.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // not included by the others before torch 2.13
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace veripo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An element of T numbers that lie `stride` apart (0 for an expanded scalar, as autograd makes them).
template <typename T>
struct Strided {
  const T* data;
  int64_t stride;
#ifdef __CUDACC__
  __host__ __device__
#endif
  T operator[](int64_t row) const { return data[row * stride]; }
};

template <typename T>
Strided<T> strided(const Tensor& values) {
  return {static_cast<const T*>(values.const_data_ptr()), values.stride(0)};
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) text += (axis ? ", " : "") + std::to_string(tensor.size(axis));
  return text + "]";
}

inline void check_logits(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "logits must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits must have shape [T, V] with V of at least 1, got ",
                  shape_of(logits));
  STD_TORCH_CHECK(logits.size(1) == 1 || logits.stride(1) == 1,
                  "logits must be contiguous along V, got a stride of ", logits.stride(1));
}

// One number per row of logits, on its device.
inline void check_vector(const char* name, const Tensor& values, ScalarType dtype, const Tensor& logits) {
  STD_TORCH_CHECK(values.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(values.scalar_type()));
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == logits.size(0), name, " must have shape [", logits.size(0),
                  "], got ", shape_of(values));
  STD_TORCH_CHECK(values.is_cuda() == logits.is_cuda() && values.get_device() == logits.get_device(), name,
                  " must be on the device of logits");
}

inline void check_temperature(double temperature) {
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature must be positive and finite, got ",
                  temperature);
}

inline void check(const Tensor& logits, const Tensor& token_ids, double temperature) {
  check_logits(logits);
  check_vector("token_ids", token_ids, ScalarType::Long, logits);
  check_temperature(temperature);
}

inline void check_backward(const Tensor& logits, const Tensor& token_ids, const Tensor& lse, const Tensor& entropy,
                           const Tensor& dlogprobs, const Tensor& dentropy, double temperature) {
  check(logits, token_ids, temperature);
  check_vector("lse", lse, ScalarType::Float, logits);
  check_vector("entropy", entropy, ScalarType::Float, logits);
  check_vector("dlogprobs", dlogprobs, ScalarType::Float, logits);
  check_vector("dentropy", dentropy, ScalarType::Float, logits);
}

inline Tensor float_vector(const Tensor& logits) {
  return torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
}

inline Tensor matrix_like(const Tensor& logits) {
  return torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
}

}  // namespace veripo
