// Causal attention of a flat stream, forward and backward; every sequence sees itself alone.
//
//     s = scale q k'     p = softmax over keys j with i - window < j <= i     o = p v     lse = log sum exp s
//     dv = p' do     dp = do v'     ds = scale p (dp - do . o)     dq = ds k     dk = ds' q
//
// As in FlashAttention (Dao, arXiv 2307.08691): blocks of rows against blocks of keys, p made again from lse.
// Scores are made turned, s' = k q': keys down, a strip of queries across. So a vector holds as many queries, each with
// a maximum, a sum and an lse in its own lane, and p' and ds' are what dv and dk take as they stand. o and dq are made
// turned and are turned back at the end. All seven products run through one operation: in AMX's tiles (amx.h), else in
// a register tile of MR rows by NR vectors (tile.h). Sums are fp32. What a query does not see has a score of minus
// infinity, so that the inner loops know no masks.
//
// A unit of work is one sequence and one key head with its query heads; a long sequence with few key heads is cut by
// query heads, whose dk and dv are then added in their order. Nothing depends on the threads or on other sequences.

#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "tile.h"

#define MR 6               // rows of a register tile
#define GROUP 32           // keys that are packed together; as many values as an AMX tile has along the summed axis
#define FORWARD_STRIP 16   // queries of a strip in AMX's tiles; in register tiles they are as many as a panel is wide
#define BACKWARD_STRIP 32
#define WIDEST (PW > BACKWARD_STRIP ? PW : BACKWARD_STRIP)
#define WINDOW_GRID 96     // going backward, what the first key of a strip with a window is a multiple of
#define AHEAD 16           // rows of a head lie far apart, and are asked for so many before their turn
#define LONG 512           // tokens from which a sequence with few key heads is cut by query heads
#define FEW 16
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

#if NR == 4
#define TILES(pair, rows) \
  TILE(pair, rows, 1, PW) TILE(pair, rows, 2, PW) TILE(pair, rows, 3, PW) TILE(pair, rows, 4, PW)
#define ROW(pair, rows) \
  {TILE_OF(pair, rows, 1), TILE_OF(pair, rows, 2), TILE_OF(pair, rows, 3), TILE_OF(pair, rows, 4)}
#else
#define TILES(pair, rows) TILE(pair, rows, 1, PW) TILE(pair, rows, 2, PW)
#define ROW(pair, rows) {TILE_OF(pair, rows, 1), TILE_OF(pair, rows, 2)}
#endif
TILES(0, 2) TILES(0, 4) TILES(0, 6)
#if defined(PAIRS) && !defined(AMX)
TILES(1, 2) TILES(1, 4) TILES(1, 6)
#endif
static const Tile PRODUCTS[2][MR / 2][NR] = {
    {ROW(0, 2), ROW(0, 4), ROW(0, 6)},
#if defined(PAIRS) && !defined(AMX)
    {ROW(1, 2), ROW(1, 4), ROW(1, 6)},
#endif
};

#ifdef AMX
typedef void (*Amx)(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t deep, float *c, int64_t ldc,
                    int add);
#define AMX_TILES(high, wide)                                                                                        \
  APART void amx_##high##_##wide(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t deep, float *c, \
                                 int64_t ldc, int add) {                                                           \
    amx_product(high, wide, a, lda, NULL, b, ldb, deep, c, ldc, add);                                              \
  }
AMX_TILES(1, 1) AMX_TILES(2, 1) AMX_TILES(3, 1) AMX_TILES(4, 1) AMX_TILES(1, 2) AMX_TILES(2, 2)
static const Amx TALL_TILES[] = {amx_1_1, amx_2_1, amx_3_1, amx_4_1}, WIDE_TILES[] = {amx_1_2, amx_2_2};

// Rows and columns are multiples of 16, as are steps.
static void multiply_by_amx(int64_t rows, int64_t columns, const float *a, int64_t lda, const float *b, int64_t ldb,
                            int64_t steps, float *c, int64_t ldc, int add) {
  int64_t tall = (columns > SIDE ? 2 : 4) * SIDE;
  for (int64_t r = 0; r < rows; r += tall, a += tall * lda, c += tall * ldc)
    for (int64_t n = 0; n < columns; n += 2 * SIDE) {
      const Amx *of = columns - n > SIDE ? WIDE_TILES : TALL_TILES;
      of[(least(tall, rows - r) - 1) / SIDE](a, lda, b + n, ldb, steps / SIDE, c + n, ldc, add);
    }
}
#endif

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
  int64_t per, width;         // values of a unit; units of a packed row, with zeros to a whole tile
  int64_t strip, across;      // queries of a strip, and what their number is a multiple of
  int64_t even, deep;         // what the rows of a product and its summed values are a multiple of
  int64_t keys, block, tall;  // keys of a chunk; going backward queries of a block, and keys that meet them together
} Job;

