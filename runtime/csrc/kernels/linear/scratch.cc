#include "scratch.h"

#include <new>

namespace bdq {
namespace {

constexpr std::size_t kKeep = std::size_t{64} << 20;
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
    return;
  }
  bytes_ = (bytes + 4095) / 4096 * 4096;
  data_ = static_cast<std::uint8_t*>(::operator new(bytes_, kAlign));
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
