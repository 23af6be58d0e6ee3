/* Softmax attention of a chunk of one sequence, for processors with instructions for pairs of bfloat16.
 *
 * Legend: m new tokens behind `context` cached ones, of which those from `first` on are visible; L = context - first + m keys. H query heads,
 * G key/value heads, D and Dv head sizes. Keys and values are packed once as weights are (`ad_core.native.packed`), in blocks of 64 keys:
 * scores are queries times packed keys, results are shares times packed values. A task is one head of a block of queries, with a running
 * maximum and sum a row.
 */
#include "ad_native.h"

#ifndef HAS_PAIRS
#error "this processor has no instructions for pairs of bfloat16"
#endif

enum { ROWS = 48, KEYS = OUTPUTS };

typedef struct {
    const uint16_t *query, *key, *value; /* of the new tokens: rows `*_row` elements apart, heads contiguous */
    const uint16_t *key_pages, *value_pages; /* [slots, G, D], [slots, G, Dv] */
    const int32_t *table; /* the sequence's pages */
    const float *sinks; /* [H] or none */
    uint16_t *out; /* [m, H, Dv] */
    uint16_t *packed_keys, *packed_values; /* [G, blocks, D / 2, 64, 2], [G, blocks, columns, 32, 64, 2] */
    int64_t query_row, key_row, value_row, page_size, m, context, first, R, G, D, Dv, window, chunk, blocks, columns;
    float scale, softcap;
} Call;

/* The row of the key at `position` (or of the value): in its page, or among the new tokens. */
INLINE const uint16_t *entry(const Call *c, const uint16_t *pages, const uint16_t *fresh, int64_t row, int64_t g, int64_t size, int64_t position) {
    if (position >= c->context) return fresh + (position - c->context) * row + g * size;
    return pages + (((int64_t)c->table[position / c->page_size] * c->page_size + position % c->page_size) * c->G + g) * size;
}

static void pack_block(const Call *c, int64_t g, int64_t block) {
    const int64_t start = c->first + block * KEYS, stop = c->context + c->m;
    uint32_t *keys = (uint32_t *)(c->packed_keys + (g * c->blocks + block) * c->D * KEYS);
    for (int64_t j = 0; j < KEYS; j++) {
        const uint16_t *row = start + j < stop ? entry(c, c->key_pages, c->key, c->key_row, g, c->D, start + j) : 0;
        for (int64_t d = 0; d < c->D / 2; d++) {
            uint32_t pair = 0;
            if (row) memcpy(&pair, row + 2 * d, sizeof pair);
            keys[d * KEYS + j] = pair;
        }
    }
    uint32_t *values = (uint32_t *)(c->packed_values + (g * c->blocks + block) * c->columns * KEYS * OUTPUTS);
    memset(values, 0, c->columns * KEYS * OUTPUTS * sizeof(uint16_t));
    for (int64_t j = 0; j < KEYS && start + j < stop; j++) {
        const uint16_t *row = entry(c, c->value_pages, c->value, c->value_row, g, c->Dv, start + j);
        for (int64_t d = 0; d < c->Dv; d++)
            values[(d / OUTPUTS * KEYS / 2 + j / 2) * OUTPUTS + d % OUTPUTS] |= (uint32_t)row[d] << (j % 2 ? 16 : 0);
    }
}

INLINE int64_t first_visible(const Call *c, int64_t position) {
    int64_t low = c->first;
    if (c->window >= 0 && position - c->window + 1 > low) low = position - c->window + 1;
    if (c->chunk > 0 && position / c->chunk * c->chunk > low) low = position / c->chunk * c->chunk;
    return low;
}

