// Many small products at once, each of a shape of its own:
//
//     out [m, n] = alpha left [m, k] right [k, n] + beta out,  beta 0 or 1
//
// Operands are fp32 or bf16, outputs too, whatever the operands are; sums are fp32 and rounded once, at the end. Of the
// two axes of a matrix one is contiguous. A piece of work is a block of rows and columns of one product. It goes along
// the summed axis in blocks: the right side's block is packed into panels of PW columns, the left side's into rows of
// units, if they do not stand like that in memory, and the register tile (tile.h) does the rest. Every sum is one chain
// along the summed axis, so neither the pieces nor the threads that take them change a bit.

#include <omp.h>
#include <stdlib.h>

#include "matrix.h"
#include "tile.h"

#define ROWS 192       // of a piece: a multiple of TALL and 16
#define FEW_ROWS 48    // of a piece, where there would be too few for the threads
#define STEPS 256      // units of the summed axis in a block: a multiple of 16
#define SHORT_STEPS 64 // where a product has few rows, which takes hardly longer than reading the right side of them
#define SHORT_COLUMNS 512  // of such a piece, at most
#define PANELS 65536   // floats of packed panels
#define COLUMNS 1024   // of a piece, at most
#define PER_THREAD 4   // pieces, at least, where rows can be cut

// ---- tiles ---------------------------------------------------------------------------------------------------------

#if NR == 4
#define TILES(pair, rows)                                                                   \
  TILE(pair, rows, 1, LANES) TILE(pair, rows, 2, 2 * LANES) TILE(pair, rows, 3, 3 * LANES) \
  TILE(pair, rows, 4, 4 * LANES)
#define ROW(pair, rows) \
  {TILE_OF(pair, rows, 1), TILE_OF(pair, rows, 2), TILE_OF(pair, rows, 3), TILE_OF(pair, rows, 4)}
#else
#define TILES(pair, rows) TILE(pair, rows, 1, LANES) TILE(pair, rows, 2, 2 * LANES)
#define ROW(pair, rows) {TILE_OF(pair, rows, 1), TILE_OF(pair, rows, 2)}
#endif
#ifdef WIDE
#define TALL_TILES(pair) TILE(pair, 12, 1, LANES) TILE(pair, 12, 2, 2 * LANES)
#define TALL_ROW(pair) {TILE_OF(pair, 12, 1), TILE_OF(pair, 12, 2)}
#else
#define TALL_TILES(pair) TILE(pair, 12, 1, LANES)
#define TALL_ROW(pair) {TILE_OF(pair, 12, 1)}
#endif
#define ALL_TILES(pair) TALL_TILES(pair) TILES(pair, 6) TILES(pair, 4) TILES(pair, 2) TILES(pair, 1)
#define ALL_ROWS(pair) {TALL_ROW(pair), ROW(pair, 6), ROW(pair, 4), ROW(pair, 2), ROW(pair, 1)}
#define HEIGHTS 5
static const int64_t HEIGHT[HEIGHTS] = {12, 6, 4, 2, 1};
ALL_TILES(0)
#if defined(PAIRS) && !defined(AMX)
ALL_TILES(1)
#endif
static const Tile PRODUCTS[2][HEIGHTS][NR] = {
    ALL_ROWS(0),
#if defined(PAIRS) && !defined(AMX)
    ALL_ROWS(1),
#endif
};

// The tallest tile of at most `rows` rows, and its height.
static Tile tallest(int pair, int64_t rows, int64_t vectors, int64_t *height) {
  int at = 0;
  while (HEIGHT[at] > rows || !PRODUCTS[pair][at][vectors - 1]) at++;
  *height = HEIGHT[at];
  return PRODUCTS[pair][at][vectors - 1];
}

// ---- the table of products -----------------------------------------------------------------------------------------

typedef struct {
  Matrix left, right, out;
  int64_t m, k, n, kind, right_kind, out_kind, add, addends;
} Product;  // as the table has it: all are 64 bits wide

