/* x times a packed weight (`ad_core.native.packed`), in bfloat16 with sums in float.
 *
 * Legend: T rows of x, K inputs, N outputs. A task is a block of outputs for a block of rows: the weight's block stays in the core's cache
 * meanwhile, in parts if it is deep.
 */
#include "ad_native.h"

#ifndef HAS_PAIRS
#error "this processor has no instructions for pairs of bfloat16"
#endif

enum { ROWS = 96, DEPTH = 1024 };

static void task(const uint16_t *x, int64_t x_row, const uint16_t *weight, const uint16_t *bias, uint16_t *out, int64_t rows, int64_t pairs,
                 int64_t N, int64_t outputs) {
    float sum[ROWS * OUTPUTS];
    for (int64_t first = 0; first < pairs; first += DEPTH) {
        const int64_t stop = first + DEPTH < pairs ? first + DEPTH : pairs;
        for (int64_t m = 0; m < rows; m += TILE) {
            const uint16_t *tile[TILE];
            for (int64_t i = 0; i < TILE; i++) tile[i] = x + (m + i < rows ? m + i : m) * x_row;
            multiply_tile(rows - m < TILE ? rows - m : TILE, tile, weight, first, stop, first > 0, sum + m * OUTPUTS);
        }
    }
    for (int64_t m = 0; m < rows; m++) store_block(out + m * N, sum + m * OUTPUTS, bias, outputs);
}

void packed_linear(const void *x, int64_t x_row, const void *weight, const void *bias, void *out, int64_t T, int64_t K, int64_t N) {
    const int64_t blocks = (N + OUTPUTS - 1) / OUTPUTS, parts = (T + ROWS - 1) / ROWS, pairs = K / 2;
#pragma omp parallel for if (omp_get_max_threads() > 1 && blocks * parts > 1)
    for (int64_t number = 0; number < blocks * parts; number++) {
        const int64_t first = number / parts * OUTPUTS, row = number % parts * ROWS;
        task((const uint16_t *)x + row * x_row, x_row, (const uint16_t *)weight + first * K, bias ? (const uint16_t *)bias + first : 0,
             (uint16_t *)out + row * N + first, T - row < ROWS ? T - row : ROWS, pairs, N, N - first);
    }
}
