// The kernels with vectors of 32 bytes.
#include "../vector_includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define DETR_METHODS_CAPABILITY avx2
#define DETR_METHODS_VECTOR_BYTES 32
#include "../all_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
