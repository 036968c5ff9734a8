// A pass of generation: rows of many sequences through all layers, in one call.
//
// A model is a list of steps (models/steps.py), each a few loops over rows and columns; threads take pieces of a step
// as they come and meet at its end. What differs from pass to pass stands in a Pass: which rows are whose adapter's
// (segments), which sequence's, and where that has its keys and values (runs).
//
// A row's results depend on its own sequence alone, to the bit: every sum is one chain in one order (product.h, paged.h),
// whatever is computed beside it and however the work is cut among threads. The numbers are rounded where training's
// are (ops/project.py, models/fast.py), but for an adapter's terms, which join the base's product before it is rounded.

#include <math.h>
#include <stdlib.h>

#include "packed4.h"
#include "paged.h"
#include "pool.h"
#include "product.h"
#include "rows.h"

enum { DENSE = 0, FOUR_BITS = 1, EIGHT_BITS = 2 };
enum { BRANCH = 0, NORM, SCALE, INNER, PRODUCTS, HEADS, ATTEND, GATED };
enum { COLUMNS = 32, PANEL = 16, ROWS = 64, VALUES_AT_ONCE = 512, AHEAD = 2 * TILE_COLUMNS };
// A task's columns, those that are unpacked at once, a task's rows, and its values of a gated unit; how many columns
// ahead codes are asked of memory.

// A frozen weight [n, k]: dense rows in the program's type, or packed (ops/packed.py).
typedef struct {
  int64_t format;
  const void *at, *absmax;
  const float *nested, *nested_code, *code, *bias;
  int64_t n, k, block;
  double offset;
  int64_t plain;  // 4-bit: blocks of a multiple of 32 that end where rows do, and no constant makes subnormal values
} Weight;

// What an adapter has at a place (a linear layer or a norm). b is [ceil(n / 16)][ceil(rank / u)][16] units of u ranks
// (paged.h's): what a task reads of it lies together.
typedef struct {
  const void *a, *b;
  int64_t rank;
  double alpha;
  const float *gain, *shift, *input_gain;
  int64_t leaves_bias;  // the gain does not multiply what the bias added
  const void *weight;   // in the base's place
  const float *bias;
} Part;

typedef struct {
  int64_t op;
  const void *in;
  int64_t in_by;  // from row to row, in values
  void *out;
  int64_t out_by, out_kind;
  int64_t width;
  float *stream;  // BRANCH: fp32 [rows, width]
  double multiplier;
  const float *norm;  // a norm's weight, NULL for none
  double eps;
  int64_t unit_offset, unrounded;
  int64_t place, count;  // of the first part, and how many weights
  const Weight *weights;
  void *inner;  // [count][most rows][inner_by]
  int64_t inner_by, inner_apart;
  Attend attend;
  const float *cos, *sin;  // [positions, turned] or NULL
  int64_t turned;
  const float *query_norm, *key_norm;
  int64_t across_heads;
  int64_t activation;
} Step;

typedef struct {
  int64_t start, stop;
  const Part *parts;  // by place; NULL is the bare base
} Segment;

typedef struct {
  int64_t start, stop, first;  // rows, and the position of the first
  const int32_t *blocks;
} Run;

typedef struct {
  int64_t rows, segments, runs;
  const Segment *segment;
  const Run *run;
  const int32_t *run_of;  // of each row
  int64_t terms, input_gains;  // whether any segment has some
  float *scratch;  // of each thread
  int64_t scratch_each;
  int64_t threads;
} Pass;

static inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
INLINE const Part *part_at(const Segment *s, int64_t place) { return s->parts ? s->parts + place : NULL; }

// ---- the residual stream and norms ---------------------------------------------------------------------------------

static const Segment *segment_of(const Pass *p, int64_t row) {
  const Segment *s = p->segment;
  while (s->stop <= row) s++;
  return s;
}

static const float *norm_of(const Step *s, const Pass *p, int64_t row) {
  if (!s->norm) return NULL;
  const Part *part = part_at(segment_of(p, row), s->place);
  return part && part->weight ? part->weight : s->norm;
}

INLINE void normalize(const int kind, const Step *s, const float *weight, const void *x, void *y, int64_t width) {
  float rstd = 1.0f / sqrtf(row_sum(x, 0, 0, width, kind, F32, 0) / width + (float)s->eps);
  norm_row(x, 0, weight, rstd, width, y, kind, F32, (int)s->unit_offset);
}

