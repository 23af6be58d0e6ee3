/* SSD over slots for the CPU: decodes read each state once and write it once; prompts go through it in blocks of 64 tokens, as products of
 * small matrices in float.
 *
 * Legend: H heads of P channels, G groups of B and C, N state elements a channel. A task is one head of one sequence.
 */
#include "ad_native.h"

enum { BLOCK = 64, ROWS = 4, COLUMNS = 4 }; /* tokens of a block; rows, and vectors of columns, of a product that are in registers at once */

typedef struct {
    int64_t token, size, slot, fresh; /* where a sequence's tokens begin, how many, where its state is, whether that counts as zero */
} Sequence;

typedef struct {
    const void *x, *B, *C, *z; /* [T, H, P], [T, G, N] twice, like x or none: rows `*_row` elements apart, contiguous inside */
    const void *dt; /* [T, H] */
    const float *A, *D, *bias; /* [H], [H] or [H, P] or none, [H] or none */
    float *state; /* [slots, H, P, N] */
    void *out; /* [T, H, P] */
    int64_t x_row, B_row, C_row, z_row, dt_row, dt_head, H, P, G, N, D_row, D_column, softplus;
    float least, most;
} Call;

INLINE float time_step(const Call *c, int64_t row, int64_t head) {
    float step = widen_one(c->dt, row * c->dt_row + head * c->dt_head);
    if (c->bias) step += c->bias[head];
    if (c->softplus && step <= 20) step = log1pf(expf(step));
    return step < c->least ? c->least : step > c->most ? c->most : step;
}

/* What is read of the state, `y`, as a row of the output. Overwrites y. */
INLINE void finish(const Call *c, int64_t row, int64_t head, const float *restrict x, float *restrict y) {
    const int64_t P = c->P;
    float z[PADDED(P)];
    if (c->D) {
        for (int64_t p = 0; p < P; p++) y[p] += c->D[head * c->D_row + p * c->D_column] * x[p];
    }
    if (c->z) {
        widen(z, c->z, row * c->z_row + head * P, P);
        for (int64_t p = 0; p < P; p++) y[p] *= silu(z[p]);
    }
    narrow(c->out, (row * c->H + head) * P, y, P);
}

INLINE void advance(const Call *c, const Sequence *sequence, int64_t head, const int64_t N) {
    const int64_t P = c->P, wide = PADDED(N), group = head / (c->H / c->G), row = sequence->token;
    float B[wide], C[wide], x[PADDED(P)], y[PADDED(P)];
    widen(B, c->B, row * c->B_row + group * N, N);
    widen(C, c->C, row * c->C_row + group * N, N);
    widen(x, c->x, row * c->x_row + head * P, P);
    const float step = time_step(c, row, head), decay = sequence->fresh ? 0 : expf(step * c->A[head]);
    float *states = c->state + (sequence->slot * c->H + head) * P * N;
    if (sequence->fresh) memset(states, 0, P * N * sizeof(float)); /* what lies there may be NaN */
    for (int64_t p = 0; p < P; p++) {
        float *restrict state = states + p * N;
        const float added = step * x[p];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < N; i++) {
            state[i] = state[i] * decay + added * B[i];
            sum += state[i] * C[i];
        }
        y[p] = sum;
    }
    finish(c, row, head, x, y);
}

INLINE void decode(const Call *c, const Sequence *sequence, int64_t head) {
    if (c->N == 128) advance(c, sequence, head, 128);
    else if (c->N == 64) advance(c, sequence, head, 64);
    else advance(c, sequence, head, c->N);
}

/* out [4, 16 V] = keep * out + a [4, K] b [K, 16 V]. Elements of a are `a_row` and `a_column` apart. */
INLINE void tile(const int64_t V, int64_t K, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float keep,
                 float *out, int64_t out_row) {
    Vector sum[ROWS][COLUMNS];
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t v = 0; v < V; v++) sum[i][v] = keep == 0 ? (Vector){0} : keep * *(Vector *)(out + i * out_row + v * WIDTH);
    for (int64_t k = 0; k < K; k++) {
        const float *factor = a + k * a_column;
        for (int64_t v = 0; v < V; v++) {
            const Vector part = *(const Vector *)(b + k * b_row + v * WIDTH);
            for (int64_t i = 0; i < ROWS; i++) sum[i][v] += factor[i * a_row] * part;
        }
    }
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t v = 0; v < V; v++) *(Vector *)(out + i * out_row + v * WIDTH) = sum[i][v];
}

