// A decoder layer with the low-rank terms of its adapters, or its feed-forward half alone, forward and backward, in one
// call each.
//
//     q k v = norm(x) W' + ...    o = attention(rotated q, k, v)    x += m (o Wo' + ...)    x += m feedforward(norm(x))
//
// What stands between products is layer.c's, attention is attention.c's: sums and roundings are theirs. What a call of
// its own saves is the way through Python between thirty of them.

#include "feedforward.h"

enum { QUERY = DOWN + 1, KEY, VALUE, OUTPUT };
static const Group INPUTS = {QUERY, VALUE}, OUTPUTS = {OUTPUT, OUTPUT};

typedef int (*Attention)(const int64_t *shape, const int64_t *spans, float scale, const int64_t *strides,
                         void *const *tensors, float *lse);

// All tensors are contiguous, in bf16 but where it is told.
typedef struct {
  int64_t rows, d, f, act;
  // attention.c's functions; heads of queries, of keys and as many of values; spans [sequences, 2]; cos and sin [rows,
  // 2 half], half = 0 where nothing turns
  Attention forward, backward;
  int64_t heads, key_heads, size, window;
  const int64_t *spans;
  int64_t sequences;
  const char *cos, *sin;
  int64_t turn_stride, half, turn_kind;
  // x [rows, d] in fp32, whose sums take its place; going backward the gradient. What is kept: x rounded [rows, d] and
  // its norm's numbers [rows] in fp32 before either half, q k v, attention's output and lse [heads, rows] in fp32, gate
  // and up
  float *x;
  char *branch[2];
  float *rstd[2];
  char *qkv, *out;
  float *lse;
  char *both;
  // for the time of a call, each what another is done with: n, dn, attention's dout [rows, max(d, heads size)]; y, dy,
  // the gradient of q k v [rows, max(d, width)]; going backward dh, n made again [rows, max(f, d)]; h [rows, f]
  char *back, *on, *room, *h;
  const char *norm[2];
  int64_t norm_mode[2];
  int64_t goes_on;  // whether its sum is wanted, or going backward the stream's gradient
} Decoder;

typedef struct {
  double scale, eps[2], multiplier;
} Factors;

static int64_t width_of(const Decoder *l) { return (l->heads + 2 * l->key_heads) * l->size; }

static void rotate(const Decoder *l, char *x, int inverse, int64_t threads) {
  if (!l->half) return;
  topwork_rotate(x, width_of(l), l->size, l->rows, l->heads + l->key_heads, l->cos, l->turn_stride, l->sin,
                 l->turn_stride, l->half, 1 + 2 * (l->turn_kind == BF16) + 4 * inverse, (int)threads);
}

// With `dqkv` backward, from `grad` [rows, heads, size].
static int attend(const Decoder *l, float scale, char *grad, char *dqkv, int64_t threads) {
  int64_t w = width_of(l), own = l->heads * l->size, s = l->size, q = 2 * own, v = 2 * (own + l->key_heads * s);
  int64_t shape[] = {l->sequences, l->rows, l->heads, l->key_heads, s, l->window, BF16, threads};
  int64_t strides[] = {w, s, w, s, w, s, own, s, own, s, w, s, w, s, w, s};
  void *tensors[] = {l->qkv, l->qkv + q, l->qkv + v, l->out, grad, dqkv, dqkv + q, dqkv + v};
  return (dqkv ? l->backward : l->forward)(shape, l->spans, scale, strides, tensors, l->lse);
}

// The feed-forward half, with n and y of the whole.
static FeedForward half_of(const Decoder *l) {
  int64_t f = l->f, d = l->d;
  Values both = {l->both, 2 * f}, h = {l->h, f}, y = {l->on, d};
  return (FeedForward){.n = {l->back, d}, .both = both, .h = h, .y = y, .f = f, .d = d, .act = l->act};
}

static void add_and_norm(const Decoder *l, const Factors *by, const char *y, int half, int64_t threads) {
  topwork_add_and_norm(l->x, y, l->x, l->branch[half], (float)by->multiplier, l->rows, l->d, l->norm[half],
                       (float)by->eps[half], l->rstd[half], l->back, (int)l->norm_mode[half], (int)threads);
}

static void add_and_norm_backward(const Decoder *l, const Factors *by, char *dy, int half, int64_t threads) {
  topwork_add_and_norm_backward(l->x, l->back, l->branch[half], l->rows, l->d, l->norm[half], l->rstd[half], l->x, dy,
                                (float)by->multiplier, (int)l->norm_mode[half], (int)threads);
}

