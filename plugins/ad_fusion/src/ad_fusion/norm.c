/* Root mean square norms: each row is read once and written once.
 *
 * Legend: rows of D numbers, `outer` times `inner` of them, each `*_stride` elements apart; the output is contiguous. KIND is that of the
 * output; numbers that are `wide` are float whatever that is.
 */
#include "ad_native.h"

enum { PART = 64 };

typedef struct {
    const void *x, *weight; /* weight [D] or none */
    void *out;
    int64_t x_wide, weight_wide, outer_stride, inner, inner_stride, D, round_first;
    float eps;
} Call;

/* `count` numbers from element `at` on as floats. */
INLINE void take(float *restrict to, const void *from, int64_t wide, int64_t at, int64_t count) {
    if (wide) memcpy(to, (const float *)from + at, count * sizeof(float));
    else widen(to, from, at, count);
}

/* Numbers `first` to `first + count` of a row's result. */
INLINE void scaled(const Call *c, const float *x, float scale, int64_t first, const int64_t count, int64_t to) {
    float weight[PART], value[PART];
    for (int64_t i = 0; i < count; i++) value[i] = x[first + i] * scale;
    if (c->round_first && KIND != FLOAT32) {
        uint16_t rounded[PART];
        narrow(rounded, 0, value, count);
        widen(value, rounded, 0, count);
    }
    if (c->weight) {
        take(weight, c->weight, c->weight_wide, first, count);
        for (int64_t i = 0; i < count; i++) value[i] *= weight[i];
    }
    narrow(c->out, to + first, value, count);
}

INLINE void norm(const Call *c, int64_t row, const int64_t D) {
    const int64_t at = row / c->inner * c->outer_stride + row % c->inner * c->inner_stride;
    float x[PADDED(D)];
    take(x, c->x, c->x_wide, at, D);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; i++) sum += x[i] * x[i];
    const float scale = 1 / sqrtf(sum / D + c->eps);
    int64_t first = 0;
    for (; first + PART <= D; first += PART) scaled(c, x, scale, first, PART, row * D);
    if (first < D) scaled(c, x, scale, first, D - first, row * D);
}

void rms_norm(const void *x, int64_t x_wide, int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride, int64_t D,
              const void *weight, int64_t weight_wide, float eps, int64_t round_first, void *out) {
    const Call call = {
        .x = x, .weight = weight, .out = out, .x_wide = x_wide, .weight_wide = weight_wide, .outer_stride = outer_stride, .inner = inner,
        .inner_stride = inner_stride, .D = D, .round_first = round_first, .eps = eps,
    };
#pragma omp parallel for if (omp_get_max_threads() > 1 && outer * inner * D > 1 << 15)
    for (int64_t row = 0; row < outer * inner; row++) {
        if (D == PART) norm(&call, row, PART); /* the usual size of a head */
        else norm(&call, row, D);
    }
}
