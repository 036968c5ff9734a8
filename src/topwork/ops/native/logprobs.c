// log p(target) of rows of logits, and in the same pass, in place, how that moves with each logit:
//
//   z = scale * x       log p = z[t] - log sum exp z       x <- gradient * scale * (onehot(t) - softmax(z))
//
// A row is read three times (largest, sum, slope) while it lies in the core's own cache. The sum is fp32 over 2,048
// values, then double, so its error does not grow with the vocabulary.

#include <math.h>

#include "rows.h"

enum { BLOCK = 2048 };

// The logits [i, i + n); the other lanes are -infinity, whose exponential is nothing.
INLINE vecf logits_at(const void *row, int64_t i, int64_t n, float scale, int kind) {
  vecf x = load(row, i, n, kind) * scale;
  for (int64_t k = n; k < LANES; k++) x[k] = -INFINITY;
  return x;
}

// Four side by side, since one would wait for itself; what is not a number does not count.
INLINE float largest(const void *row, int64_t count, float scale, int kind) {
  vecf most[4];
  int64_t i = 0;
  for (int k = 0; k < 4; k++) most[k] = (vecf){} - INFINITY;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    for (int k = 0; k < 4; k++) most[k] = vmaxf(logits_at(row, i + k * LANES, LANES, scale, kind), most[k]);
  for (; i + LANES <= count; i += LANES) most[0] = vmaxf(logits_at(row, i, LANES, scale, kind), most[0]);
  most[1] = vmaxf(logits_at(row, i, count - i, scale, kind), most[1]);
  return vlargestf(vmaxf(vmaxf(most[0], most[1]), vmaxf(most[2], most[3])));
}

INLINE double sum_of_exp(const void *row, int64_t count, float scale, float most, int kind) {
  double total = 0;
  int64_t whole = count / LANES * LANES, i = 0;
  while (i < whole) {
    vecf sum = {};
    int64_t stop = i + BLOCK < whole ? i + BLOCK : whole;
    for (; i < stop; i += LANES) sum += vexpf(logits_at(row, i, LANES, scale, kind) - most);
    total += vsumf(sum);
  }
  return total + vsumf(vexpf(logits_at(row, i, count - i, scale, kind) - most));
}

INLINE void write_slope(void *row, int64_t i, int64_t n, float scale, float most, float factor, int kind) {
  vecf z = logits_at(row, i, n, scale, kind) - most;
  store(row, i, n, kind, (kind == BF16 ? quick_exp(z) : vexpf(z)) * factor);
}

INLINE float one_row(void *row, int64_t count, int64_t target, float gradient, float scale, int kind) {
  float wanted = logits_at(row, target, 1, scale, kind)[0], most = largest(row, count, scale, kind);
  double total = sum_of_exp(row, count, scale, most, kind);
  float slope = gradient * scale;
  if (slope == 0 && isfinite(total)) {
    memset(row, 0, count * (kind == F32 ? 4 : 2));
  } else {
    float factor = (float)(-slope / total);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) write_slope(row, i, LANES, scale, most, factor, kind);
    write_slope(row, i, count - i, scale, most, factor, kind);
    store(row, target, 1, kind, (vecf){} + (float)(slope * (1 - exp((double)wanted - most) / total)));
  }
  return (float)((double)wanted - most - log(total));
}

// logits [rows, count], `stride` values from row to row; targets [rows] in [0, count); gradient and logps [rows];
// scale > 0.
void topwork_logprob_slope(
    void *logits, int64_t rows, int64_t count, int64_t stride, int kind, const int64_t *targets, const float *gradient,
    float scale, float *logps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    if (kind == F32)
      logps[r] = one_row((float *)logits + r * stride, count, targets[r], gradient[r], scale, F32);
    else
      logps[r] = one_row((uint16_t *)logits + r * stride, count, targets[r], gradient[r], scale, BF16);
  }
}
