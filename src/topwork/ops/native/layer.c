// The element-wise parts of a transformer layer, forward and backward: RMS norm, rotary embedding, the residual stream,
// gains, dropout, gated unit.
//
// Formulas: ops/norm.py, ops/rotary.py, ops/residual.py, ops/gain.py, ops/dropout.py, ops/gated.py. Strides count values, not bytes. A row belongs to
// one thread and is summed in one order, so results do not depend on the number of threads. Every kernel reads its
// inputs from memory once: a norm's second pass over a row finds it in the core's own cache. No product and sum are
// fused where the plain torch of those files rounds them one by one.

#include <math.h>

#include "rows.h"

// ---- RMS norm -------------------------------------------------------------------------------------------------------

// A view [rows / heads, heads, d] of rows whose values lie side by side.
typedef struct {
  const void *base;
  int64_t outer, inner;
} Rows;

// From a row to the next, in most cases.
INLINE int64_t step_of(Rows x, int64_t heads) { return heads == 1 ? x.outer : x.inner; }

INLINE const char *row_of(Rows x, int64_t row, int64_t heads, int kind) {
  return at(x.base, heads == 1 ? row * x.outer : row / heads * x.outer + row % heads * x.inner, kind);
}

INLINE void slope_row(
    const void *dy, int64_t dy_by, const void *x, int64_t x_by, const void *weight, float rstd, int64_t d, void *dx,
    int kind, int w_kind, int offset) {
  float mean = row_sum(x, dy, weight, d, kind, w_kind, offset) * rstd / d;
#define BODY(i, n)                                                                          \
  {                                                                                         \
    ask(dy, i, d, dy_by, kind), ask(x, i, d, x_by, kind);                                   \
    vecf g = load(dy, i, n, kind) * factor(weight, i, n, w_kind, offset);                   \
    store(dx, i, n, kind, rstd * (g - load(x, i, n, kind) * rstd * mean));                  \
  }
  EACH(d, BODY);
#undef BODY
}

// `mode`: 1 for values in bf16, 2 for a weight in bf16 (with them), 4 for 1 + weight
#define BY_MODE(CALL)                        \
  switch (mode) {                            \
    case 0: CALL(F32, F32, 0); break;        \
    case 1: CALL(BF16, F32, 0); break;       \
    case 3: CALL(BF16, BF16, 0); break;      \
    case 4: CALL(F32, F32, 1); break;        \
    case 5: CALL(BF16, F32, 1); break;       \
    case 7: CALL(BF16, BF16, 1); break;      \
  }

// y [rows, d] and rstd [rows] of x; `known`: rstd is there already.
void topwork_rms_norm(
    const void *x, int64_t outer, int64_t inner, int64_t rows, int64_t heads, int64_t d, const void *weight, float eps,
    int known, float *rstd, void *y, int mode, int threads) {
  Rows from = {x, outer, inner};
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * d > LITTLE)
  for (int64_t r = 0; r < rows; r++) {
#define CALL(kind, w_kind, offset)                                                                              \
  {                                                                                                             \
    const void *row = row_of(from, r, heads, kind);                                                             \
    if (!known) rstd[r] = 1.0f / sqrtf(row_sum(row, 0, 0, d, kind, w_kind, offset) / d + eps);                  \
    norm_row(row, step_of(from, heads), weight, rstd[r], d, at(y, r * d, kind), kind, w_kind, offset);          \
  }
    BY_MODE(CALL)
#undef CALL
  }
}

// dx [rows, d]
void topwork_rms_norm_backward(
    const void *dy, int64_t dy_outer, int64_t dy_inner, const void *x, int64_t x_outer, int64_t x_inner,
    int64_t rows, int64_t heads, int64_t d, const void *weight, const float *rstd, void *dx, int mode, int threads) {
  Rows dys = {dy, dy_outer, dy_inner}, xs = {x, x_outer, x_inner};
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * d > LITTLE)
  for (int64_t r = 0; r < rows; r++) {
#define CALL(kind, w_kind, offset)                                                                              \
  slope_row(row_of(dys, r, heads, kind), step_of(dys, heads), row_of(xs, r, heads, kind), step_of(xs, heads),   \
            weight, rstd[r], d, at(dx, r * d, kind), kind, w_kind, offset)
    BY_MODE(CALL)
#undef CALL
  }
}

// ---- rotary embedding -----------------------------------------------------------------------------------------------

// The first 2 * half values of every head of x [tokens, heads, ...] in place. `mode`: 1 for x in bf16, 2 for cos and
// sin in bf16, 4 for the inverse.
void topwork_rotate(
    void *x, int64_t by_token, int64_t by_head, int64_t tokens, int64_t heads, const void *cos, int64_t cos_stride,
    const void *sin, int64_t sin_stride, int64_t half, int mode, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * half > LITTLE)
  for (int64_t t = 0; t < tokens; t++) {
#define CALL(kind, c_kind, inverse)                                                                          \
  rotate_token(at(x, t * by_token, kind), by_head, heads, at(cos, t * cos_stride, c_kind),                   \
               at(sin, t * sin_stride, c_kind), half, inverse, kind, c_kind)
    BY_MODE(CALL)
#undef CALL
  }
}

