// What a target compiles; see targets/. Their order is that in which they use each other.
#include "vector.h"
#include "exponential.h"
#include "dropout_bits.h"
#include "matmul_kernel.h"
#include "deformable_attention_kernel.h"
#include "gaussian_attention_kernel.h"
#include "dropout_kernel.h"
#include "winograd_kernel.h"