typedef struct {
  const Product *of;
  float alpha;
  int64_t row, rows, column, columns;
} Piece;

static inline int pair_of(const Product *p) {
#ifdef PAIRS
  return p->kind == BF16;
#else
  return 0;
#endif
}
// Whether AMX multiplies it.
static inline int tiled(const Product *p) {
#ifdef AMX
  return p->kind == BF16;
#else
  return 0;
#endif
}
static inline int64_t steps_of(const Product *p) { return pair_of(p) ? (p->k + 1) / 2 : p->k; }
// A long sum of few rows: a gradient of A or B.
static inline int short_blocks(const Product *p) { return p->m <= FEW_ROWS && steps_of(p) > SHORT_STEPS; }
static inline int64_t block_of(const Product *p) { return short_blocks(p) ? SHORT_STEPS : STEPS; }

// ---- packing -------------------------------------------------------------------------------------------------------

// At most 16 units [unit, unit + 16) of a contiguous row of `k` values as they follow each other; zeros beyond the row.
INLINE void along(const int pair, const char *row, int64_t unit, int64_t k, int64_t kind, float *to) {
  int64_t first = pair ? 2 * unit : unit, count = least(k - first, pair ? 32 : 16);
  if (pair) {
    if (count == 32) {
      memcpy(to, row + 2 * first, 64);
      return;
    }
    memset(to, 0, 64);
    memcpy(to, row + 2 * first, 2 * count);
    return;
  }
  for (int64_t i = 0; i < 16; i += LANES) {
    int64_t some = least(LANES, count - i);
    vstoref(to + i, some == LANES ? load(row, first + i, LANES, kind)
                    : some > 0    ? load(row, first + i, some, kind)
                                  : vall(0));
  }
}

// Columns [c, c + LANES) of a step as units, from the one or two rows that it holds; zeros from `count` on.
INLINE void across(const int pair, const char *upper, const char *lower, int64_t c, int64_t count, int64_t kind,
                   float *to) {
#if defined(PAIRS) && !defined(AMX)
  if (pair) {
    if (count >= 16) {
      pair_rows((const uint16_t *)upper + c, lower ? (const uint16_t *)lower + c : NULL, 16, to);
      return;
    }
    memset(to, 0, 64);
    if (count > 0) pair_rows((const uint16_t *)upper + c, lower ? (const uint16_t *)lower + c : NULL, count, to);
    return;
  }
#endif
  vstoref(to, count >= LANES ? load(upper, c, LANES, kind) : count > 0 ? load(upper, c, count, kind) : vall(0));
}

// The right side's steps [unit, unit + steps) as panels [steps, PW], the last one as wide as its vectors. These where
// rows are contiguous: they are read one after the other, however many panels they go to.
INLINE void pack_rows(const int pair, const Piece *piece, int64_t unit, int64_t steps, float *to) {
  const Product *p = piece->of;
  const char *from = value_at(p->right, 0, piece->column, p->kind);
  int64_t size = bytes_of(p->kind), whole = piece->columns / PW * PW, width = up(piece->columns - whole, LANES);
  for (int64_t s = 0; s < steps; s++) {
    const char *upper = from + (pair ? 2 : 1) * (unit + s) * p->right.row * size;
    const char *lower = pair && 2 * (unit + s) + 1 < p->k ? upper + p->right.row * size : NULL;
    int64_t j = 0;
#if defined(PAIRS) && !defined(AMX)
    if (pair && lower)
      for (; j < whole; j += PW)
#pragma GCC unroll 2
        for (int64_t c = 0; c < PW; c += 2 * LANES) {
          float *at = to + j * steps + s * PW + c;
          pair_lines(upper + 2 * (j + c), lower + 2 * (j + c), at, at + LANES);
        }
#endif
    for (; j < whole; j += PW)
#pragma GCC unroll 4
      for (int64_t c = 0; c < PW; c += LANES)
        across(pair, upper, lower, j + c, LANES, p->kind, to + j * steps + s * PW + c);
    for (int64_t c = 0; c < width; c += LANES)
      across(pair, upper, lower, whole + c, piece->columns - whole - c, p->kind, to + whole * steps + s * width + c);
  }
}

