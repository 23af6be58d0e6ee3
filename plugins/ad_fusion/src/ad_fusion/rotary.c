/* Rotary embedding: the halves of each row are turned by the angles of its token, rounded as it is between operations of PyTorch.
 *
 * Legend: x [B, P, Q, D] and the angles' cosines and sines, all with strides in elements (0 where one row serves many); the output is
 * contiguous, as [B, Q, P, D] if `swapped`.
 */
#include "ad_native.h"

typedef struct {
    int64_t b, p, q;
} Strides;

typedef struct {
    const void *x, *cosine, *sine;
    void *out;
    Strides x_at, cosine_at, sine_at;
    int64_t P, Q, D, swapped;
} Call;

INLINE void round_all(float *value, const int64_t count) {
    if (KIND == FLOAT32) return;
    uint16_t rounded[count];
    narrow(rounded, 0, value, count);
    widen(value, rounded, 0, count);
}

INLINE int64_t place(Strides at, int64_t b, int64_t p, int64_t q) { return b * at.b + p * at.p + q * at.q; }

INLINE void turn(const Call *c, int64_t b, int64_t p, int64_t q, const int64_t D) {
    const int64_t half = D / 2, row = c->swapped ? (b * c->Q + q) * c->P + p : (b * c->P + p) * c->Q + q;
    float x[PADDED(D)], cosine[PADDED(D)], sine[PADDED(D)], turned[PADDED(D)];
    widen(x, c->x, place(c->x_at, b, p, q), D);
    widen(cosine, c->cosine, place(c->cosine_at, b, p, q), D);
    widen(sine, c->sine, place(c->sine_at, b, p, q), D);
    for (int64_t i = 0; i < half; i++) turned[i] = -x[half + i] * sine[i];
    for (int64_t i = 0; i < half; i++) turned[half + i] = x[i] * sine[half + i];
    for (int64_t i = 0; i < D; i++) x[i] *= cosine[i];
    round_all(x, D);
    round_all(turned, D);
    for (int64_t i = 0; i < D; i++) x[i] += turned[i];
    narrow(c->out, row * D, x, D);
}

void rotate(const void *x, int64_t x_b, int64_t x_p, int64_t x_q, const void *cosine, int64_t cosine_b, int64_t cosine_p, int64_t cosine_q,
            const void *sine, int64_t sine_b, int64_t sine_p, int64_t sine_q, void *out, int64_t B, int64_t P, int64_t Q, int64_t D,
            int64_t swapped) {
    const Call call = {
        .x = x, .cosine = cosine, .sine = sine, .out = out, .x_at = { x_b, x_p, x_q }, .cosine_at = { cosine_b, cosine_p, cosine_q },
        .sine_at = { sine_b, sine_p, sine_q }, .P = P, .Q = Q, .D = D, .swapped = swapped,
    };
#pragma omp parallel for if (omp_get_max_threads() > 1 && B * P * Q * D > 1 << 15)
    for (int64_t row = 0; row < B * P * Q; row++) {
        const int64_t b = row / (P * Q), p = row / Q % P, q = row % Q;
        if (D == 64) turn(&call, b, p, q, 64);
        else if (D == 128) turn(&call, b, p, q, 128);
        else turn(&call, b, p, q, D);
    }
}
