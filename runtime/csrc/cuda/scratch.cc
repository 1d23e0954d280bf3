#include "scratch.h"

#include <algorithm>
#include <stdexcept>

namespace bdq::cuda {
namespace {

constexpr std::size_t kAlignment = 256, kSmallest = std::size_t{1} << 20;

}  // namespace

std::shared_ptr<Scratch> Scratch::of(const NodeInfo& node) {
  // Nodes of one session have one logger. The map holds no reference, so memory goes with the last kernel of its session.
  static std::mutex mutex;
  static auto& sessions = *new std::map<const OrtLogger*, std::weak_ptr<Scratch>>;
  const OrtLogger* logger = nullptr;
  check(node.api(), node.api().KernelInfo_GetLogger(&node.info(), &logger));
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = sessions.begin(); it != sessions.end();) it = it->second.expired() ? sessions.erase(it) : std::next(it);
  std::shared_ptr<Scratch> found = sessions[logger].lock();
  if (found == nullptr) sessions[logger] = found = std::make_shared<Scratch>(node.api());
  return found;
}

Scratch::~Scratch() {
  for (auto& [stream, blocks] : blocks_) {
    for (Block& block : blocks) {
      block.allocator->Free(block.allocator, block.data);
      api_.ReleaseAllocator(block.allocator);
    }
  }
}

void* Scratch::take(const Run& run, int like, Stream stream, Cursor& cursor, std::size_t bytes) {
  bytes = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Block>& blocks = blocks_[stream];
  while (cursor.block < blocks.size() && cursor.used + bytes > blocks[cursor.block].size) cursor = {cursor.block + 1, 0};
  if (cursor.block == blocks.size()) {
    const std::size_t last = blocks.empty() ? 0 : blocks.back().size;
    blocks.reserve(blocks.size() + 1);
    blocks.push_back(allocate(run, like, std::max({bytes, 2 * last, kSmallest})));
  }
  void* found = blocks[cursor.block].data + cursor.used;
  cursor.used += bytes;
  return found;
}

Scratch::Block Scratch::allocate(const Run& run, int like, std::size_t size) const {
  const OrtValue* value = nullptr;
  const OrtMemoryInfo* memory = nullptr;
  check(api_, api_.KernelContext_GetInput(&run.context(), static_cast<std::size_t>(like), &value));
  check(api_, api_.GetTensorMemoryInfo(value, &memory));
  OrtAllocator* allocator = nullptr;
  check(api_, api_.KernelContext_GetAllocator(&run.context(), memory, &allocator));
  auto* data = static_cast<char*>(allocator->Alloc(allocator, size));
  if (data == nullptr) {
    api_.ReleaseAllocator(allocator);
    throw std::runtime_error("out of GPU memory: " + std::to_string(size) + " bytes of scratch");
  }
  return {allocator, data, size};
}

}  // namespace bdq::cuda
