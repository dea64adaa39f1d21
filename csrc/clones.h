// Loops written so that the compiler makes SIMD code of each: one clone per instruction set.
//
// gcc on x86-64 glibc compiles every VERIPO_CLONES function three times and the loader picks one; elsewhere it is one.
// To force one: CXXFLAGS="-DVERIPO_CLONES= -march=x86-64-v3" (the tests do).
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(VERIPO_CLONES) && defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VERIPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define VERIPO_DISPATCHED 1
#elif !defined(VERIPO_CLONES)
#define VERIPO_CLONES
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

// The instruction set that VERIPO_CLONES functions run with in this process.
inline const char* instruction_set() {
#ifdef VERIPO_DISPATCHED
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") ? "avx512" : __builtin_cpu_supports("x86-64-v3") ? "avx2" : "baseline";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "baseline";
#endif
}

}  // namespace veripo
