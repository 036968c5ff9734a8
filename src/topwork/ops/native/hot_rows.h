// What the rows of a feed-forward layer give to its terms' gradients, a few rows at a time while a core's cache has
// them:
//
//     G = round(s dgate B), dup alike        S' dgate and S' dup, for B's gradients, G' h, for that of down's A
//
// Products of whole tensors read each of dgate, dup and h from memory once more for either. Rows are summed in stripes
// that begin with a term, or behind so many rows, and stripes in their order: neither the number of threads nor other
// adapters' rows change a sum. G is what its product is to the bit.

#pragma once
#include "terms.h"

#ifdef AMX

enum {
  HOT = 64,             // rows of a step
  DEEP = HOT / 32,      // tiles of them along the summed axis
  STRIPE = 256,         // rows that are summed one step after the other
  MOST_SUMS = 2 << 20,  // floats of all stripes' sums
  AT_ONCE = 8,          // tiles of pairs, which should stay in the first cache
  LEFTS = 8,            // tiles that meet them
};

// A term as a stripe has it.
typedef struct {
  const Term *of;
  int64_t part, tiles;  // of sixteen ranks
  int64_t b, sums;      // where B stands, packed into tiles; where in a stripe's sums [16 tiles, f] its own are
} HotTerm;

typedef struct {
  HotTerm *terms;
  int64_t *begins;                  // rows with which stripes begin
  int64_t count, f, stripes, each;  // each: floats of a stripe's sums
  int64_t room;                     // of a thread's memory
  float *packed, *sums, *rooms;
} HotRows;

static int64_t most_stripes(const Call *c) { return c->rows / STRIPE + c->count + 1; }

// Floats that are needed for all of it, or 0 where that is too many or f fills no tiles; h is what `part` is given.
static int64_t plan_hot_rows(const Call *c, Group gates, int part, int64_t f, HotRows *h) {
  int64_t packed = 0;
  h->f = f, h->count = 0, h->each = 0, h->stripes = 0;
  for (const Term *t = c->terms; t < c->terms + c->count; t++) {
    if (!is_of(t, gates) && t->part != part) continue;
    HotTerm *own = h->terms + h->count++;
    *own = (HotTerm){t, t->part, sides(t->r), packed, h->each};
    if (t->part != part) packed += own->tiles * SIDE * f / 2;
    h->each += own->tiles * SIDE * f;
  }
  for (int64_t row = 0, next; row < c->rows; row = next) {
    h->begins[h->stripes++] = row, next = least(c->rows, row + STRIPE);
    for (const HotTerm *t = h->terms; t < h->terms + h->count; t++)
      if (t->of->start > row) next = least(next, t->of->start);
  }
  h->room = HOT * f / 2 + (1 + (AT_ONCE + LEFTS) * DEEP) * SIDES + HOT * SIDE;
  if (f % 32 || !h->count || !h->stripes || h->stripes * h->each > MOST_SUMS) return 0;
  return packed + h->stripes * h->each + c->threads * h->room;
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
        multiply_tiles(1, wide, &part, 1, sums + lefts->sums[i] + SIDE * (n + m), h->f, 1);
      }
  }
  lefts->count = 0;
}

// G of `count` rows of x, which stand where `lines` are unless these fill no tiles.
static void slopes_of_rows(const HotRows *h, const HotTerm *t, Values x, int64_t row, int64_t count, float *lines,
                           float *sums) {
  const char *at = x.at + 2 * row * x.by;
  int64_t by = x.by / 2, r = t->of->r;
  if (count < HOT) {
    memset(lines, 0, HOT * h->f * 2);
    for (int64_t i = 0; i < count; i++) memcpy((char *)lines + 2 * i * h->f, at + 2 * i * x.by, 2 * h->f);
    at = (const char *)lines, by = h->f / 2;
  }
  for (int64_t tile = 0; tile < t->tiles; tile++) {
    Stretch part = {at, h->packed + t->b + tile * SIDE * h->f / 2, by, SIDE, 0, h->f / 32};
    multiply_tiles(HOT / SIDE, 1, &part, 1, sums, SIDE, 0);
    for (int64_t i = 0; i < count; i++) {
      char *to = t->of->g + 2 * ((row + i - t->of->start) * r + SIDE * tile);
      for (int64_t n = 0, stop = least(SIDE, r - SIDE * tile); n < stop; n += LANES) {
        int64_t some = least(LANES, stop - n);
        store(to, n, some, BF16, load(sums + SIDE * i, n, some, F32) * (float)t->of->scaling);
      }
    }
  }
}

// `count` rows from `row` on, all of which have the same terms; x: the gates' gradients and h.
static void hot_step(const HotRows *h, Group gates, const Values *x, int64_t row, int64_t count, float *room,
                     float *sums) {
  float *lines = room, *spare = lines + HOT * h->f / 2, *products = spare + SIDES, *pairs = products + HOT * SIDE;
  Lefts lefts = {pairs + AT_ONCE * SIDES * DEEP};
  for (int64_t number = 0; number < 3; number++) {
    Right right = {rows_of(x[number], row), count, h->f, BF16};
    for (const HotTerm *t = h->terms; t < h->terms + h->count; t++) {
      if (t->part != gates.first + number || row < t->of->start || row >= t->of->stop) continue;
      if (number < 2) slopes_of_rows(h, t, x[number], row, count, lines, products);
      const char *left = (number < 2 ? t->of->s : t->of->g) + 2 * (row - t->of->start) * t->of->r;
      for (int64_t tile = 0; tile < t->tiles; tile++) {
        turn_rows(left, t->of->r, SIDE * tile, count, spare, lefts.tiles + lefts.count * SIDES * DEEP);
        lefts.sums[lefts.count++] = t->sums + SIDE * tile * h->f;
        if (lefts.count == LEFTS) add_rows(h, &lefts, &right, pairs, sums);
      }
    }
    if (lefts.count) add_rows(h, &lefts, &right, pairs, sums);
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

static void pack_b(const HotRows *h, const HotTerm *t, int64_t tile) {
  Right b = {dense(t->of->b, t->of->r), h->f, t->of->r, F32};
  pack_tiles(&b, 1, SIDE * tile, 1, 0, h->f / 32, h->packed + t->b + tile * SIDE * h->f / 2, 0);
}

// The gradient of a term's B, or of its A, from the stripes' sums: some of its columns.
static void add_stripes(const HotRows *h, const HotTerm *t, int of_a, int64_t from, int64_t until) {
  for (int64_t j = 0; j < t->of->r; j++)
    for (int64_t n = from; n < until; n += LANES) {
      const float *at = h->sums + t->sums + j * h->f + n;
      vecf sum = vloadf(at);
      for (int64_t s = 1; s < h->stripes; s++) sum += vloadf(at + s * h->each);
      if (of_a) vstoref((float *)t->of->da + j * h->f + n, sum);
      else
        for (int64_t i = 0; i < LANES; i++)
          ((float *)t->of->db)[(n + i) * t->of->r + j] = (float)t->of->scaling * sum[i];
    }
}

#endif
