// Products of bf16 on AMX's tiles, for grouped.c. As there, a piece is a block of rows and columns of one product, and
// goes along the summed axis in blocks. What differs:
//
// The right side is packed into tiles, [16 columns][16 units][16][16], one behind the other. Where a product has many
// rows it is packed once for all of its pieces, before them; else each piece packs its own. The left side is read where
// it stands, whatever its distance of rows, but for what fills no tile.
//
// A product may have addends (`terms` lines behind it in the table): products whose sums join its own before these are
// rounded. An addend's `out` is no address: its place in the product's out, `row` and `column`.

#pragma once

#define DEEP 768    // units of the summed axis in a block: a multiple of 16
#define HIGH 128    // rows of a piece
#define BROAD 256   // columns of a piece
#define MANY 64     // rows from which a product's right side is packed once for all
#define SIDES 256   // floats of a tile

static inline int64_t sides(int64_t count) { return (count + SIDE - 1) / SIDE; }

// What is packed before all pieces: the right side of one product or addend, its columns on the grid of the product's.
typedef struct {
  const Product *of;
  float alpha;     // what it is multiplied by
  int64_t before;  // columns of zeros in its first tile
  float *packed;   // [tiles of columns][tiles of units][16][16]; NULL: each piece packs its own
} Side;

// ---- the right side ------------------------------------------------------------------------------------------------

// `count` values from `at` on as bf16, times alpha; zeros up to 16.
INLINE void narrow16(const char *at, int64_t count, int64_t kind, float alpha, uint16_t *to) {
  for (int64_t i = 0; i < 16; i += LANES) {
    int64_t some = least(LANES, count - i);
    vecf x = some > 0 ? load(at, i, some, (int)kind) : vall(0);
    vech small = to_bf16(x * vall(alpha));
    memcpy(to + i, &small, sizeof small);
  }
}

// One tile: columns [column, column + 16) and units [unit, unit + 16) of a right side, zeros beyond it. `column` may be
// negative.
static void pack_tile(const Side *side, int64_t column, int64_t unit, float *to) {
  const Product *p = side->of;
  int64_t skip = most(0, -column), count = least(SIDE, p->n - column), from = 2 * unit, some = least(32, p->k - from);
  int plain = p->right_kind == BF16 && side->alpha == 1;
  if (p->right.column == 1) {
    uint16_t two[2][16] __attribute__((aligned(32)));
    for (int64_t s = 0; s < SIDE; s++) {
      const char *row = value_at(p->right, from + 2 * s, column, p->right_kind);
      int64_t by = p->right.row * bytes_of(p->right_kind);
      if (plain && !skip && count == SIDE && 2 * s + 1 < some) {
        pair_rows((const uint16_t *)row, (const uint16_t *)(row + by), SIDE, to + SIDE * s);
        continue;
      }
      for (int64_t half = 0; half < 2; half++) {
        int64_t there = 2 * s + half < some ? count - skip : 0;
        memset(two[half], 0, sizeof two[half]);
        uint16_t values[16];
        narrow16(row + half * by + skip * bytes_of(p->right_kind), there, p->right_kind, side->alpha, values);
        if (there > 0) memcpy(two[half] + skip, values, 2 * there);
      }
      pair_rows(two[0], two[1], SIDE, to + SIDE * s);
    }
    return;
  }
  int64_t by = p->right.column * bytes_of(p->right_kind);
  const char *at = value_at(p->right, from, column, p->right_kind);
  if (plain && !skip && some == 32 && by % 4 == 0) {
    transpose_block((const Unit *)at, by / 4, count, SIDE, to, SIDE);
    return;
  }
  uint16_t rows[16][32] __attribute__((aligned(64)));
  memset(rows, 0, sizeof rows);
  for (int64_t c = skip; c < count; c++)
    for (int64_t half = 0; half < 32; half += 16) {
      int64_t there = least(16, some - half);
      uint16_t values[16];
      if (there <= 0) continue;
      narrow16(at + c * by + half * bytes_of(p->right_kind), there, p->right_kind, side->alpha, values);
      memcpy(rows[c] + half, values, 2 * there);
    }
  transpose_block((const Unit *)rows, SIDE, SIDE, SIDE, to, SIDE);
}

// ---- the left side -------------------------------------------------------------------------------------------------

