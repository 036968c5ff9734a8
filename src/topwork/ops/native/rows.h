// What a row of a transformer layer goes through, value by value: RMS norm, rotary embedding, gated unit. Shared by the
// kernels of training (layer.c) and of generation (decode.c).

#pragma once
#include "simd.h"

#define LITTLE 32768  // values: below, waking other threads costs more than they save
#define ONE ((vecf){} + 1.0f)
#define EACH(count, body)                                      \
  do {                                                         \
    int64_t i = 0;                                             \
    for (; i + LANES <= (count); i += LANES) body(i, LANES);   \
    if (i < (count)) body(i, (count) - i);                     \
  } while (0)

INLINE char *at(const void *base, int64_t values, int kind) {
  return (char *)base + values * (kind == BF16 ? 2 : 4);
}

enum { FAR = 2304 };  // values

// Asks for what a loop over rows of `count` values, the next one `by` further on, will read FAR values from here; for
// nothing where `by` is 0, for a row that stands alone. A product over all rows leaves its output in a distant cache,
// and a processor looks ahead to the end of a page alone.
INLINE void ask(const void *row, int64_t i, int64_t count, int64_t by, int kind) {
  int64_t there = i + FAR;
  if (by) __builtin_prefetch(at(row, there < count ? there : by + there - count, kind));
}

// ---- RMS norm -------------------------------------------------------------------------------------------------------

INLINE vecf factor(const void *weight, int64_t i, int64_t n, int kind, int offset) {
  vecf w = load(weight, i, n, kind);
  return offset ? 1.0f + w : w;
}

// sum x^2, or sum dy * w * x: four sums side by side, since one would wait for itself
INLINE float row_sum(const void *x, const void *dy, const void *weight, int64_t d, int kind, int w_kind, int offset) {
  vecf sums[4] = {};
#define TERM(sum, i, n)                                                                   \
  {                                                                                       \
    vecf a = load(x, i, n, kind);                                                         \
    vecf b = dy ? load(dy, i, n, kind) * factor(weight, i, n, w_kind, offset) : a;        \
    sum = vfmaf(a, b, sum);                                                               \
  }
  int64_t i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES)
    for (int k = 0; k < 4; k++) TERM(sums[k], i + k * LANES, LANES)
  for (; i + LANES <= d; i += LANES) TERM(sums[0], i, LANES)
  if (i < d) TERM(sums[1], i, d - i)
