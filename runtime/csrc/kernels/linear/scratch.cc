#include "scratch.h"

#include <cstring>
#include <new>

namespace bdq {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kChecked = true;  // each call has its own memory, of just its size and full of NaN, so that a wrong read or write shows
#else
constexpr bool kChecked = false;
#endif
constexpr std::size_t kKeep = kChecked ? 0 : std::size_t{64} << 20, kRound = kChecked ? 1 : 4096;
constexpr std::align_val_t kAlign{64};

struct Kept {
  std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
  ~Kept() { ::operator delete(data, kAlign); }
};

thread_local Kept kept[Scratch::kUses];

}  // namespace

Scratch::Scratch(Use use, std::size_t bytes) : use_(use) {
  Kept& slot = kept[use];
  if (slot.bytes >= bytes && slot.data != nullptr) {
    data_ = slot.data;
    bytes_ = slot.bytes;
    slot = Kept{};
  } else {
    bytes_ = (bytes + kRound - 1) / kRound * kRound;
    data_ = static_cast<std::uint8_t*>(::operator new(bytes_, kAlign));
  }
  if (kChecked) std::memset(data_, 0xff, bytes_);
}

Scratch::~Scratch() {
  Kept& slot = kept[use_];
  if (bytes_ <= kKeep && bytes_ > slot.bytes) {
    std::uint8_t* old = slot.data;
    slot.data = data_;
    slot.bytes = bytes_;
    data_ = old;
  }
  ::operator delete(data_, kAlign);
}

}  // namespace bdq
