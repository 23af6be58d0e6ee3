/* x times a packed weight, in bfloat16 with sums in float, for processors with instructions for pairs of bfloat16.
 *
 * Legend: T rows of x, K inputs, N outputs. The weight lies in blocks of 64 outputs, and in each block pairs of inputs follow each other:
 * [N / 64, K / 2, 64, 2], filled up with zeros. So it is read front to back, whatever T is, and an instruction takes sixteen outputs.
 */
#include "ad_native.h"

#ifndef __AVX512BF16__
#error "this processor has no instructions for bfloat16"
#else

enum { OUTPUTS = 64, ROWS = 6, ROW_BLOCK = 96, DEPTH = 1024 };

typedef struct {
    const uint16_t *x, *weight, *bias;
    uint16_t *out;
    int64_t x_row, T, pairs, N;
} Call;

/* M rows from `row` on times pairs `first` to `stop` of a block: added to `sum` [M, 64], or written there if `first` is 0. */
INLINE void multiply_block(const Call *c, const int64_t M, int64_t row, const uint16_t *weight, int64_t first, int64_t stop, float *sum) {
    __m512 kept[ROWS][4];
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < 4; i++) kept[m][i] = first ? _mm512_loadu_ps(sum + m * OUTPUTS + 16 * i) : _mm512_setzero_ps();
    const uint16_t *x = c->x + row * c->x_row;
    for (int64_t pair = first; pair < stop; pair++) {
        __m512bh part[4];
        for (int64_t i = 0; i < 4; i++) part[i] = (__m512bh)_mm512_loadu_si512(weight + (pair * OUTPUTS + 16 * i) * 2);
        for (int64_t m = 0; m < M; m++) {
            int32_t both;
            memcpy(&both, x + m * c->x_row + 2 * pair, sizeof both);
            for (int64_t i = 0; i < 4; i++) kept[m][i] = _mm512_dpbf16_ps(kept[m][i], part[i], (__m512bh)_mm512_set1_epi32(both));
        }
    }
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < 4; i++) _mm512_storeu_ps(sum + m * OUTPUTS + 16 * i, kept[m][i]);
}

INLINE void multiply_rows(const Call *c, int64_t M, int64_t row, const uint16_t *weight, int64_t first, int64_t stop, float *sum) {
    switch (M) {
    case 1: multiply_block(c, 1, row, weight, first, stop, sum); break;
    case 2: multiply_block(c, 2, row, weight, first, stop, sum); break;
    case 3: multiply_block(c, 3, row, weight, first, stop, sum); break;
    case 4: multiply_block(c, 4, row, weight, first, stop, sum); break;
    case 5: multiply_block(c, 5, row, weight, first, stop, sum); break;
    default: multiply_block(c, 6, row, weight, first, stop, sum);
    }
}

/* One task: a block of outputs for a block of rows. The weight's block stays in the core's cache, in parts if it is deep. */
static void task(const Call *c, int64_t block, int64_t start) {
    const int64_t rows = c->T - start < ROW_BLOCK ? c->T - start : ROW_BLOCK, outputs = c->N - block * OUTPUTS;
    const uint16_t *weight = c->weight + block * c->pairs * OUTPUTS * 2;
    float sum[ROW_BLOCK * OUTPUTS];
    for (int64_t first = 0; first < c->pairs; first += DEPTH) {
        const int64_t stop = first + DEPTH < c->pairs ? first + DEPTH : c->pairs;
        for (int64_t m = 0; m < rows; m += ROWS)
            multiply_rows(c, rows - m < ROWS ? rows - m : ROWS, start + m, weight, first, stop, sum + m * OUTPUTS);
    }
    for (int64_t m = 0; m < rows; m++) {
        uint16_t *out = c->out + (start + m) * c->N + block * OUTPUTS;
        for (int64_t i = 0; i < 4 && 16 * i < outputs; i++) {
            const __mmask16 there = outputs - 16 * i < 16 ? (1u << (outputs - 16 * i)) - 1 : 0xffff;
            __m512 value = _mm512_loadu_ps(sum + m * OUTPUTS + 16 * i);
            if (c->bias) {
                const __m256i bias = _mm256_maskz_loadu_epi16(there, c->bias + block * OUTPUTS + 16 * i);
                value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16)));
            }
            _mm256_mask_storeu_epi16(out + 16 * i, there, (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
}

void packed_linear(const void *x, int64_t x_row, const void *weight, const void *bias, void *out, int64_t T, int64_t K, int64_t N) {
    const Call call = { .x = x, .weight = weight, .bias = bias, .out = out, .x_row = x_row, .T = T, .pairs = K / 2, .N = N };
    const int64_t blocks = (N + OUTPUTS - 1) / OUTPUTS, parts = (T + ROW_BLOCK - 1) / ROW_BLOCK;
#pragma omp parallel for if (omp_get_max_threads() > 1 && blocks * parts > 1)
    for (int64_t number = 0; number < blocks * parts; number++) task(&call, number / parts, number % parts * ROW_BLOCK);
}
#endif
