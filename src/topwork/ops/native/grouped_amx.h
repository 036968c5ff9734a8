// Products of bf16 on AMX's tiles, for grouped.c. As there, a piece is a block of rows and columns of one product, and
// goes along the summed axis in blocks. What differs:
//
// The right side is packed into tiles, [16 columns][16 units][16][16], one behind the other: some columns of it, a panel,
// by the thread that multiplies it with all rows, so that it never leaves the core's own cache. A thread that has none
// left helps with another's, and packs that for itself. Where the summed axis is too long for that, a panel is packed a
// slab of it at a time, and the sums of many rows are in the cache meanwhile. The left side is read where it stands,
// whatever its distance of rows, but for what fills no tile.

#pragma once
#include "held.h"
#include "right_amx.h"

#define LONG 1024      // units of the summed axis, beyond which it goes in slabs
#define SLAB 512       // units of a slab: a multiple of 16
#define TALL_SUMS 1024  // rows whose sums are held meanwhile
#define BROAD_SUMS 288  // and their columns
#define HIGH 128       // rows of a piece elsewhere
#define PANEL 262144   // floats of a panel, which should stay in the core's second cache
#define NARROW 128     // columns of a panel, at least, where it is cut for the threads
#define LITTLE_PACKED 65536  // floats of a right side that is not cut for the threads
#define WORTH 256      // rows left of a panel for which another thread packs it too
#define GROUP 4         // tiles of columns that go along the summed axis together
#define AHEAD 2         // blocks of rows from those that are multiplied to those that are asked of memory
#define MOST_STEPS 9    // tiles of the summed axis that they go at a time
#define FEW 384        // columns of a panel with few rows: the longer what is read of a row, the faster memory hands it over
#define SHALLOW 128    // units of a slab with few rows
#define FEWEST 64       // of them, where there would be too few pieces for the threads
#define MANY 64        // rows from which a panel is packed once for all

// A product may have addends (so many lines behind it in the table): products whose sums join its own before these are
// rounded, behind all of its own. An addend's `out` is no address but its place in the product's out, `row` and `column`,
// a multiple of 16; so is its end, if it is not the product's.
//
// Rows beside an addend's that share tiles with it go along as zeros, and zero times what is not finite is NaN. So an addend
// whose right side is not finite, of some of the product's rows, has no place here: its line's `add` tells.

// A product or an addend; an addend's right side is packed before all pieces, for all of them.
typedef struct {
  const Product *of;
  float alpha;  // a product's waits until its sums are rounded, an addend's is packed with its right side
  int addend, some_rows;  // some_rows: it has not all of the product's
  int wild;               // an addend of some rows whose right side is not finite
  int64_t at;  // in Room.addends: [tiles of columns][tiles of units][16][16]
} Side;

// ---- the right side ------------------------------------------------------------------------------------------------

static inline Right right_of(const Product *p) { return (Right){p->right, p->k, p->n, p->right_kind}; }

// Tiles of a right side, as it lies together in memory: rows one after the other, or a pair of tiles of columns.
static void pack_panel(const Product *p, int64_t column, int64_t wide, int64_t unit, int64_t deep, float *to) {
  int64_t across = deep * SIDES;
  Right right = right_of(p);
  if (p->right.column == 1) pack_tiles(&right, 1, column, wide, unit, deep, to, across);
  else
    for (int64_t t = 0; t < wide; t += 2)
      pack_tiles(&right, 1, column + SIDE * t, least(2, wide - t), unit, deep, to + t * across, across);
}

// ---- the left side -------------------------------------------------------------------------------------------------

