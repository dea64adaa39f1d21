// veripo_cpp::gather_logprobs_{forward,backward,fused} on the CPU: rows in parallel, each read from memory once.
//
// A row is walked in blocks that fit the L1 cache: their maximum first, then their exponentials relative to the largest
// logit so far. Sums over blocks, and whatever a row has one of, are float64. No result depends on the threads.

#include "gather_logprobs.h"
#include "huge_pages.h"
#include "rows.h"

#include <algorithm>
#include <tuple>

namespace veripo {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread is not worth its start

// A block of a row as float32: the row itself, or a converted copy in `copy`.
const float* load(const float* x, float*, int64_t) { return x; }

template <typename T>
const float* load(const T* x, float* copy, int64_t count) {
  widen(x, copy, count);
  return copy;
}

float* place(float* out, float*) { return out; }

template <typename T>
float* place(T*, float* copy) {
  return copy;
}

void store(const float*, float*, int64_t) {}

template <typename T>
void store(const float* copy, T* out, int64_t count) {
  narrow(copy, out, count);
}

float element(const float* x) { return *x; }

template <typename T>
float element(const T* x) {
  float value;
  loops::widen(x, &value, 1);
  return value;
}

// Of one row: the largest logit, log sum exp((x - highest) / temperature), and the entropy of p.
struct Statistics {
  double highest, log_total, entropy;
};

// A row of -inf alone, or one that holds NaN or +inf, has NaN for all three.
template <typename T>
Statistics statistics(const T* row, int64_t vocabulary, const Exponent& exponent, double temperature) {
  float copy[kBlock];
  float highest = -std::numeric_limits<float>::infinity();
  float anchor = std::numeric_limits<float>::lowest();  // finite, so that x - anchor is never inf - inf
  Sums sums{};
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    const int64_t count = std::min(kBlock, vocabulary - start);
    const float* x = load(row + start, copy, count);
    highest = std::max(highest, block_max(x, count));
    if (highest > anchor) {
      const double step = static_cast<double>(anchor) - highest;
      const double factor = std::exp(step / temperature);
      const double total = sums.at_anchor + sums.rest;
      sums = {0, factor * total, factor * (sums.moment + total * step)};
      anchor = highest;
    }
    const Sums of_block = block_sums(x, count, anchor, exponent);
    sums.at_anchor += of_block.at_anchor;
    sums.rest += of_block.rest;
    sums.moment += of_block.moment;
  }
  if (highest == -std::numeric_limits<float>::infinity()) return {kNaN, kNaN, kNaN};
  const double log_total = std::log1p(sums.at_anchor - 1 + sums.rest);
  return {highest, log_total, log_total - sums.moment / (sums.at_anchor + sums.rest) / temperature};
}

bool inside(int64_t token, int64_t vocabulary) { return token >= 0 && token < vocabulary; }

// log p of a token from the statistics of its row; NaN for a token outside of the vocabulary.
template <typename T>
double logprob(const T* row, int64_t vocabulary, int64_t token, const Statistics& of_row, double temperature) {
  if (!inside(token, vocabulary)) return kNaN;
  return (element(row + token) - of_row.highest) / temperature - of_row.log_total;
}

// Derivative of weight * log p(token) + entropy_weight * H by the logits of one row.
template <typename T>
void gradient(const T* row, T* out, int64_t vocabulary, int64_t token, const Statistics& of_row, double weight,
              double entropy_weight, const Exponent& exponent, double temperature) {
  float copy[kBlock], slopes[kBlock];
  const double normalizer = of_row.highest + temperature * of_row.log_total;
  const double constant = -(weight + entropy_weight * of_row.entropy) / temperature;
  const float high = static_cast<float>(normalizer), low = static_cast<float>(normalizer - high);
  const float slope = static_cast<float>(constant), rest = static_cast<float>(constant - slope);
  const float curve = static_cast<float>(-entropy_weight / temperature);
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    const int64_t count = std::min(kBlock, vocabulary - start);
    float* block = place(out + start, slopes);
    block_gradient(load(row + start, copy, count), block, count, high, low, slope, rest, curve, exponent);
    if (token >= start && token < start + count) {
      const double log_p = logprob(row, vocabulary, token, of_row, temperature), p = std::exp(log_p);
      const double spread = p == 0 ? 0 : p * (log_p + of_row.entropy);
      block[token - start] = static_cast<float>((-weight * std::expm1(log_p) - entropy_weight * spread) / temperature);
    }
    store(block, out + start, count);
  }
}

Tensor fresh_gradient(const Tensor& logits) { return on_huge_pages(matrix_like(logits)); }

template <typename T>
const T* row_of(const Tensor& logits, int64_t row) {
  return static_cast<const T*>(logits.const_data_ptr()) + row * logits.stride(0);
}