// And these where columns are contiguous.
INLINE void pack_columns(const int pair, const Piece *piece, int64_t unit, int64_t steps, float *to) {
  const Product *p = piece->of;
  int64_t size = bytes_of(p->kind), ld = p->right.column * size;
  int plain = (pair || p->kind == F32) && ld % 4 == 0 && LANES == 16;
  float spare[16 * 16] __attribute__((aligned(64))), turned[16 * 16] __attribute__((aligned(64)));
  for (int64_t c = 0; c < piece->columns; c += 16) {
    int64_t j = c / PW * PW, width = up(least(PW, piece->columns - j), LANES), count = least(16, piece->columns - c);
    const char *from = value_at(p->right, 0, piece->column + c, p->kind);
    float *panel = to + j * steps + c - j;
    for (int64_t s = 0; s < steps; s += 16) {
      int64_t some = least(16, steps - s), stop = (unit + s + some) * (pair ? 2 : 1);
      if (plain && stop <= p->k) {
        transpose_block((const Unit *)(from + (unit + s) * 4), ld / 4, count, some, panel + s * width, width);
        continue;
      }
      for (int64_t r = 0; r < count; r++) along(pair, from + r * ld, unit + s, p->k, p->kind, spare + 16 * r);
      transpose_block((const Unit *)spare, 16, count, some, turned, 16);
      for (int64_t k = 0; k < some; k++)
        memcpy(panel + (s + k) * width, turned + 16 * k, least(16, width - (c - j)) * 4);
    }
  }
}

// to [rows, steps up to 16]: the left side's steps [unit, unit + steps).
INLINE void pack_left(const int pair, const Piece *piece, int64_t unit, int64_t steps, float *to) {
  const Product *p = piece->of;
  int64_t size = bytes_of(p->kind), ld = up(steps, 16);
  if (p->left.column == 1) {
    for (int64_t r = 0; r < piece->rows; r++)
      for (int64_t s = 0; s < steps; s += 16)
        along(pair, value_at(p->left, piece->row + r, 0, p->kind), unit + s, p->k, p->kind, to + r * ld + s);
    return;
  }
  float spare[16 * 16] __attribute__((aligned(64)));
  for (int64_t r = 0; r < piece->rows; r += 16) {
    int64_t count = least(16, piece->rows - r), by = p->left.column * size;
    const char *from = value_at(p->left, piece->row + r, 0, p->kind);
    for (int64_t s = 0; s < steps; s += 16) {
      int64_t some = least(16, steps - s);
      for (int64_t k = 0; k < some; k++) {
        const char *upper = from + (pair ? 2 : 1) * (unit + s + k) * by;
        const char *lower = pair && 2 * (unit + s + k) + 1 < p->k ? upper + by : NULL;
        for (int64_t c = 0; c < 16; c += LANES) across(pair, upper, lower, c, count - c, p->kind, spare + 16 * k + c);
      }
      transpose_block((const Unit *)spare, 16, some, count, to + r * ld + s, ld);
    }
  }
}

// Whether the left side's rows can be read as units where they stand.
static int stands(const Product *p) {
  if (p->left.column != 1) return 0;
  if (p->kind == F32) return 1;
  return pair_of(p) && p->k % 2 == 0 && p->left.row % 2 == 0;
}

// ---- a piece -------------------------------------------------------------------------------------------------------

typedef struct {
  float *left, *right, *sums;
} Scratch;

static int needs_left(const Product *p) { return !stands(p); }
static int needs_sums(const Product *p) { return steps_of(p) > block_of(p) || p->out.column != 1 || !p->k; }

