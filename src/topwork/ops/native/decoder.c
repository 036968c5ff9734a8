// A decoder layer with the low-rank terms of its adapters, or its feed-forward half alone, forward and backward, in one
// call each.
//
//     q k v = norm(x) W' + ...    o = attention(rotated q, k, v)    x += m (o Wo' + ...)    x += m feedforward(norm(x))
//
// What stands between products is layer.c's, attention is attention.c's: sums and roundings are theirs. What a call of
// its own saves is the way through Python between thirty of them.

#include "tile.h"

#ifdef AMX
#include "feedforward.h"

enum { QUERY = DOWN + 1, KEY, VALUE, OUTPUT };
static const Group INPUTS = {QUERY, VALUE}, OUTPUTS = {OUTPUT, OUTPUT};

typedef int (*Attention)(const int64_t *shape, const int64_t *spans, float scale, const int64_t *strides,
                         void *const *tensors, float *lse);

// All tensors are contiguous, in bf16 but where it is told.
typedef struct {
  int64_t rows, d, f, act;
  // rows that go on behind the attention, and which these are, each once; NULL for all
  int64_t kept;
  const int64_t *positions;
  // attention.c's functions; heads of queries, of keys and as many of values; spans [sequences, 2]; cos and sin [rows,
  // 2 half], half = 0 where nothing turns
  Attention forward, backward;
  int64_t heads, key_heads, size, window;
  const int64_t *spans;
  int64_t sequences;
  const char *cos, *sin;
  int64_t turn_stride, half, turn_kind;
  // x [rows, d] in fp32 and behind the attention [kept, d], which is the same memory where all rows go on, and where sums
  // take its place; going backward the gradient. What is kept for that: x rounded and its norm's numbers in fp32 before
  // either half, q k v, attention's output [rows, heads, size] (that of the rows that go on is in `h` for a moment),
  // lse [heads, rows] in fp32, gate and up
  float *x[2];
  char *branch[2];
  float *rstd[2];
  char *qkv, *out[2];
  float *lse;
  char *both;
  // for the time of a call, each what another is done with: n, dn, attention's dout [rows, max(d, heads size)]; y, dy,
  // the gradient of q k v [rows, max(d, width)]; queries, and going backward dh, n made again, dout of the rows that go
  // on [rows, max(f, d, heads size)]; keys, h, attention's output of the rows that go on [rows, max(f, heads size)]
  char *back, *on, *room, *h;
  const char *norm[2];
  int64_t norm_mode[2];
  // norms of each head's queries and keys [size], with their numbers [rows, heads] and [rows, key heads] in fp32; NULL
  // where there are none. With them q k v stay as they are, and what is turned stands in `room` and `h`
  const char *head_norm[2];
  int64_t head_mode[2];
  float *head_rstd[2];
  int64_t goes_on;  // whether its sum is wanted, or going backward the stream's gradient
} Decoder;

typedef struct {
  double scale, eps[2], multiplier, head_eps[2];
} Factors;

typedef struct {
  const Decoder *l;
  const Factors *by;
} Pass;

static int64_t width_of(const Decoder *l) { return (l->heads + 2 * l->key_heads) * l->size; }

// Heads of x, which are those from `row` on.
static void rotate(const Decoder *l, Values x, int64_t heads, int64_t row, int64_t rows, int inverse) {
  int64_t step = row * l->turn_stride * bytes_of(l->turn_kind);
  if (!l->half) return;
  topwork_rotate(from_row(x, row).at, x.by, l->size, rows, heads, l->cos + step, l->turn_stride, l->sin + step,
                 l->turn_stride, l->half, 1 + 2 * (l->turn_kind == BF16) + 4 * inverse, 1);
}

// Queries or keys: where they are among q k v, how many heads, and where they are turned.
typedef struct {
  Values x, turned;
  int64_t heads;
} Turned;

static Turned turned_of(const Decoder *l, int keys) {
  int64_t heads = keys ? l->key_heads : l->heads;
  Values x = from_column((Values){l->qkv, width_of(l)}, keys ? l->heads * l->size : 0);
  return (Turned){x, l->head_norm[0] ? (Values){keys ? l->h : l->room, heads * l->size} : x, heads};
}

