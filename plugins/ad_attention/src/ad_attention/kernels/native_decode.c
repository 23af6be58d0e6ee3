/* Softmax attention of sequences that decode, on pages, for the CPU.
 *
 * Legend: n sequences with one query each, H query heads, G key/value heads, R = H / G, D and Dv head sizes. A task is one sequence, or a
 * part of its keys if there are fewer sequences than threads can use. It reads each key and value once, for all queries, and keeps a
 * running maximum, sum and weighted sum a head in float; parts are joined afterwards.
 */
#include "ad_native.h"

enum { BLOCK = 32, HEADS = 4, VECTORS = 4, PART = 128, TASKS_A_THREAD = 4 };

typedef struct {
    const void *query; /* [n, H, D], rows `query_row` elements apart, heads contiguous */
    const void *keys, *values, *key_bias; /* pools: [slots, G, D], [slots, G, Dv], [slots, G] or none */
    const int32_t *table, *lengths; /* pages [n, table_row]; keys of each sequence, its own among them */
    const float *sinks, *slopes, *relative; /* [H], [H], [H, columns], or none */
    const int64_t *buckets; /* column of each distance, or none */
    void *out; /* [n, H, Dv] */
    float *parts; /* [tasks, H, PADDED(Dv) + 2], where keys are cut */
    int64_t query_row, table_row, page_size, R, G, D, Dv, window, chunk, columns, num_buckets, num_parts;
    float scale, softcap;
} Call;

/* What is added to the plain scores [M, BLOCK] of keys `start` to `start + count` with heads from `first` on. */
INLINE void add_biases(const Call *c, int64_t M, int64_t first, int64_t g, int64_t position, int64_t start, int64_t count,
                       const int64_t *slots, float *scores) {
    for (int64_t m = 0; m < M; m++) {
        for (int64_t j = 0; j < count; j++) {
            const int64_t head = first + m, distance = position - start - j;
            float score = scores[m * BLOCK + j];
            if (c->softcap > 0) score = c->softcap * tanhf(score / c->softcap);
            if (c->key_bias) score += widen_one(c->key_bias, slots[j] * c->G + g);
            if (c->slopes) score -= c->slopes[head] * distance;
            if (c->relative) {
                int64_t column = distance;
                if (c->buckets) column = c->buckets[distance < c->num_buckets ? distance : c->num_buckets - 1];
                score += c->relative[head * c->columns + (column < c->columns ? column : c->columns - 1)];
            }
            scores[m * BLOCK + j] = score;
        }
    }
}

/* Scores [M, BLOCK] of M query heads with the block's keys: each key is read once for all of them. */
INLINE void score(const Call *c, const int64_t M, const void *query, const float *wide_query, int64_t g, const int64_t *slots, int64_t count,
                  float *scores, const int64_t D) {
    const int64_t wide = PADDED(D);
#ifdef __AVX512BF16__
    const uint16_t *direct[HEADS];
    for (int64_t m = 0; m < M; m++) direct[m] = (const uint16_t *)query + m * D;
#endif
    (void)query, (void)wide_query;
    for (int64_t start = 0; start < count; start += WIDTH) {
        Vector dots[HEADS][WIDTH], here[HEADS];
        for (int64_t j = 0; j < WIDTH; j++) {
            const int64_t at = (slots[start + j < count ? start + j : count - 1] * c->G + g) * D;
#ifdef __AVX512BF16__
            if (KIND == BFLOAT16) multiply_bfloat16(here, direct, M, (const uint16_t *)c->keys + at, D);
            else
#endif
                multiply(here, wide_query, wide, M, c->keys, at, D);
            for (int64_t m = 0; m < M; m++) dots[m][j] = here[m];
        }
        for (int64_t m = 0; m < M; m++) *(Vector *)(scores + m * BLOCK + start) = sums(dots[m]) * c->scale;
    }
}

