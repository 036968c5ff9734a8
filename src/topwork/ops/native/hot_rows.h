// What rows give to the gradients of terms, a few rows at a time while a core's cache has them, as soon as they are made:
//
//     G = round(s dy B)        S' dy, for B's gradient        G' x, for A's
//
// As products of whole tensors these read dy and x from memory once more for each. Rows are summed in stripes that
// begin with a term, or behind so many rows, and stripes in their order: neither the number of threads nor other
// adapters' rows change a sum. Where a gradient's stripes would take too much memory it is a product after all.

#pragma once
#include "narrow.h"

#ifndef MOST_SUMS
#define MOST_SUMS (1 << 20)  // floats of a gradient's sums, all stripes
#endif
enum {
  DEEP = HOT / 32,      // tiles of a step's rows along the summed axis
  STRIPE = 192,         // rows that are summed one step after the other
  AT_ONCE = 8,          // tiles of pairs, which should stay in the first cache
  BAND = 64,            // columns of sums that stand together: rows as long as x's would share their places in a cache
  LEFTS = 8,            // tiles that meet them
  MOST_SOURCES = 3,
};

// Rows that meet a group's S, for the gradients of B, or with `of_a` its G.
typedef struct {
  Group group;
  int of_a;
  Values x;           // [rows, ...]; of B's gradients each part has its own columns
  int64_t width;      // of A's
  int in_spare;       // nobody needs x any more behind it: it may be made in a thread's own memory instead
} Source;

// Rows as they are made, whose G, and what they are sources of. With a source that may be in spare memory `make` leaves
// that there, or where there is none in x.
typedef struct {
  Make make;
  const void *of;
  Group slopes;
  Values dy;  // the group's
  Source sources[MOST_SOURCES];
} Stage;

// A gradient that a stage's rows are summed for.
typedef struct {
  const Term *of;
  const Source *from;
  Values x;
  int64_t width, tiles;            // tiles of sixteen ranks
  int64_t tall, each;              // floats of a tile's sums in a stripe, [width / BAND][16][BAND], and of all tiles'
  int64_t first, stripes, at;      // the stripes that it meets, and where the first one's sums are
  int product;                     // it is a product after all
  int drops;                       // its rows lose values
} Sum;

typedef struct {
  const Stage *stage;
  Sum *all;
  int64_t *begins;  // rows with which stripes begin
  Narrows slopes;
  int64_t count, stripes, floats;  // floats: of all sums
  int64_t spare, lossy, room;      // values of a row in spare memory, and of one that loses some; floats of a thread's
  float *packed, *sums, *rooms;
} Hot;

static int64_t most_stripes(const Call *c) { return c->rows / STRIPE + c->count + 1; }

// The gradients that a stage's rows are summed for.
static void find_sums(const Call *c, const Stage *stage, Hot *h) {
  h->count = 0;
  for (const Source *s = stage->sources; s < stage->sources + MOST_SOURCES; s++)
    for (const Term *t = c->terms; s->x.at && t < c->terms + c->count; t++) {
      if (!is_of(t, s->group)) continue;
      const Part *p = c->parts + t->part;
      int64_t width = s->of_a ? p->inputs : p->outputs, tall = SIDE * up(width, BAND);
      Values x = s->of_a ? s->x : from_column(s->x, p->column);
      h->all[h->count++] = (Sum){t, s, x, width, sides(t->r), tall, sides(t->r) * tall, .drops = s->of_a && t->draws};
    }
}

static void cut_stripes(const Call *c, Hot *h) {
  h->stripes = 0;
  for (int64_t row = 0, next; row < c->rows; row = next) {
    h->begins[h->stripes++] = row, next = least(c->rows, row + STRIPE);
    for (const Sum *t = h->all; t < h->all + h->count; t++)
      if (t->of->start > row) next = least(next, t->of->start);
  }
}

