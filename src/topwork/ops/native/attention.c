// Causal attention of a flat stream, forward and backward; every sequence sees itself alone.
//
//     s = scale q k'     p = softmax over keys j with i - window < j <= i     o = p v     lse = log sum exp s
//     dv = p' do     dp = do v'     ds = scale p (dp - do . o)     dq = ds k     dk = ds' q
//
// As in FlashAttention (Dao, arXiv 2307.08691): blocks of rows against blocks of keys, p made again from lse.
// All six products run through one register tile (tile.h) of MR rows by NR vectors. To need no transposed scores, the
// backward makes dk and dv transposed and turns them once, at the end. Sums are fp32. What a row does not see has a
// score of minus infinity, so that the inner loops know no masks.
//
// A unit of work is one sequence and one key head with its query heads; a long sequence with few key heads is cut by
// query heads, whose dk and dv are then added in their order. Nothing depends on the threads or on other sequences.

#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "tile.h"

#define MR 6              // rows of a tile
#define FORWARD_ROWS 48   // query rows and keys of a block: multiples of MR and 32, and of PW
#define FORWARD_KEYS 256
#define BACKWARD_ROWS 96
#define BACKWARD_KEYS 128
#define LONG 512          // tokens from which a sequence with few key heads is cut by query heads
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

static void write_row(const Job *job, const float *from, char *to) {
  for (int64_t i = 0; i < job->size; i += LANES) store(to, i, LANES, job->kind, vloadf(from + i));
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
      for (int64_t c = 0; c < width; c += LANES) vstoref(to + r * width + c, load(from, c, LANES, job->kind));
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
    PRODUCTS[job->pair][rows / 2 - 1][least(NR, (job->size - d) / LANES) - 1](a, lda, b, steps, c + d, job->size, 1);
}

// The first key that row i of a sequence sees; the last is i.
static inline int64_t first_seen(const Job *job, int64_t i) { return job->window ? most(0, i - job->window + 1) : 0; }

// Minus infinity for the scores of keys outside [first, stop), in the vectors [from, to), both multiples of LANES.
static inline void hide(float *scores, int64_t first, int64_t stop, int64_t from, int64_t to) {
  for (int64_t v = from; v < least(first, to); v += LANES)
    vstoref(scores + v, pick(vlanes(first - v, LANES), vloadf(scores + v), vall(-INFINITY)));
  for (int64_t v = most(from, stop / LANES * LANES); v < to; v += LANES)
    vstoref(scores + v, pick(vlanes(0, stop - v), vloadf(scores + v), vall(-INFINITY)));
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
  for (int64_t d = 0; d < job->size; d += LANES) vstoref(row + d, vloadf(row + d) * vall(by));
}

INLINE void soften(const int pair, const float *scores, float *shares, int64_t count, vecf factor, Row *row) {
  vecf peaks = vall(-INFINITY), totals = vall(0);
  for (int64_t v = 0; v < count; v += LANES) peaks = vmaxf(peaks, vloadf(scores + v) * factor);
  row->peak = fmaxf(row->peak, vlargestf(peaks));
  vecf shift = vall(row->peak == -INFINITY ? 0 : -row->peak);
  for (int64_t v = 0; v < count; v += LANES) {
    vecf p = vexp2f(vfmaf(vloadf(scores + v), factor, shift));
    totals += p;
#ifdef PAIRS
    if (pair) {
      _mm256_storeu_si256((__m256i *)(shares + v / 2), (__m256i)_mm512_cvtneps_pbh(p));
      continue;
    }
#endif
    vstoref(shares + v, p);
  }
  row->added = vsumf(totals);
}

// Shares of one row from its scores, hidden where they are not seen; what was summed before is scaled to the new peak.
APART void soften_row(const Job *job, const float *scores, float *shares, int64_t count, Row *row, float *sums) {
  float before = row->peak;
  vecf factor = vall(job->scale * LOG2E);
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
      int64_t vectors = least(NR, (stop - j + LANES - 1) / LANES);
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
    vecf total = vall(0);
    for (int64_t d = 0; d < job->size; d += LANES)
      total = vfmaf(load(grad, d, LANES, job->kind), load(out, d, LANES, job->kind), total);
    b->overlap[r] = vsumf(total);
    b->lse[r] = job->lse[head * job->tokens + token + r] * LOG2E;
  }
  memset(b->dquery, 0, up(rows, 2) * job->size * 4);
}