/* Adds the block's values, weighted by `shares` [M, BLOCK], to `sum` [M, wide] after that was multiplied with `shrink`. */
INLINE void gather(const Call *c, const int64_t M, int64_t g, const int64_t *slots, int64_t count, const float *shares, const float *shrink,
                   float *sum, const int64_t Dv) {
    const int64_t wide = PADDED(Dv), whole = Dv / (VECTORS * WIDTH) * (VECTORS * WIDTH);
    for (int64_t d = 0; d < whole; d += VECTORS * WIDTH) {
        Vector kept[HEADS][VECTORS];
        for (int64_t m = 0; m < M; m++)
            for (int64_t i = 0; i < VECTORS; i++) kept[m][i] = *(Vector *)(sum + m * wide + d + i * WIDTH) * shrink[m];
        for (int64_t j = 0; j < count; j++) {
            const int64_t at = (slots[j] * c->G + g) * Dv + d;
            for (int64_t i = 0; i < VECTORS; i++) {
                const Vector value = widen_vector(c->values, at + i * WIDTH);
                for (int64_t m = 0; m < M; m++) kept[m][i] += shares[m * BLOCK + j] * value;
            }
        }
        for (int64_t m = 0; m < M; m++)
            for (int64_t i = 0; i < VECTORS; i++) *(Vector *)(sum + m * wide + d + i * WIDTH) = kept[m][i];
    }
    if (whole == Dv) return;
    float entry[VECTORS * WIDTH];
    for (int64_t m = 0; m < M; m++)
        for (int64_t d = whole; d < wide; d++) sum[m * wide + d] *= shrink[m];
    for (int64_t j = 0; j < count; j++) {
        widen(entry, c->values, (slots[j] * c->G + g) * Dv + whole, Dv - whole);
        for (int64_t m = 0; m < M; m++)
            for (int64_t d = whole; d < wide; d++) sum[m * wide + d] += shares[m * BLOCK + j] * entry[d - whole];
    }
}

/* A block's keys and values for M heads from `head` on, all of key/value head `g`. */
INLINE void meet(const Call *c, const int64_t M, int64_t row, int64_t head, int64_t g, int64_t start, int64_t count, const int64_t *slots,
                 const float *wide_query, float *highest, float *total, float *sum, const int64_t D, const int64_t Dv) {
    float scores[HEADS * BLOCK], shrink[HEADS];
    const char *query = (const char *)c->query + (row * c->query_row + head * D) * SIZE;
    score(c, M, query, wide_query + head * PADDED(D), g, slots, count, scores, D);
    if (c->key_bias || c->softcap > 0 || c->slopes || c->relative)
        add_biases(c, M, head, g, c->lengths[row] - 1, start, count, slots, scores);
    for (int64_t m = 0; m < M; m++) {
        float *restrict share = scores + m * BLOCK, most = highest[head + m], added = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < count; j++) most = share[j] > most ? share[j] : most;
        shrink[m] = highest[head + m] == -INFINITY ? 0.0f : exponential(highest[head + m] - most);
        highest[head + m] = most;
#pragma omp simd reduction(+ : added)
        for (int64_t j = 0; j < count; j++) added += share[j] = exponential(share[j] - most);
        total[head + m] = total[head + m] * shrink[m] + added;
    }
    gather(c, M, g, slots, count, scores, shrink, sum + head * PADDED(Dv), Dv);
}

INLINE void prefetch(const void *pool, int64_t row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)pool + row * bytes + at, 0, 2);
}

/* Rows of the pools of keys `start` to `start + count`. */
INLINE void find(const Call *c, int64_t row, int64_t start, int64_t count, int64_t *slots) {
    const int32_t *table = c->table + row * c->table_row;
    for (int64_t j = 0, at = start % c->page_size, page = start / c->page_size; j < count; j++) {
        slots[j] = (int64_t)table[page] * c->page_size + at;
        if (++at == c->page_size) at = 0, page++;
    }
}

