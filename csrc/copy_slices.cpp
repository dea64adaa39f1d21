// veripo_cpp::copy_slices on the CPU: all elements of all slices shared out evenly over the threads.
//
// Words are copied, or rounded, with their sum taken on the way, and read back 2 KiB behind the writes, while the loads
// of memory keep the core waiting: both checksums cost no pass of their own. Sums wrap modulo 2^64, so that no result
// depends on the threads.

#include "copy_slices.h"
#include "rows.h"

#include <algorithm>
#include <atomic>

namespace veripo {

struct Checksums {
  uint64_t sent, held;
};

// Two words of 16 bits as one number, at any address of a word.
using Pair = uint32_t __attribute__((may_alias, aligned(2)));

constexpr int64_t kBehind = 512;   // pairs between a write and its reading back: past the store buffer, in the L1 cache
constexpr int64_t kRun = 1 << 14;  // elements of a call of a loop; at most 2^15 words, so that no lane overflows

// Words of pairs from the sum of the pairs and that of their upper halves; widening each word halves the speed.
inline VERIPO_INLINE uint64_t sum_of(uint32_t pairs, uint32_t upper) {
  return static_cast<uint64_t>(pairs - (upper << 16)) + upper;
}

namespace loops {

VERIPO_INLINE inline uint64_t sum_words(const uint16_t* x, int64_t count) {
  const Pair* const pairs = reinterpret_cast<const Pair*>(x);
  uint32_t sum = 0, upper = 0;
#pragma omp simd reduction(+ : sum, upper)
  for (int64_t i = 0; i < count / 2; ++i) {
    sum += pairs[i];
    upper += pairs[i] >> 16;
  }
  return sum_of(sum, upper) + (count % 2 != 0 ? x[count - 1] : 0);
}

VERIPO_INLINE inline Checksums copy_words(const uint16_t* x, uint16_t* out, int64_t count) {
  const Pair* const pairs = reinterpret_cast<const Pair*>(x);
  Pair* const copies = reinterpret_cast<Pair*>(out);
  const int64_t end = count / 2, first = std::min(kBehind, end);
  uint32_t sum = 0, upper = 0, sum_held = 0, upper_held = 0;
#pragma omp simd reduction(+ : sum, upper)
  for (int64_t i = 0; i < first; ++i) {
    copies[i] = pairs[i];
    sum += pairs[i];
    upper += pairs[i] >> 16;
  }
#pragma omp simd reduction(+ : sum, upper, sum_held, upper_held) safelen(kBehind)
  for (int64_t i = first; i < end; ++i) {
    copies[i] = pairs[i];
    sum += pairs[i];
    upper += pairs[i] >> 16;
    sum_held += copies[i - kBehind];
    upper_held += copies[i - kBehind] >> 16;
  }
#pragma omp simd reduction(+ : sum_held, upper_held)
  for (int64_t i = end - first; i < end; ++i) {
    sum_held += copies[i];
    upper_held += copies[i] >> 16;
  }
  if (count % 2 != 0) out[count - 1] = x[count - 1];
  return {sum_of(sum, upper) + (count % 2 != 0 ? x[count - 1] : 0),
          sum_of(sum_held, upper_held) + (count % 2 != 0 ? out[count - 1] : 0)};
}

}  // namespace loops

VERIPO_CLONES(sum_words)
VERIPO_CLONES(copy_words)

namespace slices {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread is not worth its start

template <typename T>
const T* at(const void* data, int64_t offset) {
  return static_cast<const T*>(data) + offset;
}

template <typename T>
T* at(void* data, int64_t offset) {
  return static_cast<T*>(data) + offset;
}

// At most kRun elements that are neighbours on both sides.
template <typename T>
Checksums round(const float* from, T* to, int64_t count) {
  const uint16_t* const words = reinterpret_cast<const uint16_t*>(to);
  Checksums sums{};
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = std::min(kBlock, count - start);
    narrow(from + start, to + start, length);
    sums.sent += sum_words(words + start, length);
  }
  sums.held = sum_words(words, count);
  return sums;
}

Checksums copy_run(const Slice& slice, int64_t from, int64_t to, int64_t count) {
  if (slice.kind == Kind::to_bfloat16) return round(at<float>(slice.from, from), at<BFloat16>(slice.to, to), count);
  if (slice.kind == Kind::to_float16) return round(at<float>(slice.from, from), at<Float16>(slice.to, to), count);
  const int64_t words = slice.kind == Kind::four_bytes ? 2 : 1;
  return copy_words(at<uint16_t>(slice.from, words * from), at<uint16_t>(slice.to, words * to), words * count);
}

// Elements [begin, end) of a slice, in the order of its rows.
Checksums copy(const Slice& slice, int64_t begin, int64_t end) {
  Checksums total{};
  int64_t row = begin / slice.columns, column = begin % slice.columns;
  while (begin < end) {
    const int64_t count = std::min({kRun, slice.columns - column, end - begin});
    const Checksums sums = copy_run(slice, row * slice.from_stride + column, row * slice.to_stride + column, count);
    total = {total.sent + sums.sent, total.held + sums.held};
    begin += count;
    column += count;
    if (column == slice.columns) {
      column = 0;
      ++row;
    }
  }
  return total;
}

Tensor copy_slices(std::vector<Tensor> sources, std::vector<Tensor> targets) {
  const std::vector<Slice> slices = slices_of(sources, targets);
  std::vector<int64_t> ends;  // of each slice, in the elements of all
  ends.reserve(slices.size());
  for (const Slice& slice : slices) ends.push_back((ends.empty() ? 0 : ends.back()) + slice.rows * slice.columns);
  std::atomic<uint64_t> sent{0}, held{0};
  torch::stable::parallel_for(0, ends.empty() ? 0 : ends.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const int64_t start = i == 0 ? 0 : ends[i - 1], last = std::min(end, ends[i]);
      const Checksums sums = copy(slices[i], begin - start, last - start);
      sent += sums.sent;
      held += sums.held;
      begin = last;
    }
  });
  Tensor out = torch::stable::new_empty(targets[0], {2}, ScalarType::Long);
  auto* const sums = static_cast<uint64_t*>(out.mutable_data_ptr());
  sums[0] = sent.load();
  sums[1] = held.load();
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(veripo_cpp, library) {
  library.def("copy_slices(Tensor[] sources, Tensor(a!)[] targets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(veripo_cpp, CPU, library) { library.impl("copy_slices", TORCH_BOX(&copy_slices)); }

}  // namespace
}  // namespace slices
}  // namespace veripo