// The parts of an arena that are large enough for every piece; how long it must be.
static int64_t scratch(const Piece *pieces, int64_t count, float *arena, Scratch *s) {
  int64_t left = 0, right = 0, sums = 0, used = 0;
  for (int64_t i = 0; i < count; i++) {
    const Piece *piece = pieces + i;
    int64_t steps = least(block_of(piece->of), up(steps_of(piece->of), 16)), columns = up(piece->columns, 16);
    if (needs_left(piece->of)) left = most(left, piece->rows * steps);
    if (needs_sums(piece->of)) sums = most(sums, piece->rows * columns);
    right = most(right, columns * steps);
  }
  s->left = take(arena, &used, left);
  s->right = take(arena, &used, right);
  s->sums = take(arena, &used, sums);
  return used;
}

// to [lines, count] (+)= alpha sums; `by` is the distance of its lines in bytes.
INLINE void finish_lines(const int kind, const int add, char *to, int64_t by, int64_t lines, int64_t count,
                         const float *sums, int64_t ld, float alpha) {
  vecf factor = vall(alpha);
  for (int64_t i = 0; i < lines; i++, to += by, sums += ld) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) {
      vecf x = vloadf(sums + c) * factor;
      store(to, c, LANES, kind, add ? x + load(to, c, LANES, kind) : x);
    }
    if (c < count) {
      vecf x = vloadf(sums + c) * factor;
      store(to, c, count - c, kind, add ? x + load(to, c, count - c, kind) : x);
    }
  }
}

APART void finish(const Product *p, char *to, int64_t by, int64_t lines, int64_t count, const float *sums, int64_t ld,
                  float alpha) {
  if (p->out_kind == BF16 && p->add) finish_lines(BF16, 1, to, by, lines, count, sums, ld, alpha);
  else if (p->out_kind == BF16) finish_lines(BF16, 0, to, by, lines, count, sums, ld, alpha);
  else if (p->add) finish_lines(F32, 1, to, by, lines, count, sums, ld, alpha);
  else finish_lines(F32, 0, to, by, lines, count, sums, ld, alpha);
}

// Sums [rows, columns] of the piece's rows and columns from (row, column) on, to an output with contiguous rows.
static void finish_rows(const Piece *piece, int64_t row, int64_t rows, int64_t column, int64_t columns,
                        const float *sums, int64_t ld) {
  const Product *p = piece->of;
  char *to = (char *)value_at(p->out, piece->row + row, piece->column + column, p->out_kind);
  finish(p, to, p->out.row * bytes_of(p->out_kind), rows, columns, sums, ld, piece->alpha);
}

// All of the piece's, turned in blocks of 16, to an output with contiguous columns.
static void finish_turned(const Piece *piece, const float *sums, int64_t ld) {
  const Product *p = piece->of;
  float spare[16 * 16] __attribute__((aligned(64)));
  for (int64_t c = 0; c < piece->columns; c += 16)
    for (int64_t r = 0; r < piece->rows; r += 16) {
      int64_t rows = least(16, piece->rows - r), columns = least(16, piece->columns - c);
      transpose_block((const Unit *)(sums + r * ld + c), ld, rows, columns, spare, 16);
      char *to = (char *)value_at(p->out, piece->row + r, piece->column + c, p->out_kind);
      finish(p, to, p->out.column * bytes_of(p->out_kind), columns, rows, spare, 16, piece->alpha);
    }
}

// The right side's next block, where its rows are contiguous. (Columns that are, are a few weights and near.)
static Ask next_block(const Piece *piece, int64_t unit, int64_t steps) {
  const Product *p = piece->of;
  int64_t width = pair_of(p) ? 2 : 1, from = width * (unit + steps), size = bytes_of(p->kind);
  if (p->right.column != 1 || from >= p->k) return (Ask){};
  return (Ask){.at = value_at(p->right, from, piece->column, p->kind),
               .inner = (piece->columns * size + 63) / 64,
               .inner_by = 64,
               .outer = least(width * steps, p->k - from),
               .outer_by = p->right.row * size};
}