// Rows [row, row + rows) and units [unit, unit + 16 deep) to rows of `ld`, up to whole tiles; zeros beyond the left side,
// and before it.
static void pack_lines(const Product *p, int64_t row, int64_t rows, int64_t unit, int64_t deep, float *to, int64_t ld) {
  int64_t count = least(32 * deep, p->k - 2 * unit), first = most(0, -row), high = sides(rows);
  rows = least(rows, p->m - row);
  if (p->left.column == 1) {
    for (int64_t r = 0; r < SIDE * high; r++) {
      char *line = (char *)(to + r * ld);
      int64_t there = r >= first && r < rows ? 2 * count : 0;
      if (there) memcpy(line, value_at(p->left, row + r, 2 * unit, BF16), there);
      memset(line + there, 0, 64 * deep - there);
    }
    return;
  }
  float spare[16 * 16] __attribute__((aligned(64)));
  for (int64_t r = 0; r < SIDE * high; r += SIDE)
    for (int64_t d = 0; d < deep; d++) {
      int64_t skip = least(SIDE, most(0, first - r)), some = least(SIDE, rows - r) - skip;
      memset(spare, 0, sizeof spare);
      for (int64_t s = 0; s < least(SIDE, (count - 32 * d + 1) / 2) && some > 0; s++) {
        int64_t k = 2 * (unit + SIDE * d + s);
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
  const Side *side;
  int64_t row, rows, column, columns;
} Block;

// Some columns of a product, whose rows are taken in pieces; `next` is the first that nobody has taken.
typedef struct {
  const Side *side;
  int64_t column, columns, high, next;
} Panel;

typedef struct {
  float *left, *edge, *lines, *right, *sums;
  const float *addends;
} Room;

enum { TALLEST = 4 * SIDE, MOST_ADDENDS = 126 };  // rows of the tallest shape of sums; addends of a product

// Whether a panel is packed once, with all of its units, and not in slabs for every piece.
static int packs_once(const Product *p) { return p->m > MANY && steps_of(p) <= LONG; }

// Units of the summed axis in a block.
static int64_t block_units(const Product *p) {
  if (packs_once(p)) return LONG;
  return p->m > MANY ? SLAB : SHALLOW;
}

// Whether the sums of all of a block's columns are kept until its last unit; else those of a group are.
static int holds_sums(const Product *p) {
  return steps_of(p) > block_units(p) || p->out.column != 1 || !p->k;
}

// The parts of an arena that are large enough for a piece of any panel; how long it must be.
static int64_t room_of(const Panel *panels, int64_t count, float *arena, Room *room) {
  int64_t left = 0, lines = 0, right = 0, sums = 0, used = 0;
  for (int64_t i = 0; i < count; i++) {
    const Panel *panel = panels + i;
    const Product *p = panel->side->of;
    int64_t deep = SIDE * sides(least(block_units(p), steps_of(p))), columns = SIDE * sides(panel->columns);
    if (!stands_for_tiles(p)) left = most(left, SIDE * sides(panel->high) * deep);
    else left = most(left, TALLEST * deep);
    int64_t units = 0;
    for (int64_t t = 1; t <= p->addends; t++) units += SIDE * sides(steps_of(p + t));
    lines = most(lines, TALLEST * units);
    right = most(right, columns * deep);
    sums = most(sums, holds_sums(p) ? SIDE * sides(panel->high) * columns : TALLEST * SIDE * GROUP);
  }
  room->left = take(arena, &used, left);
  room->edge = take(arena, &used, TALLEST * SIDE);
  room->lines = take(arena, &used, lines);
  room->right = take(arena, &used, right);
  room->sums = take(arena, &used, sums);
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
  if (b->row + r + (AHEAD + 1) * rows <= p->m) to[0].ahead = (const char *)to[0].a + 4 * AHEAD * rows * to[0].lda;
  if (!rest) return 1;
  pack_lines(p, b->row + r, rows, unit + SIDE * deep, 1, room->edge, SIDE);
  to[1] = (Stretch){.a = room->edge, .lda = SIDE, .deep = 1};
  return deep ? 2 : (to[0] = to[1], 1);
}

static void finish_block(const Block *b, int64_t r, int64_t rows, int64_t c, int64_t columns, const float *sums,
                         int64_t ld) {
  Piece piece = {b->side->of, b->side->alpha, b->row, b->rows, b->column, b->columns};
  finish_rows(&piece, r, rows, c, columns, sums, ld);
}

// Up to TALLEST rows of a block, as stretches of its summed axis: what stands, and what had to be packed.
typedef struct {
  Stretch own[2];
  int64_t count, steps;  // steps: tiles along the summed axis
  int64_t rows, wide;    // wide: tiles of the block's columns, which share the asking ahead
} Lines;

// The steps [from, stop) of these rows against the right side's tiles from `right` on.
static int64_t cut_stretches(const Lines *l, int64_t from, int64_t stop, const float *right, int64_t across,
                             Stretch *to) {
  int64_t count = 0;
  for (int64_t i = 0, at = 0; i < l->count; at += l->own[i++].deep) {
    int64_t first = most(0, from - at), deep = least(l->own[i].deep, stop - at) - first;
    if (deep <= 0) continue;
    to[count] = l->own[i];
    to[count].a = (const char *)l->own[i].a + first * 4 * SIDE, to[count].deep = deep;
    if (to[count].ahead) to[count].ahead += first * 4 * SIDE;
    to[count].b = right + (at + first) * SIDES, to[count].ldb = SIDE, to[count++].across = across;
  }
  return count;
}

// Of as many rows as these, further on, the part that is asked for while the tiles [t, t + wide) are multiplied.
static void ask_ahead(const Lines *l, int64_t t, int64_t wide, Stretch *to) {
  int64_t first = l->rows * t / l->wide;
  if (!to->ahead) return;
  to->ahead += 4 * first * to->lda, to->asked = l->rows * (t + wide) / l->wide - first;
}

// An addend's rows as a stretch, and the tiles of a block's columns, [first, stop), that it is added to.
typedef struct {
  Stretch lines;
  int64_t first, stop;
} Added;

// The addends that these rows and the block's columns meet.
static int64_t added_lines(const Block *b, const Room *room, int64_t r, int64_t rows, Added *to) {
  int64_t found = 0, used = 0;
  for (int64_t t = 1; t <= b->side->of->addends; t++) {
    const Side *side = b->side + t;
    const Product *p = side->of;
    int64_t row = b->row + r - p->out.row, deep = sides(steps_of(p)), first = (p->out.column - b->column) / SIDE;
    if (row >= p->m || row + rows <= 0 || !deep || first >= sides(b->columns) || first + sides(p->n) <= 0) continue;
    float *lines = room->lines + used;
    pack_lines(p, row, rows, 0, deep, lines, SIDE * deep);
    used += SIDE * sides(rows) * SIDE * deep;
    to[found++] = (Added){{lines, room->addends + side->at, SIDE * deep, SIDE, deep * SIDES, deep}, first,
                          first + sides(p->n)};
  }
  return found;
}

// As many of the tiles from `t` on as all addends meet alike; those addends' stretches.
static int64_t added_stretches(const Added *added, int64_t count, int64_t t, int64_t *wide, Stretch *to) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i++) {
    if (added[i].first > t) *wide = least(*wide, added[i].first - t);
    else if (added[i].stop > t) *wide = least(*wide, added[i].stop - t);
    if (added[i].first > t || added[i].stop <= t) continue;
    to[found] = added[i].lines;
    to[found++].b += (t - added[i].first) * added[i].lines.across;
  }
  return found;
}