// Rows [row, row + rows) and units [unit, unit + 16 * deep) to [16 high, 16 deep] with rows of `ld`; zeros beyond the
// left side, also for rows before it.
static void pack_lines(const Product *p, int64_t row, int64_t rows, int64_t unit, int64_t deep, float *to, int64_t ld) {
  int64_t first = most(0, -row), stop = least(rows, p->m - row), count = least(32 * deep, p->k - 2 * unit);
  if (p->left.column == 1) {
    for (int64_t r = 0; r < SIDE * sides(rows); r++) {
      float *line = to + r * ld;
      int64_t there = r >= first && r < stop ? count : 0;
      if (there) memcpy(line, value_at(p->left, row + r, 2 * unit, BF16), 2 * there);
      memset((char *)line + 2 * there, 0, 64 * deep - 2 * there);
    }
    return;
  }
  float spare[16 * 16] __attribute__((aligned(64)));
  for (int64_t r = 0; r < rows; r += SIDE)
    for (int64_t d = 0; d < deep; d++) {
      int64_t skip = most(0, first - r), some = least(SIDE, stop - r) - skip;
      memset(spare, 0, sizeof spare);
      for (int64_t s = 0; s < SIDE && some > 0; s++) {
        int64_t k = 2 * (unit + SIDE * d + s);
        if (k >= p->k) break;
        const uint16_t *upper = (const uint16_t *)value_at(p->left, row + r + skip, k, BF16);
        pair_rows(upper, k + 1 < p->k ? upper + p->left.column : NULL, some, spare + SIDE * s + skip);
      }
      transpose_block(spare, SIDE, SIDE, SIDE, to + r * ld + SIDE * d, ld);
    }
}

// Whether tiles can be read where the left side stands.
static int stands_for_tiles(const Product *p) { return p->left.column == 1 && p->left.row % 2 == 0; }

// ---- a piece -------------------------------------------------------------------------------------------------------

typedef struct {
  const Side *side, *terms;
  float alpha;
  int64_t count, row, rows, column, columns;
} Block;

typedef struct {
  float *left, *edge, *lines, *right, *sums, *few;
} Room;

enum { TALLEST = 4 * SIDE, MOST_TERMS = 62 };  // terms of a block; `Stretch` for each, the block's own and its edge

static int holds_sums(const Product *p) { return steps_of(p) > DEEP || p->out.column != 1 || !p->k; }

// The parts of an arena that are large enough for a block; how long it must be.
static int64_t room_of(const Block *blocks, int64_t count, float *arena, Room *room) {
  int64_t left = 0, lines = 0, right = 0, sums = 0, used = 0;
  for (int64_t i = 0; i < count; i++) {
    const Block *b = blocks + i;
    const Product *p = b->side->of;
    int64_t deep = SIDE * sides(least(DEEP, steps_of(p))), columns = SIDE * sides(b->columns);
    int64_t units = 0;
    for (int64_t t = 0; t < b->count; t++) units += SIDE * sides(steps_of(b->terms[t].of));
    if (!stands_for_tiles(p)) left = most(left, SIDE * sides(b->rows) * deep);
    else left = most(left, TALLEST * deep);
    if (!b->side->packed) right = most(right, columns * deep);
    if (holds_sums(p)) sums = most(sums, (SIDE * sides(b->rows) + TALLEST) * columns);
    lines = most(lines, TALLEST * units);
  }
  room->left = take(arena, &used, left);
  room->edge = take(arena, &used, TALLEST * SIDE);
  room->lines = take(arena, &used, lines);
  room->right = take(arena, &used, right);
  room->sums = take(arena, &used, sums);
  room->few = take(arena, &used, TALLEST * TALLEST);
  return used;
}

APART void multiply_tiles(int64_t high, int64_t wide, const Stretch *s, int64_t count, float *c, int64_t ldc, int add) {
#define SHAPE(h, w) \
  if (high == h && wide == w) { amx_stretches(h, w, s, count, c, ldc, add); return; }
  SHAPE(2, 2) SHAPE(1, 4) SHAPE(4, 1) SHAPE(2, 1) SHAPE(1, 2) SHAPE(1, 1) SHAPE(3, 1) SHAPE(1, 3)
#undef SHAPE
}

// The rows [r, r + rows) of a block, up to a tile's shape, as one or two stretches of a block of its summed axis.
static int64_t left_stretches(const Block *b, const Room *room, int64_t r, int64_t rows, int64_t unit, int64_t units,
                              Stretch *to) {
  const Product *p = b->side->of;
  int64_t values = least(2 * units, p->k - 2 * unit), deep = values / 32, rest = values % 32, ld = SIDE * sides(units);
  if (!stands_for_tiles(p)) {
    to[0] = (Stretch){.a = room->left + r * ld, .lda = ld, .deep = sides(units)};
    return 1;
  }
  if (rows % SIDE) {
    pack_lines(p, b->row + r, rows, unit, sides(units), room->left, ld);
    to[0] = (Stretch){.a = room->left, .lda = ld, .deep = sides(units)};
    return 1;
  }
  to[0] = (Stretch){.a = value_at(p->left, b->row + r, 2 * unit, BF16), .lda = p->left.row / 2, .deep = deep};
  if (!rest) return 1;
  pack_lines(p, b->row + r, rows, unit + SIDE * deep, 1, room->edge, SIDE);
  to[1] = (Stretch){.a = room->edge, .lda = SIDE, .deep = 1};
  return deep ? 2 : (to[0] = to[1], 1);
}