// Floats that are needed for all of it; 0 where there is nothing to do, or G cannot be made so.
static int64_t plan_hot(const Call *c, const Stage *stage, Hot *h) {
  h->stage = stage, h->floats = h->spare = h->lossy = 0;
  find_sums(c, stage, h);
  cut_stripes(c, h);
  if (!h->count || !h->stripes || !plan_narrow(c, stage->slopes, 1, stage->dy, &h->slopes)) return 0;
  int products = 0;
  for (Sum *t = h->all; t < h->all + h->count; t++) {
    for (int64_t s = 0; s < h->stripes; s++) {
      int64_t until = s + 1 < h->stripes ? h->begins[s + 1] : c->rows;
      if (t->of->start >= until || t->of->stop <= h->begins[s]) continue;
      if (!t->stripes++) t->first = s;
    }
    t->product = t->width % 32 || t->stripes * t->each > MOST_SUMS;
    products |= t->product, t->at = h->floats;
    if (!t->product) h->floats += t->stripes * t->each;
    if (t->from->in_spare) h->spare = most(h->spare, t->width);
    if (t->drops) h->lossy = most(h->lossy, t->width);
  }
  if (products) h->spare = 0;  // which needs all rows
  h->room = HOT / 2 * (up(h->spare, SIDE) + up(h->lossy, SIDE)) + h->slopes.room;
  h->room += (1 + (AT_ONCE + LEFTS) * DEEP) * SIDES;
  return h->slopes.packed + h->floats + c->threads * h->room;
}

// Rows of 16 bits [count, r] from column `from` on, turned into tiles [16, HOT] (HOT / 2 units), with zeros beyond them.
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

// Tiles of left sides, turned, and where among all sums their products with the same rows are added.
typedef struct {
  float *tiles;
  int64_t sums[LEFTS], count;
} Lefts;

// Where the first of a tile's sums in a column is.
static int64_t band_of(int64_t column) { return column / BAND * SIDE * BAND + column % BAND; }

// sums [16, width] += left x for all of them; x packed into pairs a few tiles at a time, which stay in the first cache.
static void add_rows(Lefts *lefts, const Right *x, float *pairs, float *sums) {
  int64_t all = x->n / SIDE;
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

// A thread's memory for a step: rows [HOT, spare], what is left of them, and what the products need.
typedef struct {
  char *rows, *left_over;
  float *spare, *pairs, *lefts, *narrow;
} HotRoom;

static HotRoom hot_room(const Hot *h, int64_t thread) {
  float *rows = h->rooms + thread * h->room, *left_over = rows + HOT / 2 * up(h->spare, SIDE);
  float *spare = left_over + HOT / 2 * up(h->lossy, SIDE), *pairs = spare + SIDES;
  float *lefts = pairs + AT_ONCE * SIDES * DEEP;
  return (HotRoom){(char *)rows, (char *)left_over, spare, pairs, lefts, lefts + LEFTS * SIDES * DEEP};
}

static int same_rows(const Sum *t, const Sum *next) {
  return next->x.at == t->x.at && next->drops == t->drops && (!t->drops || sees_as(t->of, next->of));
}

static int meets(const Sum *t, int64_t row) { return row >= t->of->start && row < t->of->stop && !t->product; }

// The sums from `t` on, up to `until`, whose rows are the same: `count` from `row` on in a stripe, all of which have the
// same terms.
static void add_sums(const Hot *h, const Sum *t, const Sum *until, int64_t stripe, int64_t row, int64_t count,
                     const HotRoom *room) {
  Values x = t->from->in_spare && h->spare ? (Values){room->rows, t->width} : from_row(t->x, row);
  int any = 0;
  for (const Sum *s = t; s < until; s++) any |= meets(s, row);
  if (!any) return;
  if (t->drops) {
    Values seen = {room->left_over, t->width};
    drop_rows(t->of, x, row, count, t->width, seen, 0, 1);
    x = seen;
  }
  Right right = {rows_of(x, 0), count, t->width, BF16};
  Lefts lefts = {room->lefts};
  for (; t < until; t++) {
    if (!meets(t, row)) continue;
    const char *left = (t->from->of_a ? t->of->g : t->of->s) + 2 * (row - t->of->start) * t->of->r;
    for (int64_t tile = 0; tile < t->tiles; tile++) {
      turn_rows(left, t->of->r, SIDE * tile, count, room->spare, lefts.tiles + lefts.count * SIDES * DEEP);
      lefts.sums[lefts.count++] = t->at + (stripe - t->first) * t->each + tile * t->tall;
      if (lefts.count == LEFTS) add_rows(&lefts, &right, room->pairs, h->sums);
    }
  }
  if (lefts.count) add_rows(&lefts, &right, room->pairs, h->sums);
}

static void hot_step(const Hot *h, int64_t stripe, int64_t row, int64_t count, const HotRoom *room) {
  const Sum *end = h->all + h->count;
  if (h->stage->make) h->stage->make(h->stage->of, row, count, h->spare ? room->rows : NULL);
  for (int64_t i = 0; i < h->slopes.count; i++)
    multiply_narrow(h->slopes.terms + i, h->packed, row, count, room->narrow);
  for (const Sum *t = h->all, *next; t < end; t = next) {
    for (next = t + 1; next < end && same_rows(t, next); next++) continue;
    add_sums(h, t, next, stripe, row, count, room);
  }
}

// The first row behind `row` at which a term begins or ends, or a step does.
static int64_t next_step(const Hot *h, int64_t row, int64_t until) {
  int64_t next = least(until, row + HOT);
  for (const Sum *t = h->all; t < h->all + h->count; t++) {
    if (t->of->start > row) next = least(next, t->of->start);
    if (t->of->stop > row) next = least(next, t->of->stop);
  }
  return next;
}

// Some columns of a gradient, from all stripes' sums.
static void add_stripes(const Hot *h, const Sum *t, int64_t from, int64_t until) {
  for (int64_t j = 0; j < t->of->r; j++)
    for (int64_t n = from; n < until; n += LANES) {
      const float *at = h->sums + t->at + j / SIDE * t->tall + band_of(n) + j % SIDE * BAND;
      vecf sum = {};
      for (int64_t s = 0; s < t->stripes; s++) sum += vloadf(at + s * t->each);
      if (t->from->of_a) vstoref((float *)t->of->da + j * t->width + n, sum);
      else
        for (int64_t i = 0; i < LANES; i++)
          ((float *)t->of->db)[(n + i) * t->of->r + j] = (float)t->of->scaling * sum[i];
    }
}

static void run_hot(const Call *c, const Hot *h) {
  int64_t tiles = tiles_of(&h->slopes);
#pragma omp parallel num_threads(c->threads)
  {
    HotRoom room = hot_room(h, omp_get_thread_num());
    amx_begin();
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; tile++) pack_narrow(&h->slopes, tile, h->packed);
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < h->stripes; s++) {
      int64_t until = s + 1 < h->stripes ? h->begins[s + 1] : c->rows;
      for (const Sum *t = h->all; t < h->all + h->count; t++)
        if (!t->product && s >= t->first && s < t->first + t->stripes)
          memset(h->sums + t->at + (s - t->first) * t->each, 0, t->each * sizeof *h->sums);
      for (int64_t row = h->begins[s], next; row < until; row = next) {
        next = next_step(h, row, until);
        hot_step(h, s, row, next - row, &room);
      }
    }
    amx_end();
    for (const Sum *t = h->all; t < h->all + h->count; t++) {
      if (t->product) continue;
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < t->width / 32; n++) add_stripes(h, t, 32 * n, 32 * n + 32);
    }
  }
}