static inline char *row_of(View x, int64_t token, int64_t head) { return x.at + token * x.token + head * x.head; }

// A row that is read soon; there need not be one.
static inline void ask_for(const Job *job, const char *row) {
  for (int64_t c = 0; c < job->size * (job->kind == BF16 ? 2 : 4); c += 64) __builtin_prefetch(row + c);
}

// Rows that a strip will write when it is done: the first that was not asked for, and how many are left.
typedef struct {
  const char *at;
  int64_t token, left;
} Written;

// Asks for a third of a strip's, between its products: stores that miss would hold up all that comes behind them, and
// only so many misses can be under way at once.
static void ask_to_write(const Job *job, Written *soon) {
  int64_t bytes = job->size * (job->kind == BF16 ? 2 : 4), after = most(0, soon->left - (job->strip + 2) / 3);
  for (; soon->left > after; soon->left--, soon->at += soon->token)
    for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(soon->at + c, 1);
}

static void write_row(const Job *job, const float *from, char *to) {
  for (int64_t i = 0; i < job->size; i += LANES) store(to, i, LANES, job->kind, vloadf(from + i));
}

// c [rows, columns] (+)= a [rows, steps] b [steps, columns]: rows a multiple of `even`, columns of `across`. Without
// AMX b is a panel, of rows of PW, and there are no more columns.
static void multiply(const Job *job, int64_t rows, int64_t columns, const float *a, int64_t lda, const float *b,
                     int64_t ldb, int64_t steps, float *c, int64_t ldc, int add) {
#ifdef AMX
  if (job->pair) {
    multiply_by_amx(rows, columns, a, lda, b, ldb, steps, c, ldc, add);
    return;
  }
#endif
  const Tile(*products)[NR] = PRODUCTS[job->pair];
  for (int64_t r = 0; r < rows; r += MR)
    products[least(MR, rows - r) / 2 - 1][columns / LANES - 1](a + r * lda, lda, b, steps, c + r * ldc, ldc, add, NULL);
}

// ---- packing -------------------------------------------------------------------------------------------------------

// Units of `count` rows along the summed axis, with the zeros that make pairs or whole tiles of them.
static inline int64_t steps_of(const Job *job, int64_t count) { return up(count, job->deep) / job->per; }

// to [even, width]: rows as units, zeros after the last of them.
static void pack_rows(const Job *job, View x, int64_t token, int64_t head, int64_t rows, int64_t even, float *to) {
  int64_t width = job->width, own = job->size / job->per;
  int pair = job->pair, kind = job->kind;
  for (int64_t r = 0; r < rows; r++, to += width) {
    const char *from = row_of(x, token + r, head);
    ask_for(job, from + AHEAD * x.token);
    if (pair)
      for (int64_t c = 0; c < own; c += 8) memcpy(to + c, from + 4 * c, 32);
    else
      for (int64_t c = 0; c < own; c += LANES) vstoref(to + c, load(from, c, LANES, kind));
    for (int64_t c = own; c < width; c += 8) memset(to + c, 0, 32);
  }
  memset(to, 0, (even - rows) * width * 4);
}

// Rows as units where they stand, `ld` from one to the next, or packed in `spare` where they need zeros or widening. As
// many that follow them are asked for.
static const Unit *units_of(const Job *job, View x, int64_t token, int64_t head, int64_t rows, int64_t even,
                            float *spare, int64_t *ld) {
  const char *from = row_of(x, token, head);
  int whole = rows == even && job->width * job->per == job->size;
  if (whole && x.token % 4 == 0 && job->pair == (job->kind == BF16)) {
    for (int64_t r = 0; r < rows; r++) ask_for(job, from + (rows + r) * x.token);
    *ld = x.token / 4;
    return (const Unit *)from;
  }
  pack_rows(job, x, token, head, rows, even, spare);
  *ld = job->width;
  return spare;
}

// Units that pair two rows, from units that pair two columns: column c of row pair k to to[c / PW * panel + k * ld_to +
// c % PW]. Without pairs the rows as they are.
static void pack_pairs(const Job *job, const Unit *from, int64_t ld, int64_t steps, float *to, int64_t ld_to,
                       int64_t panel) {
  int64_t size = job->size;
  int pair = job->pair;
  for (int64_t k = 0; k < steps; k++)
    for (int64_t c = 0; c < size; c += 16) {
      float *into = to + c / PW * panel + k * ld_to + c % PW;
      if (pair) {
        const uint16_t *upper = (const uint16_t *)(from + 2 * k * ld) + c;
        pair_rows(upper, upper + 2 * ld, 16, into);
      } else {
        memcpy(into, from + k * ld + c, 64);
      }
    }
}

// to [columns, rows up to a multiple of 16] from [rows, columns]; zeros beyond the rows.
static void transpose(const Unit *from, int64_t ld, int64_t rows, int64_t columns, float *to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16)
      transpose_block(from + r * ld + c, ld, rows - r, columns - c, to + c * ld_to + r, ld_to);
}

