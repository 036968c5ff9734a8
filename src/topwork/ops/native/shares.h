// What terms with dropout give to their input's gradient, some rows at a time while a core's cache has them, before the
// base's product is added:
//
//     dx = sum of drop(round(G A))        and the group's backward pass, which that belongs to
//
// dx is rounded with every share, as in single steps.

#pragma once
#include "narrow.h"

// A term, and its A packed into tiles: `tiles` of sixteen columns, `deep` of 32 ranks each.
typedef struct {
  const Term *of;
  Right side;
  int64_t tiles, deep, at;
} Share;

// Those of `all` that see the same stand together and are one share; `deepest` of such, and the widest of all.
typedef struct {
  Share *all;
  int64_t count, packed, deepest, widest;
} Shares;

static int any_drops(const Call *c, Group g) {
  for (const Term *t = c->terms; t < c->terms + c->count; t++)
    if (is_of(t, g) && t->draws && t->start < t->stop) return 1;
  return 0;
}

// Behind the last one that is a share with `first`.
static const Share *end_of(const Shares *s, const Share *first) {
  const Share *next = first + 1, *end = s->all + s->count;
  while (next < end && next - first < MOST_ADDENDS && sees_as(first->of, next->of)) next++;
  return next;
}

// s->all has room for all terms.
static void plan_shares(const Call *c, Group g, Shares *s) {
  for (const Term *t = c->terms; t < c->terms + c->count; t++) {
    if (!is_of(t, g) || !t->draws || t->start >= t->stop) continue;
    int64_t n = c->parts[t->part].inputs, deep = (t->r + 31) / 32;
    s->all[s->count++] = (Share){t, {dense(t->a, n), t->r, n, F32}, sides(n), deep, s->packed};
    s->packed += sides(n) * deep * SIDES, s->widest = most(s->widest, n);
  }
  for (const Share *t = s->all, *next; t < s->all + s->count; t = next) {
    int64_t deep = 0;
    for (next = end_of(s, t); t < next; t++) deep += t->deep;
    s->deepest = most(s->deepest, deep);
  }
}

// A thread's floats: lines of every G, sums, and rows of a share.
static int64_t room_of_shares(const Shares *s) {
  return HOT * SIDE * s->deepest + HOT * SIDE + HOT / 2 * up(s->widest, SIDE);
}

// Each term's lines with its A's `tile`; their number.
static int64_t stretches_of(const Share *t, const Share *until, const float *packed, int64_t tile, float *lines,
                            Stretch *to) {
  int64_t count = 0;
  for (; t < until; lines += HOT * SIDE * t->deep, t++)
    to[count++] = (Stretch){lines, packed + t->at + tile * t->deep * SIDES, SIDE * t->deep, SIDE, 0, t->deep};
  return count;
}

// G of `rows` rows from `from` on, each term's as lines of whole tiles.
static void lay_out(const Share *t, const Share *until, int64_t from, int64_t rows, float *lines) {
  for (; t < until; lines += HOT * SIDE * t->deep, t++) {
    int64_t r = t->of->r, ld = SIDE * t->deep;
    memset(lines, 0, SIDE * sides(rows) * ld * sizeof *lines);
    for (int64_t i = 0; i < rows; i++) memcpy(lines + i * ld, t->of->g + 2 * (from - t->of->start + i) * r, 2 * r);
  }
}

// One share's `count` rows from `row` on, at most HOT, added to dx or, where those are not `begun`, their first. Whether
// it has some of them.
static int add_share(const Share *t, const Share *until, const float *packed, Values dx, int64_t row, int64_t count,
                     int begun, int64_t deepest, float *room) {
  int64_t first = most(row, t->of->start), rows = least(row + count, t->of->stop) - first, n = t->side.n;
  if (rows <= 0) return 0;
  float *sums = room + HOT * SIDE * deepest;
  Values share = {(char *)(sums + HOT * SIDE), n};
  Stretch all[MOST_ADDENDS];
  lay_out(t, until, first, rows, room);
  for (int64_t tile = 0; tile < t->tiles; tile++) {
    int64_t some = stretches_of(t, until, packed, tile, room, all);
    multiply_tiles(sides(rows), 1, all, some, sums, SIDE, 0);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0, stop = least(SIDE, n - SIDE * tile); j < stop; j += LANES)
        store(from_row(share, i).at, SIDE * tile + j, least(LANES, stop - j), BF16, vloadf(sums + SIDE * i + j));
  }
  int whole = rows == count;
  for (int64_t i = 0; i < count && !begun && !whole; i++) memset(from_row(dx, row + i).at, 0, 2 * n);
  drop_rows(t->of, share, first, rows, n, from_row(dx, first), begun || !whole, 1);
  return 1;
}

static void add_shares(const Call *c, const Shares *s, Values dx, float *arena) {
  int64_t step = rows_of_step(c), steps = (c->rows + step - 1) / step, width = s->all[0].side.n;
  const Share *end = s->all + s->count;
#pragma omp parallel num_threads(least(c->threads, most(1, steps)))
  {
    float *room = arena + s->packed + omp_get_thread_num() * room_of_shares(s);
    amx_begin();
    for (const Share *t = s->all; t < end; t++)
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < t->tiles; tile++)
        pack_tiles(&t->side, 1, SIDE * tile, 1, 0, t->deep, arena + t->at + tile * t->deep * SIDES, 0);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < steps; i++) {
      int64_t row = i * step, count = least(step, c->rows - row);
      int begun = 0;
      for (const Share *t = s->all, *next; t < end; t = next) {
        next = end_of(s, t);
        begun |= add_share(t, next, arena, dx, row, count, begun, s->deepest, room);
      }
      for (int64_t j = 0; j < count && !begun; j++) memset(from_row(dx, row + j).at, 0, 2 * width);
    }
    amx_end();
  }
}

static int run_shares(const Call *c, Group g, Values dx) {
  Shares s = {malloc(most(1, c->count) * sizeof *s.all)};
  if (!s.all) return 1;
  plan_shares(c, g, &s);
  int ours;
  float *arena = borrow(s.packed + c->threads * room_of_shares(&s), &ours);
  if (arena) add_shares(c, &s, dx, arena);
  give_back(arena, ours);
  free(s.all);
  return !arena;
}

// dx [rows, inputs], which may not be there, from dy and each G.
static int group_backward(Call *c, Group g, Values dy, Values dx) {
  int failed = 0, whole = joined(c, g), begun = dx.at && any_drops(c, g);
  if (begun && (failed = run_shares(c, g, dx))) return failed;
  for (int i = g.first; dx.at && i <= (whole ? g.first : g.last); i++) {
    const Part *p = c->parts + i;
    int64_t k = outputs_of(c, (Group){i, whole ? g.last : i});
    Matrix own = rows_of(from_column(dy, p->column), 0);
    Product *made = put(c, own, rows_of(p->weight, 0), rows_of(dx, 0), c->rows, k, p->inputs, 1);
    made->add = begun || i > g.first;
    if (whole || i == g.last) put_shares(c, made, g);  // they join the sum that is rounded last
    else if ((failed = run_stage(c))) return failed;
  }
  return run_stage(c);
}
