// Device memory that kernels of one stream hand to each other, from ONNX Runtime's allocator.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "../ort/node.h"
#include "../ort/run.h"
#include "driver.h"

namespace bdq::cuda {

// Blocks of a session for each of its streams, kept until the last of the session's kernels is gone: what runs on a stream runs in
// order, so the next call may write over them at once, and no other stream ever gets them. They grow geometrically.
class Scratch {
 public:
  // Where the next piece of a stream's memory is; each call of an operator starts from the first.
  struct Cursor {
    std::size_t block = 0, used = 0;
  };

  // That of the session that `node` is created in.
  static std::shared_ptr<Scratch> of(const NodeInfo& node);

  explicit Scratch(const OrtApi& api) : api_(api) {}
  ~Scratch();

  // `bytes`, aligned as the allocator aligns. `like`: the index of an input that lies on the device.
  void* take(const Run& run, int like, Stream stream, Cursor& cursor, std::size_t bytes);

 private:
  struct Block {
    OrtAllocator* allocator;
    char* data;
    std::size_t size;
  };

  Block allocate(const Run& run, int like, std::size_t size) const;

  const OrtApi& api_;
  std::mutex mutex_;
  std::map<Stream, std::vector<Block>> blocks_;
};

}  // namespace bdq::cuda
