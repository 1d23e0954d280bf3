// The CUDA driver, found at run time: one library serves machines with and without a GPU, and needs no CUDA headers.
#pragma once

#include <cstddef>

namespace bdq::cuda {

using Result = int;
using Device = int;
using Context = void*;
using Module = void*;
using Function = void*;
using Stream = void*;
using Address = unsigned long long;  // CUdeviceptr

// Functions of libcuda.so.1, named as there (of cuda.h's two names for some, the one that the headers use today).
struct Driver {
  Result (*cuInit)(unsigned);
  Result (*cuDeviceGetCount)(int*);
  Result (*cuGetErrorString)(Result, const char**);
  Result (*cuStreamGetCtx)(Stream, Context*);
  Result (*cuCtxPushCurrent_v2)(Context);
  Result (*cuCtxPopCurrent_v2)(Context*);
  Result (*cuCtxGetDevice)(Device*);
  Result (*cuDeviceGetAttribute)(int*, int, Device);
  Result (*cuModuleLoadData)(Module*, const void*);
  Result (*cuModuleGetFunction)(Function*, Module, const char*);
  Result (*cuFuncSetAttribute)(Function, int, int);
  Result (*cuMemcpyHtoDAsync_v2)(Address, const void*, std::size_t, Stream);
  Result (*cuMemcpyDtoDAsync_v2)(Address, Address, std::size_t, Stream);
  Result (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);

  // Null on a machine without a driver, or whose driver has no device. Loaded once.
  static const Driver* find();

  // Throws std::runtime_error with the driver's text.
  void check(Result result, const char* what) const;
};

constexpr int kComputeCapabilityMajor = 75;  // CUdevice_attribute
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxDynamicShared = 8;         // CUfunction_attribute

}  // namespace bdq::cuda