// `count` rows of `steps` units, for as many steps: one line of each, and then the next.
static Ask next_rows(const Unit *from, int64_t ld, int64_t count, int64_t steps) {
  return (Ask){.at = (const char *)from,
               .inner = count,
               .inner_by = 4 * ld,
               .outer = count > 0 ? (steps + 15) / 16 : 0,
               .outer_by = 64};
}

// The block's steps for all rows and columns of a piece.
static void multiply(const Piece *piece, const Scratch *s, int64_t unit, int64_t steps, int64_t ld, int keep) {
  const Product *p = piece->of;
  int pair = pair_of(p), last = unit + steps == steps_of(p), direct = stands(p);
  int64_t lda = direct ? (pair ? p->left.row / 2 : p->left.row) : up(steps, 16);
  const Unit *left = (const Unit *)s->left;
  if (direct) left = (const Unit *)value_at(p->left, piece->row, 0, p->kind) + unit;
  float spare[TALL * PW] __attribute__((aligned(64)));
  Ask ask = next_block(piece, unit, steps);
  for (int64_t r = 0; r < piece->rows; r += TALL) {
    int64_t wanted = least(TALL, piece->rows - r), height;
    for (int64_t j = 0; j < piece->columns; j += PW) {
      int64_t columns = least(PW, piece->columns - j), vectors = (columns + LANES - 1) / LANES;
      float *sums = keep ? s->sums + r * ld + j : spare;
      int64_t by = keep ? ld : PW;
      if (last && p->out.column == 1)  // rows stand far apart, which no processor foresees
        for (int64_t i = 0; i < wanted; i++) {
          const char *to = value_at(p->out, piece->row + r + i, piece->column + j, p->out_kind);
          for (int64_t byte = 0; byte < columns * bytes_of(p->out_kind); byte += 64) __builtin_prefetch(to + byte, 1);
        }
      for (int64_t i = 0; i < wanted; i += height) {
        Tile product = tallest(pair, wanted - i, vectors, &height);
        const Unit *rows = left + (r + i) * lda;
        if (direct && !j && !ask.outer)
          ask = next_rows(rows + height * lda, lda, least(height, piece->rows - (r + i + height)), steps);
        product(rows, lda, s->right + j * steps, steps, sums + i * by, by, unit > 0, &ask);
      }
      if (last && p->out.column == 1) finish_rows(piece, r, wanted, j, columns, sums, by);
    }
  }
}

static void run_piece(const Piece *piece, const Scratch *s) {
  const Product *p = piece->of;
  int pair = pair_of(p), turned = p->out.column != 1;
  int64_t all = steps_of(p), ld = up(piece->columns, 16);
  int keep = needs_sums(p);
  if (!all) {
    memset(s->sums, 0, piece->rows * ld * 4);
    if (!turned) finish_rows(piece, 0, piece->rows, 0, piece->columns, s->sums, ld);
  }
  for (int64_t unit = 0, block = block_of(p); unit < all; unit += block) {
    int64_t steps = least(block, all - unit);
    if (p->right.column == 1 && pair) pack_rows(1, piece, unit, steps, s->right);
    else if (p->right.column == 1) pack_rows(0, piece, unit, steps, s->right);
    else if (pair) pack_columns(1, piece, unit, steps, s->right);
    else pack_columns(0, piece, unit, steps, s->right);
    if (needs_left(p)) {
      if (pair) pack_left(1, piece, unit, steps, s->left);
      else pack_left(0, piece, unit, steps, s->left);
    }
    multiply(piece, s, unit, steps, ld, keep);
  }
  if (turned) finish_turned(piece, s->sums, ld);
}

#ifdef AMX
#include "grouped_amx.h"
#endif

// ---- all of them ---------------------------------------------------------------------------------------------------