// The columns of tiles [from, until) of a block for these rows. `sums` are those of the tile `from`, rows of `ld`.
static void multiply_group(const Lines *l, const Added *added, int64_t addends, const float *right, int64_t across,
                           int64_t from, int64_t until, float *sums, int64_t ld, int add) {
  int64_t high = sides(l->rows), per = high == 1 ? 4 : high == 2 ? 2 : 1;
  int64_t cuts = (l->steps + MOST_STEPS - 1) / MOST_STEPS, each = (l->steps + cuts - 1) / cuts;
  for (int64_t step = 0; step < l->steps; step += each) {
    int64_t stop = least(step + each, l->steps);
    for (int64_t t = from, wide; t < until; t += wide) {
      Stretch part[2 + MOST_ADDENDS];
      wide = least(per, until - t);
      int64_t count = cut_stretches(l, step, stop, right + t * across, across, part);
      int64_t own = count;
      if (stop == l->steps) count += added_stretches(added, addends, t, &wide, part + count);
      for (int64_t i = 0; i < own; i++) ask_ahead(l, t, wide, part + i);
      multiply_tiles(high, wide, part, count, sums + SIDE * (t - from), ld, add || step);
    }
  }
}

// One block of the summed axis, for all rows and columns. A few columns at a time go a few steps at a time, so that the
// left side's tiles, and the sums, are in the first cache for as long as they are used again.
static void multiply_block(const Block *b, const Room *room, const float *right, int64_t across, int64_t unit,
                           int64_t units, int keep) {
  const Product *p = b->side->of;
  int64_t width = sides(b->columns), tall = SIDE * (width == 1 ? 4 : 2), ld = SIDE * (keep ? width : GROUP);
  int last = unit + units >= steps_of(p);
  Added added[MOST_ADDENDS];
  Lines l;
  for (int64_t r = 0; r < b->rows; r += tall) {
    int64_t rows = least(tall, b->rows - r);
    int64_t addends = last ? added_lines(b, room, r, rows, added) : 0;
    l.count = left_stretches(b, room, r, rows, unit, units, l.own);
    l.steps = l.own[0].deep + (l.count == 2 ? l.own[1].deep : 0);
    l.rows = rows, l.wide = width;
    for (int64_t t = 0; t < width; t += GROUP) {
      float *sums = room->sums + (keep ? r * ld + SIDE * t : 0);
      multiply_group(&l, added, addends, right, across, t, least(t + GROUP, width), sums, ld, unit > 0);
      if (last && p->out.column == 1)
        finish_block(b, r, rows, SIDE * t, least(SIDE * GROUP, b->columns - SIDE * t), sums, ld);
    }
  }
}

