/* What every kernel in C wants: numbers of three kinds as vectors of floats, and functions of them.
 *
 * A source is compiled once for each kind of number that tensors have (`KIND`); a tensor is an address with strides in elements, and sums
 * are in float. Rows of floats that are `PADDED` end in zeros, so that loops take whole vectors.
 */
#ifndef AD_NATIVE_H
#define AD_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef _OPENMP
int omp_get_max_threads(void);
#else
static int omp_get_max_threads(void) { return 1; }
#endif

#define INLINE static inline __attribute__((always_inline, unused))
enum { FLOAT32, BFLOAT16, FLOAT16 }; /* values of KIND */
enum { SIZE = KIND == FLOAT32 ? 4 : 2 }; /* bytes of a number */

/* Sixteen numbers; compilers cut them into what the CPU has. Rows of floats are padded with zeros to whole vectors. */
enum { WIDTH = 16 };
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef _Float16 Float16 __attribute__((vector_size(2 * WIDTH), aligned(2)));
#define PADDED(count) (((count) + WIDTH - 1) / WIDTH * WIDTH)

INLINE float widen_one(const void *from, int64_t at) {
    if (KIND == FLOAT32) return ((const float *)from)[at];
    if (KIND == FLOAT16) return (float)((const _Float16 *)from)[at];
    union { uint32_t bits; float value; } wide = { .bits = (uint32_t)((const uint16_t *)from)[at] << 16 };
    return wide.value;
}

INLINE Vector widen_vector(const void *from, int64_t at) {
    if (KIND == FLOAT32) return *(const Vector *)((const float *)from + at);
    if (KIND == FLOAT16) return __builtin_convertvector(*(const Float16 *)((const _Float16 *)from + at), Vector);
#ifdef __AVX512F__ /* compilers make five instructions of the conversion below */
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at)));
    return (Vector)_mm512_slli_epi32(bits, 16);
#else
    union { Bits bits; Vector value; } wide = { .bits = __builtin_convertvector(*(const Half *)((const uint16_t *)from + at), Bits) << 16 };
    return wide.value;
#endif
}

/* `count` numbers from element `at` on as floats, padded. */
INLINE void widen(float *restrict to, const void *from, int64_t at, const int64_t count) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) *(Vector *)(to + i) = widen_vector(from, at + i);
    if (i < count) {
        for (int64_t tail = i; tail < i + WIDTH; tail++) to[tail] = tail < count ? widen_one(from, at + tail) : 0;
    }
}

