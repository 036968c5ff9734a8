// Causal attention of a flat stream, forward and backward; every sequence sees itself alone.
//
//     s = scale q k'     p = softmax over keys j with i - window < j <= i     o = p v     lse = log sum exp s
//     dv = p' do     dp = do v'     ds = scale p (dp - do . o)     dq = ds k     dk = ds' q
//
// As in FlashAttention (Dao, arXiv 2307.08691): blocks of rows against blocks of keys, p made again from lse.
// All six products run through one register tile of MR rows by NR vectors: `a` is broadcast, one 32-bit unit at a time,
// `b` is read from panels of PW columns. A unit is one fp32, or with AVX512-BF16 two bf16 that follow each other along
// the summed axis, so that both types share everything but the multiply-add. To need no transposed scores, the backward
// makes dk and dv transposed and turns them once, at the end. Sums are fp32. What a row does not see has a score of
// minus infinity, so that the inner loops know no masks.
//
// A unit of work is one sequence and one key head with its query heads; a long sequence with few key heads is cut by
// query heads, whose dk and dv are then added in their order. Nothing depends on the threads or on other sequences.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WIDE 1
#define W 16  // floats in a vector
#define NR 4  // vectors across a tile
#elif defined(__AVX2__)
#define W 8
#define NR 2
#else
#define W 4
#define NR 4
#endif
#if defined(WIDE) && defined(__AVX512BF16__)
#define PAIRS 1
#endif

#define MR 6              // rows of a tile
#define PW (NR * W)       // columns of a panel
#define FORWARD_ROWS 48   // query rows and keys of a block: multiples of MR and 32, and of PW
#define FORWARD_KEYS 256
#define BACKWARD_ROWS 96
#define BACKWARD_KEYS 128
#define LONG 512          // tokens from which a sequence with few key heads is cut by query heads
#define FEW 16
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))  // keeps the registers of an inner loop to itself

enum { F32 = 0, BF16 = 1 };

// ---- vectors -------------------------------------------------------------------------------------------------------