// The addends' stretches for the same rows; those that these rows or the block's columns do not meet are left out.
static int64_t term_stretches(const Block *b, const Room *room, int64_t r, int64_t rows, const Side **sides_of,
                              Stretch *to) {
  int64_t found = 0, used = 0;
  for (int64_t t = 0; t < b->count; t++) {
    const Product *p = b->terms[t].of;
    int64_t row = b->row + r - p->out.row, deep = sides(steps_of(p));
    if (row >= p->m || row + rows <= 0 || !deep) continue;
    if (p->out.column >= b->column + b->columns || p->out.column + p->n <= b->column) continue;
    float *lines = room->lines + used;
    pack_lines(p, row, rows, 0, deep, lines, SIDE * deep);
    used += SIDE * sides(rows) * SIDE * deep;
    sides_of[found] = b->terms + t;
    to[found++] = (Stretch){.a = lines, .lda = SIDE * deep, .deep = deep};
  }
  return found;
}

// Which of the addends' stretches meet the tiles of columns [tile, tile + wide) of the product's out, and where. An
// addend that meets some of them and not all has its own edge: those tiles are added apart.
static int64_t meeting(const Side *side, int64_t tile, int64_t wide, Stretch *to) {
  const Product *p = side->of;
  int64_t first = p->out.column / SIDE, tiles = sides(p->n + side->before), deep = sides(steps_of(p));
  if (tile < first || tile + wide > first + tiles) return 0;
  to->b = side->packed + (tile - first) * deep * SIDES;
  to->ldb = SIDE, to->across = deep * SIDES;
  return 1;
}

static void finish_block(const Block *b, int64_t r, int64_t rows, int64_t c, int64_t columns, const float *sums,
                         int64_t ld) {
  Piece piece = {b->side->of, b->alpha, b->row, b->rows, b->column, b->columns};
  finish_rows(&piece, r, rows, c, columns, sums, ld);
}

// One block of the summed axis, for all rows and columns.
static void multiply_block(const Block *b, const Room *room, const float *right, int64_t across, int64_t unit,
                           int64_t units, int keep) {
  const Product *p = b->side->of;
  int64_t width = sides(b->columns), ld = SIDE * width, tall = width == 1 ? 4 : 2;
  int last = unit + units >= steps_of(p);
  for (int64_t r = 0; r < b->rows; r += SIDE * tall) {
    int64_t rows = least(SIDE * tall, b->rows - r), high = sides(rows), per = high == 1 ? 4 : high == 2 ? 2 : 1;
    Stretch own[2], others[MOST_TERMS], all[2 + MOST_TERMS];
    const Side *whose[MOST_TERMS];
    int64_t mine = left_stretches(b, room, r, rows, unit, units, own);
    int64_t terms = last ? term_stretches(b, room, r, rows, whose, others) : 0;
    for (int64_t t = 0, wide; t < width; t += wide) {
      wide = least(per, width - t);
      int64_t count = 0, apart[MOST_TERMS], lone = 0;
      for (int64_t i = 0, at = 0; i < mine; at += own[i++].deep) {
        all[count] = own[i];
        all[count].b = right + t * across + at * SIDES, all[count].ldb = SIDE, all[count++].across = across;
      }
      for (int64_t i = 0; i < terms; i++) {
        all[count] = others[i];
        if (meeting(whose[i], b->column / SIDE + t, wide, all + count)) count++;
        else apart[lone++] = i;
      }
      float *sums = keep ? room->sums + r * ld + SIDE * t : room->few;
      int64_t by = keep ? ld : SIDE * wide;
      multiply_tiles(high, wide, all, count, sums, by, unit > 0);
      for (int64_t i = 0; i < lone; i++)
        for (int64_t w = 0; w < wide; w++) {
          Stretch one = others[apart[i]];
          if (meeting(whose[apart[i]], b->column / SIDE + t + w, 1, &one))
            multiply_tiles(high, 1, &one, 1, sums + SIDE * w, by, 1);
        }
      if (last && p->out.column == 1)
        finish_block(b, r, rows, SIDE * t, least(SIDE * wide, b->columns - SIDE * t), sums, by);
    }
  }
}