static void run_block(const Block *b, const Room *room) {
  const Product *p = b->side->of;
  int64_t all = steps_of(p), width = sides(b->columns), longest = block_units(p);
  int keep = holds_sums(p);
  if (!all) {
    memset(room->sums, 0, SIDE * sides(b->rows) * SIDE * width * 4);
    if (p->out.column == 1) finish_block(b, 0, b->rows, 0, b->columns, room->sums, SIDE * width);
  }
  for (int64_t unit = 0; unit < all; unit += longest) {
    int64_t units = least(longest, all - unit), deep = sides(units), across = deep * SIDES;
    if (!packs_once(p)) pack_panel(p, b->column, width, unit, deep, room->right);
    if (!stands_for_tiles(p)) pack_lines(p, b->row, b->rows, unit, deep, room->left, SIDE * deep);
    multiply_block(b, room, room->right, across, unit, units, keep);
  }
  if (p->out.column != 1) {
    Piece piece = {p, b->side->alpha, b->row, b->rows, b->column, b->columns};
    finish_turned(&piece, room->sums, SIDE * width);
  }
}

// ---- a panel -------------------------------------------------------------------------------------------------------

// Pieces of a panel until there are none left, or so few that they are not worth packing what others have packed.
static void run_panel(Panel *panel, const Room *room, int begun) {
  const Product *p = panel->side->of;
  int packed = !packs_once(p);
  if (begun && !packed && p->m - __atomic_load_n(&panel->next, __ATOMIC_RELAXED) < WORTH) return;
  for (;;) {
    int64_t row = __atomic_fetch_add(&panel->next, panel->high, __ATOMIC_RELAXED);
    if (row >= p->m) return;
    if (!packed) pack_panel(p, panel->column, sides(panel->columns), 0, sides(steps_of(p)), room->right);
    packed = 1;
    Block b = {panel->side, row, least(panel->high, p->m - row), panel->column, panel->columns};
    run_block(&b, room);
  }
}

// ---- all of them ---------------------------------------------------------------------------------------------------

// Columns of a product's panels: few enough for the cache, and for all threads to have some; but a right side that is
// packed in no time stays whole, since long rows are written faster than short ones.
static int64_t panel_columns(const Product *p, int64_t threads, int64_t few) {
  if (p->m <= MANY) return few;
  int64_t most_columns = packs_once(p) ? most(1, PANEL / most(SIDE, SIDE * sides(steps_of(p)))) : BROAD_SUMS;
  int64_t need = most(1, (p->n + most_columns - 1) / most_columns);
  int64_t little = packs_once(p) && p->n * SIDE * sides(steps_of(p)) <= LITTLE_PACKED;
  int64_t cuts = little ? 1 : least((need + threads - 1) / threads * threads, most(need, p->n / NARROW));
  return 2 * SIDE * sides((p->n + 2 * cuts - 1) / (2 * cuts));
}

// Rows of a panel's pieces, all alike.
static int64_t piece_rows(const Product *p, int64_t threads, int64_t columns) {
  int64_t panels = (p->n + columns - 1) / columns, pieces = (p->m + HIGH - 1) / HIGH;
  if (p->m > MANY && !packs_once(p) && stands_for_tiles(p))
    pieces = least(pieces, most((p->m + TALL_SUMS - 1) / TALL_SUMS, (threads + panels - 1) / panels));
  return SIDE * sides((p->m + most(pieces, 1) - 1) / most(pieces, 1));
}

