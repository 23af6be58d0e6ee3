/* Products of few rows with the weights of the experts that they chose, for the CPU: each of these weights is read once.
 *
 * Legend: choices, each a row of In numbers with an expert of E; an expert's weight is [Out, In], or [In, Out] if `transposed`. A task is a
 * block of outputs of all choices of one expert.
 */
#include "ad_native.h"

enum { COLUMNS = 64, ROWS = 4 };

typedef struct {
    const void *x; /* [choices / share, In], rows `x_row` elements apart */
    const void *weight, *bias; /* [E, ...] contiguous; [E, Out] or none */
    void *out; /* [choices, Out] */
    int64_t x_row, share, In, Out;
} Call;

INLINE void store(const Call *c, int64_t expert, int64_t choice, int64_t first, int64_t count, float *sum) {
    if (c->bias) for (int64_t i = 0; i < count; i++) sum[i] += widen_one(c->bias, expert * c->Out + first + i);
    narrow(c->out, choice * c->Out + first, sum, count);
}

/* Outputs `first` to `first + count` of M choices, from rows of the weight. */
INLINE void by_rows(const Call *c, int64_t expert, const int64_t *choices, const int64_t M, int64_t first, int64_t count) {
    const int64_t base = (expert * c->Out + first) * c->In, wide = PADDED(c->In);
    float sum[ROWS][COLUMNS];
#ifdef __AVX512BF16__
    const int direct = KIND == BFLOAT16;
#else
    const int direct = 0;
#endif
    float rows[direct ? 1 : M * wide];
    const uint16_t *x[ROWS];
    for (int64_t m = 0; m < M; m++) {
        const int64_t at = choices[m] / c->share * c->x_row;
        if (direct) x[m] = (const uint16_t *)c->x + at;
        else widen(rows + m * wide, c->x, at, c->In);
    }
    for (int64_t n = 0; n < count; n += WIDTH) {
        Vector dots[ROWS][WIDTH], here[ROWS];
        for (int64_t i = 0; i < WIDTH; i++) {
            const int64_t at = base + (n + i < count ? n + i : count - 1) * c->In;
#ifdef __AVX512BF16__
            if (direct) multiply_bfloat16(here, x, M, (const uint16_t *)c->weight + at, c->In);
            else
#endif
                multiply(here, rows, wide, M, c->weight, at, c->In);
            for (int64_t m = 0; m < M; m++) dots[m][i] = here[m];
        }
        for (int64_t m = 0; m < M; m++) *(Vector *)(sum[m] + n) = sums(dots[m]);
    }
    (void)x;
    for (int64_t m = 0; m < M; m++) store(c, expert, choices[m], first, count, sum[m]);
}

/* The same from columns of the weight. */
INLINE void by_columns(const Call *c, int64_t expert, const int64_t *choices, const int64_t M, int64_t first, const int64_t count) {
    const int64_t base = expert * c->Out * c->In + first, wide = PADDED(c->In);
    float sum[ROWS][COLUMNS] = {0}, part[COLUMNS], rows[M * wide];
    for (int64_t m = 0; m < M; m++) widen(rows + m * wide, c->x, choices[m] / c->share * c->x_row, c->In);
    for (int64_t d = 0; d < c->In; d++) {
        widen(part, c->weight, base + d * c->Out, count);
        for (int64_t m = 0; m < M; m++) {
            const float factor = rows[m * wide + d];
            for (int64_t i = 0; i < count; i++) sum[m][i] += factor * part[i];
        }
    }
    for (int64_t m = 0; m < M; m++) store(c, expert, choices[m], first, count, sum[m]);
}

INLINE void some(const Call *c, int64_t expert, const int64_t *choices, const int64_t M, int64_t first, int64_t count, const int transposed) {
    if (!transposed) by_rows(c, expert, choices, M, first, count);
    else if (count == COLUMNS) by_columns(c, expert, choices, M, first, COLUMNS);
    else by_columns(c, expert, choices, M, first, count);
}

