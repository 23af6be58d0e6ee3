/* Softmax attention of sequences that decode, on pages, for the CPU.
 *
 * Legend: n sequences with one query each, H query heads, G key/value heads, R = H / G, D and Dv head sizes. A task is one sequence, or a
 * part of its keys if there are fewer sequences than threads can use. It reads each key and value once, for all queries, and keeps a
 * running maximum, sum and weighted sum a head in float; parts are joined afterwards.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
int omp_get_max_threads(void);
#else
static int omp_get_max_threads(void) { return 1; }
#endif

#define INLINE static inline __attribute__((always_inline))
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { BLOCK = 16, PART = 128, TASKS_A_THREAD = 4 };

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

/* Sixteen numbers; compilers cut them into what the CPU has. Rows of floats are padded with zeros to whole vectors. */
enum { WIDTH = 16 };
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef _Float16 Float16 __attribute__((vector_size(2 * WIDTH), aligned(2)));
#define PADDED(count) (((count) + WIDTH - 1) / WIDTH * WIDTH)

INLINE float widen_one(const void *from, int64_t at, int kind) {
    if (kind == FLOAT32) return ((const float *)from)[at];
    if (kind == FLOAT16) return (float)((const _Float16 *)from)[at];
    union { uint32_t bits; float value; } wide = { .bits = (uint32_t)((const uint16_t *)from)[at] << 16 };
    return wide.value;
}

/* `count` numbers from element `at` on as floats, padded. */
INLINE void widen(float *restrict to, const void *from, int64_t at, const int64_t count, const int kind) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        if (kind == FLOAT32) {
            *(Vector *)(to + i) = *(const Vector *)((const float *)from + at + i);
        } else if (kind == BFLOAT16) {
            *(Bits *)(to + i) = __builtin_convertvector(*(const Half *)((const uint16_t *)from + at + i), Bits) << 16;
        } else {
            *(Vector *)(to + i) = __builtin_convertvector(*(const Float16 *)((const _Float16 *)from + at + i), Vector);
        }
    }
    if (i < count) {
        for (int64_t tail = i; tail < i + WIDTH; tail++) to[tail] = tail < count ? widen_one(from, at + tail, kind) : 0;
    }
}