// With `dqkv` backward, from `grad` [rows, heads, size].
static int attend(const Pass *p, char *grad, char *dqkv, int64_t threads) {
  const Decoder *l = p->l;
  int64_t w = width_of(l), own = l->heads * l->size, s = l->size, k = 2 * own, v = 2 * (own + l->key_heads * s);
  Values query = turned_of(l, 0).turned, key = turned_of(l, 1).turned;
  int64_t shape[] = {l->sequences, l->rows, l->heads, l->key_heads, s, l->window, BF16, threads};
  int64_t strides[] = {query.by, s, key.by, s, w, s, own, s, own, s, w, s, w, s, w, s};
  void *tensors[] = {query.at, key.at, l->qkv + v, l->out[0], grad, dqkv, dqkv + k, dqkv + v};
  return (dqkv ? l->backward : l->forward)(shape, l->spans, (float)p->by->scale, strides, tensors, l->lse);
}

// The feed-forward half, with n and y of the whole.
static FeedForward half_of(const Decoder *l) {
  int64_t f = l->f, d = l->d;
  Values both = {l->both, 2 * f}, h = {l->h, f}, y = {l->on, d};
  return (FeedForward){.n = {l->back, d}, .both = both, .h = h, .y = y, .f = f, .d = d, .act = l->act};
}

// ---- what is made of rows, on one thread ---------------------------------------------------------------------------

// The sum with what came before a half, y or nothing, and n of the half.
static void add_and_norm(const Pass *p, const char *y, int half, int64_t row, int64_t rows) {
  const Decoder *l = p->l;
  int64_t at = row * l->d;
  float *x = l->x[half] + at;
  topwork_add_and_norm(x, y ? y + 2 * at : NULL, x, l->branch[half] + 2 * at, (float)p->by->multiplier,
                       rows, l->d, l->norm[half], (float)p->by->eps[half], l->rstd[half] + row, l->back + 2 * at,
                       (int)l->norm_mode[half], 1);
}

static void make_first(const void *of, int64_t row, int64_t rows, char *spare) {
  (void)spare;
  add_and_norm(of, NULL, 0, row, rows);
}

static void make_second(const void *of, int64_t row, int64_t rows, char *spare) {
  (void)spare;
  add_and_norm(of, ((const Pass *)of)->l->on, 1, row, rows);
}

// Queries and keys, normalised where heads have norms and turned; `known`: the norms' numbers are there already.
static void turn_rows_of(const Pass *p, int64_t row, int64_t rows, int known) {
  const Decoder *l = p->l;
  if (!l->head_norm[0]) {
    rotate(l, turned_of(l, 0).x, l->heads + l->key_heads, row, rows, 0);
    return;
  }
  for (int keys = 0; keys < 2; keys++) {
    Turned t = turned_of(l, keys);
    topwork_rms_norm(from_row(t.x, row).at, t.x.by, l->size, rows * t.heads, t.heads, l->size, l->head_norm[keys],
                     (float)p->by->head_eps[keys], known, l->head_rstd[keys] + row * t.heads,
                     from_row(t.turned, row).at, (int)l->head_mode[keys], 1);
    rotate(l, t.turned, t.heads, row, rows, 0);
  }
}

static void make_turned(const void *of, int64_t row, int64_t rows, char *spare) {
  (void)spare;
  turn_rows_of(of, row, rows, 0);
}

static void make_turned_again(const void *of, int64_t row, int64_t rows, char *spare) {
  (void)spare;
  turn_rows_of(of, row, rows, 1);
}

static void make_sum(const void *of, int64_t row, int64_t rows, char *spare) {
  (void)spare;
  const Pass *p = of;
  int64_t at = row * p->l->d;
  float *x = p->l->x[1] + at;
  topwork_add_and_round(x, p->l->on + 2 * at, x, NULL, (float)p->by->multiplier, 1, rows * p->l->d, 1);
}

// Going backward, dy of the feed-forward half.
static void make_dy(const void *of, int64_t row, int64_t rows, char *spare) {
  (void)spare;
  const Pass *p = of;
  int64_t at = row * p->l->d;
  float *x = p->l->x[1] + at;
  topwork_add_and_round(x, NULL, x, p->l->on + 2 * at, 1, (float)p->by->multiplier, rows * p->l->d, 1);
}

// The stream's gradient before a half, and what of it the one before is given, dy or nothing.
static void add_and_norm_backward(const Pass *p, char *dy, int half, int64_t row, int64_t rows) {
  const Decoder *l = p->l;
  int64_t at = row * l->d;
  float *x = l->x[half] + at;
  topwork_add_and_norm_backward(x, l->back + 2 * at, l->branch[half] + 2 * at, rows, l->d, l->norm[half],
                                l->rstd[half] + row, x, dy ? dy + 2 * at : NULL, (float)p->by->multiplier,
                                (int)l->norm_mode[half], 1);
}

