// A gated feed-forward layer with the low-rank terms of its adapters, forward and backward.
//
//     gate = n Wg' + s S B'    up alike    h = act(gate) * up    y = h Wd' + s S B'

#pragma once
#include "hot_rows.h"
#include "layer.c"

enum { GATE, UP, DOWN };
static const Group GATES = {GATE, UP}, LAST = {DOWN, DOWN};

// both [rows, 2 f] = gate | up, h [rows, f] without gaps; y [rows, d] may be NULL. Going backward dy, dh [rows, f],
// dboth (which may be both) and dn, which may be NULL. There n is made again from x and its norm's numbers rstd [rows]
// and weight [d], without gaps in memory that may be dh's; or it is x, where rstd is NULL.
typedef struct {
  Values n, both, h, y, dy, dh, dboth, dn, x;
  int64_t f, d, act;
  float *rstd;
  const char *norm;
  int64_t norm_mode;
} FeedForward;

// Rows of h. (As C calls what it is given.)
static void make_unit(const void *of, int64_t row, int64_t rows) {
  const FeedForward *l = of;
  Values gate = from_row(l->both, row), up = from_column(gate, l->f);
  topwork_gated(gate.at, gate.by, up.at, up.by, rows, l->f, from_row(l->h, row).at, 1 + 2 * (int)l->act, 1);
}

// From n and the gates' S.
static int feedforward_forward(Call *c, const FeedForward *l) {
  int failed = group_forward(c, GATES, l->n, l->both);
  if (!failed) failed = run_rows(c, LAST, 0, l->h, make_unit, l);
  return failed || !l->y.at ? failed : group_forward(c, LAST, l->h, l->y);
}

// The unit's gradient, and h again [rows, f].
static void unit_backward(const FeedForward *l, int64_t row, int64_t rows, char *h) {
  Values dh = from_row(l->dh, row), gate = from_row(l->both, row), dgate = from_row(l->dboth, row);
  Values up = from_column(gate, l->f), dup = from_column(dgate, l->f);
  topwork_gated_backward(dh.at, dh.by, gate.at, gate.by, up.at, up.by, rows, l->f, dgate.at, dgate.by, dup.at, dup.by,
                         h, 1 + 2 * (int)l->act, 1);
}

static void make_unit_backward(const void *of, int64_t row, int64_t rows) {
  const FeedForward *l = of;
  unit_backward(l, row, rows, from_row(l->h, row).at);
}

// With it what its rows give to the terms: gates' G, their B's gradients, and that of down's A.
static void run_hot_rows(Call *c, const FeedForward *l, const HotRows *h) {
  int64_t tiles = tiles_of(&h->slopes);
#pragma omp parallel num_threads(c->threads)
  {
    HotRoom room = hot_room(h, omp_get_thread_num());
    amx_begin();
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; tile++) pack_narrow(&h->slopes, tile, h->packed);
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < h->stripes; s++) {
      float *sums = h->sums + s * h->each;
      memset(sums, 0, h->each * sizeof *sums);
      int64_t until = s + 1 < h->stripes ? h->begins[s + 1] : c->rows;
      for (int64_t row = h->begins[s], next; row < until; row = next) {
        next = next_step(h, row, until);
        unit_backward(l, row, next - row, room.h);
        Values dgate = from_row(l->dboth, row), x[] = {dgate, from_column(dgate, l->f), {room.h, l->f}};
        hot_step(h, GATES, x, row, next - row, &room, sums);
      }
    }
    amx_end();
#pragma omp for schedule(static)
    for (int64_t n = 0; n < h->count * (h->f / 32); n++) {
      const HotTerm *t = h->terms + n / (h->f / 32);
      int64_t from = n % (h->f / 32) * 32;
      add_stripes(h, t, t->part == DOWN, from, from + 32);
    }
  }
}

// 1 where that was done, 0 where it is not worth while.
static int hot_rows(Call *c, const FeedForward *l) {
  int64_t all = most(1, c->count);
  HotRows h = {malloc(all * sizeof *h.terms), malloc(most_stripes(c) * sizeof *h.begins)};
  h.slopes.terms = malloc(all * sizeof *h.slopes.terms);
  int there = h.terms && h.begins && h.slopes.terms, ours = 0;
  int64_t floats = there ? plan_hot_rows(c, GATES, l->dboth, DOWN, l->f, &h) : 0;
  float *arena = floats ? borrow(floats, &ours) : NULL;
  if (arena) {
    h.rooms = arena, h.sums = h.rooms + c->threads * h.room, h.packed = h.sums + h.stripes * h.each;
    run_hot_rows(c, l, &h);
    give_back(arena, ours);
  }
  free(h.terms), free(h.begins), free(h.slopes.terms);
  return arena != NULL;
}

// From dy and down's G.
static int feedforward_backward(Call *c, const FeedForward *l) {
  Values n = l->rstd ? l->n : l->x;
  int failed;
  put_db(c, LAST, l->dy);
  if ((failed = group_backward(c, LAST, l->dy, l->dh))) return failed;
  if (!hot_rows(c, l)) {
    if ((failed = run_rows(c, GATES, 1, l->dboth, make_unit_backward, l))) return failed;
    put_da(c, LAST, l->h), put_db(c, GATES, l->dboth);
  }
  if (l->rstd)
    topwork_rms_norm(l->x.at, l->x.by, 0, c->rows, 1, l->d, l->norm, 0, 1, l->rstd, n.at, (int)l->norm_mode,
                     (int)c->threads);
  put_da(c, GATES, n);
  return group_backward(c, GATES, l->dboth, l->dn);
}