INLINE void branch(const int kind, const Step *s, const Pass *p, int64_t row, float *scratch) {
  float *x = s->stream + row * s->width, multiplier = (float)s->multiplier;
  void *out = at(s->out, row * s->out_by, kind);
  const float *weight = norm_of(s, p, row);
  if (s->in) {
    const void *y = at(s->in, row * s->in_by, kind);
#define BODY(i, n) store(x, i, n, F32, load(x, i, n, F32) + multiplier * load(y, i, n, kind))
    EACH(s->width, BODY);
#undef BODY
  }
  if (s->unrounded && weight) {  // the model's last norm is given the stream as it is
    normalize(F32, s, weight, x, scratch, s->width);
    x = scratch;
  }
#define BODY(i, n) store(out, i, n, kind, load(x, i, n, F32))
  EACH(s->width, BODY);
#undef BODY
  if (weight && !s->unrounded) normalize(kind, s, weight, out, out, s->width);
}

// ---- products ------------------------------------------------------------------------------------------------------

// What the terms' A makes of some rows of one segment, to inner [rows, rank].
INLINE void inner_rows(const int kind, const Step *s, int64_t number, const Part *part, int64_t start, int64_t stop,
                       float *sums) {
  int64_t ranks = kind == BF16 ? part->rank + part->rank % 2 : part->rank;
  const Weight *w = s->weights + number;
  dot_rows(kind, 1, at(s->in, start * s->in_by, kind), s->in_by, stop - start, part->a, w->k, part->rank, w->k, sums,
           part->rank);
  for (int64_t r = start; r < stop; r++) {
    void *out = at(s->inner, number * s->inner_apart + r * s->inner_by, kind);
    const float *own = sums + (r - start) * part->rank;
    if (ranks > part->rank) memset(at(out, part->rank, kind), 0, bytes_of_kind(kind));
#define BODY(i, n) store(out, i, n, kind, load(own, i, n, F32))
    EACH(part->rank, BODY);
#undef BODY
  }
}

// n columns from `column` of a weight's product become outputs: bias, terms, shift, gain, one rounding.
INLINE void finish(const int kind, const Step *s, int64_t number, const Part *part, int64_t row, int64_t column,
                   int64_t from, int64_t n, const float *sums) {
  const Weight *w = s->weights + number;
  const float *bias = part && part->weight ? part->bias : w->bias;
  const char *inner = at(s->inner, number * s->inner_apart + row * s->inner_by, kind);
  int64_t units = part && part->rank ? (kind == BF16 ? (part->rank + 1) / 2 : part->rank) : 0;
  void *out = at(s->out, row * s->out_by + from, (int)s->out_kind);
#define BODY(i, some)                                                                                        \
  {                                                                                                          \
    vecf y = load(sums, i, some, F32), b = bias ? load(bias, column + (i), some, F32) : vall(0);              \
    y = bias ? y + b : y;                                                                                    \
    if (units) {                                                                                             \
      vecf term = {};                                                                                        \
      for (int64_t u = 0; u < units; u++) {                                                                  \
        uint32_t unit;                                                                                       \
        memcpy(&unit, inner + 4 * u, 4);                                                                     \
        vecf ranks = load(part->b, ((column + (i)) / 16 * units + u) * 16 + (i) % 16, some, F32);            \
        term = times_unit(kind, term, unit, (const char *)&ranks);                                           \
      }                                                                                                      \
      y = y + (float)part->alpha * term;                                                                     \
    }                                                                                                        \
    if (part && part->shift) y = y + load(part->shift, column + (i), some, F32);                             \
    if (part && part->gain) {                                                                                \
      vecf gain = load(part->gain, column + (i), some, F32);                                                 \
      y = bias && part->leaves_bias ? y * gain - (gain - 1.0f) * b : y * gain;                               \
    }                                                                                                        \
    store(out, i, some, (int)s->out_kind, y);                                                                \
  }
  EACH(n, BODY);
#undef BODY
}