#ifdef WIDE
typedef __m512 V;
INLINE V all(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, V x) { _mm512_storeu_ps(p, x); }
INLINE V fma_(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V max_(V a, V b) { return _mm512_max_ps(a, b); }  // b where one is NaN
INLINE float sum(V x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(V x) { return _mm512_reduce_max_ps(x); }

typedef __mmask16 Mask;
INLINE Mask lanes(int64_t first, int64_t stop) {  // [first, stop), which may lie outside
  uint32_t below = stop >= W ? 0xffff : stop <= 0 ? 0 : (1u << stop) - 1;
  uint32_t above = first <= 0 ? 0xffff : first >= W ? 0 : 0xffffu << first;
  return (Mask)(below & above);
}
INLINE V choose(Mask which, V a, V b) { return _mm512_mask_blend_ps(which, b, a); }
INLINE V widened(const char *from) {
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

INLINE V split(V x, V *whole) {
  *whole = _mm512_roundscale_ps(x, 0);
  return _mm512_sub_ps(x, *whole);
}
INLINE V scaled(V x, V whole) { return _mm512_scalef_ps(x, whole); }
#else
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef I Mask;
INLINE V all(float x) { return x - (V){0}; }
INLINE V load(const float *p) { V x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(float *p, V x) { memcpy(p, &x, sizeof x); }
INLINE V choose(Mask which, V a, V b) { return (V)(((I)a & which) | ((I)b & ~which)); }
INLINE V max_(V a, V b) { return choose(a > b, a, b); }
INLINE V fma_(V a, V b, V c) {
#if defined(__AVX2__) && defined(__FMA__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE float sum(V x) {
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
}
INLINE float largest(V x) {
  float most = x[0];
  for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
  return most;
}
INLINE Mask lanes(int64_t first, int64_t stop) {  // [first, stop), which may lie outside
  I at;
  for (int i = 0; i < W; i++) at[i] = i;
  int32_t from = first < 0 ? 0 : first > W ? W : (int32_t)first, to = stop < 0 ? 0 : stop > W ? W : (int32_t)stop;
  return (at >= from) & (at < to);
}
INLINE V widened(const char *from) {
  uint16_t x[W];
  I bits;
  memcpy(x, from, sizeof x);
  for (int i = 0; i < W; i++) bits[i] = (int32_t)((uint32_t)x[i] << 16);
  return (V)bits;
}
INLINE V split(V x, V *whole) {
  V magic = all(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
  *whole = (x + magic) - magic;
  return x - *whole;
}
INLINE V scaled(V x, V whole) {
  V kept = choose(whole < -126.0f, all(-126.0f), whole);
  I bits = (__builtin_convertvector(kept, I) + 127) << 23;
  return choose(whole < -126.0f, all(0), x * (V)bits);
}
#endif

// 2^x for x <= 127, to 1e-7 of itself; zero from about -126 down, NaN stays NaN.
INLINE V exp2_(V x) {
  V whole, f = split(max_(all(-200.0f), x), &whole);
  V y = fma_(all(0x1.41d326p-13f), f, all(0x1.5f456ap-10f));
  y = fma_(y, f, all(0x1.3b2dbcp-7f));
  y = fma_(y, f, all(0x1.c6aed4p-5f));
  y = fma_(y, f, all(0x1.ebfbdap-3f));
  y = fma_(y, f, all(0x1.62e43p-1f));
  return scaled(fma_(y, f, all(1.0f)), whole);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- the register tile ---------------------------------------------------------------------------------------------

#ifdef PAIRS
#define MULTIPLY_ADD(pair, c, a, b) \
  ((pair) ? _mm512_dpbf16_ps(c, (__m512bh)(a), (__m512bh)(b)) : fma_(a, b, c))
#else
#define MULTIPLY_ADD(pair, c, a, b) fma_(a, b, c)
#endif

// c [rows, vectors * W] (+)= a [rows, steps] b [steps, PW]
INLINE void tile(const int pair, const int rows, const int vectors, const float *a, int64_t lda, const float *b,
                 int64_t steps, float *c, int64_t ldc, int add) {
  V sums[MR][NR];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) sums[r][v] = add ? load(c + r * ldc + v * W) : all(0);
  for (int64_t k = 0; k < steps; k++) {
    V columns[NR];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) columns[v] = load(b + k * PW + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      V x = all(a[r * lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) sums[r][v] = MULTIPLY_ADD(pair, sums[r][v], x, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) store(c + r * ldc + v * W, sums[r][v]);
}

typedef void (*Tile)(const float *a, int64_t lda, const float *b, int64_t steps, float *c, int64_t ldc, int add);
#define TILE(pair, rows, vectors)                                                                                   \
  static void tile_##pair##_##rows##_##vectors(const float *a, int64_t lda, const float *b, int64_t steps, float *c, \
                                               int64_t ldc, int add) {                                              \
    tile(pair, rows, vectors, a, lda, b, steps, c, ldc, add);                                                       \
  }
#if NR == 4
#define TILES(pair, rows) TILE(pair, rows, 1) TILE(pair, rows, 2) TILE(pair, rows, 3) TILE(pair, rows, 4)
#define ROW(pair, rows) {tile_##pair##_##rows##_1, tile_##pair##_##rows##_2, tile_##pair##_##rows##_3, tile_##pair##_##rows##_4}
#else
#define TILES(pair, rows) TILE(pair, rows, 1) TILE(pair, rows, 2)
#define ROW(pair, rows) {tile_##pair##_##rows##_1, tile_##pair##_##rows##_2}
#endif
TILES(0, 2) TILES(0, 4) TILES(0, 6)
#ifdef PAIRS
TILES(1, 2) TILES(1, 4) TILES(1, 6)
#endif
static const Tile PRODUCTS[2][MR / 2][NR] = {
    {ROW(0, 2), ROW(0, 4), ROW(0, 6)},
#ifdef PAIRS
    {ROW(1, 2), ROW(1, 4), ROW(1, 6)},
#endif
};

// ---- the job, and how its rows are read and written ----------------------------------------------------------------

typedef struct {
  char *at;
  int64_t token, head;  // bytes
} View;

typedef struct {
  View query, key, value, out, grad, dquery, dkey, dvalue;
  float *lse;      // [heads, tokens]
  float *partial;  // [2, tokens, heads, size]: dk and dv by query head, of sequences cut by query heads
  const int64_t *spans;  // (start, length) of each sequence
  int64_t sequences, tokens, heads, key_heads, size, window;
  float scale;
  int kind, pair, threads;
} Job;

static inline int64_t units(const Job *job) { return job->pair ? job->size / 2 : job->size; }  // of one row
static inline char *row_of(View x, int64_t token, int64_t head) { return x.at + token * x.token + head * x.head; }

// Values [d, d + W) of a row as fp32.
INLINE V load_values(const Job *job, const char *row, int64_t d) {
  return job->kind == BF16 ? widened(row + 2 * d) : load((const float *)row + d);
}

static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);  // NaN stays NaN
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static void write_row(const Job *job, const float *from, char *to) {
  if (job->kind == F32) {
    memcpy(to, from, job->size * 4);
    return;
  }
  for (int64_t i = 0; i < job->size; i += 16) {
#ifdef PAIRS
    _mm256_storeu_si256((__m256i *)(to + 2 * i), (__m256i)_mm512_cvtneps_pbh(load(from + i)));
#else
    uint16_t rounded[16];
    for (int k = 0; k < 16; k++) rounded[k] = to_bf16(from[i + k]);
    memcpy(to + 2 * i, rounded, 32);
#endif
  }
}

// ---- packing -------------------------------------------------------------------------------------------------------

// to [rows or one more, units]: rows as units, their number made even by a row of zeros.
static void pack_rows(const Job *job, View x, int64_t token, int64_t head, int64_t rows, float *to) {
  int64_t width = units(job);
  for (int64_t r = 0; r < rows; r++) {
    const char *from = row_of(x, token + r, head);
    if (job->pair)
      for (int64_t c = 0; c < width; c += 8) memcpy(to + r * width + c, from + 4 * c, 32);
    else
      for (int64_t c = 0; c < width; c += W) store(to + r * width + c, load_values(job, from, c));
  }
  if (rows & 1) memset(to + rows * width, 0, width * 4);
}

// Units that pair two rows, from units that pair two columns: column c of row pair k to to[c / PW * panel + k * ld +
// c % PW]. Without pairs the rows as they are.
static void pack_pairs(const Job *job, const float *from, int64_t rows, float *to, int64_t ld, int64_t panel) {
  int64_t width = units(job);
  for (int64_t k = 0; k < (job->pair ? (rows + 1) / 2 : rows); k++) {
    for (int64_t c = 0; c < job->size; c += 16) {
      float *into = to + c / PW * panel + k * ld + c % PW;
#ifdef PAIRS
      if (job->pair) {
        const float *upper = from + 2 * k * width + c / 2;
        __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)upper));
        __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(upper + width)));
        _mm512_storeu_si512(into, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        continue;
      }
#endif
      memcpy(into, from + k * width + c, 64);
    }
  }
}

#ifdef WIDE
static void transpose_block(const float *from, int64_t ld, int64_t rows, int64_t columns, float *to, int64_t ld_to) {
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
    if (c < columns) store(to + c * ld_to, a[c]);
}
#else
static void transpose_block(const float *from, int64_t ld, int64_t rows, int64_t columns, float *to, int64_t ld_to) {
  for (int64_t c = 0; c < least(columns, 16); c++)
    for (int64_t r = 0; r < 16; r++) to[c * ld_to + r] = r < rows ? from[r * ld + c] : 0;
}
#endif

// to [columns, rows up to a multiple of 16] from [rows, columns]; zeros beyond the rows.
static void transpose(const float *from, int64_t ld, int64_t rows, int64_t columns, float *to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16)
      transpose_block(from + r * ld + c, ld, rows - r, columns - c, to + c * ld_to + r, ld_to);
}