// ---- residual stream ------------------------------------------------------------------------------------------------

#define STRETCH 4096  // values that a thread takes at a time

// `d` values among others of their kind.
INLINE void add_row(
    const float *x, const void *y, float *total, void *rounded, float multiplier, float by, int64_t d) {
#define BODY(i, n)                                                           \
  {                                                                          \
    ask(x, i, d, d, F32);                                                    \
    if (y) ask(y, i, d, d, BF16);                                            \
    vecf sum = load(x, i, n, F32);                                           \
    if (y) sum = sum + multiplier * load(y, i, n, BF16);                     \
    if (y) store(total, i, n, F32, sum);                                     \
    if (rounded) store(rounded, i, n, BF16, by * sum);                       \
  }
  EACH(d, BODY);
#undef BODY
}

// total [count] = x + multiplier * y, and rounded = by * total: x and total fp32, and they may be one; y and rounded
// bf16. Either may be NULL: without y nothing is written to total, and rounded = by * x.
void topwork_add_and_round(
    const float *x, const void *y, float *total, void *rounded, float multiplier, float by, int64_t count,
    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > LITTLE)
  for (int64_t from = 0; from < count; from += STRETCH)
    add_row(x + from, y ? at(y, from, BF16) : NULL, total + from, rounded ? at(rounded, from, BF16) : NULL, multiplier,
            by, least(STRETCH, count - from));
}

// ---- residual stream and norm ---------------------------------------------------------------------------------------

// Also n [rows, d] and rstd [rows], the norm of `rounded`, while a row of it is in the cache. `mode` is one of bf16.
void topwork_add_and_norm(
    const float *x, const void *y, float *total, void *rounded, float multiplier, int64_t rows, int64_t d,
    const void *weight, float eps, float *rstd, void *n, int mode, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * d > LITTLE)
  for (int64_t r = 0; r < rows; r++) {
    void *branch = at(rounded, r * d, BF16);
    add_row(x + r * d, y ? at(y, r * d, BF16) : NULL, total + r * d, branch, multiplier, 1, d);
#define CALL(kind, w_kind, offset)                                                                              \
  {                                                                                                             \
    rstd[r] = 1.0f / sqrtf(row_sum(branch, 0, 0, d, BF16, w_kind, offset) / d + eps);                           \
    norm_row(branch, 0, weight, rstd[r], d, at(n, r * d, BF16), BF16, w_kind, offset);                          \
  }
    BY_MODE(CALL)
#undef CALL
  }
}

// dx = dtotal + the norm's gradient from dn [rows, d], rounded, and dy = by * dx, which may be NULL; dx may be dtotal.
void topwork_add_and_norm_backward(
    const float *dtotal, const void *dn, const void *rounded, int64_t rows, int64_t d, const void *weight,
    const float *rstd, float *dx, void *dy, float by, int mode, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * d > LITTLE)
  for (int64_t r = 0; r < rows; r++) {
    uint16_t slope[d];
#define CALL(kind, w_kind, offset)                                                                              \
  slope_row(at(dn, r * d, BF16), d, at(rounded, r * d, BF16), d, weight, rstd[r], d, slope, BF16, w_kind, offset)
    BY_MODE(CALL)
#undef CALL
    add_row(dtotal + r * d, slope, dx + r * d, dy ? at(dy, r * d, BF16) : NULL, 1, by, d);
  }
}

// ---- gains ----------------------------------------------------------------------------------------------------------

INLINE void gain_row(void *y, int64_t n_values, const float *factor, const float *shift, int kind) {
#define BODY(i, n)                                                      \
  {                                                                     \
    vecf value = load(y, i, n, kind) * load(factor, i, n, F32);         \
    if (shift) value = value - load(shift, i, n, F32);                  \
    store(y, i, n, kind, value);                                        \
  }
  EACH(n_values, BODY);
#undef BODY
}

// y [rows, n] = y * factor [n] - shift [n], which may be NULL. `kind`: that of y.
void topwork_gain(
    void *y, int64_t stride, int64_t rows, int64_t n, const float *factor, const float *shift, int kind, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > LITTLE)
  for (int64_t r = 0; r < rows; r++) {
    if (kind == BF16) gain_row(at(y, r * stride, BF16), n, factor, shift, BF16);
    else gain_row(at(y, r * stride, F32), n, factor, shift, F32);
  }
}

INLINE void gain_slope_row(
    void *y, const void *dy, int64_t n_values, const float *factor, const float *offset, float *sums, int kind) {
#define BODY(i, n)                                                                     \
  {                                                                                    \
    vecf value = load(y, i, n, kind), slope = load(dy, i, n, kind);                    \
    if (offset) value = value - load(offset, i, n, F32);                               \
    store(sums, i, n, F32, load(sums, i, n, F32) + slope * value);                     \
    store(y, i, n, kind, slope * load(factor, i, n, F32));                             \
  }
  EACH(n_values, BODY);
#undef BODY
}

