// The compiled kernels inside this library (bdq_runtime/gpu/images, made by python -m bdq_runtime.gpu.build).
#pragma once

#include <cstdint>
#include <string>

namespace bdq::cuda {

struct Image {
  const char* name;   // also the entry point's
  int target;         // compute capability, 10 * major + minor, of a cubin; 0 for PTX
  std::uint32_t offset, size;
  int shared;         // bytes of dynamic shared memory
  int threads;        // in a block

  const void* data() const;
};

// The cubin for that GPU: its own, or for 8.x the newest that is not newer; otherwise PTX, which the driver compiles. Throws
// std::runtime_error for a GPU before 8.0 or a name that no image has.
const Image& choose_image(const std::string& name, int capability);

}  // namespace bdq::cuda