static inline int64_t steps_of(const Job *job, int64_t count) { return job->pair ? (count + 1) / 2 : count; }
static inline int64_t paired_panel(const Job *job, int64_t n) { return steps_of(job, n) * PW; }

// `turned`: panels [n / PW][units][PW] of the transpose; `paired`: panels [size / PW][steps][PW]. Either may be NULL.
static void pack_keys(const Job *job, View x, int64_t start, int64_t head, int64_t n, float *turned, float *paired,
                      float *spare) {
  int64_t width = units(job);
  for (int64_t j = 0; j < n; j += PW) {
    int64_t rows = least(PW, n - j);
    pack_rows(job, x, start + j, head, rows, spare);
    if (turned) transpose(spare, width, rows, width, turned + j * width, PW);
    if (paired) pack_pairs(job, spare, rows, paired + steps_of(job, j) * PW, PW, paired_panel(job, n));
  }
}

// c [rows, size] += a [rows, steps] b, b in panels of PW columns.
static void multiply_panels(const Job *job, int64_t rows, const float *a, int64_t lda, const float *b, int64_t panel,
                            int64_t steps, float *c) {
  for (int64_t d = 0; d < job->size; d += PW, b += panel)
    PRODUCTS[job->pair][rows / 2 - 1][least(NR, (job->size - d) / W) - 1](a, lda, b, steps, c + d, job->size, 1);
}

// The first key that row i of a sequence sees; the last is i.
static inline int64_t first_seen(const Job *job, int64_t i) { return job->window ? most(0, i - job->window + 1) : 0; }