// sums [n] = the sum over rows of dy * (y - offset), and y [rows, n] = dy * factor; offset [n] may be NULL. `sums` has
// room for a row of each stretch of `stretch` rows, and for one at least. `kind`: that of y and dy.
void topwork_gain_backward(
    void *y, int64_t y_stride, const void *dy, int64_t dy_stride, int64_t rows, int64_t n, const float *factor,
    const float *offset, float *sums, int64_t stretch, int kind, int threads) {
  int64_t stretches = (rows + stretch - 1) / stretch;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > LITTLE)
  for (int64_t s = 0; s < stretches; s++) {
    float *own = sums + s * n;
    memset(own, 0, n * sizeof *own);
    for (int64_t r = s * stretch; r < rows && r < (s + 1) * stretch; r++) {
      if (kind == BF16)
        gain_slope_row(at(y, r * y_stride, BF16), at(dy, r * dy_stride, BF16), n, factor, offset, own, BF16);
      else
        gain_slope_row(at(y, r * y_stride, F32), at(dy, r * dy_stride, F32), n, factor, offset, own, F32);
    }
  }
  if (!stretches) memset(sums, 0, n * sizeof *sums);
  for (int64_t s = 1; s < stretches; s++)
    for (int64_t i = 0; i < n; i++) sums[i] += sums[s * n + i];
}

// ---- dropout --------------------------------------------------------------------------------------------------------

INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

INLINE vecu mixed_lanes(vecu x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

INLINE void drop_row(
    const void *x, void *y, int64_t d, uint32_t row, vecu steps, uint32_t least, float scale, int kind, int add) {
#define BODY(i, n)                                                                             \
  {                                                                                            \
    vecu hash = mixed_lanes((steps + (uint32_t)(i) * 0x9e3779b9u) ^ row);                      \
    vecf value = pick((veci)(hash >= least), load(x, i, n, kind) * scale, (vecf){});           \
    store(y, i, n, kind, add ? load(y, i, n, kind) + value : value);                           \
  }
  EACH(d, BODY);
#undef BODY
}

// y [rows, d] = x with values dropped or, with 2 in `mode`, plus that; 1 in `mode`: x and y in bf16.
void topwork_drop(
    const void *x, int64_t x_stride, void *y, int64_t y_stride, int64_t rows, int64_t d, const int64_t *draws,
    uint32_t key, uint32_t least, float scale, int mode, int threads) {
  vecu steps;
  for (int i = 0; i < LANES; i++) steps[i] = (i + 1) * 0x9e3779b9u;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * d > LITTLE)
  for (int64_t r = 0; r < rows; r++) {
    uint32_t row = mixed((uint32_t)draws[r] ^ key);
#define CALL(kind, add) \
  drop_row(at(x, r * x_stride, kind), at(y, r * y_stride, kind), d, row, steps, least, scale, kind, add)
    switch (mode) {
      case 0: CALL(F32, 0); break;
      case 1: CALL(BF16, 0); break;
      case 2: CALL(F32, 1); break;
      case 3: CALL(BF16, 1); break;
    }
#undef CALL
  }
}

// ---- gated unit -----------------------------------------------------------------------------------------------------

// `mode`: 1 for values in bf16, + 2 * the activation
#define BY_ACTIVATION(CALL)                   \
  switch (mode) {                             \
    case 0: CALL(F32, SILU); break;           \
    case 1: CALL(BF16, SILU); break;          \
    case 2: CALL(F32, GELU_TANH); break;      \
    case 3: CALL(BF16, GELU_TANH); break;     \
    case 4: CALL(F32, GELU); break;           \
    case 5: CALL(BF16, GELU); break;          \
  }

// h [rows, f]
void topwork_gated(
    const void *gate, int64_t gate_stride, const void *up, int64_t up_stride, int64_t rows, int64_t f, void *h,
    int mode, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * f > LITTLE)
  for (int64_t r = 0; r < rows; r++) {
#define CALL(kind, act) \
  gate_row(at(gate, r * gate_stride, kind), gate_stride, at(up, r * up_stride, kind), up_stride, f,          \
           at(h, r * f, kind), kind, act)
    BY_ACTIVATION(CALL)
#undef CALL
  }
}

void topwork_gated_backward(
    const void *dh, int64_t dh_stride, const void *gate, int64_t gate_stride, const void *up, int64_t up_stride,
    int64_t rows, int64_t f, void *dgate, int64_t dgate_stride, void *dup, int64_t dup_stride, void *h, int mode,
    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * f > LITTLE)
  for (int64_t r = 0; r < rows; r++) {
#define CALL(kind, act)                                                                                       \
  gate_slope_row(at(dh, r * dh_stride, kind), dh_stride, at(gate, r * gate_stride, kind), gate_stride,        \
                 at(up, r * up_stride, kind), up_stride, f, at(dgate, r * dgate_stride, kind),                \
                 at(dup, r * dup_stride, kind), h ? at(h, r * f, kind) : NULL, kind, act)
    BY_ACTIVATION(CALL)
#undef CALL
  }
}
