// What the library exports: RegisterCustomOps, which every language binding of ONNX Runtime calls, and bdq_describe.
#include <map>
#include <mutex>
#include <utility>

#include "families.h"
#include "isa_names.h"

#if defined(_WIN32)
#define BDQ_EXPORT extern "C" __declspec(dllexport)
#else
#define BDQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace bdq {
namespace {

constexpr std::uint32_t kApiVersion = 17;
constexpr const char* kDomain = "bdq";
constexpr const char* kRegistered = "bdq.registered";
constexpr const char* kIsa = "bdq.isa";

struct Domain {
  CustomOps ops;
  OrtCustomOpDomain* domain = nullptr;
};

// ONNX Runtime never says that it is done with a domain, so these live as long as the process: one for each instruction set,
// however many sessions there are.
OrtCustomOpDomain* domain_of(const OrtApi& api, Isa isa) {
  static std::mutex mutex;
  static auto& made = *new std::map<std::pair<const OrtApi*, Isa>, Domain>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = made.find({&api, isa}); found != made.end()) return found->second.domain;
  Domain domain;
  add_cpu_ops(api, isa, domain.ops);
#if defined(BDQ_CUDA)
  add_cuda_ops(api, domain.ops);
#endif
  check(api, api.CreateCustomOpDomain(kDomain, &domain.domain));
  for (const auto& op : domain.ops) check(api, api.CustomOpDomain_Add(domain.domain, op.get()));
  return made.emplace(std::pair(&api, isa), std::move(domain)).first->second.domain;
}

std::string entry(const OrtApi& api, const OrtSessionOptions& options, const char* key) {
  int present = 0;
  check(api, api.HasSessionConfigEntry(&options, key, &present));
  if (present == 0) return "";
  std::size_t size = 0;
  check(api, api.GetSessionConfigEntry(&options, key, nullptr, &size));
  std::string value(size, '\0');
  check(api, api.GetSessionConfigEntry(&options, key, value.data(), &size));
  value.resize(size - 1);
  return value;
}

void register_ops(const OrtApi& api, OrtSessionOptions& options) {
  // A second domain of the same name would fail when the session is created.
  if (!entry(api, options, kRegistered).empty()) return;
  const std::string isa = entry(api, options, kIsa);
  OrtCustomOpDomain* domain = domain_of(api, isa.empty() ? selected_isa() : isa_of(isa));
  check(api, api.AddCustomOpDomain(&options, domain));
  check(api, api.AddSessionConfigEntry(&options, kRegistered, "1"));
}

}  // namespace

void add_cpu_ops(const OrtApi& api, Isa isa, CustomOps& ops) {
  for (const Operator& op : operators()) {
    const auto add = [&](MakeKernel make, InferShapes infer) {
      ops.push_back(std::make_unique<CustomOp>(api, op, "CPUExecutionProvider", make, infer, isa));
    };
    switch (op.family) {
      case Operator::kLinear: add(make_linear, infer_linear); break;
      case Operator::kAttention: add(make_attention, infer_attention); break;
      case Operator::kHadamard: add(make_hadamard, infer_same); break;
      case Operator::kFakeQuantize: add(make_fake_quantize, infer_same); break;
    }
  }
}

}  // namespace bdq

BDQ_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(bdq::kApiVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "bdq needs ONNX Runtime 1.18 or newer");
  return bdq::guarded(*api, [&] { bdq::register_ops(*api, *options); });
}

// JSON: {"version", "isas", "operators"}; the caller must not free it. May be called without ONNX Runtime.
BDQ_EXPORT const char* bdq_describe() { return bdq::describe(); }
