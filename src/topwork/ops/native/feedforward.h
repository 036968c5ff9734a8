// A gated feed-forward layer with the low-rank terms of its adapters, forward and backward.
//
//     gate = n Wg' + s S B'    up alike    h = act(gate) * up    y = h Wd' + s S B'

#pragma once
#include "layer.c"
#include "terms.h"

enum { GATE, UP, DOWN };
static const Group GATES = {GATE, UP}, LAST = {DOWN, DOWN};

// both [rows, 2 f] = gate | up, h [rows, f] without gaps; y [rows, d] may be NULL. Going backward dy, dh [rows, f], dboth
// (which may be both) and dn, which may be NULL. There n is made again from x and its norm's numbers rstd [rows] and
// weight [d], without gaps in memory that may be dh's; or it is x, where rstd is NULL.
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

static int feedforward_backward(Call *c, const FeedForward *l) {
  Values n = l->rstd ? l->n : l->x, up = from_column(l->both, l->f), dup = from_column(l->dboth, l->f);
  int failed;
  put_slopes(c, LAST, l->dy);
  if ((failed = run_stage(c))) return failed;
  put_db(c, LAST, l->dy);
  if ((failed = group_backward(c, LAST, l->dy, l->dh))) return failed;
  topwork_gated_backward(l->dh.at, l->dh.by, l->both.at, l->both.by, up.at, up.by, c->rows, l->f, l->dboth.at,
                         l->dboth.by, dup.at, dup.by, l->h.at, 1 + 2 * (int)l->act, c->threads);
  if (l->rstd)
    topwork_rms_norm(l->x.at, l->x.by, 0, c->rows, 1, l->d, l->norm, 0, 1, l->rstd, n.at, (int)l->norm_mode,
                     c->threads);
  put_da(c, LAST, l->h);
  put_slopes(c, GATES, l->dboth);
  if ((failed = run_stage(c))) return failed;
  put_db(c, GATES, l->dboth);
  put_da(c, GATES, n);
  return group_backward(c, GATES, l->dboth, l->dn);
}