static void run_block(const Block *b, const Room *room) {
  const Product *p = b->side->of;
  int64_t all = steps_of(p), width = sides(b->columns);
  int keep = holds_sums(p);
  if (!all) {
    memset(room->sums, 0, SIDE * sides(b->rows) * SIDE * width * 4);
    if (p->out.column == 1) finish_block(b, 0, b->rows, 0, b->columns, room->sums, SIDE * width);
  }
  for (int64_t unit = 0; unit < all; unit += DEEP) {
    int64_t units = least(DEEP, all - unit), deep = sides(units), across = deep * SIDES;
    const float *right = room->right;
    if (b->side->packed) {
      across = sides(all) * SIDES;
      right = b->side->packed + b->column / SIDE * across + unit / SIDE * SIDES;
    } else {
      for (int64_t t = 0; t < width; t++)
        for (int64_t d = 0; d < deep; d++)
          pack_tile(b->side, b->column + SIDE * t, unit + SIDE * d, room->right + t * across + d * SIDES);
    }
    if (!stands_for_tiles(p)) pack_lines(p, b->row, b->rows, unit, deep, room->left, SIDE * deep);
    multiply_block(b, room, right, across, unit, units, keep);
  }
  if (p->out.column != 1) {
    Piece piece = {p, b->alpha, b->row, b->rows, b->column, b->columns};
    finish_turned(&piece, room->sums, SIDE * width);
  }
}

// ---- all of them ---------------------------------------------------------------------------------------------------

// The products of bf16 and their addends as sides, and as pieces; how many pieces, and how many floats are packed before
// them. Where `blocks` is NULL they are only counted.
static int64_t cut_blocks(const Product *products, const double *alphas, int64_t count, Side *sides_of, Block *blocks,
                          float *packed, int64_t *floats) {
  int64_t found = 0, used = 0;
  for (int64_t i = 0, next; i < count; i = next) {
    const Product *p = products + i;
    next = i + 1 + p->terms;
    if (p->kind != BF16) continue;
    for (int64_t j = i; j < next; j++) {
      const Product *q = products + j;
      int64_t before = j > i ? q->out.column % SIDE : 0, size = sides(q->n + before) * sides(steps_of(q)) * SIDES;
      int shared = j > i || q->m > MANY;
      float *at = shared ? take(packed, &used, size) : NULL;
      sides_of[j] = (Side){q, j > i ? (float)alphas[j] : 1, before, at};
    }
    // a side's alpha is for what is packed; the product's own factor waits until its sums are rounded
    int64_t high = p->m > HIGH ? HIGH : most(p->m, 1), broad = p->m > MANY ? BROAD : BROAD / 4;
    for (int64_t r = 0; r < p->m; r += high)
      for (int64_t c = 0; c < p->n; c += broad, found++)
        if (blocks)
          blocks[found] = (Block){sides_of + i, sides_of + i + 1, (float)alphas[i], p->terms, r,
                                  least(high, p->m - r), c, least(broad, p->n - c)};
  }
  *floats = used;
  return found;
}

// The tiles of one column of tiles.
static void pack_side(const Side *side, int64_t tile) {
  int64_t deep = sides(steps_of(side->of));
  for (int64_t d = 0; d < deep; d++)
    pack_tile(side, tile * SIDE - side->before, SIDE * d, side->packed + (tile * deep + d) * SIDES);
}

static int run_blocks(const Product *products, const double *alphas, int64_t count, int64_t threads) {
  int64_t floats, found, tiles = 0;
  Side *all = malloc(most(count, 1) * sizeof *all);
  if (!all) return 1;
  found = cut_blocks(products, alphas, count, all, NULL, NULL, &floats);
  if (!found) {
    free(all);
    return 0;
  }
  threads = least(threads, found);
  Room room;
  Block *blocks = malloc(found * sizeof *blocks);
  float *packed = aligned_alloc(64, most(floats, 16) * 4), *arena = NULL;
  int64_t each = 0;
  if (blocks && packed) {
    cut_blocks(products, alphas, count, all, blocks, packed, &floats);
    each = room_of(blocks, found, NULL, &room);
    arena = aligned_alloc(64, threads * each * 4);
  }
  if (arena) {
    amx_permitted();
    for (int64_t i = 0; i < count; i++)
      if (products[i].kind == BF16 && all[i].packed) tiles += sides(products[i].n + all[i].before);
#pragma omp parallel num_threads(threads)
    {
      Room own;
      room_of(blocks, found, arena + omp_get_thread_num() * each, &own);
      amx_begin();
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tiles; t++) {
        int64_t i = 0, tile = t;
        for (;; i++) {
          if (products[i].kind != BF16 || !all[i].packed) continue;
          int64_t its = sides(products[i].n + all[i].before);
          if (tile < its) break;
          tile -= its;
        }
        pack_side(all + i, tile);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < found; i++) run_block(blocks + i, &own);
      amx_end();
    }
  }
  int none = !arena;
  free(all);
  free(blocks);
  free(packed);
  free(arena);
  return none;
}
