// What rows give to a group's terms, S = round(x A') going forward and G = round(s dy B) going backward, a few rows at a
// time while a core's cache has them: as soon as they are made. As products of whole tensors these read x from memory
// once more, and wait for all of it. A sum is what its product is to the bit.

#pragma once
#include "terms.h"

enum { HOT = 64 };  // rows of a step, at most
static const Group NONE = {0, -1};

// Makes the rows [row, row + count) of a pass, on one thread; what nobody needs behind a stage in `spare`, where that is
// not NULL.
typedef void (*Make)(const void *of, int64_t row, int64_t count, char *spare);

// A term's narrow side, packed into tiles of sixteen ranks, and the rows that it meets.
typedef struct {
  const Term *of;
  Right side;  // A' or B
  Values x;
  char *out;
  float scaling;
  int64_t tiles, at;  // at: where its tiles stand among what is packed
  int drops, as_before;  // it meets rows that lost values; the same as the one before it
} Narrow;

typedef struct {
  Narrow *terms;
  int64_t count, packed, room;  // floats of all tiles, and of a thread's memory
} Narrows;

// A group's terms for S or, with `slopes`, G; x [rows, ...] is the group's. Whether tiles can be read where x stands.
// n->terms has room for all terms.
static int plan_narrow(const Call *c, Group g, int slopes, Values x, Narrows *n) {
  int64_t longest = 0;
  n->count = n->packed = 0;
  for (const Term *t = c->terms; t < c->terms + c->count; t++) {
    if (!is_of(t, g) || t->start >= t->stop) continue;
    const Part *p = c->parts + t->part;
    int64_t k = slopes ? p->outputs : p->inputs;
    Matrix side = slopes ? dense(t->b, t->r) : turned(dense(t->a, k));
    Values own = slopes ? from_column(x, p->column) : x;
    if (k % 32 || x.by % 2) return 0;
    int drops = !slopes && t->draws, again = n->count && drops && sees_as(t, n->terms[n->count - 1].of);
    n->terms[n->count++] = (Narrow){t,           {side, k, t->r, F32},
                                    own,         slopes ? t->g : t->s,
                                    slopes ? (float)t->scaling : 1, sides(t->r), n->packed,
                                    drops,       again};
    n->packed += sides(t->r) * SIDE * k / 2, longest = most(longest, k);
  }
  n->room = HOT * longest / 2 + HOT * SIDE;
  return 1;
}

static int64_t tiles_of(const Narrows *n) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < n->count; i++) tiles += n->terms[i].tiles;
  return tiles;
}

// One of `tiles_of` all terms.
static void pack_narrow(const Narrows *n, int64_t tile, float *packed) {
  const Narrow *t = n->terms;
  for (; tile >= t->tiles; t++) tile -= t->tiles;
  int64_t deep = t->side.k / 32;
  pack_tiles(&t->side, 1, SIDE * tile, 1, 0, deep, packed + t->at + tile * deep * SIDES, 0);
}

// What a term has of `count` rows from `row` on, at most HOT. Rows that fill no tiles are copied, and
// what rows lose they lose in the copy.
static void multiply_narrow(const Narrow *t, const float *packed, int64_t row, int64_t count, float *room) {
  int64_t first = most(row, t->of->start), rows = least(row + count, t->of->stop) - first;
  if (rows <= 0) return;
  int64_t k = t->side.k, r = t->of->r, high = sides(rows), by = t->x.by / 2;
  const char *x = t->x.at + 2 * first * t->x.by;
  float *sums = room, *lines = room + HOT * SIDE;
  if (rows % SIDE || t->drops) {
    Values copy = {(char *)lines, k};
    if (t->drops && !t->as_before) drop_rows(t->of, from_row(t->x, first), first, rows, k, copy, 0, 1);
    for (int64_t i = 0; i < rows && !t->drops; i++) memcpy(from_row(copy, i).at, x + 2 * i * t->x.by, 2 * k);
    memset((char *)lines + 2 * rows * k, 0, 2 * (SIDE * high - rows) * k);
    x = (const char *)lines, by = k / 2;
  }
  for (int64_t tile = 0; tile < t->tiles; tile++) {
    Stretch all = {x, packed + t->at + tile * k / 32 * SIDES, by, SIDE, 0, k / 32};
    multiply_tiles(high, 1, &all, 1, sums, SIDE, 0);
    char *to = t->out + 2 * ((first - t->of->start) * r + SIDE * tile);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t n = 0, stop = least(SIDE, r - SIDE * tile); n < stop; n += LANES) {
        vecf sum = vloadf(sums + SIDE * i + n) * t->scaling;
        if (n + LANES <= stop) store(to + 2 * i * r, n, LANES, BF16, sum);
        else store(to + 2 * i * r, n, stop - n, BF16, sum);
      }
  }
}

// Rows of a step: all threads have some of them several times.
static int64_t rows_of_step(const Call *c) {
  return most(SIDE, least(HOT, SIDE * sides(c->rows / (4 * c->threads))));
}

static void run_steps(const Call *c, const Narrows *n, Make make, const void *of, float *arena) {
  int64_t tiles = tiles_of(n), step = rows_of_step(c), steps = (c->rows + step - 1) / step;
#pragma omp parallel num_threads(least(c->threads, most(1, steps)))
  {
    float *room = arena + n->packed + omp_get_thread_num() * n->room;
    amx_begin();
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; tile++) pack_narrow(n, tile, arena);
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < steps; s++) {
      int64_t row = s * step, count = least(step, c->rows - row);
      if (make) make(of, row, count, NULL);
      for (int64_t i = 0; i < n->count; i++) multiply_narrow(n->terms + i, arena, row, count, room);
    }
    amx_end();
  }
}

// All rows as they are made (by nobody where `make` is NULL), and each S or G of a group's terms from what x is then.
static int run_rows(Call *c, Group g, int slopes, Values x, Make make, const void *of) {
  Narrows n = {malloc(most(1, c->count) * sizeof *n.terms)};
  if (!n.terms) return 1;
  int narrow = plan_narrow(c, g, slopes, x, &n), ours;
  if (!narrow) n.count = n.packed = n.room = 0;
  float *arena = borrow(most(1, n.packed + c->threads * n.room), &ours);
  if (arena && (make || n.count)) run_steps(c, &n, make, of, arena);
  give_back(arena, ours);
  free(n.terms);
  if (!arena) return 1;
  if (narrow) return 0;
  int failed = 0;
  if (slopes) put_slopes(c, g, x);
  else failed = put_inner(c, g, x);
  return failed ? failed : run_stage(c);
}
