/* One token of n sequences through a causal convolution, for the CPU.
 *
 * Legend: n sequences, C channels, K taps, of which K - 1 meet what the state keeps. A task is a block of channels of all sequences: its taps
 * are laid out once.
 */
#include "ad_native.h"

enum { BLOCK = 64, MAX_TAPS = 16 };

typedef struct {
    const void *x, *weight, *bias; /* [n, C] with rows `x_row` elements apart, [C, K], [C] or none */
    void *state; /* [slots, K - 1, C] */
    const int32_t *slots;
    const uint8_t *fresh; /* of each sequence: its state counts as zero */
    void *out; /* [n, C] */
    int64_t x_row, n, C, K, activated;
} Call;

INLINE void filter(const Call *c, int64_t first, const int64_t count) {
    const int64_t K = c->K;
    float taps[MAX_TAPS][BLOCK], bias[BLOCK], seen[BLOCK], sum[BLOCK];
    for (int64_t k = 0; k < K; k++)
        for (int64_t i = 0; i < count; i++) taps[k][i] = widen_one(c->weight, (first + i) * K + k);
    if (c->bias) widen(bias, c->bias, first, count);
    else memset(bias, 0, sizeof bias);
    for (int64_t row = 0; row < c->n; row++) {
        char *state = (char *)c->state + ((int64_t)c->slots[row] * (K - 1) * c->C + first) * SIZE;
        if (c->fresh[row]) for (int64_t k = 0; k < K - 1; k++) memset(state + k * c->C * SIZE, 0, count * SIZE);
        memcpy(sum, bias, sizeof sum);
        for (int64_t k = 0; k < K - 1; k++) {
            widen(seen, state, k * c->C, count);
            for (int64_t i = 0; i < count; i++) sum[i] += taps[k][i] * seen[i];
            if (k) memcpy(state + (k - 1) * c->C * SIZE, state + k * c->C * SIZE, count * SIZE);
        }
        widen(seen, c->x, row * c->x_row + first, count);
        for (int64_t i = 0; i < count; i++) sum[i] += taps[K - 1][i] * seen[i];
        memcpy(state + (K - 2) * c->C * SIZE, (const char *)c->x + (row * c->x_row + first) * SIZE, count * SIZE);
        if (c->activated) for (int64_t i = 0; i < count; i++) sum[i] = silu(sum[i]);
        narrow(c->out, row * c->C + first, sum, count);
    }
}

INLINE void sized(const Call *c, int64_t block) {
    const int64_t first = block * BLOCK, count = c->C - first;
    if (count >= BLOCK) filter(c, first, BLOCK);
    else filter(c, first, count);
}

void conv_decode(const void *x, int64_t x_row, const void *weight, const void *bias, void *state, const void *slots, const void *fresh,
                 void *out, int64_t n, int64_t C, int64_t K, int64_t activated) {
    const Call call = {
        .x = x, .weight = weight, .bias = bias, .state = state, .slots = slots, .fresh = fresh, .out = out, .x_row = x_row, .n = n, .C = C,
        .K = K, .activated = activated,
    };
    const int64_t blocks = (C + BLOCK - 1) / BLOCK;
#pragma omp parallel for if (omp_get_max_threads() > 1 && n * C >= 1 << 14)
    for (int64_t block = 0; block < blocks; block++) sized(&call, block);
}