/* The same for `columns`, which are whole vectors. */
INLINE void rows_of_product(int64_t columns, int64_t K, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                            float keep, float *out, int64_t out_row) {
    int64_t j = 0;
    for (; j + COLUMNS * WIDTH <= columns; j += COLUMNS * WIDTH)
        tile(COLUMNS, K, a, a_row, a_column, b + j, b_row, keep, out + j, out_row);
    for (; j < columns; j += WIDTH) tile(1, K, a, a_row, a_column, b + j, b_row, keep, out + j, out_row);
}

/* How a block's tokens meet each other, before decay: scores [64, 64] are C B^T of one group, where a token is not before the other. */
static void compare(const Call *c, int64_t token, int64_t count, int64_t group, float *scores) {
    const int64_t N = c->N, tall = PADDED(N);
    float *C = aligned_alloc(64, BLOCK * 2 * tall * sizeof(float)), *B = C + BLOCK * tall, row[tall]; /* C [64, N], B [N, 64] */
    memset(C, 0, BLOCK * 2 * tall * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        widen(C + i * tall, c->C, (token + i) * c->C_row + group * N, N);
        widen(row, c->B, (token + i) * c->B_row + group * N, N);
        for (int64_t n = 0; n < N; n++) B[n * BLOCK + i] = row[n];
    }
    for (int64_t i = 0; i < count; i += ROWS) rows_of_product(PADDED(i + ROWS), N, C + i * tall, tall, 1, B, BLOCK, 0, scores + i * BLOCK, BLOCK);
    free(C);
}

/* weights [64, 64] = scores, decayed from the one token to the other; zero where that is a later one. `decay` is its logarithm from the
 * block's start on, which never rises if `falls`. */
static void weigh(const float *scores, const float *decay, int64_t count, int falls, float *weights) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t stop = i / ROWS * ROWS + ROWS; /* a tile's rows are read to its last token */
        const float *restrict score = scores + i * BLOCK;
        float *restrict weight = weights + i * BLOCK;
        if (falls) {
#pragma omp simd
            for (int64_t j = 0; j < stop; j++) {
                const float between = decay[i] - decay[j];
                weight[j] = j <= i ? score[j] * exponential(between < 0 ? between : 0) : 0;
            }
        } else {
            for (int64_t j = 0; j < stop; j++) weight[j] = j <= i ? score[j] * expf(decay[i] - decay[j]) : 0;
        }
    }
}

/* One head of a sequence's tokens. `scores` are those of its blocks, `apart` from each other. */
static void prefill(const Call *c, const Sequence *sequence, int64_t head, const float *scores, int64_t apart) {
    const int64_t P = c->P, N = c->N, wide = PADDED(P), tall = PADDED(N), group = head / (c->H / c->G);
    const int64_t numbers = tall * wide + BLOCK * (2 * tall + 3 * wide + BLOCK);
    float *state = aligned_alloc(64, numbers * sizeof(float)), *B = state + tall * wide, *C = B + BLOCK * tall; /* [N, P], [64, N] twice */
    float *x = C + BLOCK * tall, *added = x + BLOCK * wide, *y = added + BLOCK * wide; /* [64, P] */
    float *weights = y + BLOCK * wide; /* [64, 64] */
    float *states = c->state + (sequence->slot * c->H + head) * P * N, step[BLOCK], decay[BLOCK];
    memset(state, 0, numbers * sizeof(float));
    for (int64_t p = 0; p < P && !sequence->fresh; p++)
        for (int64_t n = 0; n < N; n++) state[n * wide + p] = states[p * N + n];
    for (int64_t start = 0; start < sequence->size; start += BLOCK, scores += apart) {
        const int64_t first = sequence->token + start, count = sequence->size - start < BLOCK ? sequence->size - start : BLOCK;
        float sum = 0;
        int falls = 1;
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = first + i;
            widen(B + i * tall, c->B, row * c->B_row + group * N, N);
            widen(C + i * tall, c->C, row * c->C_row + group * N, N);
            widen(x + i * wide, c->x, row * c->x_row + head * P, P);
            step[i] = time_step(c, row, head);
            falls &= step[i] * c->A[head] <= 0;
            decay[i] = sum += step[i] * c->A[head];
        }
        weigh(scores, decay, count, falls, weights);
        for (int64_t i = 0; i < count; i++)
            for (int64_t p = 0; p < wide; p++) added[i * wide + p] = step[i] * x[i * wide + p];
        for (int64_t i = 0; i < count; i += ROWS) { /* what was before the block, then what is in it */
            const int64_t stop = i + ROWS < count ? i + ROWS : count;
            rows_of_product(wide, N, C + i * tall, tall, 1, state, wide, 0, y + i * wide, wide);
            for (int64_t j = i; j < stop; j++) {
                const float kept = expf(decay[j]);
                for (int64_t p = 0; p < wide; p++) y[j * wide + p] *= kept;
            }
            rows_of_product(wide, stop, weights + i * BLOCK, BLOCK, 1, added, wide, 1, y + i * wide, wide);
        }
        for (int64_t i = 0; i < count; i++) {
            const float left = expf(sum - decay[i]);
            for (int64_t p = 0; p < wide; p++) added[i * wide + p] *= left;
        }
        const float kept = expf(sum);
        for (int64_t n = 0; n < tall; n += ROWS) rows_of_product(wide, count, B + n, 1, tall, added, wide, kept, state + n * wide, wide);
        for (int64_t i = 0; i < count; i++) finish(c, first + i, head, x + i * wide, y + i * wide);
    }
    for (int64_t p = 0; p < P; p++)
        for (int64_t n = 0; n < N; n++) states[p * N + n] = state[n * wide + p];
    free(state);
}

