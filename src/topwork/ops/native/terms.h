// Frozen layers with the low-rank terms of their adapters, as stages of the products of grouped.c: those with one input
// are a group, whose outputs lie side by side.
//
//     S = n A'    y = n W' + b + s S B'        G = s dy B    dn = dy W + G A    dA = G' n    dB = s dy' S
//
// With dropout S is drop(n) A', dn has drop(G A), and dA is G' drop(n), each term with draws of its own.
// The stages are those of ops/project.py, and so are sums and roundings.

#pragma once
#include "grouped.c"
#include "layer.c"

// ---- what a call is given: all numbers are 64 bits wide ------------------------------------------------------------

// Rows of values in bf16 that lie side by side.
typedef struct {
  char *at;
  int64_t by;
} Values;

typedef struct {
  Values weight;     // [outputs, inputs]
  const char *bias;  // [outputs], or NULL
  int64_t bias_kind, inputs, outputs;
  int64_t column;  // where its outputs begin among its group's
} Part;

// s B A of rows [start, stop): masters a [r, inputs], b [outputs, r] in fp32; S and G [stop - start, r] in bf16; the
// masters' gradients. What its A sees loses values: layer.c's draws [stop - start] and key, the least hash of what stays,
// and its factor; NULL where nothing is lost.
typedef struct {
  char *a, *b, *s, *g, *da, *db;
  int64_t r, start, stop, part;
  double scaling;
  const int64_t *draws;
  int64_t key, least;
  double kept;
} Term;

// Terms that see the same of their rows best stand together.
typedef struct {
  const Part *parts;
  const Term *terms;
  int64_t count, rows, threads;
  Product *lines;  // of a stage
  double *alphas;
  int64_t used;
} Call;

typedef struct {
  int first, last;  // parts
} Group;

static Matrix rows_of(Values x, int64_t row) { return (Matrix){x.at + 2 * row * x.by, x.by, 1}; }
static Matrix turned(Matrix x) { return (Matrix){x.at, x.column, x.row}; }
static Matrix dense(char *at, int64_t columns) { return (Matrix){at, columns, 1}; }
static Values from_column(Values x, int64_t column) { return (Values){x.at + 2 * column, x.by}; }
static Values from_row(Values x, int64_t row) { return (Values){x.at + 2 * row * x.by, x.by}; }
static int64_t rows_of_term(const Term *t) { return t->stop - t->start; }
static int is_of(const Term *t, Group g) { return t->part >= g.first && t->part <= g.last; }

// ---- dropout -------------------------------------------------------------------------------------------------------

// Whether terms of one group see the same of their rows: layers with one input do.
static int sees_as(const Term *t, const Term *other) {
  if (!t->draws || !other->draws) return t->draws == other->draws;
  int same_rows = t->start == other->start && t->stop == other->stop;
  return same_rows && t->draws == other->draws && t->key == other->key && t->least == other->least;
}

// to [rows, width] = x of rows from `row` on, as a term's A sees them; with `add` added to what is there.
static void drop_rows(const Term *t, Values x, int64_t row, int64_t rows, int64_t width, Values to, int add,
                      int64_t threads) {
  topwork_drop(x.at, x.by, to.at, to.by, rows, width, t->draws + row - t->start, (uint32_t)t->key, (uint32_t)t->least,
               (float)t->kept, 1 + 2 * add, (int)threads);
}

// All rows of x that a term with dropout sees, as a matrix in memory that is to be freed; NULL where there is none.
static char *all_dropped(const Call *c, const Term *t, Values x) {
  int64_t width = c->parts[t->part].inputs, rows = rows_of_term(t);
  char *to = malloc(most(1, 2 * rows * width));
  if (to) drop_rows(t, from_row(x, t->start), t->start, rows, width, (Values){to, width}, 0, c->threads);
  return to;
}

// ---- stages of products --------------------------------------------------------------------------------------------

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

// S of a term with dropout, or the gradient of its A from G, which end before the stage does.
static int multiply_dropped(Call *c, const Term *t, int of_a, Values x) {
  int64_t k = c->parts[t->part].inputs, rows = rows_of_term(t), used = c->used;
  char *seen = all_dropped(c, t, x);
  if (!seen) return 1;
  if (of_a) put(c, turned(dense(t->g, t->r)), dense(seen, k), dense(t->da, k), t->r, rows, k, 1)->out_kind = F32;
  else put(c, dense(seen, k), turned(dense(t->a, k)), dense(t->s, t->r), rows, k, t->r, 1)->right_kind = F32;
  int failed = multiply_table(c->lines + used, c->alphas + used, 1, c->threads);
  c->used = used;
  free(seen);
  return failed;
}

