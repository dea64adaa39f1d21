// veripo_cpp::copy_slices on the CPU: all elements of all slices shared out evenly over the threads.
//
// A tile is copied, or rounded, with its bits summed on the way, and read back while the cache holds it, so that the two
// checksums cost no read of memory. Sums wrap modulo 2^64: no result depends on the threads.

#include "copy_slices.h"
#include "rows.h"

#include <algorithm>
#include <atomic>

namespace veripo {
namespace loops {

// Of at most 2^15 words, so that no lane overflows.
VERIPO_INLINE inline int64_t sum_words(const int16_t* x, int64_t count) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// The same of words that are copied. memcpy of as many leaves nothing in the cache for the read that follows.
VERIPO_INLINE inline int64_t copy_words(const int16_t* x, int16_t* out, int64_t count) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += x[i];
    out[i] = x[i];
  }
  return sum;
}

}  // namespace loops

VERIPO_CLONES(sum_words)
VERIPO_CLONES(copy_words)

namespace slices {
namespace {

constexpr int64_t kTile = 1 << 17;  // elements: 256 KiB of bfloat16 and their copy; at 1 << 15 a call took 5 % longer
constexpr int64_t kRun = 1 << 14;  // elements of a call of a loop; at most 2^15 words

struct Checksums {
  uint64_t sent, held;
};

template <typename T>
uint64_t round(const float* from, T* to, int64_t count) {
  uint64_t sum = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = std::min(kBlock, count - start);
    narrow(from + start, to + start, length);
    sum += static_cast<uint64_t>(sum_words(reinterpret_cast<const int16_t*>(to + start), length));
  }
  return sum;
}

template <typename T>
const T* at(const void* data, int64_t offset) {
  return static_cast<const T*>(data) + offset;
}

template <typename T>
T* at(void* data, int64_t offset) {
  return static_cast<T*>(data) + offset;
}

int64_t words_of(Kind kind) { return kind == Kind::four_bytes ? 2 : 1; }

uint64_t write(const Slice& slice, int64_t from, int64_t to, int64_t count) {
  const int64_t words = words_of(slice.kind);
  if (slice.kind == Kind::to_bfloat16) return round(at<float>(slice.from, from), at<BFloat16>(slice.to, to), count);
  if (slice.kind == Kind::to_float16) return round(at<float>(slice.from, from), at<Float16>(slice.to, to), count);
  return static_cast<uint64_t>(
      copy_words(at<int16_t>(slice.from, words * from), at<int16_t>(slice.to, words * to), words * count));
}

uint64_t read(const Slice& slice, int64_t to, int64_t count) {
  const int64_t words = words_of(slice.kind);
  const int16_t* const data = at<int16_t>(slice.to, words * to);
  return static_cast<uint64_t>(sum_words(data, words * count));
}

// body(offset in the source, offset in the target, count) for runs of neighbours that make up elements [begin, end) of a
// slice, in the order of its rows.
template <typename Body>
void for_each_run(const Slice& slice, int64_t begin, int64_t end, const Body& body) {
  int64_t row = begin / slice.columns, column = begin % slice.columns;
  while (begin < end) {
    const int64_t count = std::min({kRun, slice.columns - column, end - begin});
    body(row * slice.from_stride + column, row * slice.to_stride + column, count);
    begin += count;
    column += count;
    if (column == slice.columns) {
      column = 0;
      ++row;
    }
  }
}

Checksums copy(const Slice& slice, int64_t begin, int64_t end) {
  Checksums sums{};
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t last = std::min(start + kTile, end);
    for_each_run(slice, start, last,
                 [&](int64_t from, int64_t to, int64_t count) { sums.sent += write(slice, from, to, count); });
    for_each_run(slice, start, last, [&](int64_t, int64_t to, int64_t count) { sums.held += read(slice, to, count); });
  }
  return sums;
}

Tensor copy_slices(std::vector<Tensor> sources, std::vector<Tensor> targets) {
  const std::vector<Slice> slices = slices_of(sources, targets);
  std::vector<int64_t> ends;  // of each slice, in the elements of all
  ends.reserve(slices.size());
  for (const Slice& slice : slices) ends.push_back((ends.empty() ? 0 : ends.back()) + slice.rows * slice.columns);
  std::atomic<uint64_t> sent{0}, held{0};
  torch::stable::parallel_for(0, ends.empty() ? 0 : ends.back(), kTile, [&](int64_t begin, int64_t end) {
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