// body(element type, row) for every row, in parallel.
template <typename Body>
void for_each_row(const Tensor& logits, const Body& body) {
  const ScalarType dtype = logits.scalar_type();
  const int64_t grain = std::max<int64_t>(1, kGrain / logits.size(1));
  torch::stable::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (dtype == ScalarType::Float) body(float(), row);
      if (dtype == ScalarType::BFloat16) body(BFloat16(), row);
      if (dtype == ScalarType::Half) body(Float16(), row);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& token_ids, double temperature) {
  check(logits, token_ids, temperature);
  Tensor logprobs = float_vector(logits), entropy = float_vector(logits), lse = float_vector(logits);
  const Exponent exponent(temperature);
  const int64_t vocabulary = logits.size(1);
  const auto tokens = strided<int64_t>(token_ids);
  float* const out = static_cast<float*>(logprobs.mutable_data_ptr());
  float* const entropy_out = static_cast<float*>(entropy.mutable_data_ptr());
  float* const lse_out = static_cast<float*>(lse.mutable_data_ptr());
  for_each_row(logits, [&](auto element_type, int64_t row) {
    const auto* x = row_of<decltype(element_type)>(logits, row);
    const Statistics of_row = statistics(x, vocabulary, exponent, temperature);
    out[row] = static_cast<float>(logprob(x, vocabulary, tokens[row], of_row, temperature));
    entropy_out[row] = static_cast<float>(of_row.entropy);
    lse_out[row] = static_cast<float>(of_row.highest / temperature + of_row.log_total);
  });
  return {logprobs, entropy, lse};
}

// Sums each row anew instead of reading lse and entropy: float32 of an lse of 30 is off by 1e-6, and so would be every
// probability, ten times what autograd's log_softmax is off. The row is still in the cache: it takes a fifth longer.
Tensor backward(const Tensor& logits, const Tensor& token_ids, const Tensor& lse, const Tensor& entropy,
                const Tensor& dlogprobs, const Tensor& dentropy, double temperature) {
  check_backward(logits, token_ids, lse, entropy, dlogprobs, dentropy, temperature);
  Tensor dlogits = fresh_gradient(logits);
  const Exponent exponent(temperature);
  const int64_t vocabulary = logits.size(1);
  const auto tokens = strided<int64_t>(token_ids);
  const auto weights = strided<float>(dlogprobs), entropy_weights = strided<float>(dentropy);
  void* const out = dlogits.mutable_data_ptr();
  for_each_row(logits, [&](auto element_type, int64_t row) {
    using T = decltype(element_type);
    const T* x = row_of<T>(logits, row);
    const Statistics of_row = statistics(x, vocabulary, exponent, temperature);
    gradient(x, static_cast<T*>(out) + row * vocabulary, vocabulary, tokens[row], of_row, weights[row],
             entropy_weights[row], exponent, temperature);
  });
  return dlogits;
}

std::tuple<Tensor, Tensor> fused(const Tensor& logits, const Tensor& token_ids, const Tensor& coefficient,
                                 double temperature) {
  check(logits, token_ids, temperature);
  check_vector("coefficient", coefficient, ScalarType::Float, logits);
  Tensor logprobs = float_vector(logits), dlogits = fresh_gradient(logits);
  const Exponent exponent(temperature);
  const int64_t vocabulary = logits.size(1);
  const auto tokens = strided<int64_t>(token_ids);
  const auto weights = strided<float>(coefficient);
  float* const out = static_cast<float*>(logprobs.mutable_data_ptr());
  void* const slopes = dlogits.mutable_data_ptr();
  for_each_row(logits, [&](auto element_type, int64_t row) {
    using T = decltype(element_type);
    const T* x = row_of<T>(logits, row);
    const Statistics of_row = statistics(x, vocabulary, exponent, temperature);
    out[row] = static_cast<float>(logprob(x, vocabulary, tokens[row], of_row, temperature));
    gradient(x, static_cast<T*>(slopes) + row * vocabulary, vocabulary, tokens[row], of_row, weights[row], 0, exponent,
             temperature);
  });
  return {logprobs, dlogits};
}

std::string isa() { return name_of(instruction_set()); }

STABLE_TORCH_LIBRARY(veripo_cpp, library) {
  library.def(
      "gather_logprobs_forward(Tensor logits, Tensor token_ids, float temperature) "
      "-> (Tensor logprobs, Tensor entropy, Tensor lse)");
  library.def(
      "gather_logprobs_backward(Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, Tensor dlogprobs, "
      "Tensor dentropy, float temperature) -> Tensor dlogits");
  library.def(
      "gather_logprobs_fused(Tensor logits, Tensor token_ids, Tensor coefficient, float temperature) "
      "-> (Tensor logprobs, Tensor dlogits)");
  library.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(veripo_cpp, CPU, library) {
  library.impl("gather_logprobs_forward", TORCH_BOX(&forward));
  library.impl("gather_logprobs_backward", TORCH_BOX(&backward));
  library.impl("gather_logprobs_fused", TORCH_BOX(&fused));
}

STABLE_TORCH_LIBRARY_IMPL(veripo_cpp, CompositeExplicitAutograd, library) { library.impl("isa", TORCH_BOX(&isa)); }

}  // namespace
}  // namespace veripo