// The panels of the products of bf16, written to `panels` where there is room for them; how many, and how many pieces
// and how many floats of packed addends.
static int64_t cut_panels(const Product *products, const double *alphas, int64_t count, int64_t threads, int64_t few,
                          Side *all, Panel *panels, int64_t *pieces, int64_t *floats) {
  int64_t found = 0;
  *floats = *pieces = 0;
  for (int64_t i = 0, next; i < count; i = next) {
    const Product *p = products + i;
    int64_t columns = panel_columns(p, threads, few), high = most(SIDE, piece_rows(p, threads, columns));
    next = i + 1 + p->addends;
    if (p->kind != BF16) continue;
    for (int64_t j = i; j < next; j++) {
      const Product *q = products + j;
      all[j] = (Side){q, (float)alphas[j], j > i, j > i && q->m < p->m, 0, *floats};
      if (all[j].addend) *floats += sides(q->n) * sides(steps_of(q)) * SIDES;
    }
    for (int64_t c = 0; c < p->n; c += columns, found++, *pieces += (p->m + high - 1) / high)
      if (panels) panels[found] = (Panel){all + i, c, least(columns, p->n - c), high, 0};
  }
  return found;
}

// Whether one of `count` units holds a bf16 that is infinite or not a number.
static int not_finite(const float *units, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t both;
    memcpy(&both, units + i, 4);
    found |= ((both & 0x7f80) == 0x7f80) | ((both & 0x7f800000) == 0x7f800000);
  }
  return found;
}

// Pairs of the addends' tiles of columns: how many, or with `to` the one of that number is packed there.
static int64_t pack_addends(Side *all, int64_t count, int64_t number, float *to) {
  int64_t before = 0;
  for (int64_t i = 0; i < count; i++) {
    if (!all[i].addend) continue;
    const Product *p = all[i].of;
    int64_t deep = sides(steps_of(p)), wide = sides(p->n), part = number - before, pairs = (wide + 1) / 2;
    before += pairs;
    if (!to || part >= pairs) continue;
    int64_t pair = least(2, wide - 2 * part), across = deep * SIDES;
    float *at = to + all[i].at + 2 * part * across;
    Right right = right_of(p);
    pack_tiles(&right, all[i].alpha, 2 * SIDE * part, pair, 0, deep, at, across);
    if (all[i].some_rows && not_finite(at, pair * across)) __atomic_store_n(&all[i].wild, 1, __ATOMIC_RELAXED);
    break;
  }
  return before;
}

static int any_wild(const Side *all, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (all[i].wild) return 1;
  return 0;
}

static void run_threads(Side *all, int64_t count, Panel *panels, int64_t found, float *arena, int64_t floats,
                        int64_t each, int64_t threads) {
  int64_t pairs = pack_addends(all, count, 0, NULL), untouched = 0;
#pragma omp parallel num_threads(threads)
  {
    Room room;
    room_of(panels, found, arena + floats + omp_get_thread_num() * each, &room);
    room.addends = arena;
    amx_begin();
    if (pairs) {
#pragma omp for schedule(dynamic, 2)
      for (int64_t t = 0; t < pairs; t++) pack_addends(all, count, t, arena);
    }
    if (!any_wild(all, count)) {
      int64_t i;
      while ((i = __atomic_fetch_add(&untouched, 1, __ATOMIC_RELAXED)) < found) run_panel(panels + i, &room, 0);
      for (i = 0; i < found; i++) run_panel(panels + i, &room, 1);
    }
    amx_end();
  }
}

// The products of bf16 of a table. Before anything was written: 1 when memory ran out, 3 when there are wild addends, whose
// lines then tell.
static int run_blocks(Product *products, const double *alphas, int64_t count, int64_t threads) {
  int64_t floats, pieces, found, few = FEW;
  Side *all = calloc(most(count, 1), sizeof *all);
  Panel *panels = NULL;
  int failed = !all, ours = 0;
  if (all && (found = cut_panels(products, alphas, count, threads, few, all, NULL, &pieces, &floats))) {
    while (pieces < 2 * threads && few > FEWEST)
      found = cut_panels(products, alphas, count, threads, few /= 2, all, NULL, &pieces, &floats);
    if ((panels = malloc(found * sizeof *panels))) {
      Room room;
      cut_panels(products, alphas, count, threads, few, all, panels, &pieces, &floats);  // for as many threads as above
      int64_t each = room_of(panels, found, NULL, &room), some = most(1, least(threads, pieces));
      float *arena = borrow(floats + some * each, &ours);
      if (arena) run_threads(all, count, panels, found, arena, floats, each, some);
      failed = !arena;
      give_back(arena, ours);
    } else {
      failed = 1;
    }
  }
  for (int64_t i = 0; all && !failed && i < count; i++) products[i].add |= all[i].wild;
  if (all && !failed && any_wild(all, count)) failed = 3;
  free(all);
  free(panels);
  return failed;
}
