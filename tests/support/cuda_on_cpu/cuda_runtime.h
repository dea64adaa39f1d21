// As much of CUDA as csrc/frames_to_patches.cu uses, for a C++ compiler: a launch runs all threads one after the other.
//
// tests/kernels/test_cuda_on_cpu.py writes each `kernel<<<blocks, threads, ...>>>(arguments)` as cuda_on_cpu::launch.
#pragma once

#include <algorithm>
#include <cstdint>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
#define aoti_torch_get_current_cuda_stream(index, stream) (*(stream) = nullptr, AOTI_TORCH_SUCCESS)

using cudaStream_t = void*;
using std::min;

namespace cuda_on_cpu {

// In place of torch's: there is no device to make current.
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

struct Index {
  uint32_t x;
};
inline Index block, thread;

template <typename Kernel>
void launch(int64_t blocks, int64_t threads, const Kernel& kernel) {
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t j = 0; j < threads; ++j) {
      block.x = static_cast<uint32_t>(i);
      thread.x = static_cast<uint32_t>(j);
      kernel();
    }
}

}  // namespace cuda_on_cpu

#define blockIdx cuda_on_cpu::block
#define threadIdx cuda_on_cpu::thread

inline float __fdiv_rn(float a, float b) { return a / b; }
