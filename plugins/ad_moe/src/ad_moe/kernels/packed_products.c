/* Products of rows with the packed weights (`ad_core.native.packed`) of the experts that they chose: each of these weights is read once.
 *
 * Legend: choices, each a row of In numbers with an expert of E, whose weight has Out outputs. A task is a block of outputs of all choices
 * of one expert: the weight's block stays in the core's cache meanwhile, in parts if it is deep.
 */
#include "ad_native.h"

#ifndef HAS_PAIRS
#error "this processor has no instructions for pairs of bfloat16"
#endif

enum { ROWS = 96, DEPTH = 1024 };

typedef struct {
    const uint16_t *x, *weight, *bias; /* [choices / share, In], rows `x_row` elements apart; packed [E, ...]; [E, Out] or none */
    uint16_t *out; /* [choices, Out] */
    int64_t x_row, share, In, Out, blocks;
} Call;

static void task(const Call *c, int64_t expert, const int64_t *choices, int64_t count, int64_t block) {
    const uint16_t *weight = c->weight + (expert * c->blocks + block) * OUTPUTS * c->In;
    const uint16_t *bias = c->bias ? c->bias + expert * c->Out + block * OUTPUTS : 0;
    float sum[ROWS * OUTPUTS];
    for (; count > 0; count -= ROWS, choices += ROWS) {
        const int64_t rows = count < ROWS ? count : ROWS;
        for (int64_t first = 0; first < c->In / 2; first += DEPTH) {
            const int64_t stop = first + DEPTH < c->In / 2 ? first + DEPTH : c->In / 2;
            for (int64_t m = 0; m < rows; m += TILE) {
                const uint16_t *tile[TILE];
                for (int64_t i = 0; i < TILE; i++) tile[i] = c->x + choices[m + i < rows ? m + i : m] / c->share * c->x_row;
                multiply_tile(rows - m < TILE ? rows - m : TILE, tile, weight, first, stop, first > 0, sum + m * OUTPUTS);
            }
        }
        for (int64_t m = 0; m < rows; m++)
            store_block(c->out + choices[m] * c->Out + block * OUTPUTS, sum + m * OUTPUTS, bias, c->Out - block * OUTPUTS);
    }
}

void packed_products(const void *x, int64_t x_row, int64_t share, const void *selected, int64_t choices, const void *weight,
                     const void *bias, int64_t E, int64_t Out, int64_t In, void *out) {
    const Call call = {
        .x = x, .weight = weight, .bias = bias, .out = out, .x_row = x_row, .share = share, .In = In, .Out = Out,
        .blocks = (Out + OUTPUTS - 1) / OUTPUTS,
    };
    const int64_t *experts = selected;
    /* Choices in the order of their experts: those of e are order[begin[e]] to order[begin[e + 1]]. */
    int64_t *begin = calloc(2 * (E + 2) + choices, sizeof(int64_t)), *chosen = begin + E + 2, *order = chosen + E + 2, count = 0;
    for (int64_t i = 0; i < choices; i++) {
        if (experts[i] >= 0 && experts[i] < E) begin[experts[i] + 2]++;
        else memset((uint16_t *)out + i * Out, 0, Out * SIZE);
    }
    for (int64_t e = 0; e < E; e++) {
        if (begin[e + 2]) chosen[count++] = e;
        begin[e + 2] += begin[e + 1];
    }
    for (int64_t i = 0; i < choices; i++)
        if (experts[i] >= 0 && experts[i] < E) order[begin[experts[i] + 1]++] = i;
#pragma omp parallel for schedule(dynamic, 2) if (omp_get_max_threads() > 1)
    for (int64_t number = 0; number < count * call.blocks; number++) {
        const int64_t expert = chosen[number / call.blocks], from = begin[expert];
        task(&call, expert, order + from, begin[expert + 1] - from, number % call.blocks);
    }
    free(begin);
}