// Minus infinity for the scores of keys outside [first, stop), in the vectors [from, to), both multiples of W.
static inline void hide(float *scores, int64_t first, int64_t stop, int64_t from, int64_t to) {
  for (int64_t v = from; v < least(first, to); v += W)
    store(scores + v, choose(lanes(first - v, W), load(scores + v), all(-INFINITY)));
  for (int64_t v = most(from, stop / W * W); v < to; v += W)
    store(scores + v, choose(lanes(0, stop - v), load(scores + v), all(-INFINITY)));
}

// The next `count` floats of an arena, on a cache line of their own; without an arena they are only counted.
static inline float *take(float *arena, int64_t *used, int64_t count) {
  float *at = arena ? arena + *used : NULL;
  *used += up(count, 16);
  return at;
}

// ---- forward -------------------------------------------------------------------------------------------------------

typedef struct {
  float peak;          // of the scores seen so far, as a power of two
  float total, added;  // the sum of exponentials, and what the last keys added to it
} Row;

typedef struct {
  float *turned_keys, *paired_values, *spare;  // of all keys
  float *rows, *scores, *shares, *sums;        // of a block of rows
  Row row[FORWARD_ROWS];
} Forward;

static int64_t forward_scratch(const Job *job, int64_t n, float *arena, Forward *f) {
  int64_t used = 0, width = units(job);
  f->turned_keys = take(arena, &used, up(n, PW) * width);
  f->paired_values = take(arena, &used, up(job->size, PW) / PW * paired_panel(job, n));
  f->spare = take(arena, &used, PW * width);
  f->rows = take(arena, &used, FORWARD_ROWS * width);
  f->scores = take(arena, &used, FORWARD_ROWS * FORWARD_KEYS);
  f->shares = take(arena, &used, FORWARD_ROWS * FORWARD_KEYS);
  f->sums = take(arena, &used, FORWARD_ROWS * job->size);
  return used;
}

static inline void scale_row(const Job *job, float *row, float by) {
  for (int64_t d = 0; d < job->size; d += W) store(row + d, load(row + d) * all(by));
}

INLINE void soften(const int pair, const float *scores, float *shares, int64_t count, V factor, Row *row) {
  V peaks = all(-INFINITY), totals = all(0);
  for (int64_t v = 0; v < count; v += W) peaks = max_(peaks, load(scores + v) * factor);
  row->peak = fmaxf(row->peak, largest(peaks));
  V shift = all(row->peak == -INFINITY ? 0 : -row->peak);
  for (int64_t v = 0; v < count; v += W) {
    V p = exp2_(fma_(load(scores + v), factor, shift));
    totals += p;
#ifdef PAIRS
    if (pair) {
      _mm256_storeu_si256((__m256i *)(shares + v / 2), (__m256i)_mm512_cvtneps_pbh(p));
      continue;
    }
#endif
    store(shares + v, p);
  }
  row->added = sum(totals);
}

// Shares of one row from its scores, hidden where they are not seen; what was summed before is scaled to the new peak.
APART void soften_row(const Job *job, const float *scores, float *shares, int64_t count, Row *row, float *sums) {
  float before = row->peak;
  V factor = all(job->scale * LOG2E);
  if (job->pair) soften(1, scores, shares, count, factor, row);
  else soften(0, scores, shares, count, factor, row);
  if (row->peak > before && before > -INFINITY) {
    float shrink = exp2f(before - row->peak);
    row->total *= shrink;
    scale_row(job, sums, shrink);
  }
  row->total += row->added;
}

// Rows [i0, i0 + rows) against keys [j0, j0 + keys).
static void forward_block(const Job *job, Forward *f, int64_t n, int64_t i0, int64_t rows, int64_t j0, int64_t keys) {
  int64_t width = units(job), even = up(rows, 2);
  for (int64_t j = j0; j < j0 + keys; j += PW)
    for (int64_t r = 0; r < even; r += MR) {
      int64_t count = least(MR, even - r), stop = least(i0 + least(r + MR, rows), j0 + keys);
      if (stop <= j || first_seen(job, i0 + r) >= j + PW) continue;
      int64_t vectors = least(NR, (stop - j + W - 1) / W);
      PRODUCTS[job->pair][count / 2 - 1][vectors - 1](
          f->rows + r * width, width, f->turned_keys + j * width, width, f->scores + r * FORWARD_KEYS + j - j0,
          FORWARD_KEYS, 0);
    }
  for (int64_t r = 0; r < even; r += MR) {
    int64_t count = least(MR, even - r);
    int64_t from = most(0, first_seen(job, i0 + r) - j0) / PW * PW, to = least(i0 + least(r + MR, rows) - j0, keys);
    if (to <= from) continue;
    int64_t begin = steps_of(job, from), ld = steps_of(job, FORWARD_KEYS);
    for (int64_t k = r; k < r + count; k++) {
      float *scores = f->scores + k * FORWARD_KEYS;
      hide(scores, first_seen(job, i0 + k) - j0, i0 + k + 1 - j0, from, to);
      soften_row(job, scores + from, f->shares + k * ld + begin, to - from, f->row + k, f->sums + k * job->size);
    }
    multiply_panels(job, count, f->shares + r * ld + begin, ld, f->paired_values + (steps_of(job, j0) + begin) * PW,
                    paired_panel(job, n), steps_of(job, to) - begin, f->sums + r * job->size);
  }
}