// Packed rows turned, in units that pair two rows: to [size, steps], rows of `ld_to`.
static void turn_pairs(const Job *job, const Unit *rows, int64_t ld, int64_t steps, float *spare, float *to,
                       int64_t ld_to) {
  if (job->pair) pack_pairs(job, rows, ld, steps, spare, job->size, PW);
  transpose(job->pair ? spare : rows, job->pair ? job->size : ld, steps, job->size, to, ld_to);
}

// Of the keys that go together: the distance of rows where they are turned, and the units that all of those take.
static inline int64_t turned_ld(const Job *job, int64_t n) { return up(steps_of(job, least(n, job->keys)), 16); }
static inline int64_t turned_units(const Job *job, int64_t n) {
  return up(n, job->keys) / job->keys * job->size * turned_ld(job, n);
}

// All n keys or values of a head: as rows [n, width], and turned, [size, keys] for each chunk. Either may be NULL.
static void pack_keys(const Job *job, View x, int64_t start, int64_t head, int64_t n, float *rows, float *turned,
                      float *spare) {
  int64_t ld = turned_ld(job, n), ld_packed = job->width;
  for (int64_t j = 0; j < n; j += GROUP) {
    int64_t count = least(GROUP, n - j);
    const Unit *packed = rows ? rows + j * job->width : spare;
    if (rows) pack_rows(job, x, start + j, head, count, GROUP, rows + j * job->width);
    else packed = units_of(job, x, start + j, head, count, GROUP, spare, &ld_packed);
    if (turned)
      turn_pairs(job, packed, ld_packed, steps_of(job, count), spare + GROUP * job->width,
                 turned + j / job->keys * job->size * ld + j % job->keys / job->per, ld);
  }
}

// The first key that row i of a sequence sees; the last is i.
static inline int64_t first_seen(const Job *job, int64_t i) { return job->window ? most(0, i - job->window + 1) : 0; }

// ---- a strip of queries against a chunk of keys --------------------------------------------------------------------

// Keys and queries are counted from the chunk's first key. A strip has keys [from, keys), of which [first, stop) are
// seen by some query of a vector; these are even, and `end` completes the last tile.
typedef struct {
  int64_t at, columns;  // of the first query; how many there are, with what completes a vector or tile
  int64_t from, keys, end;
} Strip;

static Strip strip_of(const Job *job, int64_t at, int64_t queries, int64_t keys, int64_t grid) {
  int64_t count = least(job->strip, queries), seen = least(keys, at + count);
  int64_t from = job->window ? most(0, at / GROUP * GROUP - job->window + 1) / grid * grid : 0;
  return (Strip){at, up(count, job->across), from, seen, up(seen, job->tall)};
}

// Keys of a strip, and from which column on its queries see some of them: all that came before the strip, and then 16
// at a time (in AMX's tiles 32).
typedef struct {
  int64_t from, to, column;
} Part;

static inline Part first_part(const Job *job, const Strip *s) {
  return (Part){s->from, least(s->keys, s->at + most(16, job->deep)), 0};
}
static inline Part next_part(const Job *job, const Strip *s, Part p) {
  return (Part){p.to, least(s->keys, p.to + most(16, job->deep)), p.to - s->at};
}
#define EACH_PART(p, job, s) (Part p = first_part(job, s); p.from < p.to; p = next_part(job, s, p))

// scores [keys, strip] = rows of keys times turned queries.
static void make_scores(const Job *job, const Strip *s, const float *rows, const float *turned, float *scores) {
  for EACH_PART (p, job, s)
    multiply(job, up(p.to, job->even) - p.from, s->columns - p.column, rows + p.from * job->width, job->width,
             turned + p.column, job->strip, job->width, scores + p.from * job->strip + p.column, job->strip, 0);
}

// sums [size, strip] += turned rows of the chunk [size, keys] times shares [keys, strip]; without `add` sums are made.
static void add_shares(const Job *job, const Strip *s, const float *turned, int64_t ld, const float *shares,
                       float *sums, int add) {
  for EACH_PART (p, job, s)
    multiply(job, job->size, s->columns - p.column, turned + p.from / job->per, ld,
             shares + p.from / job->per * job->strip + p.column, job->strip, steps_of(job, p.to) - p.from / job->per,
             sums + p.column, job->strip, add || p.column);
}

// The keys [first, stop) that some query of a vector sees, of which the first is `at`.
static inline int64_t stop_of(const Strip *s, int64_t at) { return up(least(s->keys, at + LANES), 2); }
static inline int64_t first_of(const Job *job, const Strip *s, int64_t at) {
  return job->window ? most(s->from, least(stop_of(s, at), (at - job->window + 1) & ~1)) : s->from;
}

