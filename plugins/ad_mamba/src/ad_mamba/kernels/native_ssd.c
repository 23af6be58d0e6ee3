/* One token of n sequences through SSD, for the CPU: each state is read once and written once.
 *
 * Legend: n sequences, H heads of P channels, G groups of B and C, N state elements a channel. A task is one head of one sequence.
 */
#include "ad_native.h"

typedef struct {
    const void *x, *B, *C, *z; /* [n, H, P], [n, G, N] twice, like x or none: rows `*_row` elements apart, contiguous inside */
    const void *dt; /* [n, H] */
    const float *A, *D, *bias; /* [H], [H] or [H, P] or none, [H] or none */
    float *state; /* [slots, H, P, N] */
    const int32_t *slots;
    const uint8_t *fresh; /* of each sequence: its state counts as zero */
    void *out; /* [n, H, P] */
    int64_t x_row, B_row, C_row, z_row, dt_row, dt_head, H, P, G, N, D_row, D_column, softplus;
    float least, most;
} Call;

INLINE void advance(const Call *c, int64_t row, int64_t head, const int64_t N) {
    const int64_t P = c->P, wide = PADDED(N), group = head / (c->H / c->G);
    float B[wide], C[wide], x[PADDED(P)], y[PADDED(P)], z[PADDED(P)];
    widen(B, c->B, row * c->B_row + group * N, N);
    widen(C, c->C, row * c->C_row + group * N, N);
    widen(x, c->x, row * c->x_row + head * P, P);
    float step = widen_one(c->dt, row * c->dt_row + head * c->dt_head);
    if (c->bias) step += c->bias[head];
    if (c->softplus && step <= 20) step = log1pf(expf(step));
    step = step < c->least ? c->least : step > c->most ? c->most : step;
    const float decay = c->fresh[row] ? 0 : expf(step * c->A[head]);
    float *states = c->state + ((int64_t)c->slots[row] * c->H + head) * P * N;
    if (c->fresh[row]) memset(states, 0, P * N * sizeof(float)); /* what lies there may be NaN */
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
    if (c->D) {
        for (int64_t p = 0; p < P; p++) y[p] += c->D[head * c->D_row + p * c->D_column] * x[p];
    }
    if (c->z) {
        widen(z, c->z, row * c->z_row + head * P, P);
        for (int64_t p = 0; p < P; p++) y[p] *= silu(z[p]);
    }
    narrow(c->out, (row * c->H + head) * P, y, P);
}

INLINE void sized(const Call *c, int64_t row, int64_t head) {
    if (c->N == 128) advance(c, row, head, 128);
    else if (c->N == 64) advance(c, row, head, 64);
    else advance(c, row, head, c->N);
}

void ssd_decode(const void *x, int64_t x_row, const void *dt, int64_t dt_row, int64_t dt_head, const void *A, const void *B,
                int64_t B_row, const void *C, int64_t C_row, const void *D, int64_t D_row, int64_t D_column, const void *z, int64_t z_row,
                const void *bias, int64_t softplus, float least, float most, void *state, const void *slots, const void *fresh, void *out,
                int64_t n, int64_t H, int64_t P, int64_t G, int64_t N) {
    const Call call = {
        .x = x, .B = B, .C = C, .z = z, .dt = dt, .A = A, .D = D, .bias = bias, .state = state, .slots = slots, .fresh = fresh, .out = out,
        .x_row = x_row, .B_row = B_row, .C_row = C_row, .z_row = z_row, .dt_row = dt_row, .dt_head = dt_head, .H = H, .P = P, .G = G,
        .N = N, .D_row = D_row, .D_column = D_column, .softplus = softplus, .least = least, .most = most,
    };
#pragma omp parallel for if (omp_get_max_threads() > 1)
    for (int64_t task = 0; task < n * H; task++) sized(&call, task / H, task % H);
}
