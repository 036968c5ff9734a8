// The register tile that small matrix products run through, and what turns and lays out its operands.
//
//     c [rows, vectors * LANES] (+)= a [rows, steps] b [steps, vectors * LANES]
//
// `a` is broadcast, one 32-bit unit at a time, `b` is read from a packed panel. A unit is one fp32, or with AVX512-BF16
// or AMX two bf16 that follow each other along the summed axis, so that both types share everything but the multiply-add.
// AMX (amx.h) multiplies 16 rows and columns of such units at once, from the same rows and panels.
// Sums are fp32, and each is one chain along the summed axis: no choice of tile or block changes a bit.

#pragma once
#include "amx.h"
#include "simd.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WIDE 1
#endif
#if defined(AMX) || (defined(WIDE) && defined(__AVX512BF16__))
#define PAIRS 1
#endif
// How it was compiled: for AMX (3), bf16 multiplied in pairs (2), AVX-512 without (1), narrower vectors (0).
#if defined(AMX)
#define LEVEL 3
#elif defined(PAIRS)
#define LEVEL 2
#elif defined(WIDE)
#define LEVEL 1
#else
#define LEVEL 0
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
#define NR 2  // vectors across a tile
#else
#define NR 4
#endif
#define PW (NR * LANES)  // columns of a panel
#define TALL 12          // rows of the tallest tile
#define APART static __attribute__((noinline))  // keeps the registers of an inner loop to itself

typedef float Unit __attribute__((aligned(2), may_alias));  // also where two bf16 of a tensor stand

static inline int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

#if defined(PAIRS) && !defined(AMX)
#define MULTIPLY_ADD(pair, c, a, b) \
  ((pair) ? (vecf)_mm512_dpbf16_ps((__m512)(c), (__m512bh)(a), (__m512bh)(b)) : vfmaf(a, b, c))
#else
#define MULTIPLY_ADD(pair, c, a, b) vfmaf(a, b, c)
#endif

// Lines of memory to be asked for while a tile is multiplied, one at a step: `outer` times `inner` of them, the latter
// `inner_by` bytes apart.
typedef struct {
  const char *at;
  int64_t inner, inner_by, outer, outer_by, done;
} Ask;

INLINE void ask_next(Ask *ask) {
  if (!ask->outer) return;
  __builtin_prefetch(ask->at + ask->done * ask->inner_by, 0, 2);
  if (++ask->done < ask->inner) return;
  ask->done = 0, ask->at += ask->outer_by, ask->outer--;
}

// `lda` in units; `width` is the panel's, in floats. All that is const here is a constant where it is called.
INLINE void tile_steps(const int pair, const int rows, const int vectors, const int width, const int asks,
                       const Unit *a, int64_t lda, const float *b, int64_t steps, vecf sums[TALL][NR], Ask *ask) {
  for (int64_t k = 0; k < steps; k++) {
    vecf columns[NR];
    if (asks) ask_next(ask);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) columns[v] = vloadf(b + k * width + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      vecf x = vall(a[r * lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) sums[r][v] = MULTIPLY_ADD(pair, sums[r][v], x, columns[v]);
    }
  }
}

INLINE void tile(const int pair, const int rows, const int vectors, const int width, const Unit *a, int64_t lda,
                 const float *b, int64_t steps, float *c, int64_t ldc, int add, Ask *ask) {
  vecf sums[TALL][NR];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) sums[r][v] = add ? vloadf(c + r * ldc + v * LANES) : vall(0);
  if (ask && ask->outer) {
    Ask asked = *ask;  // in registers meanwhile
    tile_steps(pair, rows, vectors, width, 1, a, lda, b, steps, sums, &asked);
    *ask = asked;
  } else {
    tile_steps(pair, rows, vectors, width, 0, a, lda, b, steps, sums, NULL);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) vstoref(c + r * ldc + v * LANES, sums[r][v]);
}

// A function of one size of tile, and its name in a table of them. What it shall ask for may be NULL.
typedef void (*Tile)(const Unit *a, int64_t lda, const float *b, int64_t steps, float *c, int64_t ldc, int add,
                     Ask *ask);