static inline void hide_keys(const Job *job, float *scores, int64_t from, int64_t to, int64_t at) {
  for (int64_t j = from; j < to; j++) {
    veci seen = vlanes(j - at, job->window ? j - at + job->window : LANES);
    vstoref(scores + j * job->strip, pick(seen, vloadf(scores + j * job->strip), vall(-INFINITY)));
  }
}

// Minus infinity for the scores that a vector of queries, the first of them `at`, does not see.
static inline void hide(const Job *job, float *scores, int64_t first, int64_t stop, int64_t at) {
  int64_t old = job->window ? least(stop, most(first, at + LANES - job->window)) : first;
  hide_keys(job, scores, first, old, at);
  hide_keys(job, scores, most(old, at + 1), stop, at);
}

// Zeros for a vector of `n` floats in the rows [from, to).
static inline void clear(float *rows, int64_t ld, int64_t n, int64_t from, int64_t to) {
  for (int64_t r = from; r < to; r++) memset(rows + r * ld, 0, 4 * n);
}

// Units that pair two rows of fp32.
INLINE void pair_up(vecf upper, vecf lower, float *pairs) {
#if defined(WIDE) && defined(__AVX512BF16__)
  const __m512i mix = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                       5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i two = (__m512i)_mm512_cvtne2ps_pbh((__m512)lower, (__m512)upper);
  _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(mix, two));
#else
  vecu first = __builtin_convertvector(to_bf16(upper), vecu), second = __builtin_convertvector(to_bf16(lower), vecu);
  first |= second << 16;
  memcpy(pairs, &first, sizeof first);
#endif
}

// Turned sums of `count` queries, times `by` where it is not NULL, to their rows, which begin at `to`. They are rounded
// first, so that half as much is turned.
INLINE void turn_back_as(const int kind, const float *sums, int64_t strip, int64_t size, const vecf *by, int64_t count,
                         char *to, int64_t token) {
  const int per = kind == BF16 ? 2 : 1;
  float units[16 * 16] __attribute__((aligned(64))), rows[16 * 16] __attribute__((aligned(64)));
  for (int64_t q = 0; q < count; q += 16)
    for (int64_t d = 0; d < size; d += 16 * per) {
      int64_t own = least(16, (size - d) / per), some = least(16, count - q);
      for (int64_t u = 0; u < own; u++)
        for (int64_t v = 0; v < 16; v += LANES) {
          const float *from = sums + (d + u * per) * strip + q + v;
          vecf factor = by ? by[(q + v) / LANES] : vall(1), first = vloadf(from) * factor;
          if (per == 2) pair_up(first, vloadf(from + strip) * factor, units + 16 * u + v);
          else vstoref(units + 16 * u + v, first);
        }
      transpose_block(units, 16, own, some, rows, 16);
      for (int64_t r = 0; r < some; r++) {
        char *into = to + (q + r) * token + 4 * d / per;
        memcpy(into, rows + 16 * r, 32);
        if (own > 8) memcpy(into + 32, rows + 16 * r + 8, 32);
      }
    }
}

static void turn_back(const Job *job, const float *sums, const vecf *by, int64_t count, View x, int64_t token,
                      int64_t head) {
  char *to = row_of(x, token, head);
  if (job->kind == BF16) turn_back_as(BF16, sums, job->strip, job->size, by, count, to, x.token);
  else turn_back_as(F32, sums, job->strip, job->size, by, count, to, x.token);
}

// ---- forward -------------------------------------------------------------------------------------------------------

typedef struct {
  float *keys, *turned_values, *spare;              // of all keys
  float *queries, *scores, *shares, *sums, *rows;   // of a strip
  Written soon;                                     // of the output
  vecf peak[WIDEST / LANES], total[WIDEST / LANES]; // the largest score so far, as a power of two; sums of exponentials
} Forward;

static int64_t forward_scratch(const Job *job, int64_t n, float *arena, Forward *f) {
  int64_t used = 0, keys = up(least(n, job->keys), job->tall);
  f->keys = take(arena, &used, up(n, GROUP) * job->width);
  f->turned_values = take(arena, &used, turned_units(job, n));
  f->spare = take(arena, &used, GROUP * (job->width + job->size));
  f->queries = take(arena, &used, job->width * job->strip);
  f->scores = take(arena, &used, keys * job->strip);
  f->shares = take(arena, &used, keys * job->strip);
  f->sums = take(arena, &used, job->size * job->strip);
  f->rows = take(arena, &used, job->strip * job->width);
  return used;
}

