/* Whether this processor multiplies pairs of bfloat16. */
#include "ad_native.h"

#ifndef HAS_PAIRS
#error "this processor has no instructions for pairs of bfloat16"
#endif

void pairs(void) {}