// n of a half again.
static void norm_again(const Decoder *l, int half, int64_t row, int64_t rows, char *spare) {
  int64_t at = 2 * row * l->d;
  topwork_rms_norm(l->branch[half] + at, l->d, 0, rows, 1, l->d, l->norm[half], 0, 1, l->rstd[half] + row,
                   spare ? spare : l->room + at, (int)l->norm_mode[half], 1);
}

static void make_second_backward(const void *of, int64_t row, int64_t rows, char *spare) {
  norm_again(((const Pass *)of)->l, 1, row, rows, spare);
  add_and_norm_backward(of, ((const Pass *)of)->l->on, 1, row, rows);
}

static void make_first_backward(const void *of, int64_t row, int64_t rows, char *spare) {
  norm_again(((const Pass *)of)->l, 0, row, rows, spare);
  if (((const Pass *)of)->l->goes_on) add_and_norm_backward(of, NULL, 0, row, rows);
}

// The gradient of heads before their norm takes the place of that behind it.
static void norm_heads_backward(const Decoder *l, int keys, char *dx, int64_t row) {
  Turned t = turned_of(l, keys);
  int mode = (int)l->head_mode[keys];
  for (int64_t h = 0; h < t.heads; h++, dx += 2 * l->size) {
    const char *x = from_row(t.x, row).at + 2 * h * l->size;
    float rstd = l->head_rstd[keys][row * t.heads + h];
#define CALL(kind, w_kind, offset) \
  slope_row(dx, l->size, x, l->size, l->head_norm[keys], rstd, l->size, dx, BF16, w_kind, offset)
    BY_MODE(CALL)
#undef CALL
  }
}

static void make_turned_back(const void *of, int64_t row, int64_t rows, char *spare) {
  (void)spare;
  const Decoder *l = ((const Pass *)of)->l;
  Values dqkv = {l->on, width_of(l)};
  rotate(l, dqkv, l->heads + l->key_heads, row, rows, 1);
  for (int64_t r = row; r < row + rows && l->head_norm[0]; r++)
    for (int keys = 0; keys < 2; keys++)
      norm_heads_backward(l, keys, from_row(dqkv, r).at + 2 * keys * l->heads * l->size, r);
}

// ---- rows that go on -----------------------------------------------------------------------------------------------

// to [kept, bytes] from [rows, bytes].
static void gather(const Decoder *l, const void *from, void *to, int64_t bytes, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (l->kept * bytes > 4 * LITTLE)
  for (int64_t i = 0; i < l->kept; i++) memcpy((char *)to + i * bytes, (char *)from + l->positions[i] * bytes, bytes);
}

// And back, with zeros for the others.
static void spread(const Decoder *l, const void *from, void *to, int64_t bytes, int64_t threads) {
#pragma omp parallel num_threads(threads) if (l->rows * bytes > 4 * LITTLE)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < l->rows; row++) memset((char *)to + row * bytes, 0, bytes);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < l->kept; i++) memcpy((char *)to + l->positions[i] * bytes, (char *)from + i * bytes, bytes);
  }
}

// ---- passes --------------------------------------------------------------------------------------------------------

static int forward(Call *c, const Pass *p) {
  const Decoder *l = p->l;
  int64_t own = l->heads * l->size;
  Values n = {l->back, l->d}, qkv = {l->qkv, width_of(l)}, out = {l->out[1], own}, y = {l->on, l->d};
  FeedForward half = half_of(l);
  int failed;
  if ((failed = run_rows(c, INPUTS, 0, n, make_first, p))) return failed;
  if ((failed = group_forward(c, INPUTS, n, qkv))) return failed;
  if ((failed = run_rows(c, NONE, 0, qkv, make_turned, p))) return failed;
  if ((failed = attend(p, NULL, NULL, c->threads))) return failed;
  if (l->positions) {
    gather(l, l->x[0], l->x[1], 4 * l->d, c->threads), gather(l, l->out[0], l->out[1], 2 * own, c->threads);
    c->rows = l->kept;
  }
  if ((failed = run_rows(c, OUTPUTS, 0, out, NULL, NULL))) return failed;
  if ((failed = group_forward(c, OUTPUTS, out, y))) return failed;
  if ((failed = run_rows(c, GATES, 0, n, make_second, p))) return failed;
  if (!l->goes_on) half.y.at = NULL;
  if ((failed = feedforward_forward(c, &half)) || !l->goes_on) return failed;
  return run_rows(c, NONE, 0, y, make_sum, p);
}