// Shares of the keys [first, stop) for a vector of queries, from their scores; peak and total go on. Returns by how
// much what was summed before must shrink.
INLINE vecf soften(const int pair, const int64_t ld, const float *scores, float *shares, int64_t first, int64_t stop,
                   vecf factor, vecf *peak, vecf *total) {
  vecf peaks[2] = {vall(-INFINITY), vall(-INFINITY)}, totals[2] = {}, before = *peak;
  for (int64_t j = first; j < stop; j += 2)
    for (int u = 0; u < 2; u++) peaks[u] = vmaxf(peaks[u], vloadf(scores + (j + u) * ld));
  *peak = vmaxf(before, vmaxf(peaks[0], peaks[1]) * factor);
  vecf shift = pick(*peak == vall(-INFINITY), vall(0), -*peak), shrink = vexp2f(before + shift);
  for (int64_t j = first; j < stop; j += 2) {
    vecf p[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; u++) {
      p[u] = vexp2f(vfmaf(vloadf(scores + (j + u) * ld), factor, shift));
      totals[u] += p[u];
    }
    if (pair) pair_up(p[0], p[1], shares + j / 2 * ld);
    else vstoref(shares + j * ld, p[0]), vstoref(shares + (j + 1) * ld, p[1]);
  }
  *total = *total * shrink + (totals[0] + totals[1]);
  return shrink;
}

APART vecf soften_keys(const Job *job, const float *scores, float *shares, int64_t first, int64_t stop, vecf *peak,
                       vecf *total) {
  vecf factor = vall(job->scale * LOG2E);
  if (!job->pair) return soften(0, PW, scores, shares, first, stop, factor, peak, total);
#ifdef AMX
  return soften(1, FORWARD_STRIP, scores, shares, first, stop, factor, peak, total);
#else
  return soften(1, PW, scores, shares, first, stop, factor, peak, total);
#endif
}

// A strip, the first query of which is `at` counted from the chunk's first key, j0.
static void forward_chunk(const Job *job, Forward *f, int64_t n, int64_t at, int64_t queries, int64_t j0, int add) {
  Strip s = strip_of(job, at, queries, job->keys, GROUP);
  int64_t strip = job->strip, per = job->per, ld = turned_ld(job, n);
  make_scores(job, &s, f->keys + j0 * job->width, f->queries, f->scores);
  ask_to_write(job, &f->soon);
  for (int64_t v = 0; v < s.columns; v += LANES) {
    int64_t first = first_of(job, &s, at + v), stop = stop_of(&s, at + v);
    hide(job, f->scores + v, first, stop, at + v);
    vecf *peak = f->peak + v / LANES, *total = f->total + v / LANES;
    vecf shrink = soften_keys(job, f->scores + v, f->shares + v, first, stop, peak, total);
    clear(f->shares + v, strip, LANES, s.from / per, first / per);
    clear(f->shares + v, strip, LANES, stop / per, s.end / per);
    for (int64_t d = v; add && d < job->size * strip; d += strip) vstoref(f->sums + d, vloadf(f->sums + d) * shrink);
  }
  ask_to_write(job, &f->soon);
  add_shares(job, &s, f->turned_values + j0 / job->keys * job->size * ld, ld, f->shares, f->sums, add);
  ask_to_write(job, &f->soon);
}

static void forward_strip(const Job *job, Forward *f, int64_t start, int64_t n, int64_t head, int64_t i0) {
  int64_t count = least(job->strip, n - i0), begin = first_seen(job, i0 / GROUP * GROUP) / job->keys * job->keys, ld;
  const Unit *rows = units_of(job, job->query, start + i0, head, count, count, f->rows, &ld);
  transpose(rows, ld, count, job->width, f->queries, job->strip);
  f->soon = (Written){row_of(job->out, start + i0, head), job->out.token, count};
  for (int v = 0; v < WIDEST / LANES; v++) f->peak[v] = vall(-INFINITY), f->total[v] = vall(0);
  for (int64_t j = begin; j < i0 + count; j += job->keys)
    forward_chunk(job, f, n, i0 - j, count, j, j > begin);
  vecf inverse[WIDEST / LANES];
  for (int v = 0; v < WIDEST / LANES; v++) inverse[v] = vall(1) / f->total[v];
  turn_back(job, f->sums, inverse, count, job->out, start + i0, head);
  float *lse = job->lse + head * job->tokens + start + i0;
  for (int64_t r = 0; r < count; r++)
    lse[r] = (f->peak[r / LANES][r % LANES] + log2f(f->total[r / LANES][r % LANES])) * LN2;
}

static void forward_unit(const Job *job, int64_t start, int64_t n, int64_t head, int64_t count, float *arena) {
  Forward f;
  forward_scratch(job, n, arena, &f);
  int64_t key_head = head / (job->heads / job->key_heads);
  pack_keys(job, job->key, start, key_head, n, f.keys, NULL, f.spare);
  pack_keys(job, job->value, start, key_head, n, NULL, f.turned_values, f.spare);
  for (int64_t h = head; h < head + count; h++)
    for (int64_t i = 0; i < n; i += job->strip) forward_strip(job, &f, start, n, h, i);
}

// ---- backward ------------------------------------------------------------------------------------------------------