/* One task: keys `first` to `stop` of sequence `row`. `highest`, `total` [H] and `sum` [H, PADDED(Dv)] are its result. While a block is
 * computed the next one is fetched: pages lie anywhere, and no processor guesses where. */
INLINE void attend(const Call *c, int64_t row, int64_t first, int64_t stop, float *highest, float *total, float *sum, const int64_t D,
                   const int64_t Dv) {
    const int64_t R = c->R, G = c->G, H = R * G, wide = PADDED(D);
    float query[H * wide];
    int64_t places[2][BLOCK], *slots = places[0], *next = places[1];
    for (int64_t head = 0; head < H; head++) widen(query + head * wide, c->query, row * c->query_row + head * D, D);
    memset(sum, 0, H * PADDED(Dv) * sizeof(float));
    for (int64_t head = 0; head < H; head++) highest[head] = -INFINITY, total[head] = 0;
    int64_t count = stop - first < BLOCK ? stop - first : BLOCK;
    find(c, row, first, count, slots);
    for (int64_t j = 0; j < count; j++) prefetch(c->keys, slots[j], G * D * SIZE), prefetch(c->values, slots[j], G * Dv * SIZE);
    for (int64_t start = first, following; start < stop; start += count, count = following) {
        const int64_t rest = stop - start - count;
        following = rest < BLOCK ? rest : BLOCK;
        find(c, row, start + count, following, next);
        for (int64_t g = 0; g < G; g++) {
            for (int64_t j = following * g / G; j < following * (g + 1) / G; j++) /* each head fetches its share */
                prefetch(c->keys, next[j], G * D * SIZE), prefetch(c->values, next[j], G * Dv * SIZE);
            for (int64_t r = 0, head = g * R; r < R; r += HEADS, head += HEADS) {
#define MEET(M) meet(c, M, row, head, g, start, count, slots, query, highest, total, sum, D, Dv)
                if (R - r >= 4) MEET(4);
                else if (R - r == 3) MEET(3);
                else if (R - r == 2) MEET(2);
                else MEET(1);
            }
        }
        int64_t *swap = slots;
        slots = next, next = swap;
    }
}

/* The first key that the sequence's query sees. */
INLINE int64_t first_visible(const Call *c, int64_t row) {
    const int64_t position = c->lengths[row] - 1;
    int64_t first = c->window >= 0 && position - c->window + 1 > 0 ? position - c->window + 1 : 0;
    if (c->chunk > 0 && position / c->chunk * c->chunk > first) first = position / c->chunk * c->chunk;
    return first;
}

/* Writes the result of one sequence; a sink takes its share of the sum and gives nothing. */
INLINE void finish(const Call *c, int64_t row, const float *highest, float *total, float *sum) {
    const int64_t wide = PADDED(c->Dv), H = c->R * c->G;
    for (int64_t head = 0; head < H; head++) {
        float share = total[head], factor = 1;
        if (c->sinks) { /* relative to the higher of the two, so that neither overflows */
            const float sink = c->sinks[head];
            if (sink > highest[head]) factor = exponential(highest[head] - sink), share = share * factor + 1;
            else share += exponential(sink - highest[head]);
        }
        const float scale = share > 0 ? factor / share : 0; /* a padded sequence has no keys */
        for (int64_t d = 0; d < c->Dv; d++) sum[head * wide + d] *= scale;
        narrow(c->out, (row * H + head) * c->Dv, sum + head * wide, c->Dv);
    }
}

INLINE void part(const Call *c, int64_t task, const int64_t D, const int64_t Dv) {
    const int64_t cut = task % c->num_parts, row = task / c->num_parts, H = c->R * c->G, size = H * (PADDED(Dv) + 2);
    const int64_t begin = first_visible(c, row), count = c->lengths[row] - begin;
    const int64_t first = begin + count * cut / c->num_parts, stop = begin + count * (cut + 1) / c->num_parts;
    float kept[c->num_parts > 1 ? 1 : size];
    float *result = c->num_parts > 1 ? c->parts + task * size : kept;
    attend(c, row, first, stop, result, result + H, result + 2 * H, D, Dv);
    if (c->num_parts == 1) finish(c, row, result, result + H, result + 2 * H);
}

