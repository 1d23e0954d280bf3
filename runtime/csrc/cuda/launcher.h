// Launches of one call of an operator, on the stream that ONNX Runtime gives it.
#pragma once

#include <cstdint>
#include <string>

#include "../ort/run.h"
#include "driver.h"
#include "images.h"
#include "scratch.h"

namespace bdq::cuda {

struct Grid {
  std::int64_t x = 1, y = 1, z = 1;
};

// A pointer argument of a kernel: device memory, aligned to 16 bytes, or null where the kernel does not read it.
struct Pointer {
  const void* address;
};

class Launcher {
 public:
  // Makes the stream's context current while it lives. `like`: an input in device memory; scratch is had where it is.
  Launcher(const Run& run, Scratch& scratch, int like);
  ~Launcher();
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // Memory for the kernels of this call.
  template <class T>
  T* scratch(std::int64_t count) {
    return static_cast<T*>(scratch_.take(run_, like_, stream_, cursor_, static_cast<std::size_t>(count) * sizeof(T)));
  }

  // A place in scratch to return to: what is taken after mark() is taken again after rewind(), by later kernels of this call.
  Scratch::Cursor mark() const { return cursor_; }
  void rewind(const Scratch::Cursor& cursor) { cursor_ = cursor; }

  // Device copy of host memory; that may be changed when this returns.
  template <class T>
  const T* upload(const T* data, std::int64_t count) {
    T* copy = scratch<T>(count);
    copy_in(copy, data, static_cast<std::size_t>(count) * sizeof(T));
    return copy;
  }

  void copy(void* to, const void* from, std::size_t bytes);

  // Arguments as in bdq_runtime/gpu/variants.py: Pointer, std::int32_t, std::int64_t or float. An empty grid launches nothing.
  template <class... Arguments>
  void launch(const std::string& image, const Grid& grid, Arguments... arguments) {
    (check_argument(image, arguments), ...);
    // Triton appends two pointers to memory that these kernels do not use.
    void* nothing[2] = {nullptr, nullptr};
    void* addresses[] = {&arguments..., &nothing[0], &nothing[1]};
    start(image, grid, addresses);
  }

 private:
  static void check_argument(const std::string& image, const Pointer& pointer);
  static void check_argument(const std::string&, std::int32_t) {}
  static void check_argument(const std::string&, std::int64_t) {}
  static void check_argument(const std::string&, float) {}

  void copy_in(void* to, const void* from, std::size_t bytes);
  void start(const std::string& image, const Grid& grid, void** arguments);

  const Run& run_;
  Scratch& scratch_;
  const int like_;
  const Driver& driver_;
  Stream stream_ = nullptr;
  Context context_ = nullptr;
  int capability_ = 0;
  Scratch::Cursor cursor_;
};

// Throws std::invalid_argument, naming the value, for one that the 32-bit argument of a kernel cannot hold.
std::int32_t int32(const char* name, std::int64_t value);

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace bdq::cuda