typedef struct {
  float *keys, *values, *turned_keys, *dkeys, *dvalues, *spare;                             // of all keys
  float *turned_rows, *turned_grads, *paired_rows, *paired_grads, *lse, *overlap, *dquery;  // of a block of queries
  float *share_rows, *dscore_rows;           // [keys, queries of a block], in units of queries
  float *scores, *dshares, *dscores, *rows;  // of a strip
  uint64_t begun;                            // a bit for each strip of a block: whether its dquery holds sums
  Written soon;                              // of dquery
} Backward;

// From one row of shares to the next: no power of two, for those take each other's places in the cache.
static inline int64_t rows_ld(const Job *job, int64_t n) { return steps_of(job, least(up(n, GROUP), job->block)) + 16; }
static inline int64_t paired_panel(const Job *job, int64_t n) { return steps_of(job, least(n, job->block)) * PW; }

static int64_t backward_scratch(const Job *job, int64_t n, float *arena, Backward *b) {
  int64_t used = 0, width = job->width, size = job->size, strip = job->strip;
  int64_t keys = up(least(n, job->keys), job->tall), block = least(up(n, most(GROUP, strip)), job->block);
  b->keys = take(arena, &used, up(n, GROUP) * width);
  b->values = take(arena, &used, up(n, GROUP) * width);
  b->turned_keys = take(arena, &used, turned_units(job, n));
  b->dkeys = take(arena, &used, up(n, GROUP) * size);
  b->dvalues = take(arena, &used, up(n, GROUP) * size);
  b->spare = take(arena, &used, GROUP * (width + size));
  b->turned_rows = take(arena, &used, block * width);
  b->turned_grads = take(arena, &used, block * width);
  b->paired_rows = take(arena, &used, up(size, PW) / PW * paired_panel(job, n));
  b->paired_grads = take(arena, &used, up(size, PW) / PW * paired_panel(job, n));
  b->lse = take(arena, &used, block);
  b->overlap = take(arena, &used, block);
  b->dquery = take(arena, &used, block * size);
  b->share_rows = take(arena, &used, keys * rows_ld(job, n));
  b->dscore_rows = take(arena, &used, keys * rows_ld(job, n));
  b->scores = take(arena, &used, keys * strip);
  b->dshares = take(arena, &used, keys * strip);
  b->dscores = take(arena, &used, keys * strip);
  b->rows = take(arena, &used, strip * width);
  return used;
}

// Queries and gradients of a block: turned, strip by strip, and in pairs of rows.
static void backward_load(const Job *job, Backward *b, int64_t token, int64_t head, int64_t n, int64_t rows) {
  int64_t width = job->width, strip = job->strip, ld;
  View sources[2] = {job->query, job->grad};
  float *turned[2] = {b->turned_rows, b->turned_grads}, *paired[2] = {b->paired_rows, b->paired_grads};
  for (int64_t q = 0; q < rows; q += strip)
    for (int i = 0; i < 2; i++) {
      int64_t count = least(strip, rows - q);
      const Unit *from = units_of(job, sources[i], token + q, head, count, up(count, job->deep), b->rows, &ld);
      transpose(from, ld, count, width, turned[i] + q * width, strip);
      pack_pairs(job, from, ld, steps_of(job, count), paired[i] + q / job->per * PW, PW, paired_panel(job, n));
    }
  for (int64_t r = 0; r < up(rows, strip); r++) b->lse[r] = INFINITY, b->overlap[r] = 0;
  for (int64_t r = 0; r < rows; r++) {
    const char *grad = row_of(job->grad, token + r, head), *out = row_of(job->out, token + r, head);
    vecf total = vall(0);
    ask_for(job, out + AHEAD * job->out.token);
    for (int64_t d = 0; d < job->size; d += LANES)
      total = vfmaf(load(grad, d, LANES, job->kind), load(out, d, LANES, job->kind), total);
    b->overlap[r] = vsumf(total);
    b->lse[r] = job->lse[head * job->tokens + token + r] * LOG2E;
  }
  b->begun = 0;
}

// Shares and score gradients of the keys [first, stop) and a vector of queries, from their scores, hidden where they
// are not seen, and their share gradients. Queries beyond the sequence have an infinite lse, and so no share.
INLINE void differentiate(const int pair, const int64_t ld, const float *scores, const float *dshares, vecf lse,
                          vecf overlap, int64_t first, int64_t stop, vecf factor, vecf scale, float *dscores,
                          float *share_rows, float *dscore_rows, int64_t row_ld) {
  for (int64_t j = first; j < stop; j += 2) {
    vecf p[2], ds[2];
#pragma GCC unroll 2
    for (int u = 0; u < 2; u++) {
      p[u] = vexp2f(vfmaf(vloadf(scores + (j + u) * ld), factor, -lse));
      ds[u] = (vloadf(dshares + (j + u) * ld) - overlap) * (p[u] * scale);
      store(share_rows + (j + u) * row_ld, 0, LANES, pair ? BF16 : F32, p[u]);
      store(dscore_rows + (j + u) * row_ld, 0, LANES, pair ? BF16 : F32, ds[u]);
    }
    if (pair) pair_up(ds[0], ds[1], dscores + j / 2 * ld);
    else vstoref(dscores + j * ld, ds[0]), vstoref(dscores + (j + 1) * ld, ds[1]);
  }
}

