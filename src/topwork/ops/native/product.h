// Rows times a weight whose rows are contiguous, as dot products: the products of generation.
//
//     sums [m, n] = x [m, k] w [n, k]'
//
// Nothing is packed: with few rows a weight is read once, from memory, and that is all the time there is. A sum is one
// chain of vectors along k and one way to add up its lanes, whatever rows and columns are computed beside it: a row's
// results are the same to the bit alone and in any company.

#pragma once
#include "simd.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define DOT_PAIRS 1  // two bf16 products added to a lane at once
#endif
#if defined(__AVX512F__)
enum { TILE_ROWS = 4, TILE_COLUMNS = 4 };
#elif defined(__AVX2__)
enum { TILE_ROWS = 2, TILE_COLUMNS = 4 };
#else
enum { TILE_ROWS = 2, TILE_COLUMNS = 2 };
#endif

enum { TILE_SUMS = TILE_ROWS * TILE_COLUMNS };

INLINE int64_t bytes_of_kind(int kind) { return kind == BF16 ? 2 : 4; }

// Each vector's lanes added up, every one in the same order.
INLINE void add_lanes(const vecf sums[TILE_SUMS], float out[TILE_SUMS]) {
#if defined(__AVX512F__)
  __m512 a[16], b[8], c[4], d[2];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = (__m512)sums[i];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512d p = _mm512_castps_pd(b[2 * i]), q = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  __m512 e = _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
  _mm512_storeu_ps(out, e);
#else
  for (int i = 0; i < TILE_SUMS; i++) out[i] = vsumf(sums[i]);
#endif
}

#ifdef DOT_PAIRS
enum { PAIR_STEP = 32 };
#endif

// The sums of `rows` rows and `columns` columns, both constants where it is called, as rows of out. Going
// `across`, the columns take turns at every step, which keeps the processor busiest with a weight that is in its cache;
// else one column comes after the other, which is the order in which memory hands a weight over fastest.
//
// `ahead`: the columns after these are asked of memory meanwhile.
INLINE void dot_tile(const int kind, const int rows, const int columns, const int across, const int ahead,
                     const void *x, int64_t ldx, const void *w, int64_t ldw, int64_t k, float out[TILE_SUMS]) {
  vecf sums[TILE_SUMS] = {};
  const int width = across ? columns : 1;
#pragma GCC unroll 16
  for (int first = 0; first < columns; first += width) {
    int64_t i = 0;
#ifdef DOT_PAIRS
    if (kind == BF16) {
      const uint16_t *px = x, *pw = (const uint16_t *)w + first * ldw;
#define DOT_STEP(LOAD)                                                                                              \
  {                                                                                                                 \
    __m512i b[TILE_COLUMNS];                                                                                        \
    _Pragma("GCC unroll 4") for (int c = 0; c < width; c++) {                                                       \
      if (ahead) __builtin_prefetch(pw + (c + columns) * ldw + i, 0, 2); /* to the second cache */                   \
      b[c] = LOAD(pw + c * ldw + i);                                                                                \
    }                                                                                                               \
    _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) {                                                        \
      __m512bh a = (__m512bh)LOAD(px + r * ldx + i);                                                                \
      _Pragma("GCC unroll 4") for (int c = 0; c < width; c++) {                                                     \
        vecf *sum = sums + r * columns + first + c;                                                                 \
        *sum = (vecf)_mm512_dpbf16_ps((__m512)*sum, a, (__m512bh)b[c]);                                             \
      }                                                                                                             \
    }                                                                                                               \
  }
      for (; i + PAIR_STEP <= k; i += PAIR_STEP) DOT_STEP(_mm512_loadu_si512)
      if (i < k) {
        __mmask32 seen = (__mmask32)((1ull << (k - i)) - 1);
#define SOME(at) _mm512_maskz_loadu_epi16(seen, at)
        DOT_STEP(SOME)
#undef SOME
      }
#undef DOT_STEP
      continue;
    }
#endif
    int64_t size = bytes_of_kind(kind);
    const char *pw = (const char *)w + first * ldw * size;
#define DOT_STEP(n)                                                                                                 \
  {                                                                                                                 \
    vecf b[TILE_COLUMNS];                                                                                           \
    _Pragma("GCC unroll 4") for (int c = 0; c < width; c++) b[c] = load(pw + c * ldw * size, i, n, kind);           \
    _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) {                                                        \
      vecf a = load((const char *)x + r * ldx * size, i, n, kind);                                                  \
      _Pragma("GCC unroll 4") for (int c = 0; c < width; c++) {                                                     \
        vecf *sum = sums + r * columns + first + c;                                                                 \
        *sum = vfmaf(a, b[c], *sum);                                                                                \
      }                                                                                                             \
    }                                                                                                               \
  }
    for (; i + LANES <= k; i += LANES) DOT_STEP(LANES)
    if (i < k) DOT_STEP(k - i)
