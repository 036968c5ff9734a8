// What the kernels share: sixteen fp32 lanes, read from and written to fp32 or bf16, and the exponential function.
//
// The lanes are a GNU vector, which a compiler turns into whatever the processor has (512, 256 or 128 bits at a time);
// intrinsics stand only where a compiler does not find the instruction by itself. A loop's body takes the number of
// values `n`: the constant 16, and once what is left of a row. Nothing is read or written beyond it.

#pragma once
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions alone

#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { F32 = 0, BF16 = 1, LANES = 16 };
typedef float v16f __attribute__((vector_size(4 * LANES)));
typedef int32_t v16i __attribute__((vector_size(4 * LANES)));
typedef uint32_t v16u __attribute__((vector_size(4 * LANES)));
typedef uint16_t v16h __attribute__((vector_size(2 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE v16f pick(v16i mask, v16f yes, v16f no) { return (v16f)(((v16i)yes & mask) | ((v16i)no & ~mask)); }

// a * b + c, rounded once where the processor can: only where the result need not equal plain torch's
INLINE v16f fma16(v16f a, v16f b, v16f c) {
#ifdef __AVX512F__
  return (v16f)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

INLINE v16f from_bf16(v16h x) {
#ifdef __AVX512F__  // gcc 12 makes two halves of it otherwise
  return (v16f)((v16u)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
  return (v16f)(__builtin_convertvector(x, v16u) << 16);
#endif
}

// To nearest even; NaN stays NaN. The instruction takes values below 1.2e-38 for zero.
INLINE v16h to_bf16(v16f x) {
#ifdef __AVX512BF16__
  return (v16h)_mm512_cvtneps_pbh((__m512)x);
#else
  v16u bits = (v16u)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  v16u nan = (v16u)(x != x);
  return __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40) & nan), v16h);
#endif
}

INLINE v16f rounded(v16f x, int kind) { return kind == BF16 ? from_bf16(to_bf16(x)) : x; }

// The values [i, i + n) of a row; the other lanes are zero.
INLINE v16f load(const void *row, int64_t i, int64_t n, int kind) {
  if (kind == BF16) {
    v16h x = {};
    memcpy(&x, (const uint16_t *)row + i, 2 * n);
    return from_bf16(x);
  }
  v16f x = {};
  memcpy(&x, (const float *)row + i, 4 * n);
  return x;
}

INLINE void store(void *row, int64_t i, int64_t n, int kind, v16f x) {
  if (kind == BF16) {
    v16h small = to_bf16(x);
    memcpy((uint16_t *)row + i, &small, 2 * n);
  } else {
    memcpy((float *)row + i, &x, 4 * n);
  }
}

// The lanes' sum in a fixed order.
INLINE float sum16(v16f x) {
  float lanes[LANES];
  memcpy(lanes, &x, sizeof lanes);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// e^x within 2 units in the last place (below 1.2e-38: within 1.4e-45); infinity beyond 88.7; NaN stays NaN. Cephes'
// polynomial, summed pairwise, on |r| <= ln 2 / 2; x = n ln 2 + r with ln 2 in two parts, the first of few bits.
INLINE v16f exp16(v16f x) {
  const v16f magic = (v16f){} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
#ifdef __AVX512F__
  x = (v16f)_mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x));
#else
  x = pick(x > 100.0f, (v16f){} + 100.0f, pick(x < -110.0f, (v16f){} - 110.0f, x));
#endif
  v16f turned = fma16(x, (v16f){} + 1.44269504088896341f, magic), n = turned - magic;
  v16f r = fma16(n, (v16f){} - 0.693359375f, x);
  r = fma16(n, (v16f){} + 2.12194440e-4f, r);
  v16f r2 = r * r;
  v16f high = fma16(r, (v16f){} + 1.9875691500e-4f, (v16f){} + 1.3981999507e-3f);
  v16f middle = fma16(r, (v16f){} + 8.3334519073e-3f, (v16f){} + 4.1665795894e-2f);
  v16f low = fma16(r, (v16f){} + 1.6666665459e-1f, (v16f){} + 5.0000001201e-1f);
  v16f p = fma16(fma16(fma16(high, r2, middle), r2, low), r2, r) + 1.0f;
#ifdef __AVX512F__
  return (v16f)_mm512_scalef_ps((__m512)p, (__m512)n);
#else  // 2^n as two factors
  v16i power = (v16i)((v16u)turned - (v16u)magic), half = power >> 1;
  v16u rest = (v16u)power - (v16u)half;
  return p * (v16f)(((v16u)half + 127) << 23) * (v16f)((rest + 127) << 23);
#endif
}