// A vector of queries, the first of which is the block's query q.
APART void differentiate_keys(const Job *job, const Backward *b, int64_t q, int64_t row_ld, int64_t first,
                              int64_t stop) {
  vecf factor = vall(job->scale * LOG2E), scale = vall(job->scale), lse = vloadf(b->lse + q);
  vecf overlap = vloadf(b->overlap + q);
  int64_t v = q % job->strip, at = q / job->per;
#define DIFFERENTIATE(pair, ld)                                                                                     \
  differentiate(pair, ld, b->scores + v, b->dshares + v, lse, overlap, first, stop, factor, scale, b->dscores + v, \
                b->share_rows + at, b->dscore_rows + at, row_ld)
  if (!job->pair) DIFFERENTIATE(0, PW);
#ifdef AMX
  else DIFFERENTIATE(1, BACKWARD_STRIP);
#else
  else DIFFERENTIATE(1, PW);
#endif
}

// The strip from query q of a block on, against a chunk: adds to dquery, and makes its columns of the rows.
static void backward_strip(const Job *job, Backward *b, int64_t n, int64_t q, const Strip *s, int64_t j0) {
  int64_t width = job->width, strip = job->strip, per = job->per, ld = turned_ld(job, n), row_ld = rows_ld(job, n);
  make_scores(job, s, b->keys + j0 * width, b->turned_rows + q * width, b->scores);
  ask_to_write(job, &b->soon);
  make_scores(job, s, b->values + j0 * width, b->turned_grads + q * width, b->dshares);
  ask_to_write(job, &b->soon);
  for (int64_t v = 0; v < s->columns; v += LANES) {
    int64_t first = first_of(job, s, s->at + v), stop = stop_of(s, s->at + v);
    hide(job, b->scores + v, first, stop, s->at + v);
    differentiate_keys(job, b, q + v, row_ld, first, stop);
    ask_to_write(job, &b->soon);
    for (int after = 0; after < 2; after++) {
      int64_t from = after ? stop : s->from, to = after ? s->end : first;
      clear(b->dscores + v, strip, LANES, from / per, to / per);
      clear(b->share_rows + (q + v) / per, row_ld, LANES / per, from, to);
      clear(b->dscore_rows + (q + v) / per, row_ld, LANES / per, from, to);
    }
  }
  for (int64_t v = s->columns; v < least(strip, up(s->columns, job->deep)); v += LANES) {
    clear(b->share_rows + (q + v) / per, row_ld, LANES / per, s->from, s->end);
    clear(b->dscore_rows + (q + v) / per, row_ld, LANES / per, s->from, s->end);
  }
  int add = b->begun >> q / strip & 1;
  b->begun |= (uint64_t)1 << q / strip;
  add_shares(job, s, b->turned_keys + j0 / job->keys * job->size * ld, ld, b->dscores, b->dquery + q * job->size, add);
}

// Queries [i0, i0 + rows) against keys [j0, j0 + keys): adds to dquery, dkeys and dvalues. Where a strip meets itself
// its dquery is whole, and is written while it is near in the cache.
static void backward_block(const Job *job, Backward *b, int64_t start, int64_t n, int64_t head, int64_t i0,
                           int64_t rows, int64_t j0, int64_t keys) {
  int64_t size = job->size, row_ld = rows_ld(job, n), per = job->per, at = i0 - j0, until = steps_of(job, rows) * per;
  for (int64_t q = most(0, -at) / job->strip * job->strip; q < until; q += job->strip) {
    if (q >= rows) {
      clear(b->share_rows + q / per, row_ld, job->strip / per, 0, up(keys, GROUP));
      clear(b->dscore_rows + q / per, row_ld, job->strip / per, 0, up(keys, GROUP));
      continue;
    }
    Strip s = strip_of(job, at + q, rows - q, keys, WINDOW_GRID);
    int64_t token = start + i0 + q, whole = s.at < keys ? least(job->strip, rows - q) : 0;
    b->soon = (Written){row_of(job->dquery, token, head), job->dquery.token, whole};
    if (s.from < s.keys) backward_strip(job, b, n, q, &s, j0);
    turn_back(job, b->dquery + q * size, NULL, whole, job->dquery, token, head);
  }
  for (int64_t k = 0; k < keys; k += job->tall) {
    int64_t begin = most(0, k - at) / job->deep * job->deep, end = until;
    if (job->window) end = least(end, up(k / WINDOW_GRID * WINDOW_GRID + WINDOW_GRID + job->window - 1 - at, GROUP));
    if (end <= begin) continue;
    int64_t count = least(job->tall, up(keys, job->even) - k), row = k * row_ld + begin / per;
    for (int64_t d = 0; d < size; d += PW) {
      int64_t columns = least(PW, size - d), panel = d / PW * paired_panel(job, n) + begin / per * PW;
      multiply(job, count, columns, b->share_rows + row, row_ld, b->paired_grads + panel, PW, (end - begin) / per,
               b->dvalues + (j0 + k) * size + d, size, 1);
      multiply(job, count, columns, b->dscore_rows + row, row_ld, b->paired_rows + panel, PW, (end - begin) / per,
               b->dkeys + (j0 + k) * size + d, size, 1);
    }
  }
}