#undef TERM
  return vsumf((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

INLINE void norm_row(
    const void *x, int64_t by, const void *weight, float rstd, int64_t d, void *y, int kind, int w_kind, int offset) {
#define BODY(i, n)                                                                            \
  {                                                                                           \
    ask(x, i, d, by, kind);                                                                   \
    vecf normal = load(x, i, n, kind) * rstd, w = factor(weight, i, n, w_kind, offset);       \
    store(y, i, n, kind, offset ? normal * w : w * rounded(normal, kind));                    \
  }
  EACH(d, BODY);
#undef BODY
}

// ---- rotary embedding -----------------------------------------------------------------------------------------------

INLINE void rotate_token(
    void *x, int64_t by_head, int64_t heads, const void *cos, const void *sin, int64_t half, int inverse, int kind,
    int c_kind) {
#define BODY(i, n)                                                                             \
  {                                                                                            \
    vecf c1 = load(cos, i, n, c_kind), c2 = load(cos, half + (i), n, c_kind);                  \
    vecf s1 = load(sin, i, n, c_kind), s2 = load(sin, half + (i), n, c_kind);                  \
    vecf p = inverse ? -s2 : s1, q = inverse ? -s1 : s2;                                       \
    for (int64_t h = 0; h < heads; h++) {                                                      \
      void *head = at(x, h * by_head, kind);                                                   \
      __builtin_prefetch(at(head, (i) + FAR, kind));                                         \
      vecf x1 = load(head, i, n, kind), x2 = load(head, half + (i), n, kind);                  \
      store(head, i, n, kind, x1 * c1 - x2 * p);                                               \
      store(head, half + (i), n, kind, x2 * c2 + x1 * q);                                      \
    }                                                                                          \
  }
  EACH(half, BODY);
#undef BODY
}

// ---- gated unit -----------------------------------------------------------------------------------------------------

enum { SILU = 0, GELU_TANH = 1, GELU = 2 };

// act(x) = x * share; act'(x) = slope
typedef struct {
  vecf share, slope;
} Activation;

// e^x to (1 + |x|) 1e-7 of itself, for values that are rounded to bf16.
INLINE vecf quick_exp(vecf x) {
#ifdef __AVX512DQ__
  x = x * 1.44269504088896341f;
  vecf f = (vecf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  vecf y = vfmaf(vall(0x1.e9750ap-10f), f, vall(0x1.277852p-7f));
  y = vfmaf(y, f, vall(0x1.c91ce8p-5f));
  y = vfmaf(y, f, vall(0x1.ebdb56p-3f));
  y = vfmaf(y, f, vall(0x1.62e4bap-1f));
  y = vfmaf(y, f, ONE);
  return (vecf)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
  return vexpf(x);
#endif
}

INLINE Activation logistic(vecf x, vecf u, vecf du, int kind) {  // share = 1 / (1 + e^-u)
  vecf share = ONE / (1.0f + (kind == BF16 ? quick_exp(-u) : vexpf(-u)));
  return (Activation){share, share + x * share * (1.0f - share) * du};
}

// Phi(x) = 1 - erfc(z) / 2 or, left of zero, erfc(z) / 2, with z = |x| / sqrt(2); erfc(z) = e^(-z^2) t Q(t), Q fitted
// to e^(z^2) erfc(z) / t for 0 <= z <= 14 with a relative error of 4e-8. The part of z^2 that its rounding loses is put
// back, or far from zero it would be multiplied by the exponential function.
INLINE Activation normal(vecf x) {
  vecf z = (vecf)((vecu)x & 0x7fffffff) * 0.70710678118654752f;
  z = pick(z > 14.0f, (vecf){} + 14.0f, z);
  vecf square = z * z, bell = vexpf(-square), t = ONE / (1.0f + z * 0.3f);
  bell *= 1.0f - vfmaf(z, z, -square);
  vecf q = vfmaf(t, (vecf){} - 0.1266166367f, (vecf){} + 0.4718264925f);
  q = vfmaf(q, t, (vecf){} - 0.4846922796f);
  q = vfmaf(q, t, (vecf){} + 0.5170492903f);
  q = vfmaf(q, t, (vecf){} - 0.07404940041f);
  q = vfmaf(q, t, (vecf){} + 0.2063852519f);
  q = vfmaf(q, t, (vecf){} + 0.1504688449f);
  q = vfmaf(q, t, (vecf){} + 0.1704237223f);
  q = vfmaf(q, t, (vecf){} + 0.1692047531f);
  vecf tail = bell * (t * q) * 0.5f, share = pick(x > 0.0f, 1.0f - tail, tail);
  return (Activation){share, share + x * bell * 0.39894228040143268f};
}

INLINE Activation activation(vecf x, int act, int kind) {
  if (act == SILU) return logistic(x, x, ONE, kind);
  if (act == GELU) return normal(x);
  const float twice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  vecf square = x * x;
  return logistic(x, twice * (x + 0.044715f * (square * x)), twice * (1.0f + 0.134145f * square), kind);
}

INLINE void gate_row(
    const void *gate, int64_t gate_by, const void *up, int64_t up_by, int64_t f, void *h, int kind, int act) {
#define BODY(i, n)                                                                     \
  {                                                                                    \
    ask(gate, i, f, gate_by, kind), ask(up, i, f, up_by, kind);                        \
    vecf x = load(gate, i, n, kind), active = x * activation(x, act, kind).share;      \
    store(h, i, n, kind, rounded(active, kind) * load(up, i, n, kind));                \
  }
  EACH(f, BODY);
#undef BODY
}

// Each value is read before it is written: dgate and dup may be gate and up themselves. h, where it is not NULL, is the
// unit's own output again.
INLINE void gate_slope_row(
    const void *dh, int64_t dh_by, const void *gate, int64_t gate_by, const void *up, int64_t up_by, int64_t f,
    void *dgate, void *dup, void *h, int kind, int act) {
#define BODY(i, n)                                                                               \
  {                                                                                              \
    ask(dh, i, f, dh_by, kind), ask(gate, i, f, gate_by, kind), ask(up, i, f, up_by, kind);      \
    vecf x = load(gate, i, n, kind), u = load(up, i, n, kind), d = load(dh, i, n, kind);         \
    Activation a = activation(x, act, kind);                                                     \
    store(dgate, i, n, kind, d * u * a.slope);                                                   \
    store(dup, i, n, kind, d * (x * a.share));                                                   \
    if (h) store(h, i, n, kind, rounded(x * a.share, kind) * u);                                 \
  }
  EACH(f, BODY);
#undef BODY
}
