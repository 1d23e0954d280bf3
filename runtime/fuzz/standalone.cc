// Runs a fuzz target on seeded random inputs, for compilers without libFuzzer and machines behind an emulator.
//   fuzz_linear_standalone [count] [seed]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 1000;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0u);
  for (int i = 0; i < count; ++i) {
    std::vector<std::uint8_t> data(64 + random() % 4096);
    for (std::uint8_t& byte : data) byte = static_cast<std::uint8_t>(random());
    LLVMFuzzerTestOneInput(data.data(), data.size());
  }
  std::printf("%d inputs\n", count);
}