#if defined(BY_TABLE) && defined(DOT_PAIRS)
// One row and TILE_SUMS columns of a 4-bit weight whose blocks end where its rows do: values are looked up and multiplied
// without being written anywhere. The same chains as dot_tile's.
INLINE void dot_codes(const Packed4 *w, const uint16_t *x, int64_t column, int64_t k, float out[TILE_SUMS]) {
  vecf sums[TILE_SUMS];
  __m512 code = _mm512_loadu_ps(w->code);
  int64_t blocks = k / w->block;
  for (int first = 0; first < TILE_SUMS; first += TILE_COLUMNS) {
    const uint8_t *bytes = w->codes + ((column + first) * k >> 1);
    int64_t block = (column + first) * blocks;
    __m512 sum[TILE_COLUMNS] = {};
    for (int64_t b = 0, i = 0; b < blocks; b++) {
      __m512i table[TILE_COLUMNS];
#pragma GCC unroll 4
      for (int c = 0; c < TILE_COLUMNS; c++) {
        __builtin_prefetch(bytes + (((c + AHEAD) * k + i) >> 1), 0, 2);
        table[c] = table_of(code, constant(w, block + c * blocks + b));
      }
      for (int64_t stop = i + w->block; i < stop; i += 32) {
        __m512bh a = (__m512bh)_mm512_loadu_si512(x + i);
#pragma GCC unroll 4
        for (int c = 0; c < TILE_COLUMNS; c++)
          sum[c] = _mm512_dpbf16_ps(sum[c], a, (__m512bh)looked_up(table[c], bytes + ((c * k + i) >> 1)));
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < TILE_COLUMNS; c++) sums[first + c] = (vecf)sum[c];
  }
  add_lanes(sums, out);
}
#endif

// Rows [start, stop), whose weight is the base's, times n of its columns.
INLINE void base_sums(const int kind, const Step *s, const Weight *w, int64_t start, int64_t stop, int64_t column,
                      int64_t n, float *sums, void *panel, int *cold) {
  const void *x = at(s->in, start * s->in_by, kind);
  if (w->format == DENSE) {
    if (*cold) dot_rows(kind, 1, x, s->in_by, stop - start, at(w->at, column * w->k, kind), w->k, n, w->k, sums, COLUMNS);
    else dot_rows(kind, 0, x, s->in_by, stop - start, at(w->at, column * w->k, kind), w->k, n, w->k, sums, COLUMNS);
    *cold = 0;
    return;
  }
  Packed4 packed = {w->at, w->absmax, w->nested, w->nested_code, (float)w->offset, w->code, w->block};
#if defined(BY_TABLE) && defined(DOT_PAIRS)
  if (kind == BF16 && w->plain && stop - start == 1 && n % TILE_SUMS == 0) {
    for (int64_t c = 0; c < n; c += TILE_SUMS) dot_codes(&packed, x, column + c, w->k, sums + c);
    return;
  }
#endif
  for (int64_t c = 0; c < n; c += PANEL) {
    int64_t some = least(PANEL, n - c);
    if (w->format == FOUR_BITS) {
      unpack_row(&packed, (column + c) * w->k, some * w->k, kind == BF16 ? OUT_BF16 : OUT_F32, panel);
    } else {
      for (int64_t i = 0; i < some; i++) {
        int64_t row = column + c + i;
        unpack_row8((const int8_t *)w->at + row * w->k, ((const float *)w->absmax)[row], w->k,
                    kind == BF16 ? OUT_BF16 : OUT_F32, at(panel, i * w->k, kind));
      }
    }
    dot_rows(kind, 0, x, s->in_by, stop - start, panel, w->k, some, w->k, sums + c, COLUMNS);
  }
}

// n columns of one of the step's weights for rows [start, stop); `from` is where they stand in the output.
INLINE void product_task(const int kind, const Step *s, const Pass *p, int64_t number, int64_t start, int64_t stop,
                         int64_t column, int64_t n, int64_t from, float *scratch) {
  const Weight *w = s->weights + number;
  float *sums = scratch, *panel = scratch + p->rows * COLUMNS;
  int64_t place = s->place + number, first = 0, row = start;
  int cold = 1;
  while (p->segment[first].stop <= start) first++;
  for (int64_t i = first; row < stop; i++) {  // neighbours with the base's weight are multiplied together
    const Part *part = part_at(p->segment + i, place);
    int64_t end = least(stop, p->segment[i].stop);
    if (part && part->weight) {
      dot_rows(kind, 1, at(s->in, row * s->in_by, kind), s->in_by, end - row, at(part->weight, column * w->k, kind),
               w->k, n, w->k, sums + (row - start) * COLUMNS, COLUMNS);
    } else {
      while (end < stop) {
        const Part *next = part_at(p->segment + i + 1, place);
        if (next && next->weight) break;
        end = least(stop, p->segment[++i].stop);
      }
      base_sums(kind, s, w, row, end, column, n, sums + (row - start) * COLUMNS, panel, &cold);
    }
    row = end;
  }
  for (int64_t r = start, i = first; r < stop; r++) {
    while (p->segment[i].stop <= r) i++;
    finish(kind, s, number, part_at(p->segment + i, place), r, column, from, n, sums + (r - start) * COLUMNS);
  }
}

static int64_t product_rows(const Step *s, const Pass *p, int64_t number) {
  return s->weights[number].format == DENSE ? ROWS : most(1, p->rows);  // a panel is unpacked once
}

INLINE void products(const int kind, const Step *s, const Pass *p, int64_t task, float *scratch) {
  for (int64_t number = 0, from = 0; number < s->count; number++) {
    int64_t n = s->weights[number].n, rows = product_rows(s, p, number), stripes = parts_of(p->rows, rows);
    int64_t own = parts_of(n, COLUMNS) * stripes;
    if (task < own) {  // the stripes of some columns one after the other, while these are in the cache
      int64_t column = task / stripes * COLUMNS, start = task % stripes * rows;
      product_task(kind, s, p, number, start, least(p->rows, start + rows), column, least(COLUMNS, n - column),
                   from + column, scratch);
      return;
    }
    task -= own, from += n;
  }
}

static int64_t product_tasks(const Step *s, const Pass *p) {
  int64_t found = 0;
  for (int64_t i = 0; i < s->count; i++)
    found += parts_of(s->weights[i].n, COLUMNS) * parts_of(p->rows, product_rows(s, p, i));
  return found;
}

INLINE void inner(const int kind, const Step *s, const Pass *p, int64_t task, float *scratch) {
  int64_t stripes = parts_of(p->rows, ROWS), number = task % s->count, stripe = task / s->count % stripes;
  const Segment *segment = p->segment + task / s->count / stripes;
  const Part *part = part_at(segment, s->place + number);
  int64_t from = most(stripe * ROWS, segment->start), to = least((stripe + 1) * ROWS, segment->stop);
  if (part && part->rank && from < to) inner_rows(kind, s, number, part, from, to, scratch);
}

// Inputs of a projection that stands alone, times what an adapter learned, in place.
INLINE void scale(const int kind, const Step *s, const Pass *p, int64_t row) {
  const Part *part = part_at(segment_of(p, row), s->place);
  if (!part || !part->input_gain) return;
  void *x = at(s->out, row * s->out_by, kind);
#define BODY(i, n) store(x, i, n, kind, load(x, i, n, kind) * load(part->input_gain, i, n, F32))
  EACH(s->width, BODY);
#undef BODY
}

// ---- attention -----------------------------------------------------------------------------------------------------

INLINE void head_norms(const int kind, const Step *s, const float *weight, char *x, int64_t heads) {
  int64_t size = s->attend.size;
  if (s->across_heads) {
    normalize(kind, s, weight, x, x, heads * size);
    return;
  }
  for (int64_t h = 0; h < heads; h++) normalize(kind, s, weight, at(x, h * size, kind), at(x, h * size, kind), size);
}

// A row of queries, keys and values is made ready in its buffer, and keys and values go to the sequence's block.
INLINE void heads(const int kind, const Step *s, const Pass *p, int64_t row) {
  const Attend *a = &s->attend;
  const Run *run = p->run + p->run_of[row];
  int64_t size = a->size, queries = a->heads * a->group, position = run->first + row - run->start;
  int64_t bytes = bytes_of_kind(kind), units = size * bytes / 4;
  char *q = at(s->out, row * s->out_by, kind), *k = at(q, queries * size, kind), *v = at(k, a->heads * size, kind);
  if (s->query_norm) {
    head_norms(kind, s, s->query_norm, q, queries);
    head_norms(kind, s, s->key_norm, k, a->heads);
  }
  if (s->cos)
    rotate_token(q, size, queries + a->heads, s->cos + position * s->turned, s->sin + position * s->turned,
                 s->turned / 2, 0, kind, F32);
  int64_t block = run->blocks[position / BLOCK] * a->heads, slot = position % BLOCK;
  for (int64_t h = 0; h < a->heads; h++) {
    char *keys = (char *)a->keys + (block + h) * BLOCK * size * bytes + slot * 4;
    for (int64_t u = 0; u < units; u++) memcpy(keys + u * BLOCK * 4, k + (h * units + u) * 4, 4);
    memcpy((char *)a->values + ((block + h) * BLOCK + slot) * size * bytes, v + h * size * bytes, size * bytes);
  }
}

static int64_t attention_tasks(const Step *s, const Pass *p) {
  int64_t found = 0;
  for (int64_t i = 0; i < p->runs; i++)
    found += s->attend.heads * parts_of((p->run[i].stop - p->run[i].start) * s->attend.group, QUERIES);
  return found;
}

INLINE void attention(const int kind, const Step *s, const Pass *p, int64_t task, float *scratch) {
  const Attend *a = &s->attend;
  const Run *run = p->run;
  int64_t tiles;
  for (;; run++, task -= tiles) {
    tiles = a->heads * parts_of((run->stop - run->start) * a->group, QUERIES);
    if (task < tiles) break;
  }
  int64_t head = task % a->heads, first = task / a->heads * QUERIES;
  int64_t stop = least((run->stop - run->start) * a->group, first + QUERIES);
  Asked asked = {.count = stop - first};
  for (int64_t i = first; i < stop; i++) {
    int64_t row = run->start + i / a->group, query = head * a->group + i % a->group;
    asked.query[i - first] = at(s->in, row * s->in_by + query * a->size, kind);
    asked.out[i - first] = at(s->out, row * s->out_by + query * a->size, kind);
    asked.position[i - first] = run->first + i / a->group;
    asked.head[i - first] = query;
  }
  attend(kind, a, &asked, run->blocks, head, scratch);
}

// ---- all of it -----------------------------------------------------------------------------------------------------

INLINE void gated(const int kind, const Step *s, int64_t task) {
  int64_t pieces = parts_of(s->width, VALUES_AT_ONCE), row = task / pieces, from = task % pieces * VALUES_AT_ONCE;
  const char *gate = at(s->in, row * s->in_by + from, kind), *up = at(gate, s->width, kind);
  int64_t n = least(VALUES_AT_ONCE, s->width - from);
  void *out = at(s->out, row * s->out_by + from, kind);
  if (s->activation == SILU) gate_row(gate, 0, up, 0, n, out, kind, SILU);
  else if (s->activation == GELU_TANH) gate_row(gate, 0, up, 0, n, out, kind, GELU_TANH);
  else gate_row(gate, 0, up, 0, n, out, kind, GELU);
}

static int64_t tasks_of(const Step *s, const Pass *p) {
  switch (s->op) {
    case SCALE: return p->input_gains ? p->rows : 0;
    case INNER: return p->terms ? s->count * p->segments * parts_of(p->rows, ROWS) : 0;
    case PRODUCTS: return product_tasks(s, p);
    case ATTEND: return attention_tasks(s, p);
    case GATED: return p->rows * parts_of(s->width, VALUES_AT_ONCE);
    default: return p->rows;
  }
}

INLINE void run_task(const int kind, const Step *s, const Pass *p, int64_t task, float *scratch) {
  switch (s->op) {
    case BRANCH: branch(kind, s, p, task, scratch); break;
    case NORM: {
      void *x = at(s->out, task * s->out_by, kind);
      normalize(kind, s, norm_of(s, p, task), x, x, s->width);
      break;
    }
    case SCALE: scale(kind, s, p, task); break;
    case INNER: inner(kind, s, p, task, scratch); break;
    case PRODUCTS: products(kind, s, p, task, scratch); break;
    case HEADS: heads(kind, s, p, task); break;
    case ATTEND: attention(kind, s, p, task, scratch); break;
    case GATED: gated(kind, s, task); break;
  }
}

typedef struct {
  const Step *steps;
  const Pass *over;
  int64_t kind;
} Work;

static void run_f32(const Step *s, const Pass *p, int64_t task, float *scratch) { run_task(F32, s, p, task, scratch); }

static void run_bf16(const Step *s, const Pass *p, int64_t task, float *scratch) { run_task(BF16, s, p, task, scratch); }

static void work(const void *job, int64_t step, int64_t task, int64_t thread) {
  const Work *w = job;
  float *scratch = w->over->scratch + thread * w->over->scratch_each;
  if (w->kind == BF16) run_bf16(w->steps + step, w->over, task, scratch);
  else run_f32(w->steps + step, w->over, task, scratch);
}

// Runs the steps over the pass's rows; `kind` is the type of all buffers but the stream. Returns 0, or 1 where memory
// ran out, before anything was written.
int topwork_decode(const Step *steps, int64_t count, const Pass *p, int64_t kind) {
  Work all = {steps, p, kind};
  Counter *counters = calloc(count, sizeof *counters);
  if (!counters) return 1;
  for (int64_t i = 0; i < count; i++) counters[i].tasks = tasks_of(steps + i, p);
  run_job(&all, work, counters, count, p->threads);
  free(counters);
  return 0;
}

int64_t topwork_decode_sizes(int64_t which) {
  const int64_t sizes[] = {sizeof(Weight), sizeof(Part), sizeof(Step), sizeof(Segment), sizeof(Run), sizeof(Pass)};
  return sizes[which];
}
