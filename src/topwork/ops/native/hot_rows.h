// What the rows of a feed-forward layer give to its terms' gradients going backward, a few rows at a time while a core's
// cache has them:
//
//     G = round(s dgate B), dup alike        S' dgate and S' dup, for B's gradients, G' h, for that of down's A
//
// Products of whole tensors read each of dgate, dup and h from memory once more for either. Rows are summed in stripes
// that begin with a term, or behind so many rows, and stripes in their order: neither the number of threads nor other
// adapters' rows change a sum.

#pragma once
#include "narrow.h"

enum {
  DEEP = HOT / 32,      // tiles of a step's rows along the summed axis
  STRIPE = 256,         // rows that are summed one step after the other
  MOST_SUMS = 2 << 20,  // floats of all stripes' sums
  AT_ONCE = 8,          // tiles of pairs, which should stay in the first cache
  BAND = 64,            // columns of sums that stand together: rows as long as f would share their places in a cache
  LEFTS = 8,            // tiles that meet them
};

// A term as a stripe has it.
typedef struct {
  const Term *of;
  int64_t part, tiles;  // of sixteen ranks
  int64_t sums;         // where in a stripe's sums its own are: [tiles][f / BAND][16][BAND]
} HotTerm;

typedef struct {
  HotTerm *terms;
  int64_t *begins;                  // rows with which stripes begin
  Narrows slopes;                   // the gates' G
  int64_t count, f, stripes, each;  // each: floats of a stripe's sums
  int64_t tall;                     // floats of a tile's
  int64_t room;                     // of a thread's memory
  float *packed, *sums, *rooms;
} HotRows;

static int64_t most_stripes(const Call *c) { return c->rows / STRIPE + c->count + 1; }

// Floats that are needed for all of it, or 0 where that is too many or f fills no tiles; h is what `part` is given.
static int64_t plan_hot_rows(const Call *c, Group gates, Values dboth, int part, int64_t f, HotRows *h) {
  h->f = f, h->count = 0, h->each = 0, h->stripes = 0, h->tall = SIDE * up(f, BAND);
  for (const Term *t = c->terms; t < c->terms + c->count; t++) {
    if (!is_of(t, gates) && t->part != part) continue;
    HotTerm *own = h->terms + h->count++;
    *own = (HotTerm){t, t->part, sides(t->r), h->each};
    h->each += own->tiles * h->tall;
  }
  for (int64_t row = 0, next; row < c->rows; row = next) {
    h->begins[h->stripes++] = row, next = least(c->rows, row + STRIPE);
    for (const HotTerm *t = h->terms; t < h->terms + h->count; t++)
      if (t->of->start > row) next = least(next, t->of->start);
  }
  if (!plan_narrow(c, gates, 1, dboth, &h->slopes)) return 0;
  h->room = HOT * f / 2 + (1 + (AT_ONCE + LEFTS) * DEEP) * SIDES + h->slopes.room;
  if (f % 32 || !h->count || !h->stripes || h->stripes * h->each > MOST_SUMS) return 0;
  return h->slopes.packed + h->stripes * h->each + c->threads * h->room;
}

// Rows of 16 bits [count, r] from column `from` on, turned into tiles [16, HOT], with zeros beyond them.
static void turn_rows(const char *at, int64_t r, int64_t from, int64_t count, float *spare, float *to) {
  int64_t some = least(SIDE, r - from);
  for (int64_t d = 0; d < DEEP; d++) {
    memset(spare, 0, SIDES * sizeof *spare);
    for (int64_t row = 32 * d, s = 0; row < least(count, 32 * (d + 1)); row += 2, s++) {
      const uint16_t *upper = (const uint16_t *)at + row * r + from;
      pair_rows(upper, row + 1 < count ? upper + r : NULL, some, spare + SIDE * s);
    }
    transpose_block(spare, SIDE, SIDE, SIDE, to + SIDE * d, SIDE * DEEP);
  }
}

// Tiles of left sides, turned, and where in a stripe's sums their products with the same rows are added.
typedef struct {
  float *tiles;
  int64_t sums[LEFTS], count;
} Lefts;

// Where the first of a tile's sums in a column is.
static int64_t band_of(int64_t column) { return column / BAND * SIDE * BAND + column % BAND; }

