// Memory for one call, kept by the thread for its next one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bdq {

// Takes the buffer that this thread keeps for `use` (or a new one where that is too small) and gives it back at the end; a second
// lease on the same thread meanwhile simply allocates. Throws std::bad_alloc.
class Scratch {
 public:
  enum Use { kActivations, kMultiply, kAttention, kUses };

  Scratch(Use use, std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::uint8_t* data() const { return data_; }  // aligned to 64 bytes

 private:
  Use use_;
  std::uint8_t* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace bdq