static void forward_rows(const Job *job, Forward *f, int64_t start, int64_t n, int64_t head, int64_t i0) {
  int64_t rows = least(FORWARD_ROWS, n - i0);
  pack_rows(job, job->query, start + i0, head, rows, f->rows);
  memset(f->sums, 0, up(rows, 2) * job->size * 4);
  for (int64_t r = 0; r < up(rows, 2); r++) f->row[r] = (Row){-INFINITY, 0, 0};
  for (int64_t j = first_seen(job, i0) / PW * PW; j < i0 + rows; j += FORWARD_KEYS)
    forward_block(job, f, n, i0, rows, j, least(FORWARD_KEYS, i0 + rows - j));
  for (int64_t r = 0; r < rows; r++) {
    float *sums = f->sums + r * job->size;
    scale_row(job, sums, 1 / f->row[r].total);
    write_row(job, sums, row_of(job->out, start + i0 + r, head));
    job->lse[head * job->tokens + start + i0 + r] = (f->row[r].peak + log2f(f->row[r].total)) * LN2;
  }
}

static void forward_unit(const Job *job, int64_t start, int64_t n, int64_t head, int64_t count, float *arena) {
  Forward f;
  forward_scratch(job, n, arena, &f);
  int64_t key_head = head / (job->heads / job->key_heads);
  pack_keys(job, job->key, start, key_head, n, f.turned_keys, NULL, f.spare);
  pack_keys(job, job->value, start, key_head, n, NULL, f.paired_values, f.spare);
  for (int64_t h = head; h < head + count; h++)
    for (int64_t i = 0; i < n; i += FORWARD_ROWS) forward_rows(job, &f, start, n, h, i);
}

// ---- backward ------------------------------------------------------------------------------------------------------

typedef struct {
  float *turned_keys, *turned_values, *paired_keys, *dkeys, *dvalues, *spare;  // of all keys; the gradients turned
  float *rows, *grads, *turned_rows, *turned_grads, *lse, *overlap, *dquery;   // of a block of rows
  float *shares, *dscores, *dscore_rows, *tile;                                // of rows and keys
} Backward;

static int64_t backward_scratch(const Job *job, int64_t n, float *arena, Backward *b) {
  int64_t used = 0, width = units(job), size = job->size;
  b->turned_keys = take(arena, &used, up(n, PW) * width);
  b->turned_values = take(arena, &used, up(n, PW) * width);
  b->paired_keys = take(arena, &used, up(size, PW) / PW * paired_panel(job, n));
  b->dkeys = take(arena, &used, up(n, PW) * size);
  b->dvalues = take(arena, &used, up(n, PW) * size);
  b->spare = take(arena, &used, most(PW, BACKWARD_ROWS) * size);
  b->rows = take(arena, &used, BACKWARD_ROWS * width);
  b->grads = take(arena, &used, BACKWARD_ROWS * width);
  b->turned_rows = take(arena, &used, BACKWARD_ROWS * size);
  b->turned_grads = take(arena, &used, BACKWARD_ROWS * size);
  b->lse = take(arena, &used, BACKWARD_ROWS);
  b->overlap = take(arena, &used, BACKWARD_ROWS);
  b->dquery = take(arena, &used, BACKWARD_ROWS * size);
  b->shares = take(arena, &used, BACKWARD_ROWS * BACKWARD_KEYS);
  b->dscores = take(arena, &used, BACKWARD_ROWS * BACKWARD_KEYS);
  b->dscore_rows = take(arena, &used, BACKWARD_ROWS * BACKWARD_KEYS);
  b->tile = take(arena, &used, 2 * MR * PW);
  return used;
}