// Shares and score gradients of a tile, from its scores, hidden where they are not seen, and its share gradients. Rows
// beyond the sequence have an infinite lse, and so no share. `columns` vectors of the panel are written, those from
// `vectors` on as zeros.
INLINE void differentiate(const int pair, const Backward *b, int64_t r, int64_t rows, int64_t key, vecf factor,
                          vecf scale, int64_t vectors, int64_t columns) {
  const float *scores = b->tile, *dshares = b->tile + MR * PW, *lse = b->lse + r, *overlap = b->overlap + r;
  int64_t per = pair ? 2 : 1, row_ld = BACKWARD_KEYS / per, at = (key / PW * BACKWARD_ROWS + r) / per * PW;
  float *shares = b->shares + at, *dscores = b->dscores + at, *dscore_rows = b->dscore_rows + r * row_ld + key / per;
  for (int64_t k = 0; k < rows; k += 2) {
    vecf shift[2] = {vall(-lse[k]), vall(-lse[k + 1])}, less[2] = {vall(overlap[k]), vall(overlap[k + 1])};
    for (int64_t v = 0; v < vectors * LANES; v += LANES) {
      vecf p[2], ds[2];
#pragma GCC unroll 2
      for (int u = 0; u < 2; u++) {
        p[u] = vexp2f(vfmaf(vloadf(scores + (k + u) * PW + v), factor, shift[u]));
        ds[u] = (vloadf(dshares + (k + u) * PW + v) - less[u]) * (p[u] * scale);
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
        vstoref(shares + (k + u) * PW + v, p[u]);
        vstoref(dscores + (k + u) * PW + v, ds[u]);
        vstoref(dscore_rows + (k + u) * row_ld + v, ds[u]);
      }
    }
  }
  for (int64_t k = 0; k < rows / per; k++)
    for (int64_t v = vectors * LANES; v < columns * LANES; v += LANES) {
      vstoref(shares + k * PW + v, vall(0));
      vstoref(dscores + k * PW + v, vall(0));
    }
}

APART void backward_tile(const Job *job, const Backward *b, int64_t r, int64_t rows, int64_t key, int64_t vectors,
                         int64_t columns) {
  vecf factor = vall(job->scale * LOG2E), scale = vall(job->scale);
  if (job->pair) differentiate(1, b, r, rows, key, factor, scale, vectors, columns);
  else differentiate(0, b, r, rows, key, factor, scale, vectors, columns);
}

// Rows [i0, i0 + rows) against keys [j0, j0 + keys): adds to dquery, dkeys and dvalues.
static void backward_block(const Job *job, Backward *b, int64_t n, int64_t i0, int64_t rows, int64_t j0, int64_t keys) {
  int64_t width = units(job), even = up(rows, 2), size = job->size, row_ld = steps_of(job, BACKWARD_KEYS);
  const Tile(*products)[NR] = PRODUCTS[job->pair];
  for (int64_t j = j0; j < j0 + keys; j += PW) {
    int64_t columns = (least(PW, n - j) + LANES - 1) / LANES;  // vectors of the panel that hold keys
    int64_t begin = even, end = 0;                     // the rows that see some of the panel
    for (int64_t r = most(0, j - i0) / MR * MR; r < even; r += MR) {
      if (first_seen(job, i0 + r) >= j + PW) break;
      int64_t count = least(MR, even - r), stop = i0 + least(r + MR, rows);
      int64_t vectors = least(NR, (stop - j + LANES - 1) / LANES);
      Tile product = products[count / 2 - 1][vectors - 1];
      product(b->rows + r * width, width, b->turned_keys + j * width, width, b->tile, PW, 0);
      product(b->grads + r * width, width, b->turned_values + j * width, width, b->tile + MR * PW, PW, 0);
      for (int64_t k = 0; k < count; k++)
        hide(b->tile + k * PW, first_seen(job, i0 + r + k) - j, i0 + r + k + 1 - j, 0, vectors * LANES);
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

int topwork_attention_level(void) { return LEVEL; }
