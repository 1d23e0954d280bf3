// libcuda.so.1 for tests: device memory is host memory, and every launch goes to a callback.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int (*launch_t)(const void* image, const char* entry, const unsigned* grid, const unsigned* block, unsigned shared, void** arguments);

static launch_t launch;
static int capability = 80, depth = 0, loads = 0;

void mock_set(launch_t callback, int cc) {
  launch = callback;
  capability = cc;
}
int mock_context_depth(void) { return depth; }
int mock_loads(void) { return loads; }

struct function {
  const void* image;
  char entry[96];
  int shared;
};

int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuGetErrorString(int result, const char** text) { return *text = result == 719 ? "unspecified launch failure" : "mock error", 0; }
int cuStreamGetCtx(void* stream, void** context) { return (void)stream, *context = (void*)1, 0; }
int cuCtxPushCurrent_v2(void* context) { return (void)context, depth++, 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = (void*)1, depth--, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, depth > 0 ? 0 : 201; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return attribute == 75 || attribute == 76 ? 0 : 1;
}
int cuModuleLoadData(void** module, const void* image) { return *module = (void*)image, loads++, depth > 0 ? 0 : 201; }
int cuModuleGetFunction(void** function, void* module, const char* entry) {
  struct function* made = calloc(1, sizeof *made);
  made->image = module;
  strncpy(made->entry, entry, sizeof made->entry - 1);
  *function = made;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return 1;
  ((struct function*)function)->shared = value;
  return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  return (void)stream, memcpy((void*)to, from, bytes), depth > 0 ? 0 : 201;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  return (void)stream, memmove((void*)to, (void*)from, bytes), depth > 0 ? 0 : 201;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                   void** arguments, void** extra) {
  const struct function* f = function;
  const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  (void)stream;
  if (extra != NULL || depth <= 0) return 1;
  // as the driver: more than 48 KiB must have been allowed
  if (shared > (48u << 10) && (int)shared > f->shared) return 1;
  return launch(f->image, f->entry, grid, block, shared, arguments);
}
