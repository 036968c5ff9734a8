// Attention of rows over keys and values in blocks (ops/paged.py): a sequence is a list of blocks.
//
// Of a layer: keys [blocks, H_kv, D / u, BLOCK, u] and values [blocks, H_kv, BLOCK, D]; u values of 4 bytes together
// stand side by side along D, so that a block's scores are made for all its tokens at once, without adding up lanes.
//
// A row goes over its keys block by block, counted from the sequence's beginning, and keeps the largest score, the sum
// of the shares and their values so far. Blocks and keys that it does not see change none of these, not by a bit, so a
// row's result does not depend on the rows that are computed beside it.

#pragma once
#include <math.h>

#include "product.h"

enum { BLOCK = 32, BLOCK_VECTORS = BLOCK / LANES, TOGETHER = 4, VALUES = 4, QUERIES = 32 };
// TOGETHER queries are multiplied at once with a block, and VALUES vectors of its values; QUERIES are a task.
#define UNSEEN (-1e30f)  // below any score: exp(-infinity - UNSEEN) is zero, not NaN

typedef struct {
  const void *keys, *values;
  int64_t heads, size;          // of keys and values
  int64_t group;                // queries' heads for each of them
  float scale, softcap;         // 0: none
  int64_t window;               // 0: none
  const float *sinks;           // [heads * group] or NULL
} Attend;

// The unit of a query that is multiplied with a unit of every key of a block.
INLINE vecf times_unit(const int kind, vecf sum, uint32_t query, const char *keys) {
  if (kind == F32) {
    float q;
    memcpy(&q, &query, 4);
    return vfmaf(vall(q), vloadf((const float *)keys), sum);
  }
#ifdef DOT_PAIRS
  return (vecf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)query),
                                (__m512bh)_mm512_loadu_si512(keys));
#else
  vecu pairs;
  memcpy(&pairs, keys, sizeof pairs);
  uint32_t low = query << 16, high = query & 0xffff0000;
  float ql, qh;
  memcpy(&ql, &low, 4);
  memcpy(&qh, &high, 4);
  return vfmaf(vall(qh), (vecf)(pairs & 0xffff0000), vfmaf(vall(ql), (vecf)(pairs << 16), sum));
#endif
}

// scores [TOGETHER][BLOCK] of a block's keys [units][BLOCK] of one head.
INLINE void block_scores(const int kind, const char *const *queries, const char *keys, int64_t units,
                         float scores[TOGETHER][BLOCK]) {
  vecf sums[TOGETHER][BLOCK_VECTORS] = {};
  for (int64_t i = 0; i < units; i++) {
#pragma GCC unroll 4
    for (int q = 0; q < TOGETHER; q++) {
      uint32_t unit;
      memcpy(&unit, queries[q] + 4 * i, 4);
#pragma GCC unroll 8
      for (int v = 0; v < BLOCK_VECTORS; v++)
        sums[q][v] = times_unit(kind, sums[q][v], unit, keys + (i * BLOCK + v * LANES) * 4);
    }
  }
  for (int q = 0; q < TOGETHER; q++)
    for (int v = 0; v < BLOCK_VECTORS; v++) vstoref(scores[q] + v * LANES, sums[q][v]);
}

INLINE vecf capped(vecf x, float cap) {  // cap tanh(x / cap)
  vecf e = vexpf(x * vall(2.0f / cap));
  return cap - (2.0f * cap) / (e + 1.0f);
}

// A query's scores become shares relative to its largest score; `most` and `sum` are brought up to date, and by what
// its values so far are to be multiplied is returned. Keys [first, stop) of the block are seen.
INLINE float block_shares(const Attend *a, float scores[BLOCK], int64_t first, int64_t stop, float *most, float *sum) {
  vecf x[BLOCK_VECTORS];
  float largest = *most;
  for (int v = 0; v < BLOCK_VECTORS; v++) {
    x[v] = vloadf(scores + v * LANES) * vall(a->scale);
    if (a->softcap) x[v] = capped(x[v], a->softcap);
    x[v] = pick(vlanes(first - v * LANES, stop - v * LANES), x[v], vall(-INFINITY));
    float here = vlargestf(x[v]);
    largest = here > largest ? here : largest;
  }
  float turn = *most == largest ? 1.0f : ((float *)&(vecf[]){vexpf(vall(*most - largest))})[0], total = 0;
  for (int v = 0; v < BLOCK_VECTORS; v++) {
    x[v] = vexpf(x[v] - vall(largest));
    vstoref(scores + v * LANES, x[v]);
    total += vsumf(x[v]);
  }
  *sum = *sum * turn + total;
  *most = largest;
  return turn;
}