// How many columns a piece has: what is packed of them should stay in the cache. A few rows cannot be dealt to threads,
// their columns can.
static int64_t piece_columns(const Product *p, int64_t threads) {
  if (short_blocks(p)) {
    int64_t parts = up((p->n + SHORT_COLUMNS - 1) / SHORT_COLUMNS, threads);
    return most(PW, up((p->n + parts - 1) / parts, 2 * LANES));
  }
  int64_t fit = PANELS / most(1, least(STEPS, steps_of(p))) / PW * PW;
  return least(COLUMNS, most(PW, fit));
}

// The pieces of all products, written to `pieces` where there is room for them; their number.
static int64_t cut(const Product *products, const double *alphas, int64_t count, int64_t rows, int64_t threads,
                   Piece *pieces) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i++) {
    const Product *p = products + i;
    int64_t columns = piece_columns(p, threads);
    if (tiled(p)) continue;
    for (int64_t r = 0; r < p->m; r += rows)
      for (int64_t c = 0; c < p->n; c += columns, found++)
        if (pieces) pieces[found] = (Piece){p, (float)alphas[i], r, least(rows, p->m - r), c, least(columns, p->n - c)};
  }
  return found;
}

// Where both sides would be turned, the longer one is better off on the right; k = 1 is both ways contiguous.
static void turn(Product *p) {
  if (p->left.column == 1 || p->right.column != 1 || p->m <= p->n || p->kind != p->right_kind || p->addends) return;
  Product q = *p;
  p->left = (Matrix){q.right.at, q.right.column, q.right.row};
  p->right = (Matrix){q.left.at, q.left.column, q.left.row};
  p->out = (Matrix){q.out.at, q.out.column, q.out.row};
  p->m = q.n, p->n = q.m;
}

static int run_pieces(const Product *products, const double *alphas, int64_t count, int64_t threads) {
  int64_t rows = ROWS, found = cut(products, alphas, count, rows, threads, NULL);
  while (threads > 1 && found < threads * PER_THREAD && rows > FEW_ROWS) {
    rows /= 2;
    found = cut(products, alphas, count, rows, threads, NULL);
  }
  if (!found) return 0;
  threads = least(threads, found);
  Piece *pieces = malloc(found * sizeof *pieces);
  if (!pieces) return 1;
  cut(products, alphas, count, rows, threads, pieces);
  Scratch s;
  int64_t each = scratch(pieces, found, NULL, &s);
  float *arena = aligned_alloc(64, threads * each * 4);
  if (!arena) {
    free(pieces);
    return 1;
  }
  scratch(pieces, found, arena, &s);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < found; i++) {
    int64_t at = omp_get_thread_num() * each;
    run_piece(pieces + i, &(Scratch){s.left + at, s.right + at, s.sums + at});
  }
  free(pieces);
  free(arena);
  return 0;
}

// The table has a line of 17 numbers for each product: address, row stride and column stride of left, right and out; m,
// k, n; kinds of left, of right and of the output; whether to add; how many lines behind it are addends. Both kinds are
// one, and there are no addends, but for bf16 on AMX, beside which the right side may be fp32. Turned products (whose
// columns are contiguous) are allowed everywhere.
// Returns 0, or before anything was written 1 when memory ran out, 2 where the system does not permit AMX, 3 where an
// addend has to be made apart: its line has 1 for `add` then (grouped_amx.h).
static int multiply_table(Product *products, const double *alphas, int64_t count, int64_t threads) {
  for (int64_t i = 0; i < count; i += 1 + products[i].addends) turn(products + i);
#ifdef AMX
  if (!amx_permitted()) return 2;
  int failed = run_blocks(products, alphas, count, threads);
  if (failed) return failed;
#endif
  return run_pieces(products, alphas, count, threads);
}

int topwork_grouped_products(Product *products, const double *alphas, int64_t count, int64_t threads) {
  return multiply_table(products, alphas, count, threads);
}

int topwork_grouped_level(void) { return LEVEL; }
