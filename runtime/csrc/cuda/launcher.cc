#include "launcher.h"

#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>

namespace bdq::cuda {
namespace {

constexpr std::int64_t kMaxGridX = std::numeric_limits<std::int32_t>::max(), kMaxGridYZ = 65535;
constexpr int kStaticShared = 48 << 10;  // beyond this a function must be told

const Driver& driver() {
  const Driver* found = Driver::find();
  if (found == nullptr) throw std::runtime_error("there is no CUDA driver or device on this machine");
  return *found;
}

// A function belongs to a context and an image. Contexts of ONNX Runtime live as long as the process.
Function function_of(const Driver& driver, Context context, const Image& image) {
  static std::mutex mutex;
  static auto& loaded = *new std::map<std::pair<Context, const Image*>, Function>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = loaded.find({context, &image}); found != loaded.end()) return found->second;
  Module module = nullptr;
  Function function = nullptr;
  driver.check(driver.cuModuleLoadData(&module, image.data()), image.name);
  driver.check(driver.cuModuleGetFunction(&function, module, image.name), image.name);
  if (image.shared > kStaticShared) driver.check(driver.cuFuncSetAttribute(function, kMaxDynamicShared, image.shared), image.name);
  return loaded[{context, &image}] = function;
}

}  // namespace

Launcher::Launcher(const Run& run, Scratch& scratch, int like) : run_(run), scratch_(scratch), like_(like), driver_(driver()) {
  bdq::check(run.api(), run.api().KernelContext_GetGPUComputeStream(&run.context(), &stream_));
  driver_.check(driver_.cuStreamGetCtx(stream_, &context_), "cuStreamGetCtx");
  driver_.check(driver_.cuCtxPushCurrent_v2(context_), "cuCtxPushCurrent");
  Device device = 0;
  int major = 0, minor = 0;
  Result result = driver_.cuCtxGetDevice(&device);
  if (result == 0) result = driver_.cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device);
  if (result == 0) result = driver_.cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device);
  if (result != 0) {
    driver_.cuCtxPopCurrent_v2(&context_);
    driver_.check(result, "cuDeviceGetAttribute");
  }
  capability_ = 10 * major + minor;
}

Launcher::~Launcher() {
  Context popped = nullptr;
  driver_.cuCtxPopCurrent_v2(&popped);
}

void Launcher::copy_in(void* to, const void* from, std::size_t bytes) {
  // From pageable memory the driver has staged the bytes when it returns.
  driver_.check(driver_.cuMemcpyHtoDAsync_v2(reinterpret_cast<Address>(to), from, bytes, stream_), "cuMemcpyHtoDAsync");
}

void Launcher::copy(void* to, const void* from, std::size_t bytes) {
  if (to == from || bytes == 0) return;
  driver_.check(driver_.cuMemcpyDtoDAsync_v2(reinterpret_cast<Address>(to), reinterpret_cast<Address>(from), bytes, stream_),
                "cuMemcpyDtoDAsync");
}

void Launcher::check_argument(const std::string& image, const Pointer& pointer) {
  if (reinterpret_cast<std::uintptr_t>(pointer.address) % 16 != 0)
    throw std::invalid_argument("a tensor for " + image + " is not aligned to 16 bytes; give memory that is");
}

void Launcher::start(const std::string& name, const Grid& grid, void** arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
    throw std::invalid_argument("sizes make a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                                std::to_string(grid.z) + " blocks, which CUDA cannot launch");
  const Image& image = choose_image(name, capability_);
  const Function function = function_of(driver_, context_, image);
  driver_.check(driver_.cuLaunchKernel(function, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                                       static_cast<unsigned>(grid.z), static_cast<unsigned>(image.threads), 1, 1,
                                       static_cast<unsigned>(image.shared), stream_, arguments, nullptr),
                image.name);
}

std::int32_t int32(const char* name, std::int64_t value) {
  if (value < std::numeric_limits<std::int32_t>::min() || value > std::numeric_limits<std::int32_t>::max())
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", more than the CUDA kernels take");
  return static_cast<std::int32_t>(value);
}

}  // namespace bdq::cuda