// A group's terms join the stage as products: S = round(x A').
static int put_inner(Call *c, Group g, Values x) {
  for (const Term *t = c->terms; t < c->terms + c->count; t++) {
    int failed = is_of(t, g) && t->draws ? multiply_dropped(c, t, 0, x) : 0;
    if (failed) return failed;
    if (!is_of(t, g) || t->draws) continue;
    int64_t k = c->parts[t->part].inputs;
    Matrix right = turned(dense(t->a, k));
    put(c, rows_of(x, t->start), right, dense(t->s, t->r), rows_of_term(t), k, t->r, 1)->right_kind = F32;
  }
  return 0;
}

// So do G = round(s dy B).
static void put_slopes(Call *c, Group g, Values dy) {
  for (const Term *t = c->terms; t < c->terms + c->count; t++) {
    if (!is_of(t, g)) continue;
    const Part *p = c->parts + t->part;
    Matrix own = rows_of(from_column(dy, p->column), t->start);
    put(c, own, dense(t->b, t->r), dense(t->g, t->r), rows_of_term(t), p->outputs, t->r, t->scaling)->right_kind = F32;
  }
}

static void put_addend(Call *c, Product *of, Matrix left, Matrix right, Matrix at, int64_t m, int64_t k, int64_t n,
                       int64_t kind, double alpha) {
  Product *line = put(c, left, right, at, m, k, n, alpha);
  line->right_kind = kind, line->out_kind = F32, of->addends++;
}

// What parts add to the product `of`, whose columns begin with those of the first: biases, then s S B'.
static void put_outer(Call *c, Product *of, Group g) {
  static const uint16_t one = 0x3f80;
  for (int i = g.first; i <= g.last; i++) {
    const Part *p = c->parts + i;
    Matrix at = {NULL, 0, p->column - c->parts[g.first].column}, ones = {(char *)&one, 0, 1};
    if (p->bias)
      put_addend(c, of, ones, dense((char *)p->bias, p->outputs), at, c->rows, 1, p->outputs, p->bias_kind, 1);
  }
  for (const Term *t = c->terms; t < c->terms + c->count; t++) {
    if (!is_of(t, g) || t->start >= t->stop) continue;
    const Part *p = c->parts + t->part;
    Matrix at = {NULL, t->start, p->column - c->parts[g.first].column};
    put_addend(c, of, dense(t->s, t->r), turned(dense(t->b, t->r)), at, rows_of_term(t), t->r, p->outputs, F32,
               t->scaling);
  }
}

// The terms' share of an input's gradient, G A, as addends of the product `of`; of those without dropout.
static void put_shares(Call *c, Product *of, Group g) {
  for (const Term *t = c->terms; t < c->terms + c->count; t++) {
    if (!is_of(t, g) || t->start >= t->stop || t->draws) continue;
    int64_t n = c->parts[t->part].inputs;
    put_addend(c, of, dense(t->g, t->r), dense(t->a, n), (Matrix){NULL, t->start, 0}, rows_of_term(t), t->r, n, F32, 1);
  }
}

// The gradient of a term's A, G' x, or of its B, s x' S; x is its group's.
static int put_gradient(Call *c, const Term *t, int of_a, Values x) {
  if (of_a && t->draws) return multiply_dropped(c, t, 1, x);
  const Part *p = c->parts + t->part;
  Matrix left = turned(of_a ? dense(t->g, t->r) : rows_of(from_column(x, p->column), t->start));
  Matrix right = of_a ? rows_of(x, t->start) : dense(t->s, t->r);
  int64_t m = of_a ? t->r : p->outputs, n = of_a ? p->inputs : t->r;
  Matrix out = dense(of_a ? t->da : t->db, n);
  put(c, left, right, out, m, rows_of_term(t), n, of_a ? 1 : t->scaling)->out_kind = F32;
  return 0;
}

// ---- groups --------------------------------------------------------------------------------------------------------

// Whether each weight's rows follow those of the one before: then all are one product.
static int joined(const Call *c, Group g) {
  for (int i = g.first; i < g.last; i++) {
    const Part *p = c->parts + i, *next = p + 1;
    if (next->weight.at != p->weight.at + 2 * p->outputs * p->weight.by || next->weight.by != p->weight.by ||
        next->column % 16)
      return 0;
  }
  return 1;
}

static int64_t outputs_of(const Call *c, Group g) {
  return c->parts[g.last].column + c->parts[g.last].outputs - c->parts[g.first].column;
}

// y [rows, outputs] from x and each S.
static int group_forward(Call *c, Group g, Values x, Values y) {
  int whole = joined(c, g);
  for (int i = g.first; i <= (whole ? g.first : g.last); i++) {
    const Part *p = c->parts + i;
    Group own = {i, whole ? g.last : i};
    Matrix right = turned(rows_of(p->weight, 0)), out = rows_of(from_column(y, p->column), 0);
    put_outer(c, put(c, rows_of(x, 0), right, out, c->rows, p->inputs, outputs_of(c, own), 1), own);
  }
  return run_stage(c);
}
