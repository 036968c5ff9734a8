// A gated feed-forward layer with the low-rank terms of its adapters, forward and backward, in one call each.
//
//     gate = n Wg' + s S B'    up alike    h = act(gate) * up    y = h Wd' + s S B'    S = n A' or h A'
//
// The products are those of grouped.c, in the stages that ops/project.py has, and the unit is layer.c's: sums and
// roundings are theirs. What a call of its own saves is the way through Python between ten of them.

#include "grouped.c"
#include "rows.h"

enum { GATE, UP, DOWN, PARTS };

// ---- what a call is given: all numbers are 64 bits wide ------------------------------------------------------------

// Rows of values that lie side by side.
typedef struct {
  char *at;
  int64_t by;
} Values;

// n [rows, d], both [rows, 2 f] = gate | up, h [rows, f], y [rows, d], which may be NULL; all bf16. Going backward dy,
// dh [rows, f], dboth (which may be both) and dn, which may be NULL. There n is made again from x and its norm's numbers
// rstd [rows] and weight [d], in memory that may be dh's; or it is x, where rstd is NULL.
typedef struct {
  Values weight[PARTS];  // gate and up [f, d], down [d, f]
  Values n, both, h, y, dy, dh, dboth, dn, x;
  int64_t rows, d, f, act;
  const float *rstd;
  const char *norm;
  int64_t norm_kind, offset;  // offset: 1 + weight
} Layer;

// s B A of rows [start, stop): masters a [r, inputs], b [outputs, r] in fp32; S and G [stop - start, r] in bf16; the
// masters' gradients.
typedef struct {
  char *a, *b, *s, *g, *da, *db;
  int64_t r, start, stop, part;
  double scaling;
} Term;

// ---- stages of products --------------------------------------------------------------------------------------------

typedef struct {
  const Layer *layer;
  const Term *terms;
  int64_t count, threads;
  Product *lines;  // of a stage
  double *alphas;
  int64_t used;
} Call;

static Matrix rows_of(Values x, int64_t row) { return (Matrix){x.at + 2 * row * x.by, x.by, 1}; }
static Matrix turned(Matrix x) { return (Matrix){x.at, x.column, x.row}; }
static Matrix dense(char *at, int64_t columns) { return (Matrix){at, columns, 1}; }
static Values part_of(const Layer *l, Values both, int part) { return (Values){both.at + 2 * part * l->f, both.by}; }
static int64_t inputs_of(const Layer *l, const Term *t) { return t->part == DOWN ? l->f : l->d; }
static int64_t outputs_of(const Layer *l, const Term *t) { return t->part == DOWN ? l->d : l->f; }
static int64_t rows_of_term(const Term *t) { return t->stop - t->start; }

// out [m, n] = alpha left [m, k] right [k, n] joins the stage; its line, for what differs from bf16.
static Product *put(Call *c, Matrix left, Matrix right, Matrix out, int64_t m, int64_t k, int64_t n, double alpha) {
  c->lines[c->used] = (Product){left, right, out, m, k, n, BF16, BF16, BF16, 0, 0};
  c->alphas[c->used] = alpha;
  return c->lines + c->used++;
}

// The addends of a stage that have a mark (grouped.c's answer 3), as products of their own before those that they
// belong to: what is not finite in them stays in their own rows.
static int make_apart(Call *c, int64_t count) {
  int64_t kept = 0, failed = 0;
  for (int64_t i = 0, next; i < count && !failed; i = next) {
    Product *p = c->lines + i, *to = c->lines + kept;
    int64_t addends = p->addends, begun = p->add;
    next = i + 1 + addends;
    c->alphas[kept] = c->alphas[i], *to = *p, to->addends = 0, kept++;
    for (int64_t j = i + 1; j < next && !failed; j++) {
      Product q = c->lines[j];
      double alpha = c->alphas[j];
      if (!q.add) {
        c->alphas[kept] = alpha, c->lines[kept++] = q, to->addends++;
        continue;
      }
      for (int64_t r = 0; r < to->m && !begun; r++) memset(to->out.at + 2 * r * to->out.row, 0, 2 * to->n);
      begun = to->add = 1;
      q.out = (Matrix){(char *)value_at(to->out, q.out.row, q.out.column, BF16), to->out.row, 1}, q.out_kind = BF16;
      failed = multiply_table(&q, &alpha, 1, c->threads);
    }
  }
  return failed ? (int)failed : multiply_table(c->lines, c->alphas, kept, c->threads);
}