static void backward_load(const Job *job, Backward *b, int64_t token, int64_t head, int64_t rows) {
  int64_t width = units(job), steps = steps_of(job, rows), ld = steps_of(job, BACKWARD_ROWS);
  View sources[2] = {job->query, job->grad};
  float *packed[2] = {b->rows, b->grads}, *turned[2] = {b->turned_rows, b->turned_grads};
  for (int i = 0; i < 2; i++) {
    pack_rows(job, sources[i], token, head, rows, packed[i]);
    if (job->pair) pack_pairs(job, packed[i], rows, b->spare, job->size, PW);
    transpose(job->pair ? b->spare : packed[i], job->pair ? job->size : width, steps, job->size, turned[i], ld);
  }
  for (int64_t r = 0; r < up(rows, 2); r++) b->lse[r] = INFINITY, b->overlap[r] = 0;
  for (int64_t r = 0; r < rows; r++) {
    const char *grad = row_of(job->grad, token + r, head), *out = row_of(job->out, token + r, head);
    V total = all(0);
    for (int64_t d = 0; d < job->size; d += W)
      total = fma_(load_values(job, grad, d), load_values(job, out, d), total);
    b->overlap[r] = sum(total);
    b->lse[r] = job->lse[head * job->tokens + token + r] * LOG2E;
  }
  memset(b->dquery, 0, up(rows, 2) * job->size * 4);
}

// Shares and score gradients of a tile, from its scores, hidden where they are not seen, and its share gradients. Rows
// beyond the sequence have an infinite lse, and so no share. `columns` vectors of the panel are written, those from
// `vectors` on as zeros.
INLINE void differentiate(const int pair, const Backward *b, int64_t r, int64_t rows, int64_t key, V factor, V scale,
                          int64_t vectors, int64_t columns) {
  const float *scores = b->tile, *dshares = b->tile + MR * PW, *lse = b->lse + r, *overlap = b->overlap + r;
  int64_t per = pair ? 2 : 1, row_ld = BACKWARD_KEYS / per, at = (key / PW * BACKWARD_ROWS + r) / per * PW;
  float *shares = b->shares + at, *dscores = b->dscores + at, *dscore_rows = b->dscore_rows + r * row_ld + key / per;
  for (int64_t k = 0; k < rows; k += 2) {
    V shift[2] = {all(-lse[k]), all(-lse[k + 1])}, less[2] = {all(overlap[k]), all(overlap[k + 1])};
    for (int64_t v = 0; v < vectors * W; v += W) {
      V p[2], ds[2];
#pragma GCC unroll 2
      for (int u = 0; u < 2; u++) {
        p[u] = exp2_(fma_(load(scores + (k + u) * PW + v), factor, shift[u]));
        ds[u] = (load(dshares + (k + u) * PW + v) - less[u]) * (p[u] * scale);
      }
#ifdef PAIRS
      if (pair) {
        const __m512i mix = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        __m512i two = (__m512i)_mm512_cvtne2ps_pbh(ds[1], ds[0]);
        _mm512_storeu_si512(dscores + k / 2 * PW + v, _mm512_permutexvar_epi16(mix, two));
        _mm256_storeu_si256((__m256i *)(dscore_rows + k * row_ld + v / 2), _mm512_castsi512_si256(two));
        _mm256_storeu_si256((__m256i *)(dscore_rows + (k + 1) * row_ld + v / 2), _mm512_extracti64x4_epi64(two, 1));
        two = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
        _mm512_storeu_si512(shares + k / 2 * PW + v, _mm512_permutexvar_epi16(mix, two));
        continue;
      }
#endif
      for (int u = 0; u < 2; u++) {
        store(shares + (k + u) * PW + v, p[u]);
        store(dscores + (k + u) * PW + v, ds[u]);
        store(dscore_rows + (k + u) * row_ld + v, ds[u]);
      }
    }
  }
  for (int64_t k = 0; k < rows / per; k++)
    for (int64_t v = vectors * W; v < columns * W; v += W) {
      store(shares + k * PW + v, all(0));
      store(dscores + k * PW + v, all(0));
    }
}

APART void backward_tile(const Job *job, const Backward *b, int64_t r, int64_t rows, int64_t key, int64_t vectors,
                         int64_t columns) {
  V factor = all(job->scale * LOG2E), scale = all(job->scale);
  if (job->pair) differentiate(1, b, r, rows, key, factor, scale, vectors, columns);
  else differentiate(0, b, r, rows, key, factor, scale, vectors, columns);
}