// 1 where a stage's rows and G were made so, and its gradients or their products put into the next; else 0.
static int made_hot(Call *c, const Stage *stage, int *failed) {
  int64_t all = most(1, c->count);
  Hot h = {.all = malloc(MOST_SOURCES * all * sizeof *h.all), .begins = malloc(most_stripes(c) * sizeof *h.begins)};
  h.slopes.terms = malloc(all * sizeof *h.slopes.terms);
  int there = h.all && h.begins && h.slopes.terms, ours = 0;
  int64_t floats = there ? plan_hot(c, stage, &h) : 0;
  float *arena = floats ? borrow(floats, &ours) : NULL;
  if (arena) {
    h.rooms = arena, h.sums = h.rooms + c->threads * h.room, h.packed = h.sums + h.floats;
    run_hot(c, &h);
    give_back(arena, ours);
    for (const Sum *t = h.all; t < h.all + h.count && !*failed; t++)
      if (t->product) *failed = put_gradient(c, t->of, t->from->of_a, t->from->x);
  }
  free(h.all), free(h.begins), free(h.slopes.terms);
  return arena != NULL;
}

// A stage's rows, G and gradients.
static int run_gradients(Call *c, const Stage *stage) {
  int failed = 0;
  if (!made_hot(c, stage, &failed)) {
    failed = run_rows(c, stage->slopes, 1, stage->dy, stage->make, stage->of);
    for (const Source *s = stage->sources; s < stage->sources + MOST_SOURCES && !failed; s++)
      for (const Term *t = c->terms; s->x.at && t < c->terms + c->count && !failed; t++)
        if (is_of(t, s->group)) failed = put_gradient(c, t, s->of_a, s->x);
  }
  return failed ? failed : run_stage(c);
}
