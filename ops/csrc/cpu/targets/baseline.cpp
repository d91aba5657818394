// The kernels with the instructions that every processor of this architecture has.
#include "../vector_includes.h"

#define DETR_METHODS_CAPABILITY baseline
#define DETR_METHODS_VECTOR_BYTES 16
#include "../all_kernels.h"