static int run_stage(Call *c) {
  int64_t count = c->used;
  c->used = 0;
  int failed = count ? multiply_table(c->lines, c->alphas, count, c->threads) : 0;
  return failed == 3 ? make_apart(c, count) : failed;
}

// The terms of parts [first, last] join the stage as products: S = round(x A'), or with `gradient` G = round(s dout B).
static void put_inner(Call *c, int first, int last, Values x, int gradient) {
  for (int64_t i = 0; i < c->count; i++) {
    const Term *t = c->terms + i;
    if (t->part < first || t->part > last) continue;
    Values own = first == last || !gradient ? x : part_of(c->layer, x, t->part);
    int64_t k = gradient ? outputs_of(c->layer, t) : inputs_of(c->layer, t);
    Matrix right = gradient ? dense(t->b, t->r) : turned(dense(t->a, k));
    Matrix out = dense(gradient ? t->g : t->s, t->r);
    put(c, rows_of(own, t->start), right, out, rows_of_term(t), k, t->r, gradient ? t->scaling : 1)->right_kind = F32;
  }
}

// The terms of a part as addends of the product `of`: s S B' or, with `gradient`, G A. `column`: where its columns begin
// in it.
static void put_addends(Call *c, Product *of, int part, int64_t column, int gradient) {
  for (int64_t i = 0; i < c->count; i++) {
    const Term *t = c->terms + i;
    if (t->part != part || t->start >= t->stop) continue;
    int64_t n = gradient ? inputs_of(c->layer, t) : outputs_of(c->layer, t);
    Matrix right = gradient ? dense(t->a, n) : turned(dense(t->b, t->r)), at = {NULL, t->start, column};
    Product *line = put(c, dense(gradient ? t->g : t->s, t->r), right, at, rows_of_term(t), t->r, n,
                        gradient ? 1 : t->scaling);
    line->right_kind = F32, line->out_kind = F32, of->addends++;
  }
}

// The gradients of a part's B, s dout' S, or A, G' x.
static void put_masters(Call *c, int part, Values x, int of_a) {
  for (int64_t i = 0; i < c->count; i++) {
    const Term *t = c->terms + i;
    if (t->part != part) continue;
    Matrix inner = dense(of_a ? t->g : t->s, t->r), own = rows_of(x, t->start);
    int64_t n = of_a ? inputs_of(c->layer, t) : outputs_of(c->layer, t), rows = rows_of_term(t);
    Product *line = of_a ? put(c, turned(inner), own, dense(t->da, n), t->r, rows, n, 1)
                         : put(c, turned(own), inner, dense(t->db, t->r), n, rows, t->r, t->scaling);
    line->out_kind = F32;
  }
}

// Whether the rows of up's weight follow those of gate's: then both are one product.
static int joined(const Layer *l) {
  return l->weight[UP].at == l->weight[GATE].at + 2 * l->f * l->weight[GATE].by && l->f % 16 == 0 &&
         l->weight[UP].by == l->weight[GATE].by;
}

// ---- the layer -----------------------------------------------------------------------------------------------------

static void run_unit(const Layer *l, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (l->rows * l->f > LITTLE)
  for (int64_t r = 0; r < l->rows; r++) {
    const char *gate = l->both.at + 2 * r * l->both.by, *up = gate + 2 * l->f;
    void *h = l->h.at + 2 * r * l->h.by;
    if (l->act == SILU) gate_row(gate, l->both.by, up, l->both.by, l->f, h, BF16, SILU);
    else if (l->act == GELU_TANH) gate_row(gate, l->both.by, up, l->both.by, l->f, h, BF16, GELU_TANH);
    else gate_row(gate, l->both.by, up, l->both.by, l->f, h, BF16, GELU);
  }
}

static void run_slopes(const Layer *l, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (l->rows * l->f > LITTLE)
  for (int64_t r = 0; r < l->rows; r++) {
    const char *dh = l->dh.at + 2 * r * l->dh.by, *gate = l->both.at + 2 * r * l->both.by, *up = gate + 2 * l->f;
    char *dgate = l->dboth.at + 2 * r * l->dboth.by, *dup = dgate + 2 * l->f, *h = l->h.at + 2 * r * l->h.by;
#define SLOPES(act) \
  gate_slope_row(dh, l->dh.by, gate, l->both.by, up, l->both.by, l->f, dgate, dup, h, BF16, act)
    if (l->act == SILU) SLOPES(SILU);
    else if (l->act == GELU_TANH) SLOPES(GELU_TANH);
    else SLOPES(GELU);
#undef SLOPES
  }
}

