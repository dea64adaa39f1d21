// Loops written so that the compiler makes SIMD code of each, and the instruction set that they run with.
//
// A loop is an always-inline function in a namespace `loops`, and VERIPO_CLONES(name) beside it defines the function
// that callers call: compiled three times by gcc on x86-64, once elsewhere. It chooses by itself, not by the loader
// (target_clones), so that VERIPO_ISA can force a clone. CXXFLAGS with an -march of more than x86-64 give that one.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define VERIPO_INLINE __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SSE3__)
#define VERIPO_DISPATCHED 1
#endif

namespace veripo {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The 16-bit formats, as integers: gcc 11 and the instruction sets before v3 have no type for either.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class Isa { baseline, avx2, avx512 };

inline const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

// The widest that this processor and this build have, and the narrowest that this build has.
#ifdef VERIPO_DISPATCHED
inline Isa widest() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  return __builtin_cpu_supports("x86-64-v3") ? Isa::avx2 : Isa::baseline;
}
inline Isa narrowest() { return Isa::baseline; }
#else
inline Isa widest() {
#if defined(__AVX512F__)
  return Isa::avx512;
#elif defined(__AVX2__)
  return Isa::avx2;
#else
  return Isa::baseline;
#endif
}
inline Isa narrowest() { return widest(); }
#endif

inline Isa chosen() {
  const char* const wanted = std::getenv("VERIPO_ISA");
  if (wanted == nullptr || *wanted == 0) return widest();
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wanted, name_of(isa)) != 0) continue;
    STD_TORCH_CHECK(isa <= widest(), "VERIPO_ISA is '", wanted, "', but this processor has ", name_of(widest()),
                    " at most");
    STD_TORCH_CHECK(isa >= narrowest(), "VERIPO_ISA is '", wanted, "', but the op was compiled for ",
                    name_of(widest()));
    return isa;
  }
  STD_TORCH_CHECK(false, "VERIPO_ISA must be baseline, avx2 or avx512, got '", wanted, "'");
}

// What the loops run with in this process; `cpp.missing` asks first, so that a wrong VERIPO_ISA ends there.
inline Isa instruction_set() {
  static const Isa isa = chosen();
  return isa;
}

#ifdef VERIPO_DISPATCHED
template <typename Loop, typename... Arguments>
__attribute__((target("arch=x86-64-v4"), noinline)) auto on_avx512(Loop loop, Arguments... arguments) {
  return loop(arguments...);
}

template <typename Loop, typename... Arguments>
__attribute__((target("arch=x86-64-v3"), noinline)) auto on_avx2(Loop loop, Arguments... arguments) {
  return loop(arguments...);
}
#endif

template <typename Loop, typename... Arguments>
__attribute__((noinline)) auto on_baseline(Loop loop, Arguments... arguments) {
  return loop(arguments...);
}

template <typename Loop, typename... Arguments>
auto run_clone(Loop loop, Arguments... arguments) {
#ifdef VERIPO_DISPATCHED
  if (instruction_set() == Isa::avx512) return on_avx512(loop, arguments...);
  if (instruction_set() == Isa::avx2) return on_avx2(loop, arguments...);
#endif
  return on_baseline(loop, arguments...);
}

}  // namespace veripo

#define VERIPO_CLONES(name)                                                                                          \
  template <typename... Arguments>                                                                                   \
  auto name(Arguments... arguments) {                                                                                \
    return run_clone([](auto... each) VERIPO_INLINE { return loops::name(each...); }, arguments...);                 \
  }