#define TILE(pair, rows, vectors, width)                                                                              \
  static void tile_##pair##_##rows##_##vectors(const Unit *a, int64_t lda, const float *b, int64_t steps, float *c, \
                                               int64_t ldc, int add, Ask *ask) {                                    \
    tile(pair, rows, vectors, width, a, lda, b, steps, c, ldc, add, ask);                                           \
  }
#define TILE_OF(pair, rows, vectors) tile_##pair##_##rows##_##vectors

// ---- turning -------------------------------------------------------------------------------------------------------

// to [columns, 16] from at most 16 rows and columns; zeros beyond the rows.
#ifdef WIDE
__attribute__((unused))
static void transpose_block(const Unit *from, int64_t ld, int64_t rows, int64_t columns, float *to, int64_t ld_to) {
  __m512 a[16], b[16];
  __mmask16 seen = columns >= 16 ? 0xffff : (__mmask16)((1u << columns) - 1);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) a[r] = r < rows ? _mm512_maskz_loadu_ps(seen, from + r * ld) : _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < 16; r += 4) {
#define PAIR_UP(into, which, x, y) a[into] = _mm512_castpd_ps(which(_mm512_castps_pd(x), _mm512_castps_pd(y)))
    PAIR_UP(r, _mm512_unpacklo_pd, b[r], b[r + 2]);
    PAIR_UP(r + 1, _mm512_unpackhi_pd, b[r], b[r + 2]);
    PAIR_UP(r + 2, _mm512_unpacklo_pd, b[r + 1], b[r + 3]);
    PAIR_UP(r + 3, _mm512_unpackhi_pd, b[r + 1], b[r + 3]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < 4; r++) {
    b[r] = _mm512_shuffle_f32x4(a[r], a[r + 4], 0x88);
    b[r + 4] = _mm512_shuffle_f32x4(a[r], a[r + 4], 0xdd);
    b[r + 8] = _mm512_shuffle_f32x4(a[r + 8], a[r + 12], 0x88);
    b[r + 12] = _mm512_shuffle_f32x4(a[r + 8], a[r + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int r = 0; r < 8; r++) {
    a[r] = _mm512_shuffle_f32x4(b[r], b[r + 8], 0x88);
    a[r + 8] = _mm512_shuffle_f32x4(b[r], b[r + 8], 0xdd);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 16; c++)
    if (c < columns) vstoref(to + c * ld_to, (vecf)a[c]);
}
#else
__attribute__((unused))
static void transpose_block(const Unit *from, int64_t ld, int64_t rows, int64_t columns, float *to, int64_t ld_to) {
  for (int64_t c = 0; c < least(columns, 16); c++)
    for (int64_t r = 0; r < 16; r++) to[c * ld_to + r] = r < rows ? from[r * ld + c] : 0;
}
#endif

// Units from two rows of bf16: to[i] = (upper[i], lower[i]); `lower` may be NULL, for a row of zeros.
INLINE void pair_rows(const uint16_t *upper, const uint16_t *lower, int64_t count, float *to) {
  int64_t i = 0;
#if defined(WIDE)
  for (; i < count; i += 16) {
    __mmask16 seen = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
    __m256i first = _mm256_maskz_loadu_epi16(seen, upper + i);
    __m256i second = lower ? _mm256_maskz_loadu_epi16(seen, lower + i) : _mm256_setzero_si256();
    __m512i two = _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
    _mm512_mask_storeu_epi32(to + i, seen, two);
  }
#endif
  for (; i < count; i++) {
    uint32_t two = upper[i] | (lower ? (uint32_t)lower[i] << 16 : 0);
    memcpy(to + i, &two, 4);
  }
}

#if defined(WIDE)
// 32 columns of two rows of bf16 as units, 16 and 16.
INLINE void pair_lines(const void *upper, const void *lower, float *first, float *second) {
  __m512i mix = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  __m512i above = _mm512_add_epi16(mix, _mm512_set1_epi16(16));
  __m512i a = _mm512_loadu_si512(upper), b = _mm512_loadu_si512(lower);
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(a, mix, b));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi16(a, above, b));
}
#endif

// The next `count` floats of an arena, on a cache line of their own; without an arena they are only counted.
static inline float *take(float *arena, int64_t *used, int64_t count) {
  float *at = arena ? arena + *used : NULL;
  *used += up(count, 16);
  return at;
}
