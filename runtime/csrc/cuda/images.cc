#include "images.h"

#include <stdexcept>

// Embedded, not beside the library: onnxruntime-genai and others copy one file into a model's folder.
asm(".section .rodata\n"
    ".balign 64\n"
    ".hidden bdq_cuda_images\n"
    ".global bdq_cuda_images\n"
    "bdq_cuda_images:\n"
    ".incbin \"" BDQ_IMAGES "/images.bin\"\n"
    ".byte 0\n"
    ".previous\n");
extern "C" const unsigned char bdq_cuda_images[];

namespace bdq::cuda {
namespace {

constexpr int kOldest = 80;

constexpr Image kImages[] = {
#include "images.inc"
};

// Machine code for 8.y runs on 8.z from y on; from 9.0 on the images use features of one chip only.
bool runs_on(const Image& image, int capability) {
  if (image.target / 10 == 8) return capability / 10 == 8 && image.target <= capability;
  return image.target == capability;
}

}  // namespace

const void* Image::data() const { return bdq_cuda_images + offset; }

const Image& choose_image(const std::string& name, int capability) {
  const std::string version = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  if (capability < kOldest) throw std::runtime_error("this GPU has compute capability " + version + ", the bdq kernels need 8.0 or newer");
  const Image* best = nullptr;
  const Image* portable = nullptr;
  for (const Image& image : kImages) {
    if (name != image.name) continue;
    if (image.target == 0) portable = &image;
    else if (runs_on(image, capability) && (best == nullptr || best->target < image.target)) best = &image;
  }
  if (best == nullptr) best = portable;
  if (best == nullptr) throw std::runtime_error("the library has no image " + name);
  return *best;
}

}  // namespace bdq::cuda