#undef DOT_STEP
  }
  add_lanes(sums, out);
}

// A stripe of `rows` rows and n columns, `columns` at a time; rows and columns are constants.
INLINE void dot_stripe(const int kind, const int rows, const int columns, const int across, const void *x, int64_t ldx,
                       const void *w, int64_t ldw, int64_t n, int64_t k, float *sums, int64_t ld) {
  int64_t size = bytes_of_kind(kind), c = 0;
  float out[TILE_SUMS] __attribute__((aligned(64)));
  for (; c + columns <= n; c += columns) {
    dot_tile(kind, rows, columns, across, 0, x, ldx, (const char *)w + c * ldw * size, ldw, k, out);
    for (int r = 0; r < rows; r++) memcpy(sums + r * ld + c, out + r * columns, sizeof(float) * columns);
  }
  for (; c < n; c++) {
    dot_tile(kind, rows, 1, 0, 0, x, ldx, (const char *)w + c * ldw * size, ldw, k, out);
    for (int r = 0; r < rows; r++) sums[r * ld + c] = out[r];
  }
}

// Several stripes and a weight that comes from memory: each few columns go through all stripes, and the first of these
// asks for the next columns, so that memory works while the others are computed.
INLINE int64_t dot_ahead(const int kind, const void *x, int64_t ldx, int64_t m, const void *w, int64_t ldw, int64_t n,
                         int64_t k, float *sums, int64_t ld) {
  int64_t size = bytes_of_kind(kind), c = 0;
  float out[TILE_SUMS] __attribute__((aligned(64)));
  for (; c + TILE_COLUMNS <= n; c += TILE_COLUMNS) {
    const char *columns = (const char *)w + c * ldw * size;
    for (int64_t r = 0; r + TILE_ROWS <= m; r += TILE_ROWS) {
      const char *rows = (const char *)x + r * ldx * size;
      if (r) dot_tile(kind, TILE_ROWS, TILE_COLUMNS, 1, 0, rows, ldx, columns, ldw, k, out);
      else dot_tile(kind, TILE_ROWS, TILE_COLUMNS, 1, 1, rows, ldx, columns, ldw, k, out);
      for (int i = 0; i < TILE_ROWS; i++)
        memcpy(sums + (r + i) * ld + c, out + i * TILE_COLUMNS, sizeof(float) * TILE_COLUMNS);
    }
  }
  return c;
}

// sums [m, n], rows `ld` apart. `cold`: the weight comes from memory.
INLINE void dot_rows(const int kind, const int cold, const void *x, int64_t ldx, int64_t m, const void *w, int64_t ldw,
                     int64_t n, int64_t k, float *sums, int64_t ld) {
  int64_t size = bytes_of_kind(kind), r = 0;
#define STRIPE(rows, columns, across) \
  dot_stripe(kind, rows, columns, across, (const char *)x + r * ldx * size, ldx, w, ldw, n, k, sums + r * ld, ld)
  if (cold && m >= 2 * TILE_ROWS) {
    int64_t whole = m < 4 * TILE_ROWS ? m / TILE_ROWS * TILE_ROWS : 4 * TILE_ROWS;
    int64_t done = dot_ahead(kind, x, ldx, whole, w, ldw, n, k, sums, ld);
    if (done < n)
      for (; r < whole; r += TILE_ROWS)
        dot_stripe(kind, TILE_ROWS, TILE_COLUMNS, 1, (const char *)x + r * ldx * size, ldx,
                   (const char *)w + done * ldw * size, ldw, n - done, k, sums + r * ld + done, ld);
    r = whole;
  } else if (cold && m >= TILE_ROWS) {
    STRIPE(TILE_ROWS, TILE_COLUMNS, 0);
    r = TILE_ROWS;
  }
  for (; r + TILE_ROWS <= m; r += TILE_ROWS) STRIPE(TILE_ROWS, TILE_COLUMNS, 1);
  for (; r < m; r++) STRIPE(1, TILE_SUMS, 0);
#undef STRIPE
}