INLINE void narrow(void *to, int64_t at, const float *restrict from, int64_t count, int kind) {
    if (kind == FLOAT32) {
        memcpy((float *)to + at, from, count * sizeof(float));
    } else if (kind == BFLOAT16) {
        uint16_t *restrict target = (uint16_t *)to + at;
        const uint32_t *restrict bits = (const uint32_t *)from;
        for (int64_t i = 0; i < count; i++) { /* to the nearest, ties to even; NaN stays NaN */
            uint32_t rounded = (bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) >> 16;
            target[i] = (bits[i] & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
        }
    } else {
        _Float16 *restrict target = (_Float16 *)to + at;
        for (int64_t i = 0; i < count; i++) target[i] = (_Float16)from[i];
    }
}

/* The sums of sixteen vectors, as one: each step adds halves of two and so halves their number. */
INLINE Vector sums(const Vector *in) {
    typedef int32_t Lanes __attribute__((vector_size(4 * WIDTH)));
    Vector a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = __builtin_shuffle(in[i], in[i + 8], (Lanes){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
               __builtin_shuffle(in[i], in[i + 8], (Lanes){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shuffle(a[i], a[i + 4], (Lanes){0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}) +
               __builtin_shuffle(a[i], a[i + 4], (Lanes){4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shuffle(b[i], b[i + 2], (Lanes){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
               __builtin_shuffle(b[i], b[i + 2], (Lanes){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
    return __builtin_shuffle(c[0], c[1], (Lanes){0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}) +
           __builtin_shuffle(c[0], c[1], (Lanes){1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
}

/* exp for x <= 0, within 2 units of the last place; 0 below -87. The products are fused so that nothing is reassociated. */
INLINE float exponential(float x) {
    float whole = rintf(x * 1.44269504f);
    float rest = __builtin_fmaf(whole, -0.693359375f, x);
    rest = __builtin_fmaf(whole, 2.12194440e-4f, rest);
    float sum = 1.9875691500e-4f;
    sum = __builtin_fmaf(sum, rest, 1.3981999507e-3f);
    sum = __builtin_fmaf(sum, rest, 8.3334519073e-3f);
    sum = __builtin_fmaf(sum, rest, 4.1665795894e-2f);
    sum = __builtin_fmaf(sum, rest, 1.6666665459e-1f);
    sum = __builtin_fmaf(sum, rest, 5.0000001201e-1f);
    sum = __builtin_fmaf(sum * rest, rest, rest) + 1.0f;
    union { int32_t bits; float value; } power = { .bits = ((int32_t)whole + 127) << 23 };
    return x < -87.0f ? 0.0f : sum * power.value;
}

/* What is added to the plain scores [R, BLOCK] of keys `start` to `start + count`. */
INLINE void add_biases(const Call *c, int64_t g, int64_t position, int64_t start, int64_t count, const int64_t *slots, float *scores,
                       const int kind) {
    for (int64_t r = 0; r < c->R; r++) {
        for (int64_t j = 0; j < count; j++) {
            const int64_t head = g * c->R + r, distance = position - start - j;
            float score = scores[r * BLOCK + j];
            if (c->softcap > 0) score = c->softcap * tanhf(score / c->softcap);
            if (c->key_bias) score += widen_one(c->key_bias, slots[j] * c->G + g, kind);
            if (c->slopes) score -= c->slopes[head] * distance;
            if (c->relative) {
                int64_t column = distance;
                if (c->buckets) column = c->buckets[distance < c->num_buckets ? distance : c->num_buckets - 1];
                score += c->relative[head * c->columns + (column < c->columns ? column : c->columns - 1)];
            }
            scores[r * BLOCK + j] = score;
        }
    }
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
                   const int64_t Dv, const int kind) {
    const int64_t R = c->R, G = c->G, H = R * G, position = c->lengths[row] - 1, wide = PADDED(D), wide_v = PADDED(Dv);
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    float query[H * wide], scores[R * BLOCK], entries[BLOCK * (wide > wide_v ? wide : wide_v)];
    int64_t places[2][BLOCK], *slots = places[0], *next = places[1];
    for (int64_t head = 0; head < H; head++) widen(query + head * wide, c->query, row * c->query_row + head * D, D, kind);
    for (int64_t i = 0; i < H * wide; i++) query[i] *= c->scale;
    memset(sum, 0, H * wide_v * sizeof(float));
    for (int64_t head = 0; head < H; head++) highest[head] = -INFINITY, total[head] = 0;
    int64_t count = stop - first < BLOCK ? stop - first : BLOCK;
    find(c, row, first, count, slots);
    for (int64_t j = 0; j < count; j++) prefetch(c->keys, slots[j], G * D * size), prefetch(c->values, slots[j], G * Dv * size);
    for (int64_t start = first, following; start < stop; start += count, count = following) {
        const int64_t whole = PADDED(count), rest = stop - start - count;
        following = rest < BLOCK ? rest : BLOCK;
        find(c, row, start + count, following, next);
        for (int64_t g = 0; g < G; g++) {
            const int64_t from = following * g / G, to = following * (g + 1) / G; /* each head fetches its share */
            for (int64_t j = 0; j < count; j++) widen(entries + j * wide, c->keys, (slots[j] * G + g) * D, D, kind);
            memset(entries + count * wide, 0, (whole - count) * wide * sizeof(float));
            for (int64_t j = from; j < to; j++) prefetch(c->keys, next[j], G * D * size);
            for (int64_t r = 0; r < R; r++) {
                const float *own = query + (g * R + r) * wide;
                for (int64_t j = 0; j < count; j += WIDTH) {
                    Vector dots[WIDTH];
                    for (int64_t k = 0; k < WIDTH; k++) {
                        const float *key = entries + (j + k) * wide;
                        dots[k] = *(const Vector *)key * *(const Vector *)own;
                        for (int64_t d = WIDTH; d < wide; d += WIDTH) dots[k] += *(const Vector *)(key + d) * *(const Vector *)(own + d);
                    }
                    *(Vector *)(scores + r * BLOCK + j) = sums(dots);
                }
            }
            if (c->key_bias || c->softcap > 0 || c->slopes || c->relative) add_biases(c, g, position, start, count, slots, scores, kind);
            for (int64_t j = 0; j < count; j++) widen(entries + j * wide_v, c->values, (slots[j] * G + g) * Dv, Dv, kind);
            for (int64_t j = from; j < to; j++) prefetch(c->values, next[j], G * Dv * size);
            for (int64_t r = 0; r < R; r++) {
                const int64_t head = g * R + r;
                float *restrict score = scores + r * BLOCK, most = highest[head], added = 0;
#pragma omp simd reduction(max : most)
                for (int64_t j = 0; j < count; j++) most = score[j] > most ? score[j] : most;
                const float shrink = highest[head] == -INFINITY ? 0.0f : exponential(highest[head] - most);
                highest[head] = most;
#pragma omp simd reduction(+ : added)
                for (int64_t j = 0; j < count; j++) added += score[j] = exponential(score[j] - most);
                total[head] = total[head] * shrink + added;
                for (int64_t d = 0; d < wide_v; d += WIDTH) {
                    Vector *place = (Vector *)(sum + head * wide_v + d), even = *place * shrink, odd = {0};
                    int64_t j = 0;
                    for (; j + 2 <= count; j += 2) { /* two sums, so that one does not wait for the other */
                        even += score[j] * *(const Vector *)(entries + j * wide_v + d);
                        odd += score[j + 1] * *(const Vector *)(entries + (j + 1) * wide_v + d);
                    }
                    if (j < count) even += score[j] * *(const Vector *)(entries + j * wide_v + d);
                    *place = even + odd;
                }
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
INLINE void finish(const Call *c, int64_t row, const float *highest, float *total, float *sum, int kind) {
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
        narrow(c->out, (row * H + head) * c->Dv, sum + head * wide, c->Dv, kind);
    }
}

INLINE void part(const Call *c, int64_t task, const int64_t D, const int64_t Dv, const int kind) {
    const int64_t cut = task % c->num_parts, row = task / c->num_parts, H = c->R * c->G, size = H * (PADDED(Dv) + 2);
    const int64_t begin = first_visible(c, row), count = c->lengths[row] - begin;
    const int64_t first = begin + count * cut / c->num_parts, stop = begin + count * (cut + 1) / c->num_parts;
    float kept[c->num_parts > 1 ? 1 : size];
    float *result = c->num_parts > 1 ? c->parts + task * size : kept;
    attend(c, row, first, stop, result, result + H, result + 2 * H, D, Dv, kind);
    if (c->num_parts == 1) finish(c, row, result, result + H, result + 2 * H, kind);
}

static void join(const Call *c, int64_t row, int kind) {
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
    finish(c, row, base, base + H, sum, kind);
}

/* Sizes that are common are compiled for themselves. */
INLINE void sized(const Call *c, int64_t task, const int kind) {
    if (c->D == 64 && c->Dv == 64) part(c, task, 64, 64, kind);
    else if (c->D == 128 && c->Dv == 128) part(c, task, 128, 128, kind);
    else part(c, task, c->D, c->Dv, kind);
}

void attention_decode(const void *query, int64_t query_row, const void *keys, const void *values, const void *key_bias,
                      const void *table, int64_t table_row, const void *lengths, const void *sinks, const void *slopes,
                      const void *relative, int64_t columns, const void *buckets, int64_t num_buckets, void *out, int64_t n, int64_t H,
                      int64_t G, int64_t D, int64_t Dv, int64_t page_size, int64_t window, int64_t chunk, int64_t longest, int64_t kind,
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
    for (int64_t task = 0; task < tasks; task++) {
        if (kind == FLOAT32) sized(&call, task, FLOAT32);
        else if (kind == BFLOAT16) sized(&call, task, BFLOAT16);
        else sized(&call, task, FLOAT16);
    }
    if (call.num_parts > 1) {
        for (int64_t row = 0; row < n; row++) join(&call, row, kind);
        free(call.parts);
    }
}

/* The first `count` rows of `entries`, `row` bytes each and `stride` bytes apart, to rows `slots` of `pool`. */
void append(const void *entries, int64_t stride, void *pool, const void *slots, int64_t count, int64_t row) {
    for (int64_t t = 0; t < count; t++)
        memcpy((char *)pool + ((const int32_t *)slots)[t] * row, (const char *)entries + t * stride, row);
}