static int backward(Call *c, const Pass *p) {
  const Decoder *l = p->l;
  int64_t own = l->heads * l->size;
  Values dy = {l->on, l->d}, out = {l->out[1], own}, dout = {l->back, own}, dqkv = {l->on, width_of(l)};
  Values n = {l->room, l->d}, dn = {l->goes_on ? l->back : NULL, l->d};  // n is made again when dh is used up
  FeedForward half = half_of(l);
  half.dy = dy, half.dh = (Values){l->room, l->f}, half.dboth = half.both, half.dn = half.n;
  Stage begin = {make_dy, p, LAST, dy, {{LAST, 0, dy}}};
  Stage second = {make_second_backward, p, OUTPUTS, dy, {{OUTPUTS, 0, dy}, {OUTPUTS, 1, out}, {GATES, 1, n, l->d, 1}}};
  Stage turned = {make_turned_back, p, INPUTS, dqkv, {{INPUTS, 0, dqkv}}};
  Stage first = {make_first_backward, p, NONE, dn, {{INPUTS, 1, n, l->d, 1}}};
  int failed;
  c->rows = l->kept;
  if ((failed = run_gradients(c, &begin))) return failed;
  if ((failed = feedforward_backward(c, &half))) return failed;
  if (l->positions) gather(l, l->out[0], l->out[1], 2 * own, c->threads);
  if ((failed = run_gradients(c, &second))) return failed;
  if ((failed = group_backward(c, OUTPUTS, dy, l->positions ? (Values){l->room, own} : dout))) return failed;
  if (l->positions) {
    spread(l, l->room, dout.at, 2 * own, c->threads);
    if (l->goes_on) spread(l, l->x[1], l->x[0], 4 * l->d, c->threads);
  }
  c->rows = l->rows;
  if (l->head_norm[0] && (failed = run_rows(c, NONE, 0, dqkv, make_turned_again, p))) return failed;
  if ((failed = attend(p, dout.at, dqkv.at, c->threads))) return failed;
  if ((failed = run_gradients(c, &turned))) return failed;
  if ((failed = group_backward(c, INPUTS, dqkv, dn))) return failed;
  return run_gradients(c, &first);
}

// ---- calls ---------------------------------------------------------------------------------------------------------

// Room for the lines of a stage; 0, 1 when memory ran out, or 2 where the system does not permit AMX.
static int begin(Call *c) {
  if (!amx_permitted()) return 2;
  int64_t most_lines = 4 * c->count + 16;
  c->lines = malloc(most_lines * sizeof *c->lines), c->alphas = malloc(most_lines * sizeof *c->alphas);
  return !c->lines || !c->alphas;
}

// The answer of a call that is over.
static int end(Call *c, int failed) {
  free(c->lines), free(c->alphas);
  return failed;
}

static int feedforward_with_gradients(Call *c, const FeedForward *l) {
  Stage first = {NULL, NULL, LAST, l->dy, {{LAST, 0, l->dy}}}, last = {make_n, l, NONE, l->dn, {source_of_n(l)}};
  int failed = run_gradients(c, &first);
  if (!failed) failed = feedforward_backward(c, l);
  return failed ? failed : run_gradients(c, &last);
}

#endif

// Parts [3] and a layer as they are shaped above, with terms; forward, or with `back` backward. 0, or what `begin` says
// before anything was written, or 1; 2 where this is not compiled for AMX.
int topwork_feedforward(const void *parts, const void *layer, int64_t rows, const void *terms, int64_t count,
                        int64_t back, int64_t threads) {
#ifdef AMX
  Call c = {parts, terms, count, rows, threads};
  int failed = begin(&c);
  if (!failed && back) failed = feedforward_with_gradients(&c, layer);
  else if (!failed && !(failed = run_rows(&c, GATES, 0, ((const FeedForward *)layer)->n, NULL, NULL)))
    failed = feedforward_forward(&c, layer);
  return end(&c, failed);
#else
  return 2;
#endif
}

// The same with parts [7].
int topwork_decoder_layer(const void *parts, const void *layer, const void *factors, const void *terms, int64_t count,
                          int64_t back, int64_t threads) {
#ifdef AMX
  Call c = {parts, terms, count, ((const Decoder *)layer)->rows, threads};
  Pass p = {layer, factors};
  int failed = begin(&c);
  if (!failed) failed = (back ? backward : forward)(&c, &p);
  return end(&c, failed);
#else
  return 2;
#endif
}

int topwork_decoder_level(void) { return LEVEL; }