INLINE void block(const Call *c, int64_t expert, const int64_t *choices, int64_t size, int64_t first, const int transposed) {
    const int64_t count = c->Out - first < COLUMNS ? c->Out - first : COLUMNS;
    for (; size >= ROWS; size -= ROWS, choices += ROWS) some(c, expert, choices, ROWS, first, count, transposed);
    if (size >= 2) some(c, expert, choices, 2, first, count, transposed), size -= 2, choices += 2;
    if (size == 1) some(c, expert, choices, 1, first, count, transposed);
}

void routed_products(const void *x, int64_t x_row, int64_t share, const void *selected, int64_t choices, const void *weight,
                     const void *bias, int64_t E, int64_t Out, int64_t In, int64_t transposed, void *out) {
    const Call call = { .x = x, .weight = weight, .bias = bias, .out = out, .x_row = x_row, .share = share, .In = In, .Out = Out };
    const int64_t *experts = selected, blocks = (Out + COLUMNS - 1) / COLUMNS;
    /* Choices in the order of their experts: those of e are order[begin[e]] to order[begin[e + 1]]. */
    int64_t *begin = calloc(2 * (E + 2) + choices, sizeof(int64_t)), *chosen = begin + E + 2, *order = chosen + E + 2, count = 0;
    for (int64_t i = 0; i < choices; i++) {
        if (experts[i] >= 0 && experts[i] < E) begin[experts[i] + 2]++;
        else memset((char *)out + i * Out * SIZE, 0, Out * SIZE);
    }
    for (int64_t e = 0; e < E; e++) {
        if (begin[e + 2]) chosen[count++] = e;
        begin[e + 2] += begin[e + 1];
    }
    for (int64_t i = 0; i < choices; i++)
        if (experts[i] >= 0 && experts[i] < E) order[begin[experts[i] + 1]++] = i;
#pragma omp parallel for schedule(dynamic, 4) if (omp_get_max_threads() > 1)
    for (int64_t task = 0; task < count * blocks; task++) {
        const int64_t expert = chosen[task / blocks], first = task % blocks * COLUMNS, from = begin[expert], to = begin[expert + 1];
        if (transposed) block(&call, expert, order + from, to - from, first, 1);
        else block(&call, expert, order + from, to - from, first, 0);
    }
    free(begin);
}

/* Each token's sum over its choices: rows [tokens, choices, Out] by `weights` [tokens, choices], or as they are if there are none. */
void weighted_sums(const void *rows, const void *weights, void *out, int64_t tokens, int64_t choices, int64_t Out) {
    const float *factor = weights;
#pragma omp parallel for if (omp_get_max_threads() > 1 && tokens * choices * Out > 1 << 16)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t first = 0; first < Out; first += COLUMNS) {
            const int64_t count = Out - first < COLUMNS ? Out - first : COLUMNS;
            float sum[COLUMNS] = {0}, part[COLUMNS];
            for (int64_t k = 0; k < choices; k++) {
                widen(part, rows, (t * choices + k) * Out + first, count);
                const float weight = factor ? factor[t * choices + k] : 1;
                for (int64_t i = 0; i < count; i++) sum[i] += weight * part[i];
            }
            narrow(out, t * Out + first, sum, count);
        }
    }
}

/* silu(gate) * up of rows [rows, 2 I], where the gate is the first half or, if `interleaved`, every other number; each rounded as it is
 * between two operations of PyTorch. */
void silu_and_multiply(const void *projected, void *out, int64_t rows, int64_t I, int64_t interleaved) {
#pragma omp parallel for if (omp_get_max_threads() > 1 && rows * I > 1 << 14)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t first = 0; first < I; first += COLUMNS) {
            const int64_t count = I - first < COLUMNS ? I - first : COLUMNS;
            float both[2 * COLUMNS], gate[COLUMNS], up[COLUMNS];
            if (interleaved) {
                widen(both, projected, (row * I + first) * 2, 2 * count);
                for (int64_t i = 0; i < count; i++) gate[i] = both[2 * i], up[i] = both[2 * i + 1];
            } else {
                widen(gate, projected, row * 2 * I + first, count);
                widen(up, projected, row * 2 * I + I + first, count);
            }
            for (int64_t i = 0; i < count; i++) gate[i] = silu(gate[i]);
            narrow(both, 0, gate, count);
            widen(gate, both, 0, count);
            for (int64_t i = 0; i < count; i++) gate[i] *= up[i];
            narrow(out, row * I + first, gate, count);
        }
    }
}