// n from x and its norm's numbers, to where n stands.
static void run_norm(const Layer *l, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (l->rows * l->d > LITTLE)
  for (int64_t r = 0; r < l->rows; r++) {
    const char *x = l->x.at + 2 * r * l->x.by;
    char *n = l->n.at + 2 * r * l->n.by;
#define NORM(kind, offset) norm_row(x, l->x.by, l->norm, l->rstd[r], l->d, n, BF16, kind, offset)
    if (l->norm_kind == F32 && l->offset) NORM(F32, 1);
    else if (l->norm_kind == F32) NORM(F32, 0);
    else if (l->offset) NORM(BF16, 1);
    else NORM(BF16, 0);
#undef NORM
  }
}

static int forward(Call *c) {
  const Layer *l = c->layer;
  int both = joined(l), failed;
  put_inner(c, GATE, UP, l->n, 0);
  if ((failed = run_stage(c))) return failed;
  for (int part = GATE; part <= (both ? GATE : UP); part++) {
    Product *p = put(c, rows_of(l->n, 0), turned(rows_of(l->weight[part], 0)), rows_of(part_of(l, l->both, part), 0),
                     l->rows, l->d, both ? 2 * l->f : l->f, 1);
    put_addends(c, p, part, 0, 0);
    if (both) put_addends(c, p, UP, l->f, 0);
  }
  if ((failed = run_stage(c))) return failed;
  run_unit(l, c->threads);
  put_inner(c, DOWN, DOWN, l->h, 0);
  if ((failed = run_stage(c)) || !l->y.at) return failed;
  Matrix right = turned(rows_of(l->weight[DOWN], 0));
  put_addends(c, put(c, rows_of(l->h, 0), right, rows_of(l->y, 0), l->rows, l->f, l->d, 1), DOWN, 0, 0);
  return run_stage(c);
}

static int backward(Call *c) {
  const Layer *l = c->layer;
  Values n = l->rstd ? l->n : l->x;
  int both = joined(l), failed;
  put_inner(c, DOWN, DOWN, l->dy, 1);
  if ((failed = run_stage(c))) return failed;
  Matrix right = rows_of(l->weight[DOWN], 0);
  put_addends(c, put(c, rows_of(l->dy, 0), right, rows_of(l->dh, 0), l->rows, l->d, l->f, 1), DOWN, 0, 1);
  put_masters(c, DOWN, l->dy, 0);
  if ((failed = run_stage(c))) return failed;
  run_slopes(l, c->threads);
  if (l->rstd) run_norm(l, c->threads);
  put_masters(c, DOWN, l->h, 1);
  put_inner(c, GATE, UP, l->dboth, 1);
  if ((failed = run_stage(c))) return failed;
  for (int part = GATE; part <= UP; part++) {
    put_masters(c, part, part_of(l, l->dboth, part), 0), put_masters(c, part, n, 1);
    if (!l->dn.at || (both && part == UP)) continue;
    Product *p = put(c, rows_of(part_of(l, l->dboth, part), 0), rows_of(l->weight[part], 0), rows_of(l->dn, 0), l->rows,
                     both ? 2 * l->f : l->f, l->d, 1);
    p->add = part == UP;
    if (!both && part == GATE) {  // the terms join the sum that is rounded last
      if ((failed = run_stage(c))) return failed;
      continue;
    }
    put_addends(c, p, GATE, 0, 1), put_addends(c, p, UP, 0, 1);
  }
  return run_stage(c);
}

// A layer, and its terms where they are shaped like that; forward, or with `back` backward. 0; 1 when memory ran out; or
// 2 before anything was written, where this is not compiled for AMX or the system does not permit it.
int topwork_feedforward(const void *layer, const void *terms, int64_t count, int64_t back, int64_t threads) {
#ifdef AMX
  if (!amx_permitted()) return 2;
  int64_t most_lines = 4 * count + 8;
  Call c = {layer, terms, count, threads, malloc(most_lines * sizeof(Product)), malloc(most_lines * sizeof(double))};
  int failed = c.lines && c.alphas ? (back ? backward : forward)(&c) : 1;
  free(c.lines), free(c.alphas);
  return failed;
#else
  (void)layer, (void)terms, (void)count, (void)back, (void)threads, (void)forward, (void)backward;
  return 2;
#endif
}

int topwork_feedforward_level(void) { return LEVEL; }