// Rows [i0, i0 + rows) against keys [j0, j0 + keys): adds to dquery, dkeys and dvalues.
static void backward_block(const Job *job, Backward *b, int64_t n, int64_t i0, int64_t rows, int64_t j0, int64_t keys) {
  int64_t width = units(job), even = up(rows, 2), size = job->size, row_ld = steps_of(job, BACKWARD_KEYS);
  const Tile(*products)[NR] = PRODUCTS[job->pair];
  for (int64_t j = j0; j < j0 + keys; j += PW) {
    int64_t columns = (least(PW, n - j) + W - 1) / W;  // vectors of the panel that hold keys
    int64_t begin = even, end = 0;                     // the rows that see some of the panel
    for (int64_t r = most(0, j - i0) / MR * MR; r < even; r += MR) {
      if (first_seen(job, i0 + r) >= j + PW) break;
      int64_t count = least(MR, even - r), stop = i0 + least(r + MR, rows);
      int64_t vectors = least(NR, (stop - j + W - 1) / W);
      Tile product = products[count / 2 - 1][vectors - 1];
      product(b->rows + r * width, width, b->turned_keys + j * width, width, b->tile, PW, 0);
      product(b->grads + r * width, width, b->turned_values + j * width, width, b->tile + MR * PW, PW, 0);
      for (int64_t k = 0; k < count; k++)
        hide(b->tile + k * PW, first_seen(job, i0 + r + k) - j, i0 + r + k + 1 - j, 0, vectors * W);
      backward_tile(job, b, r, count, j - j0, vectors, columns);
      begin = least(begin, r);
      end = r + count;
    }
    if (end <= begin) continue;
    int64_t from = steps_of(job, begin), steps = steps_of(job, end) - from, ld = steps_of(job, BACKWARD_ROWS);
    int64_t panel = (j - j0) / PW * ld * PW + from * PW;
    for (int64_t d = 0; d < size; d += MR) {
      Tile product = products[least(MR, size - d) / 2 - 1][columns - 1];
      product(b->turned_grads + d * ld + from, ld, b->shares + panel, steps, b->dvalues + j * size + d * PW, PW, 1);
      product(b->turned_rows + d * ld + from, ld, b->dscores + panel, steps, b->dkeys + j * size + d * PW, PW, 1);
    }
  }
  for (int64_t r = 0; r < even; r += MR) {
    int64_t from = most(0, first_seen(job, i0 + r) - j0) / PW * PW, to = least(i0 + least(r + MR, rows) - j0, keys);
    if (to <= from) continue;
    multiply_panels(job, least(MR, even - r), b->dscore_rows + r * row_ld + steps_of(job, from), row_ld,
                    b->paired_keys + (steps_of(job, j0) + steps_of(job, from)) * PW, paired_panel(job, n),
                    steps_of(job, to) - steps_of(job, from), b->dquery + r * size);
  }
}

// The turned gradients as rows: to the tensors, or with `cut` to the partial sums of this query head.
static void backward_finish(const Job *job, Backward *b, int64_t start, int64_t n, int64_t head, int cut) {
  View targets[2] = {job->dkey, job->dvalue};
  float *turned[2] = {b->dkeys, b->dvalues};
  for (int i = 0; i < 2; i++)
    for (int64_t j = 0; j < n; j += PW) {
      int64_t rows = least(PW, n - j);
      transpose(turned[i] + j * job->size, PW, job->size, rows, b->spare, job->size);
      for (int64_t r = 0; r < rows; r++) {
        int64_t token = start + j + r;
        const float *row = b->spare + r * job->size;
        if (cut) memcpy(job->partial + ((i * job->tokens + token) * job->heads + head) * job->size, row, job->size * 4);
        else write_row(job, row, row_of(targets[i], token, head / (job->heads / job->key_heads)));
      }
    }
}

static void backward_unit(const Job *job, int64_t start, int64_t n, int64_t head, int64_t count, float *arena) {
  Backward b;
  backward_scratch(job, n, arena, &b);
  int64_t shared = job->heads / job->key_heads;
  pack_keys(job, job->key, start, head / shared, n, b.turned_keys, b.paired_keys, b.spare);
  pack_keys(job, job->value, start, head / shared, n, b.turned_values, NULL, b.spare);
  memset(b.dkeys, 0, up(n, PW) * job->size * 4);
  memset(b.dvalues, 0, up(n, PW) * job->size * 4);
  for (int64_t h = head; h < head + count; h++)
    for (int64_t i = 0; i < n; i += BACKWARD_ROWS) {
      int64_t rows = least(BACKWARD_ROWS, n - i);
      backward_load(job, &b, start + i, h, rows);
      for (int64_t j = first_seen(job, i) / PW * PW; j < i + rows; j += BACKWARD_KEYS)
        backward_block(job, &b, n, i, rows, j, least(BACKWARD_KEYS, i + rows - j));
      for (int64_t r = 0; r < rows; r++)
        write_row(job, b.dquery + r * job->size, row_of(job->dquery, start + i + r, h));
    }
  backward_finish(job, &b, start, n, head, count < shared);
}