INLINE void narrow(void *to, int64_t at, const float *restrict from, int64_t count) {
    if (KIND == FLOAT32) {
        memcpy((float *)to + at, from, count * sizeof(float));
    } else if (KIND == BFLOAT16) {
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
    Vector a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = __builtin_shufflevector(in[i], in[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(in[i], in[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* The products of M rows of floats `x`, `wide` apart and padded, with one row of `count` numbers that is read once, front to back: more
 * than one stream of memory at a time is read at half the speed. `dots` are vectors whose sums are the products. */
INLINE void multiply(Vector *dots, const float *x, int64_t wide, const int64_t M, const void *row, int64_t at, int64_t count) {
    Vector even[4] = {0}, odd[4] = {0};
    int64_t d = 0;
    for (; d + 2 * WIDTH <= count; d += 2 * WIDTH) {
        const Vector first = widen_vector(row, at + d), second = widen_vector(row, at + d + WIDTH);
        for (int64_t m = 0; m < M; m++) {
            even[m] += first * *(const Vector *)(x + m * wide + d);
            odd[m] += second * *(const Vector *)(x + m * wide + d + WIDTH);
        }
    }
    for (; d < count; d += WIDTH) {
        float rest[WIDTH];
        widen(rest, row, at + d, count - d < WIDTH ? count - d : WIDTH);
        for (int64_t m = 0; m < M; m++) even[m] += *(const Vector *)rest * *(const Vector *)(x + m * wide + d);
    }
    for (int64_t m = 0; m < M; m++) dots[m] = even[m] + odd[m];
}

#ifdef __AVX512BF16__
/* The same of M rows of bfloat16, where both factors are read as they are: 32 products an instruction, summed in float. */
INLINE void multiply_bfloat16(Vector *dots, const uint16_t *const *x, const int64_t M, const uint16_t *row, int64_t count) {
    __m512 even[4], odd[4];
    for (int64_t m = 0; m < M; m++) even[m] = odd[m] = _mm512_setzero_ps();
    int64_t d = 0;
    for (; d + 64 <= count; d += 64) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(row + d), second = (__m512bh)_mm512_loadu_si512(row + d + 32);
        for (int64_t m = 0; m < M; m++) {
            even[m] = _mm512_dpbf16_ps(even[m], first, (__m512bh)_mm512_loadu_si512(x[m] + d));
            odd[m] = _mm512_dpbf16_ps(odd[m], second, (__m512bh)_mm512_loadu_si512(x[m] + d + 32));
        }
    }
    for (; d < count; d += 32) {
        const __mmask32 there = count - d < 32 ? (1u << (count - d)) - 1 : 0xffffffffu;
        const __m512bh rest = (__m512bh)_mm512_maskz_loadu_epi16(there, row + d);
        for (int64_t m = 0; m < M; m++) even[m] = _mm512_dpbf16_ps(even[m], rest, (__m512bh)_mm512_maskz_loadu_epi16(there, x[m] + d));
    }
    for (int64_t m = 0; m < M; m++) dots[m] = (Vector)_mm512_add_ps(even[m], odd[m]);
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PAIRS
enum { OUTPUTS = 64, TILE = 6 }; /* outputs of a block of a packed weight (`ad_core.native.packed`), rows that are multiplied with it at once */

/* M rows x times pairs `first` to `stop` of a block, added to `sum` [M, 64] or, unless `kept_sum`, written there. */
INLINE void multiply_block(const int64_t M, const uint16_t *const *x, const uint16_t *weight, int64_t first, int64_t stop, int kept_sum,
                           float *sum) {
    __m512 kept[TILE][4];
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < 4; i++) kept[m][i] = kept_sum ? _mm512_loadu_ps(sum + m * OUTPUTS + 16 * i) : _mm512_setzero_ps();
    for (int64_t pair = first; pair < stop; pair++) {
        __m512bh part[4];
        for (int64_t i = 0; i < 4; i++) part[i] = (__m512bh)_mm512_loadu_si512(weight + (pair * OUTPUTS + 16 * i) * 2);
        for (int64_t m = 0; m < M; m++) {
            int32_t both;
            memcpy(&both, x[m] + 2 * pair, sizeof both);
            for (int64_t i = 0; i < 4; i++) kept[m][i] = _mm512_dpbf16_ps(kept[m][i], part[i], (__m512bh)_mm512_set1_epi32(both));
        }
    }
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < 4; i++) _mm512_storeu_ps(sum + m * OUTPUTS + 16 * i, kept[m][i]);
}

/* The same for up to TILE rows. */
INLINE void multiply_tile(int64_t M, const uint16_t *const *x, const uint16_t *weight, int64_t first, int64_t stop, int kept_sum,
                          float *sum) {
    switch (M) {
    case 1: multiply_block(1, x, weight, first, stop, kept_sum, sum); break;
    case 2: multiply_block(2, x, weight, first, stop, kept_sum, sum); break;
    case 3: multiply_block(3, x, weight, first, stop, kept_sum, sum); break;
    case 4: multiply_block(4, x, weight, first, stop, kept_sum, sum); break;
    case 5: multiply_block(5, x, weight, first, stop, kept_sum, sum); break;
    default: multiply_block(6, x, weight, first, stop, kept_sum, sum);
    }
}

/* The first `count` of 64 sums, plus as many numbers of `bias` unless there is none, rounded to `out`. */
INLINE void store_block(uint16_t *out, const float *sum, const uint16_t *bias, int64_t count) {
    for (int64_t i = 0; 16 * i < count && i < 4; i++) {
        const __mmask16 there = count - 16 * i < 16 ? (1u << (count - 16 * i)) - 1 : 0xffff;
        __m512 value = _mm512_loadu_ps(sum + 16 * i);
        if (bias) {
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, bias + 16 * i));
            value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
        }
        _mm256_mask_storeu_epi16(out + 16 * i, there, (__m256i)_mm512_cvtneps_pbh(value));
    }
}
#endif

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

/* x times its logistic function. */
INLINE float silu(float x) {
    const float low = exponential(x < 0 ? x : -x);
    return x * (x < 0 ? low : 1.0f) / (1.0f + low);
}

#endif