static void attend(const Call *c, int64_t head, int64_t begin) {
    const int64_t rows = c->m - begin < ROWS ? c->m - begin : ROWS, g = head / c->R, wide = c->columns * OUTPUTS;
    const int64_t lowest = first_visible(c, c->context + begin), highest = c->context + begin + rows; /* keys that any row sees */
    float scores[ROWS * KEYS], sum[ROWS * wide], most[ROWS], total[ROWS], part[TILE * OUTPUTS];
    uint16_t shares[ROWS * KEYS];
    memset(sum, 0, rows * wide * sizeof(float));
    for (int64_t i = 0; i < rows; i++) most[i] = c->sinks ? c->sinks[head] : -INFINITY, total[i] = c->sinks ? 1 : 0;
    for (int64_t block = (lowest - c->first) / KEYS; c->first + block * KEYS < highest; block++) {
        const int64_t start = c->first + block * KEYS;
        const uint16_t *keys = c->packed_keys + (g * c->blocks + block) * c->D * KEYS;
        const uint16_t *values = c->packed_values + (g * c->blocks + block) * c->columns * KEYS * OUTPUTS;
        for (int64_t i = 0; i < rows; i += TILE) {
            const uint16_t *tile[TILE];
            for (int64_t k = 0; k < TILE; k++) tile[k] = c->query + (begin + (i + k < rows ? i + k : i)) * c->query_row + head * c->D;
            multiply_tile(rows - i < TILE ? rows - i : TILE, tile, keys, 0, c->D / 2, 0, scores + i * KEYS);
        }
        for (int64_t i = 0; i < rows; i++) {
            const int64_t position = c->context + begin + i, low = first_visible(c, position) - start, high = position + 1 - start;
            float *restrict score = scores + i * KEYS, top = most[i], added = 0;
            for (int64_t j = 0; j < KEYS; j++) score[j] *= c->scale;
            if (c->softcap > 0)
                for (int64_t j = 0; j < KEYS; j++) score[j] = c->softcap * tanhf(score[j] / c->softcap);
            if (low > 0 || high < KEYS)
                for (int64_t j = 0; j < KEYS; j++) score[j] = j >= low && j < high ? score[j] : -INFINITY;
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < KEYS; j++) top = score[j] > top ? score[j] : top;
            if (top == -INFINITY) { /* it sees none of this block, nor any before */
                memset(shares + i * KEYS, 0, KEYS * sizeof(uint16_t));
                continue;
            }
            const float shrink = most[i] == -INFINITY ? 0.0f : exponential(most[i] - top);
#pragma omp simd reduction(+ : added)
            for (int64_t j = 0; j < KEYS; j++) added += score[j] = exponential(score[j] - top);
            total[i] = total[i] * shrink + added;
            most[i] = top;
            if (shrink != 1)
                for (int64_t d = 0; d < wide; d++) sum[i * wide + d] *= shrink;
            store_block(shares + i * KEYS, score, 0, KEYS);
        }
        for (int64_t i = 0; i < rows; i += TILE) {
            const int64_t count = rows - i < TILE ? rows - i : TILE;
            const uint16_t *tile[TILE];
            for (int64_t k = 0; k < TILE; k++) tile[k] = shares + (k < count ? i + k : i) * KEYS;
            for (int64_t column = 0; column < c->columns; column++) {
                multiply_tile(count, tile, values + column * KEYS * OUTPUTS, 0, KEYS / 2, 0, part);
                for (int64_t k = 0; k < count; k++)
                    for (int64_t d = 0; d < OUTPUTS; d++) sum[(i + k) * wide + column * OUTPUTS + d] += part[k * OUTPUTS + d];
            }
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t d = 0; d < c->Dv; d++) sum[i * wide + d] /= total[i];
        narrow(c->out, ((begin + i) * c->G * c->R + head) * c->Dv, sum + i * wide, c->Dv);
    }
}

void attention_prefill(const void *query, int64_t query_row, const void *key, int64_t key_row, const void *value, int64_t value_row,
                       const void *key_pages, const void *value_pages, const void *table, int64_t page_size, const void *sinks, void *out,
                       int64_t m, int64_t context, int64_t first, int64_t H, int64_t G, int64_t D, int64_t Dv, int64_t window,
                       int64_t chunk, float scale, float softcap) {
    Call call = {
        .query = query, .key = key, .value = value, .key_pages = key_pages, .value_pages = value_pages, .table = table, .sinks = sinks,
        .out = out, .query_row = query_row, .key_row = key_row, .value_row = value_row, .page_size = page_size, .m = m, .context = context,
        .first = first, .R = H / G, .G = G, .D = D, .Dv = Dv, .window = window, .chunk = chunk, .scale = scale, .softcap = softcap,
        .blocks = (context - first + m + KEYS - 1) / KEYS, .columns = (Dv + OUTPUTS - 1) / OUTPUTS,
    };
    call.packed_keys = aligned_alloc(64, G * call.blocks * KEYS * (D + call.columns * OUTPUTS) * sizeof(uint16_t));
    call.packed_values = call.packed_keys + G * call.blocks * KEYS * D;
    const int64_t parts = (m + ROWS - 1) / ROWS;
#pragma omp parallel if (omp_get_max_threads() > 1)
    {
#pragma omp for
        for (int64_t pair = 0; pair < G * call.blocks; pair++) pack_block(&call, pair / call.blocks, pair % call.blocks);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < H * parts; task++) attend(&call, task % H, (parts - 1 - task / H) * ROWS); /* the longest first */
    }
    free(call.packed_keys);
}
