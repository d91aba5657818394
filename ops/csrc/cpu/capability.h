// Which vector instructions the CPU kernels use, decided when the program runs.
//
// Every kernel is compiled once for each capability (see targets/), in a namespace of that name.
#pragma once

#include <string>

namespace detr_methods {

enum class Capability { baseline, avx2, avx512 };

// The capability in force: the best that the processor has, unless another one was chosen.
Capability capability();

}  // namespace detr_methods

#if defined(__x86_64__)
#define DETR_METHODS_DISPATCH(...)             \
  switch (::detr_methods::capability()) {       \
    case ::detr_methods::Capability::avx512:    \
      ::detr_methods::avx512::__VA_ARGS__;             \
      break;                                    \
    case ::detr_methods::Capability::avx2:      \
      ::detr_methods::avx2::__VA_ARGS__;               \
      break;                                    \
    default:                                    \
      ::detr_methods::baseline::__VA_ARGS__;           \
  }
#define DETR_METHODS_DECLARE(...) \
  namespace baseline {                    \
  __VA_ARGS__                             \
  }                                       \
  namespace avx2 {                        \
  __VA_ARGS__                             \
  }                                       \
  namespace avx512 {                      \
  __VA_ARGS__                             \
  }
#else
#define DETR_METHODS_DISPATCH(...) ::detr_methods::baseline::__VA_ARGS__;
#define DETR_METHODS_DECLARE(...) \
  namespace baseline {                    \
  __VA_ARGS__                             \
  }
#endif