// ---- the stream ----------------------------------------------------------------------------------------------------

static int is_cut(const Job *job, int64_t n) {  // by the sequence's own shape, never by its neighbours or the threads
  return n >= LONG && job->key_heads < FEW && job->heads > job->key_heads;
}

static int run(Job *job, int backward) {
  int64_t longest = 0, cut = 0, shared = job->heads / job->key_heads;
  for (int64_t s = 0; s < job->sequences; s++) {
    longest = most(longest, job->spans[2 * s + 1]);
    cut |= is_cut(job, job->spans[2 * s + 1]);
  }
  Forward f;
  Backward b;
  int64_t each = backward ? backward_scratch(job, longest, NULL, &b) : forward_scratch(job, longest, NULL, &f);
  float *arena = aligned_alloc(64, job->threads * each * 4);
  job->partial = backward && cut ? malloc(2 * job->tokens * job->heads * job->size * 4) : NULL;
  if (!arena || (backward && cut && !job->partial)) {
    free(arena);
    free(job->partial);
    return 1;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(job->threads)
  for (int64_t u = 0; u < job->sequences * job->heads; u++) {
    int64_t start = job->spans[2 * (u / job->heads)], n = job->spans[2 * (u / job->heads) + 1], head = u % job->heads;
    int64_t count = is_cut(job, n) ? 1 : shared;
    if (head % count) continue;
    float *own = arena + omp_get_thread_num() * each;
    if (backward) backward_unit(job, start, n, head, count, own);
    else forward_unit(job, start, n, head, count, own);
  }
  for (int64_t s = 0; backward && s < job->sequences; s++) {
    int64_t start = job->spans[2 * s], n = job->spans[2 * s + 1];
    if (!is_cut(job, n)) continue;
#pragma omp parallel for schedule(static) num_threads(job->threads)
    for (int64_t u = 0; u < n * job->key_heads * 2; u++) {
      int64_t which = u & 1, key_head = u / 2 % job->key_heads, token = start + u / 2 / job->key_heads;
      float *rows = job->partial + ((which * job->tokens + token) * job->heads + key_head * shared) * job->size;
      for (int64_t g = 1; g < shared; g++)
        for (int64_t d = 0; d < job->size; d++) rows[d] += rows[g * job->size + d];
      write_row(job, rows, row_of(which ? job->dvalue : job->dkey, token, key_head));
    }
  }
  free(arena);
  free(job->partial);
  return 0;
}

// shape: sequences, tokens, heads, key heads, head size, window (0: none), kind, threads. spans: (start, length) of the
// sequences that hold tokens. tensors and strides (of tokens and heads, in values): query, key, value, out, and going
// backward grad, dquery, dkey, dvalue; the last axis is contiguous. lse [heads, tokens]. dquery, dkey and dvalue may be
// query, key and value. Returns 0, or 1 when memory ran out, before anything was written.
static int call(const int64_t *shape, const int64_t *spans, float scale, const int64_t *strides, void *const *tensors,
                float *lse, int backward) {
  Job job = {.sequences = shape[0], .tokens = shape[1], .heads = shape[2], .key_heads = shape[3], .size = shape[4],
             .window = shape[5], .kind = (int)shape[6], .threads = (int)shape[7], .spans = spans, .scale = scale,
             .lse = lse};
#ifdef PAIRS
  job.pair = job.kind == BF16;
#endif
  View *views[8] = {&job.query, &job.key, &job.value, &job.out, &job.grad, &job.dquery, &job.dkey, &job.dvalue};
  int64_t bytes = job.kind == BF16 ? 2 : 4;
  for (int i = 0; i < (backward ? 8 : 4); i++)
    *views[i] = (View){tensors[i], strides[2 * i] * bytes, strides[2 * i + 1] * bytes};
  return job.sequences ? run(&job, backward) : 0;
}

int topwork_attention_forward(const int64_t *shape, const int64_t *spans, float scale, const int64_t *strides,
                              void *const *tensors, float *lse) {
  return call(shape, spans, scale, strides, tensors, lse, 0);
}

int topwork_attention_backward(const int64_t *shape, const int64_t *spans, float scale, const int64_t *strides,
                               void *const *tensors, float *lse) {
  return call(shape, spans, scale, strides, tensors, lse, 1);
}

// How it was compiled: bf16 multiplied in pairs (2), AVX-512 without (1), narrower vectors (0).
int topwork_attention_level(void) {
#if defined(PAIRS)
  return 2;
#elif defined(WIDE)
  return 1;
#else
  return 0;
#endif
}