// found [TOGETHER][size] = turns found + shares values, of `count` keys [count, size].
INLINE void block_values(const int kind, const char *values, int64_t count, int64_t size,
                         float scores[TOGETHER][BLOCK], const float turns[TOGETHER], float *found) {
  int64_t bytes = bytes_of_kind(kind), d = 0;
#define SOME(vectors, n)                                                                                      \
  {                                                                                                           \
    vecf sums[TOGETHER][VALUES];                                                                              \
    for (int q = 0; q < TOGETHER; q++)                                                                        \
      for (int v = 0; v < vectors; v++)                                                                       \
        sums[q][v] = load(found + q * size + d + v * LANES, 0, n, F32) * vall(turns[q]);                      \
    for (int64_t j = 0; j < count; j++) {                                                                     \
      vecf value[VALUES];                                                                                     \
      for (int v = 0; v < vectors; v++) value[v] = load(values + (j * size + d + v * LANES) * bytes, 0, n, kind); \
      for (int q = 0; q < TOGETHER; q++)                                                                      \
        for (int v = 0; v < vectors; v++) sums[q][v] = vfmaf(vall(scores[q][j]), value[v], sums[q][v]);       \
    }                                                                                                         \
    for (int q = 0; q < TOGETHER; q++)                                                                        \
      for (int v = 0; v < vectors; v++) store(found + q * size + d + v * LANES, 0, n, F32, sums[q][v]);       \
  }
  for (; d + VALUES * LANES <= size; d += VALUES * LANES) SOME(VALUES, LANES)
  for (; d + LANES <= size; d += LANES) SOME(1, LANES)
  if (d < size) SOME(1, size - d)
#undef SOME
}

// What a head of keys is asked at once: queries of some rows of a sequence.
typedef struct {
  const char *query[QUERIES];
  void *out[QUERIES];
  int64_t position[QUERIES];
  int64_t head[QUERIES];  // of queries, for its sink
  int64_t count;
} Asked;

// The last query again, until there are as many as are multiplied at once; `found` is [QUERIES][size].
INLINE void attend(const int kind, const Attend *a, Asked *asked, const int32_t *blocks, int64_t head, float *found) {
  int64_t bytes = bytes_of_kind(kind), units = a->size * bytes / 4, count = asked->count, all = count;
  int64_t last = asked->position[0], first = last;
  float most[QUERIES], sum[QUERIES] = {}, turns[TOGETHER], scores[TOGETHER][BLOCK] __attribute__((aligned(64)));
  for (; all % TOGETHER; all++) {
    asked->query[all] = asked->query[count - 1];
    asked->position[all] = asked->position[count - 1];
  }
  for (int64_t q = 0; q < all; q++) {
    int64_t here = asked->position[q];
    most[q] = UNSEEN;
    last = here > last ? here : last;
    first = here < first ? here : first;
  }
  memset(found, 0, all * a->size * sizeof(float));
  for (int64_t b = a->window && first >= a->window ? (first - a->window + 1) / BLOCK : 0; b * BLOCK <= last; b++) {
    int64_t place = (blocks[b] * a->heads + head) * BLOCK * a->size * bytes, left = last + 1 - b * BLOCK;
    for (int64_t q = 0; q < all; q += TOGETHER) {
      block_scores(kind, asked->query + q, (const char *)a->keys + place, units, scores);
      for (int i = 0; i < TOGETHER; i++) {
        int64_t stop = asked->position[q + i] + 1 - b * BLOCK, begin = a->window ? stop - a->window : 0;
        turns[i] = block_shares(a, scores[i], begin, stop, most + q + i, sum + q + i);
      }
      block_values(kind, (const char *)a->values + place, left < BLOCK ? left : BLOCK, a->size, scores, turns,
                   found + q * a->size);
    }
  }
  for (int64_t q = 0; q < count; q++) {
    float by = 1.0f;
    if (a->sinks) {
      float sink = a->sinks[asked->head[q]], top = sink > most[q] ? sink : most[q];
      by = expf(most[q] - top);
      sum[q] = sum[q] * by + expf(sink - top);
    }
    vecf factor = vall(by / sum[q]);
    const float *values = found + q * a->size;
    int64_t d = 0;
    for (; d + LANES <= a->size; d += LANES) store(asked->out[q], d, LANES, kind, vloadf(values + d) * factor);
    if (d < a->size) store(asked->out[q], d, a->size - d, kind, load(values, d, a->size - d, F32) * factor);
  }
}
