// What the kernels share: a vector of fp32 lanes, read from and written to fp32 or bf16, and the exponential function.
//
// It is a GNU vector of as many lanes as a register holds: wider ones gcc 12 takes apart badly (the loss takes 2.1 to
// 2.6 times as long with 16 lanes on AVX2 as with 8). Intrinsics stand only where a compiler does not find the
// instruction by itself. A loop's body takes the number of values `n`: LANES, and once what is left of a row. Nothing
// is read or written beyond it.

#pragma once
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions alone

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { F32 = 0, BF16 = 1 };
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else  // SSE, NEON
enum { LANES = 4 };
#endif
typedef float vecf __attribute__((vector_size(4 * LANES)));
typedef int32_t veci __attribute__((vector_size(4 * LANES)));
typedef uint32_t vecu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vech __attribute__((vector_size(2 * LANES)));
#define INLINE static inline __attribute__((always_inline))

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE vecf vall(float x) { return x - (vecf){}; }
INLINE vecf vloadf(const float *p) {
  vecf x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void vstoref(float *p, vecf x) { memcpy(p, &x, sizeof x); }
INLINE vecf pick(veci mask, vecf yes, vecf no) { return (vecf)(((veci)yes & mask) | ((veci)no & ~mask)); }

// a * b + c, rounded once where the processor can: only where the result need not equal plain torch's
INLINE vecf vfmaf(vecf a, vecf b, vecf c) {
#ifdef __AVX512F__
  return (vecf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vecf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (vecf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

INLINE vecf vmaxf(vecf a, vecf b) {  // b where one is NaN
#ifdef __AVX512F__
  return (vecf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return pick(a > b, a, b);
#endif
}

INLINE vecf from_bf16(vech x) {
#ifdef __AVX512F__  // gcc 12 makes two halves of it otherwise
  return (vecf)((vecu)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
  return (vecf)(__builtin_convertvector(x, vecu) << 16);
#endif
}

// To nearest even; NaN stays NaN. The instruction takes values below 1.2e-38 for zero.
INLINE vech to_bf16(vecf x) {
#ifdef __AVX512BF16__
  return (vech)_mm512_cvtneps_pbh((__m512)x);
#else
  vecu bits = (vecu)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vecu nan = (vecu)(x != x);
  return __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40) & nan), vech);
#endif
}

INLINE vecf rounded(vecf x, int kind) { return kind == BF16 ? from_bf16(to_bf16(x)) : x; }

// The values [i, i + n) of a row; the other lanes are zero.
INLINE vecf load(const void *row, int64_t i, int64_t n, int kind) {
  if (kind == BF16) {
    vech x = {};
    memcpy(&x, (const uint16_t *)row + i, 2 * n);
    return from_bf16(x);
  }
  vecf x = {};
  memcpy(&x, (const float *)row + i, 4 * n);
  return x;
}

INLINE void store(void *row, int64_t i, int64_t n, int kind, vecf x) {
  if (kind == BF16) {
    vech small = to_bf16(x);
    memcpy((uint16_t *)row + i, &small, 2 * n);
  } else {
    memcpy((float *)row + i, &x, 4 * n);
  }
}

// The lanes' sum, halves upon each other.
INLINE float vsumf(vecf x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[LANES];
  memcpy(lanes, &x, sizeof lanes);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

INLINE float vlargestf(vecf x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// All bits set in the lanes [first, stop), which may lie outside.
INLINE veci vlanes(int64_t first, int64_t stop) {
  veci at;
  for (int i = 0; i < LANES; i++) at[i] = i;
  int32_t from = first < 0 ? 0 : first > LANES ? LANES : (int32_t)first;
  int32_t to = stop < 0 ? 0 : stop > LANES ? LANES : (int32_t)stop;
  return (at >= from) & (at < to);
}

// 2^x for x <= 127, to 1e-7 of itself; zero from about -126 down, NaN stays NaN.
INLINE vecf vexp2f(vecf x) {
#ifdef __AVX512F__
  // A result that is no normal number costs the instruction some 150 cycles: there it is not asked.
  __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  vecf whole = (vecf)_mm512_roundscale_ps((__m512)x, 0);
#else
  x = vmaxf(vall(-200.0f), x);
  vecf magic = vall(12582912.0f), whole = (x + magic) - magic;  // 1.5 * 2^23: adding it rounds to a whole number
#endif
  vecf f = x - whole;
  vecf y = vfmaf(vall(0x1.41d326p-13f), f, vall(0x1.5f456ap-10f));
  y = vfmaf(y, f, vall(0x1.3b2dbcp-7f));
  y = vfmaf(y, f, vall(0x1.c6aed4p-5f));
  y = vfmaf(y, f, vall(0x1.ebfbdap-3f));
  y = vfmaf(y, f, vall(0x1.62e43p-1f));
  y = vfmaf(y, f, vall(1.0f));
#ifdef __AVX512F__
  return (vecf)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)whole);
#else
  vecf kept = pick(whole < -126.0f, vall(-126.0f), whole);
  vecf power = (vecf)((__builtin_convertvector(kept, veci) + 127) << 23);
  return pick(whole < -126.0f, vall(0), y * power);
#endif
}

// e^x within 2 units in the last place (below 1.2e-38: within 1.4e-45); infinity beyond 88.7; NaN stays NaN. Cephes'
// polynomial, summed pairwise, on |r| <= ln 2 / 2; x = n ln 2 + r with ln 2 in two parts, the first of few bits.
INLINE vecf vexpf(vecf x) {
  const vecf magic = (vecf){} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
#ifdef __AVX512F__
  x = (vecf)_mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x));
#else
  x = pick(x > 100.0f, (vecf){} + 100.0f, pick(x < -110.0f, (vecf){} - 110.0f, x));
#endif
  vecf turned = vfmaf(x, (vecf){} + 1.44269504088896341f, magic), n = turned - magic;
  vecf r = vfmaf(n, (vecf){} - 0.693359375f, x);
  r = vfmaf(n, (vecf){} + 2.12194440e-4f, r);
  vecf r2 = r * r;
  vecf high = vfmaf(r, (vecf){} + 1.9875691500e-4f, (vecf){} + 1.3981999507e-3f);
  vecf middle = vfmaf(r, (vecf){} + 8.3334519073e-3f, (vecf){} + 4.1665795894e-2f);
  vecf low = vfmaf(r, (vecf){} + 1.6666665459e-1f, (vecf){} + 5.0000001201e-1f);
  vecf p = vfmaf(vfmaf(vfmaf(high, r2, middle), r2, low), r2, r) + 1.0f;
#ifdef __AVX512F__
  return (vecf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else  // 2^n as two factors
  veci power = (veci)((vecu)turned - (vecu)magic), half = power >> 1;
  vecu rest = (vecu)power - (vecu)half;
  return p * (vecf)(((vecu)half + 127) << 23) * (vecf)((rest + 127) << 23);
#endif
}
