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

static int feedforward_forward(Call *c, const FeedForward *l) {
  int failed = group_forward(c, GATES, l->n, l->both), mode = 1 + 2 * (int)l->act;
  if (failed) return failed;
  topwork_gated(l->both.at, l->both.by, l->both.at + 2 * l->f, l->both.by, c->rows, l->f, l->h.at, mode, c->threads);
  return group_forward(c, LAST, l->h, l->y);
}

// The unit's gradient, and h again.
static void unit_backward(const FeedForward *l, int64_t row, int64_t rows, int64_t threads) {
  Values up = from_column(l->both, l->f), dup = from_column(l->dboth, l->f);
  topwork_gated_backward(l->dh.at + 2 * row * l->dh.by, l->dh.by, l->both.at + 2 * row * l->both.by, l->both.by,
                         up.at + 2 * row * up.by, up.by, rows, l->f, l->dboth.at + 2 * row * l->dboth.by, l->dboth.by,
                         dup.at + 2 * row * dup.by, dup.by, l->h.at + 2 * row * l->f, 1 + 2 * (int)l->act,
                         (int)threads);
}

#ifdef AMX
// With it what its rows give to the terms: gates' G, their B's gradients, and that of down's A.
static void run_hot_rows(Call *c, const FeedForward *l, const HotRows *h) {
  const Values x[] = {l->dboth, from_column(l->dboth, l->f), l->h};
#pragma omp parallel num_threads(c->threads)
  {
    float *room = h->rooms + omp_get_thread_num() * h->room;
    amx_begin();
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < h->count; t++)
      for (int64_t tile = 0; tile < h->terms[t].tiles && h->terms[t].part != DOWN; tile++)
        pack_b(h, h->terms + t, tile);
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < h->stripes; s++) {
      float *sums = h->sums + s * h->each;
      memset(sums, 0, h->each * sizeof *sums);
      int64_t until = s + 1 < h->stripes ? h->begins[s + 1] : c->rows;
      for (int64_t row = h->begins[s], next; row < until; row = next) {
        next = next_step(h, row, until);
        unit_backward(l, row, next - row, 1);
        hot_step(h, GATES, x, row, next - row, room, sums);
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
#endif

// 1 where that was done, 0 where it is not worth while.
static int hot_rows(Call *c, const FeedForward *l) {
#ifdef AMX
  HotRows h = {malloc(most(1, c->count) * sizeof *h.terms), malloc(most_stripes(c) * sizeof *h.begins)};
  int64_t floats = h.terms && h.begins ? plan_hot_rows(c, GATES, DOWN, l->f, &h) : 0;
  int ours = 0;
  float *arena = floats ? borrow(floats, &ours) : NULL;
  if (arena) {
    h.rooms = arena, h.sums = h.rooms + c->threads * h.room, h.packed = h.sums + h.stripes * h.each;
    run_hot_rows(c, l, &h);
    give_back(arena, ours);
  }
  free(h.terms), free(h.begins);
  return arena != NULL;
#else
  (void)c, (void)l;
  return 0;
#endif
}

static int feedforward_backward(Call *c, const FeedForward *l) {
  Values n = l->rstd ? l->n : l->x;
  int failed;
  put_slopes(c, LAST, l->dy);
  if ((failed = run_stage(c))) return failed;
  put_db(c, LAST, l->dy);
  if ((failed = group_backward(c, LAST, l->dy, l->dh))) return failed;
  if (!hot_rows(c, l)) {
    unit_backward(l, 0, c->rows, c->threads);
    put_da(c, LAST, l->h);
    put_slopes(c, GATES, l->dboth);
    if ((failed = run_stage(c))) return failed;
    put_db(c, GATES, l->dboth);
  }
  if (l->rstd)
    topwork_rms_norm(l->x.at, l->x.by, 0, c->rows, 1, l->d, l->norm, 0, 1, l->rstd, n.at, (int)l->norm_mode,
                     (int)c->threads);
  put_da(c, GATES, n);
  return group_backward(c, GATES, l->dboth, l->dn);
}