static void join(const Call *c, int64_t row) {
    const int64_t H = c->R * c->G, wide = PADDED(c->Dv), size = H * (wide + 2);
    float *base = c->parts + row * c->num_parts * size, *sum = base + 2 * H;
    for (int64_t head = 0; head < H; head++) {
        float most = -INFINITY, total = 0;
        for (int64_t cut = 0; cut < c->num_parts; cut++) most = base[cut * size + head] > most ? base[cut * size + head] : most;
        for (int64_t cut = 0; cut < c->num_parts; cut++) {
            const float *other = base + cut * size, *added = other + 2 * H + head * wide;
            const float factor = other[head] == -INFINITY ? 0.0f : exponential(other[head] - most);
            total += other[H + head] * factor;
            for (int64_t d = 0; d < wide; d++) sum[head * wide + d] = (cut ? sum[head * wide + d] : 0) + factor * added[d];
        }
        base[head] = most, base[H + head] = total;
    }
    finish(c, row, base, base + H, sum);
}

/* Sizes that are common are compiled for themselves. */
INLINE void sized(const Call *c, int64_t task) {
    if (c->D == 64 && c->Dv == 64) part(c, task, 64, 64);
    else if (c->D == 128 && c->Dv == 128) part(c, task, 128, 128);
    else part(c, task, c->D, c->Dv);
}

void attention_decode(const void *query, int64_t query_row, const void *keys, const void *values, const void *key_bias,
                      const void *table, int64_t table_row, const void *lengths, const void *sinks, const void *slopes,
                      const void *relative, int64_t columns, const void *buckets, int64_t num_buckets, void *out, int64_t n, int64_t H,
                      int64_t G, int64_t D, int64_t Dv, int64_t page_size, int64_t window, int64_t chunk, int64_t longest,
                      float scale, float softcap) {
    Call call = {
        .query = query, .keys = keys, .values = values, .key_bias = key_bias, .table = table, .lengths = lengths, .sinks = sinks,
        .slopes = slopes, .relative = relative, .buckets = buckets, .out = out, .query_row = query_row, .table_row = table_row,
        .page_size = page_size, .R = H / G, .G = G, .D = D, .Dv = Dv, .window = window, .chunk = chunk, .columns = columns,
        .num_buckets = num_buckets, .num_parts = 1, .scale = scale, .softcap = softcap,
    };
    const int64_t threads = omp_get_max_threads();
    if (threads > 1 && n < TASKS_A_THREAD * threads) {
        const int64_t wanted = (TASKS_A_THREAD * threads + n - 1) / n, possible = longest / PART;
        call.num_parts = possible < 1 ? 1 : wanted < possible ? wanted : possible;
        if (call.num_parts > 1) {
            call.parts = malloc(n * call.num_parts * H * (PADDED(Dv) + 2) * sizeof(float));
            if (!call.parts) call.num_parts = 1;
        }
    }
    const int64_t tasks = n * call.num_parts;
#pragma omp parallel for schedule(dynamic, 1) if (threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; task++) sized(&call, task);
    if (call.num_parts > 1) {
        for (int64_t row = 0; row < n; row++) join(&call, row);
        free(call.parts);
    }
}

/* The first `count` rows of `entries`, `row` bytes each and `stride` bytes apart, to rows `slots` of `pool`. */
void append(const void *entries, int64_t stride, void *pool, const void *slots, int64_t count, int64_t row) {
    for (int64_t t = 0; t < count; t++)
        memcpy((char *)pool + ((const int32_t *)slots)[t] * row, (const char *)entries + t * stride, row);
}
