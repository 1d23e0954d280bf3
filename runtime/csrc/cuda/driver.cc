#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace bdq::cuda {
namespace {

bool load(Driver& driver) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  bool complete = true;
  const auto get = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    complete = complete && function != nullptr;
  };
#define BDQ_GET(name) get(driver.name, #name)
  BDQ_GET(cuInit);
  BDQ_GET(cuDeviceGetCount);
  BDQ_GET(cuGetErrorString);
  BDQ_GET(cuStreamGetCtx);
  BDQ_GET(cuCtxPushCurrent_v2);
  BDQ_GET(cuCtxPopCurrent_v2);
  BDQ_GET(cuCtxGetDevice);
  BDQ_GET(cuDeviceGetAttribute);
  BDQ_GET(cuModuleLoadData);
  BDQ_GET(cuModuleGetFunction);
  BDQ_GET(cuFuncSetAttribute);
  BDQ_GET(cuMemcpyHtoDAsync_v2);
  BDQ_GET(cuMemcpyDtoDAsync_v2);
  BDQ_GET(cuLaunchKernel);
#undef BDQ_GET
  int devices = 0;
  return complete && driver.cuInit(0) == 0 && driver.cuDeviceGetCount(&devices) == 0 && devices > 0;
}

}  // namespace

const Driver* Driver::find() {
  static Driver driver{};
  static const bool loaded = load(driver);
  return loaded ? &driver : nullptr;
}

void Driver::check(Result result, const char* what) const {
  if (result == 0) return;
  const char* text = nullptr;
  if (cuGetErrorString(result, &text) != 0 || text == nullptr) text = "unknown error";
  throw std::runtime_error(std::string(what) + ": " + text + " (CUDA error " + std::to_string(result) + ")");
}

}  // namespace bdq::cuda
