#include "capability.h"

#include <torch/library.h>
#include <torch/version.h>

#include <atomic>
#include <vector>

namespace detr_methods {
namespace {

bool supported(Capability level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // f16c, which the kernels use too, is older than AVX2; Clang cannot ask for it
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == Capability::avx2) return avx2;
  if (level == Capability::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == Capability::baseline;
}

Capability best() {
  if (supported(Capability::avx512)) return Capability::avx512;
  return supported(Capability::avx2) ? Capability::avx2 : Capability::baseline;
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> level{best()};
  return level;
}

const char* name_of(Capability level) {
  if (level == Capability::avx512) return "avx512";
  return level == Capability::avx2 ? "avx2" : "baseline";
}

// Choose a capability by name (an empty name chooses nothing) and return the one in force.
std::string cpu_capability(std::string name) {
  if (name.empty()) return name_of(capability());
  for (Capability level : {Capability::baseline, Capability::avx2, Capability::avx512}) {
    if (name == name_of(level)) {
      TORCH_CHECK_VALUE(supported(level), "cpu capability ", name, " is not one of this processor");
      current() = level;
      return name;
    }
  }
  TORCH_CHECK_VALUE(false, "cpu capability is '", name, "', expected avx512, avx2 or baseline");
}

// Whether MKL, which computes differently elsewhere, is on a processor of its own maker.
bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// What ops/_sources.py looks for in the file, which therefore need not be loaded to be asked.
[[gnu::used]] const char origin[] =
    "detr_methods sources " DETR_METHODS_SOURCES " torch " TORCH_VERSION;

// Compiler, its flags and the torch that the kernels were compiled against.
std::vector<std::string> build_information() {
#if defined(__clang__)
  const std::string compiler = __VERSION__;  // begins with its name
#else
  const std::string compiler = std::string("GCC ") + __VERSION__;
#endif
  return {compiler, DETR_METHODS_FLAGS, TORCH_VERSION};
}

}  // namespace

Capability capability() { return current().load(std::memory_order_relaxed); }

TORCH_LIBRARY_FRAGMENT(detr_methods, library) {
  library.def("cpu_capability(str name) -> str", cpu_capability);
  library.def("is_intel() -> bool", is_intel);
  library.def("build_information() -> str[]", build_information);
}

}  // namespace detr_methods