static int forward(Call *c, const Decoder *l, const Factors *by) {
  Values n = {l->back, l->d}, qkv = {l->qkv, width_of(l)}, out = {l->out, l->heads * l->size}, y = {l->on, l->d};
  FeedForward half = half_of(l);
  int failed;
  add_and_norm(l, by, NULL, 0, c->threads);
  if ((failed = group_forward(c, INPUTS, n, qkv))) return failed;
  rotate(l, l->qkv, 0, c->threads);
  if ((failed = attend(l, (float)by->scale, NULL, NULL, c->threads))) return failed;
  if ((failed = group_forward(c, OUTPUTS, out, y))) return failed;
  add_and_norm(l, by, l->on, 1, c->threads);
  if (!l->goes_on) half.y.at = NULL;
  if ((failed = feedforward_forward(c, &half)) || !l->goes_on) return failed;
  topwork_add_and_round(l->x, l->on, l->x, NULL, (float)by->multiplier, 1, l->rows * l->d, (int)c->threads);
  return 0;
}

static int backward(Call *c, const Decoder *l, const Factors *by) {
  int64_t own = l->heads * l->size;
  Values dy = {l->on, l->d}, out = {l->out, own}, dout = {l->back, own}, dqkv = {l->on, width_of(l)};
  Values n = {l->room, l->d}, dn = {l->goes_on ? l->back : NULL, l->d};
  FeedForward half = half_of(l);
  half.dy = dy, half.dh = (Values){l->room, l->f}, half.dboth = half.both, half.dn = half.n;
  half.x = (Values){l->branch[1], l->d}, half.n = n;  // made again when dh is used up
  half.rstd = l->rstd[1], half.norm = l->norm[1], half.norm_mode = l->norm_mode[1];
  int failed;
  topwork_add_and_round(l->x, NULL, l->x, l->on, 1, (float)by->multiplier, l->rows * l->d, (int)c->threads);
  if ((failed = feedforward_backward(c, &half))) return failed;
  add_and_norm_backward(l, by, l->on, 1, c->threads);
  put_slopes(c, OUTPUTS, dy);
  if ((failed = run_stage(c))) return failed;
  put_db(c, OUTPUTS, dy), put_da(c, OUTPUTS, out);
  if ((failed = group_backward(c, OUTPUTS, dy, dout))) return failed;
  if ((failed = attend(l, (float)by->scale, dout.at, dqkv.at, c->threads))) return failed;
  rotate(l, dqkv.at, 1, c->threads);
  topwork_rms_norm(l->branch[0], l->d, 0, l->rows, 1, l->d, l->norm[0], 0, 1, l->rstd[0], n.at, (int)l->norm_mode[0],
                   (int)c->threads);
  put_slopes(c, INPUTS, dqkv);
  if ((failed = run_stage(c))) return failed;
  put_db(c, INPUTS, dqkv), put_da(c, INPUTS, n);
  if ((failed = group_backward(c, INPUTS, dqkv, dn))) return failed;
  if (l->goes_on) add_and_norm_backward(l, by, NULL, 0, c->threads);
  return 0;
}

// ---- calls ---------------------------------------------------------------------------------------------------------

// Room for the lines of a stage; 0, 1 when memory ran out, or 2 where this is not compiled for AMX or the system does
// not permit it.
static int begin(Call *c) {
#ifdef AMX
  if (!amx_permitted()) return 2;
  int64_t most_lines = 4 * c->count + 16;
  c->lines = malloc(most_lines * sizeof *c->lines), c->alphas = malloc(most_lines * sizeof *c->alphas);
  return !c->lines || !c->alphas;
#else
  (void)c;
  return 2;
#endif
}

// The answer of a call that is over.
static int end(Call *c, int failed) {
  free(c->lines), free(c->alphas);
  return failed;
}

// Parts [3] and a layer as they are shaped above, with terms; forward, or with `back` backward. 0, or what `begin` says
// before anything was written, or 1.
int topwork_feedforward(const void *parts, const void *layer, int64_t rows, const void *terms, int64_t count,
                        int64_t back, int64_t threads) {
  Call c = {parts, terms, count, rows, threads};
  int failed = begin(&c);
  if (!failed) failed = (back ? feedforward_backward : feedforward_forward)(&c, layer);
  return end(&c, failed);
}

// The same with parts [7].
int topwork_decoder_layer(const void *parts, const void *layer, const void *factors, const void *terms, int64_t count,
                          int64_t back, int64_t threads) {
  Call c = {parts, terms, count, ((const Decoder *)layer)->rows, threads};
  int failed = begin(&c);
  if (!failed) failed = (back ? backward : forward)(&c, layer, factors);
  return end(&c, failed);
}

int topwork_decoder_level(void) { return LEVEL; }