// Gradients of keys and values to the tensors, or with `cut` to the partial sums of this query head.
static void backward_finish(const Job *job, Backward *b, int64_t start, int64_t n, int64_t head, int cut) {
  View targets[2] = {job->dkey, job->dvalue};
  float *rows[2] = {b->dkeys, b->dvalues};
  for (int i = 0; i < 2; i++)
    for (int64_t j = 0; j < n; j++) {
      const float *row = rows[i] + j * job->size;
      float *part = job->partial + ((i * job->tokens + start + j) * job->heads + head) * job->size;
      if (cut) memcpy(part, row, job->size * 4);
      else write_row(job, row, row_of(targets[i], start + j, head / (job->heads / job->key_heads)));
    }
}

static void backward_unit(const Job *job, int64_t start, int64_t n, int64_t head, int64_t count, float *arena) {
  Backward b;
  backward_scratch(job, n, arena, &b);
  int64_t shared = job->heads / job->key_heads;
  pack_keys(job, job->key, start, head / shared, n, b.keys, b.turned_keys, b.spare);
  pack_keys(job, job->value, start, head / shared, n, b.values, NULL, b.spare);
  memset(b.dkeys, 0, up(n, GROUP) * job->size * 4);
  memset(b.dvalues, 0, up(n, GROUP) * job->size * 4);
  for (int64_t h = head; h < head + count; h++)
    for (int64_t i = 0; i < n; i += job->block) {
      int64_t rows = least(job->block, n - i);
      backward_load(job, &b, start + i, h, n, rows);
      for (int64_t j = first_seen(job, i) / job->keys * job->keys; j < i + rows; j += job->keys)
        backward_block(job, &b, start, n, h, i, rows, j, least(job->keys, i + rows - j));
    }
  backward_finish(job, &b, start, n, head, count < shared);
}

// ---- the stream ----------------------------------------------------------------------------------------------------

static int is_cut(const Job *job, int64_t n) {  // by the sequence's own shape, never by its neighbours or the threads
  return n >= LONG && job->key_heads < FEW && job->heads > job->key_heads;
}

// Each thread's AMX tiles, where the job takes them.
static void begin_tiles(const Job *job) {
#ifdef AMX
  if (job->pair) amx_begin();
#endif
}
static void end_tiles(const Job *job) {
#ifdef AMX
  if (job->pair) amx_end();
#endif
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
#pragma omp parallel num_threads(job->threads)
  {
    begin_tiles(job);
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < job->sequences * job->heads; u++) {
      int64_t start = job->spans[2 * (u / job->heads)], n = job->spans[2 * (u / job->heads) + 1], head = u % job->heads;
      int64_t count = is_cut(job, n) ? 1 : shared;
      if (head % count) continue;
      float *own = arena + omp_get_thread_num() * each;
      if (backward) backward_unit(job, start, n, head, count, own);
      else forward_unit(job, start, n, head, count, own);
    }
    end_tiles(job);
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

// Units, and how many rows go together. Where the system does not permit AMX, bf16 is widened to fp32.
static void choose_tiles(Job *job, int backward) {
  int amx = 0;
#ifdef AMX
  amx = job->pair = job->kind == BF16 && amx_permitted();
#elif defined(PAIRS)
  job->pair = job->kind == BF16;
#endif
  job->per = job->pair ? 2 : 1;
  job->deep = amx ? 32 : job->per;
  job->even = amx ? 16 : 2;
  job->across = amx ? 16 : LANES;
  job->width = up(job->size, amx ? 32 : 1) / job->per;
  job->strip = !amx ? PW : backward ? BACKWARD_STRIP : FORWARD_STRIP;
  job->tall = backward && !amx ? 48 : GROUP;
  job->keys = !backward ? 128 : amx ? 256 : 192;  // a multiple of a strip and of `tall`
  job->block = amx ? 256 : 128;                   // of a strip
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
  choose_tiles(&job, backward);
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

int topwork_attention_level(void) { return LEVEL; }