// sums [16, f] += left x for all of them; x packed into pairs a few tiles at a time, which stay in the first cache.
static void add_rows(const HotRows *h, Lefts *lefts, const Right *x, float *pairs, float *sums) {
  int64_t all = h->f / SIDE;
  for (int64_t n = 0; n < all; n += AT_ONCE) {
    int64_t some = least(AT_ONCE, all - n);
    pack_tiles(x, 1, SIDE * n, some, 0, DEEP, pairs, SIDES * DEEP);
    for (int64_t i = 0; i < lefts->count; i++)
      for (int64_t m = 0, wide; m < some; m += wide) {
        const float *left = lefts->tiles + i * SIDES * DEEP, *right = pairs + m * SIDES * DEEP;
        Stretch part = {left, right, SIDE * DEEP, SIDE, SIDES * DEEP, DEEP};
        wide = some - m < 4 ? 2 : 4;
        multiply_tiles(1, wide, &part, 1, sums + lefts->sums[i] + band_of(SIDE * (n + m)), BAND, 1);
      }
  }
  lefts->count = 0;
}

// A thread's memory for a step: h [HOT, f], which nobody needs any more behind it, and what the products need.
typedef struct {
  char *h;
  float *spare, *pairs, *lefts, *narrow;
} HotRoom;

static HotRoom hot_room(const HotRows *h, int64_t thread) {
  float *spare = h->rooms + thread * h->room + HOT * h->f / 2, *pairs = spare + SIDES;
  float *lefts = pairs + AT_ONCE * SIDES * DEEP;
  return (HotRoom){(char *)(h->rooms + thread * h->room), spare, pairs, lefts, lefts + LEFTS * SIDES * DEEP};
}

// `count` rows from `row` on, all of which have the same terms; x: the gates' gradients, and h, from there.
static void hot_step(const HotRows *h, Group gates, const Values *x, int64_t row, int64_t count, const HotRoom *room,
                     float *sums) {
  Lefts lefts = {room->lefts};
  for (int64_t i = 0; i < h->slopes.count; i++)
    multiply_narrow(h->slopes.terms + i, h->packed, row, count, room->narrow);
  for (int64_t number = 0; number < 3; number++) {
    Right right = {rows_of(x[number], 0), count, h->f, BF16};
    for (const HotTerm *t = h->terms; t < h->terms + h->count; t++) {
      if (t->part != gates.first + number || row < t->of->start || row >= t->of->stop) continue;
      const char *left = (number < 2 ? t->of->s : t->of->g) + 2 * (row - t->of->start) * t->of->r;
      for (int64_t tile = 0; tile < t->tiles; tile++) {
        turn_rows(left, t->of->r, SIDE * tile, count, room->spare, lefts.tiles + lefts.count * SIDES * DEEP);
        lefts.sums[lefts.count++] = t->sums + tile * h->tall;
        if (lefts.count == LEFTS) add_rows(h, &lefts, &right, room->pairs, sums);
      }
    }
    if (lefts.count) add_rows(h, &lefts, &right, room->pairs, sums);
  }
}

// The first row behind `row` at which a term begins or ends, or a step does.
static int64_t next_step(const HotRows *h, int64_t row, int64_t until) {
  int64_t next = least(until, row + HOT);
  for (const HotTerm *t = h->terms; t < h->terms + h->count; t++) {
    if (t->of->start > row) next = least(next, t->of->start);
    if (t->of->stop > row) next = least(next, t->of->stop);
  }
  return next;
}

// The gradient of a term's B, or of its A, from the stripes' sums: some of its columns.
static void add_stripes(const HotRows *h, const HotTerm *t, int of_a, int64_t from, int64_t until) {
  for (int64_t j = 0; j < t->of->r; j++)
    for (int64_t n = from; n < until; n += LANES) {
      const float *at = h->sums + t->sums + j / SIDE * h->tall + band_of(n) + j % SIDE * BAND;
      vecf sum = vloadf(at);
      for (int64_t s = 1; s < h->stripes; s++) sum += vloadf(at + s * h->each);
      if (of_a) vstoref((float *)t->of->da + j * h->f + n, sum);
      else
        for (int64_t i = 0; i < LANES; i++)
          ((float *)t->of->db)[(n + i) * t->of->r + j] = (float)t->of->scaling * sum[i];
    }
}
