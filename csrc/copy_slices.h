// What the CPU and the CUDA half of veripo_cpp::copy_slices share: the checks at the door.
//
// Definition: slices_torch.py in veripo_kernels; `slices.py` refuses shared memory. Only the LibTorch stable ABI is used.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // not included by the others before torch 2.13
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

namespace veripo::slices {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostColumns = int64_t{1} << 31;

// What happens to an element: it stays as it is, or a float32 is rounded.
enum class Kind : int32_t { two_bytes, four_bytes, to_bfloat16, to_float16 };

// A copy of `rows` rows. Strides count elements.
struct Slice {
  const void* from;
  void* to;
  int64_t rows, columns, from_stride, to_stride;
  Kind kind;
};

inline std::string named(const char* list, size_t number) {
  return std::string(list) + "[" + std::to_string(number) + "]";
}

inline Kind kind_of(const std::string& name, ScalarType from, ScalarType to) {
  if (from == to && from == ScalarType::Float) return Kind::four_bytes;
  if (from == to && (from == ScalarType::BFloat16 || from == ScalarType::Half)) return Kind::two_bytes;
  if (from == ScalarType::Float && to == ScalarType::BFloat16) return Kind::to_bfloat16;
  if (from == ScalarType::Float && to == ScalarType::Half) return Kind::to_float16;
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 and stay so, or be rounded from float32; got ",
                  torch::headeronly::toString(from), " to ", torch::headeronly::toString(to));
}

inline void check_matrix(const std::string& name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have shape [rows, columns]");
  STD_TORCH_CHECK(tensor.size(1) < 2 || tensor.stride(1) == 1, name, " must have its columns next to each other");
  STD_TORCH_CHECK(tensor.size(1) < kMostColumns, name, " must have fewer than 2^31 columns, got ", tensor.size(1));
  STD_TORCH_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.get_device() == first.get_device(), name,
                  " must be on the device of the first");
}

// Rows that follow each other on both sides are one.
inline Slice joined(Slice slice) {
  const int64_t count = slice.rows * slice.columns;
  const bool follow = slice.from_stride == slice.columns && slice.to_stride == slice.columns;
  if (!follow || count >= kMostColumns) return slice;
  slice.rows = count > 0 ? 1 : 0;
  slice.columns = count;
  return slice;
}

inline std::vector<Slice> slices_of(const std::vector<Tensor>& sources, const std::vector<Tensor>& targets) {
  STD_TORCH_CHECK(sources.size() == targets.size() && !targets.empty(),
                  "sources and targets must be equally many, and one at least; got ", sources.size(), " and ",
                  targets.size());
  std::vector<Slice> slices;
  slices.reserve(sources.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor &from = sources[i], &to = targets[i];
    check_matrix(named("sources", i), from, targets[0]);
    check_matrix(named("targets", i), to, targets[0]);
    STD_TORCH_CHECK(from.size(0) == to.size(0) && from.size(1) == to.size(1), named("targets", i),
                    " must have shape [", from.size(0), ", ", from.size(1), "], got [", to.size(0), ", ", to.size(1),
                    "]");
    const Kind kind = kind_of(named("sources", i), from.scalar_type(), to.scalar_type());
    if (from.numel() > 0)
      slices.push_back(joined({from.const_data_ptr(), to.mutable_data_ptr(), from.size(0), from.size(1), from.stride(0),
                               to.stride(0), kind}));
  }
  return slices;
}

}  // namespace veripo::slices
