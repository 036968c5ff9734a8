// A gated feed-forward layer with the low-rank terms of its adapters, forward and backward.
//
//     gate = n Wg' + s S B'    up alike    h = act(gate) * up    y = h Wd' + s S B'

#pragma once
#include "hot_rows.h"
#include "shares.h"

enum { GATE, UP, DOWN };
static const Group GATES = {GATE, UP}, LAST = {DOWN, DOWN};

// both [rows, 2 f] = gate | up, h [rows, f] without gaps; y [rows, d] may be NULL. Going backward dy, dh [rows, f],
// dboth (which may be both) and dn, which may be NULL. There n is made again from x and its norm's numbers rstd [rows]
// and weight [d], in memory that may be dh's; or it is x, where rstd is NULL.
typedef struct {
  Values n, both, h, y, dy, dh, dboth, dn, x;
  int64_t f, d, act;
  float *rstd;
  const char *norm;
  int64_t norm_mode;
} FeedForward;

// Rows of h. (As C calls what it is given.)
static void make_unit(const void *of, int64_t row, int64_t rows, char *spare) {
  const FeedForward *l = of;
  (void)spare;
  Values gate = from_row(l->both, row), up = from_column(gate, l->f);
  topwork_gated(gate.at, gate.by, up.at, up.by, rows, l->f, from_row(l->h, row).at, 1 + 2 * (int)l->act, 1);
}

// From n and the gates' S.
static int feedforward_forward(Call *c, const FeedForward *l) {
  int failed = group_forward(c, GATES, l->n, l->both);
  if (!failed) failed = run_rows(c, LAST, 0, l->h, make_unit, l);
  return failed || !l->y.at ? failed : group_forward(c, LAST, l->h, l->y);
}

// The unit's gradient, and h again.
static void make_unit_backward(const void *of, int64_t row, int64_t rows, char *spare) {
  const FeedForward *l = of;
  Values dh = from_row(l->dh, row), gate = from_row(l->both, row), dgate = from_row(l->dboth, row);
  Values up = from_column(gate, l->f), dup = from_column(dgate, l->f);
  topwork_gated_backward(dh.at, dh.by, gate.at, gate.by, up.at, up.by, rows, l->f, dgate.at, dgate.by, dup.at, dup.by,
                         spare ? spare : from_row(l->h, row).at, 1 + 2 * (int)l->act, 1);
}

// n again, where it is not x.
static void make_n(const void *of, int64_t row, int64_t rows, char *spare) {
  const FeedForward *l = of;
  Values x = from_row(l->x, row);
  if (!l->rstd) return;
  topwork_rms_norm(x.at, x.by, 0, rows, 1, l->d, l->norm, 0, 1, l->rstd + row, spare ? spare : from_row(l->n, row).at,
                   (int)l->norm_mode, 1);
}

// What the gates' A want of a stage behind all of it, where `make_n` makes it.
static Source source_of_n(const FeedForward *l) {
  return (Source){GATES, 1, l->rstd ? l->n : l->x, l->d, l->rstd != NULL};
}

// From dy, down's G and the gradient of its B; all but those of the gates' A.
static int feedforward_backward(Call *c, const FeedForward *l) {
  Stage unit = {make_unit_backward, l, GATES, l->dboth, {{GATES, 0, l->dboth}, {LAST, 1, l->h, l->f, 1}}};
  int failed = group_backward(c, LAST, l->dy, l->dh);
  if (!failed) failed = run_gradients(c, &unit);
  return failed ? failed : group_backward(c, GATES, l->dboth, l->dn);
}