static void prefill_all(const Call *c, const Sequence *sequences, int64_t count) {
    int64_t total = 0, begin[count + 1]; /* blocks of the sequences before */
    for (int64_t s = 0; s < count; s++) {
        begin[s] = total;
        total += (sequences[s].size + BLOCK - 1) / BLOCK;
    }
    begin[count] = total;
    float *scores = aligned_alloc(64, total * c->G * BLOCK * BLOCK * sizeof(float)); /* [blocks, G, 64, 64] */
#pragma omp parallel if (omp_get_max_threads() > 1)
    {
#pragma omp for
        for (int64_t task = 0; task < total * c->G; task++) {
            const int64_t block = task / c->G, group = task % c->G;
            int64_t s = 0;
            while (begin[s + 1] <= block) s++;
            const int64_t start = (block - begin[s]) * BLOCK, left = sequences[s].size - start;
            compare(c, sequences[s].token + start, left < BLOCK ? left : BLOCK, group, scores + task * BLOCK * BLOCK);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * c->H; task++) {
            const int64_t s = task / c->H, head = task % c->H, group = head / (c->H / c->G);
            prefill(c, sequences + s, head, scores + (begin[s] * c->G + group) * BLOCK * BLOCK, c->G * BLOCK * BLOCK);
        }
    }
    free(scores);
}

/* `sequences` are first those that decode, a token each. Rows of the output from `tokens` on, up to T, are zero. */
void ssd(const void *x, int64_t x_row, const void *dt, int64_t dt_row, int64_t dt_head, const void *A, const void *B, int64_t B_row,
         const void *C, int64_t C_row, const void *D, int64_t D_row, int64_t D_column, const void *z, int64_t z_row, const void *bias,
         int64_t softplus, float least, float most, void *state, const void *sequences, int64_t decodes, int64_t prefills, void *out,
         int64_t tokens, int64_t T, int64_t H, int64_t P, int64_t G, int64_t N) {
    const Call call = {
        .x = x, .B = B, .C = C, .z = z, .dt = dt, .A = A, .D = D, .bias = bias, .state = state, .out = out, .x_row = x_row, .B_row = B_row,
        .C_row = C_row, .z_row = z_row, .dt_row = dt_row, .dt_head = dt_head, .H = H, .P = P, .G = G, .N = N, .D_row = D_row,
        .D_column = D_column, .softplus = softplus, .least = least, .most = most,
    };
    const Sequence *all = sequences;
#pragma omp parallel for if (omp_get_max_threads() > 1)
    for (int64_t task = 0; task < decodes * H; task++) decode(&call, all + task / H, task % H);
    if (prefills) prefill_all(&call, all + decodes, prefills);
    memset((char *)out + tokens * H * P * SIZE, 0, (T - tokens) * H * P * SIZE);
}
