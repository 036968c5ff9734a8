// A gated feed-forward layer with the low-rank terms of its adapters, forward and backward, on AMX.
//
//     gate = n Wg' + s S B'    up alike    h = act(gate) * up    y = h Wd' + s S B'    S = n A' or h A'
//
// As single products its way leads through memory: gate and up, h, and their gradients are written and read again, some
// of them four times. Here a block of rows goes all the way while it is in the core's own caches, and only what the
// backward pass needs is written. For that, weights are packed into tiles at the head of a call, once for all blocks,
// which then read them from the cache that all cores share.
//
// Sums and roundings are those of the single products (grouped.c) and of layer.c, so outputs, and gradients of inputs,
// are the same to the bit. Gradients of A and B are sums over rows: each block makes its own, and these are added up in
// the blocks' order. Blocks depend on the rows alone, so results do not depend on the number of threads.

#include <omp.h>
#include <stdlib.h>

#include "held.h"
#include "rows.h"
#include "tile.h"
#ifdef AMX
#include "right_amx.h"

enum {
  ROWS = 128,          // of a block, at most
  STRIP = 2 * SIDE,    // rows that are multiplied at a time
  WIDTH = 8,           // tiles of columns that are multiplied at a time: their sums stay in the first cache
  STEPS = 9,           // tiles of the summed axis at a time, so that the left side's stay there too
  UNITS = ROWS / 2,    // of a block's rows as a summed axis
  MOST_ACTIVE = 24,    // terms that have some rows in common
  MOST_FACTORS = 2 + MOST_ACTIVE,
};
enum { GATE, UP, DOWN, PARTS };

// ---- what a call is given: all numbers are 64 bits wide --------------------------------------------------------------

// n [rows, d] and y, or their gradients; both [rows, 2 f] = gate | up. y and dn may be NULL, and both going forward. Going
// backward n is made again, from x and its norm's numbers rstd [rows] and weight [d]; or it is x, where rstd is NULL.
typedef struct {
  const uint16_t *weight[PARTS];  // gate and up [f, d], down [d, f]
  int64_t weight_by[PARTS];
  const uint16_t *in;  // n, or dy going backward
  int64_t in_by;
  uint16_t *both, *out;  // out: y, or dn going backward
  int64_t both_by, out_by, rows, d, f, act;
  const uint16_t *x;
  int64_t x_by;
  const float *rstd;
  const void *norm;
  int64_t norm_kind, offset;  // offset: 1 + weight
} Layer;

// s B A of rows [start, stop). s [stop - start, r]; da [r, inputs] and db [outputs, r] in fp32.
typedef struct {
  const float *a, *b;
  uint16_t *s;
  float *da, *db;
  int64_t r, start, stop, part;
  double scaling;
} Term;

static int64_t inputs_of(const Layer *l, const Term *t) { return t->part == DOWN ? l->f : l->d; }
static int64_t outputs_of(const Layer *l, const Term *t) { return t->part == DOWN ? l->d : l->f; }

// ---- packed right sides ----------------------------------------------------------------------------------------------

typedef struct {
  Right right;
  float alpha, *at;
  int64_t wide, deep, pieces;
} Packed;

enum { PIECE = 4 };  // tiles of columns, or of the summed axis where rows are contiguous, that are packed at a time

static Packed planned(const void *at, int64_t row, int64_t column, int64_t k, int64_t n, int kind, double alpha,
                      float *arena, int64_t *used) {
  Packed p = {{{(char *)at, row, column}, k, n, kind}, (float)alpha};
  p.wide = sides(n), p.deep = sides((k + 1) / 2);
  p.pieces = ((column == 1 ? p.deep : p.wide) + PIECE - 1) / PIECE;
  p.at = take(arena, used, p.wide * p.deep * SIDES);
  return p;
}

static void pack_piece(const Packed *p, int64_t piece) {
  int64_t across = p->deep * SIDES, first = PIECE * piece;
  for (int64_t t = 0; p->right.at.column == 1 && t < p->wide; t += WIDTH)
    pack_tiles(&p->right, p->alpha, SIDE * t, least(WIDTH, p->wide - t), SIDE * first, least(PIECE, p->deep - first),
               p->at + t * across + first * SIDES, across);
  if (p->right.at.column != 1)
    pack_tiles(&p->right, p->alpha, SIDE * first, least(PIECE, p->wide - first), 0, p->deep, p->at + first * across,
               across);
}

// All that a call packs: weights, and two of each term.
typedef struct {
  Packed weight[PARTS];
  Packed *terms;  // what makes S or G, and what that is multiplied by
  int64_t count;
} Sides;

static int64_t plan_sides(const Layer *l, const Term *terms, int64_t count, int back, float *arena, Sides *to) {
  int64_t used = 0;
  for (int part = 0; part < PARTS; part++) {
    int64_t in = part == DOWN ? l->f : l->d, out = part == DOWN ? l->d : l->f, by = l->weight_by[part];
    int64_t leaves_out = part == DOWN ? !back && !l->out : back && !l->out;
    int64_t n = leaves_out ? 0 : back ? in : out;
    to->weight[part] = back ? planned(l->weight[part], by, 1, out, n, BF16, 1, arena, &used)
                            : planned(l->weight[part], 1, by, in, n, BF16, 1, arena, &used);
    if (leaves_out) to->weight[part].pieces = 0;
  }
  for (int64_t i = 0; i < count; i++) {
    const Term *t = terms + i;
    int64_t in = inputs_of(l, t), out = outputs_of(l, t);
    Packed *two = to->terms + 2 * i;
    if (back) {
      two[0] = planned(t->b, t->r, 1, out, t->r, F32, 1, arena, &used);
      two[1] = planned(t->a, in, 1, t->r, in, F32, 1, arena, &used);
    } else {
      two[0] = planned(t->a, 1, in, in, t->r, F32, 1, arena, &used);
      two[1] = planned(t->b, 1, t->r, t->r, out, F32, t->scaling, arena, &used);
    }
  }
  return used;
}

// Pieces of all right sides: how many, or where `number` is one of them, it is packed.
static int64_t pack_sides(const Sides *sides, int64_t number) {
  int64_t before = 0;
  for (int64_t i = 0; i < PARTS + 2 * sides->count; i++) {
    const Packed *p = i < PARTS ? sides->weight + i : sides->terms + i - PARTS;
    if (number >= before && number < before + p->pieces) {
      pack_piece(p, number - before);
      return 0;
    }
    before += p->pieces;
  }
  return before;
}

// ---- products ----------------------------------------------------------------------------------------------------------

// A left side, rows of `by` units, against a right side's tiles from a column's on.
typedef struct {
  const void *left;
  int64_t by, deep;
  const float *right;
  int64_t across;
} Factor;

APART void multiply_pair(const Stretch *s, int64_t count, float *sums, int64_t ld, int add) {
  amx_stretches(2, 2, s, count, sums, ld, add);
}
APART void multiply_one(const Stretch *s, int64_t count, float *sums, int64_t ld, int add) {
  amx_stretches(2, 1, s, count, sums, ld, add);
}

// Rows that are read when a product is done, `lines` cache lines of each: they stand far apart, which no processor
// foresees, and are asked for while it runs.
typedef struct {
  const char *at;
  int64_t by, rows, lines;
} Ahead;

enum { AT_ONCE = 2 };  // rows of each that are asked for between two tiles of columns

static void ask_for(Ahead *ahead, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t r = 0; r < AT_ONCE && ahead[i].rows > 0; r++, ahead[i].rows--, ahead[i].at += ahead[i].by)
      for (int64_t c = 0; c < ahead[i].lines; c++) __builtin_prefetch(ahead[i].at + 64 * c);
}

// sums [STRIP, 16 wide]: the factors' products, one after the other, STEPS tiles of the summed axis at a time.
static void multiply(const Factor *factors, int64_t count, int64_t wide, float *sums, Ahead *ahead, int64_t aheads) {
  int64_t step = 0, begun = 0;
  while (count) {
    Stretch part[1 + MOST_FACTORS];
    int64_t found = 0;
    for (int64_t left = STEPS; left && count; found++) {
      int64_t deep = least(left, factors->deep - step);
      part[found] = (Stretch){(const char *)factors->left + 4 * SIDE * step, factors->right + step * SIDES, factors->by,
                              SIDE, factors->across, deep};
      left -= deep, step += deep;
      if (step == factors->deep) factors++, count--, step = 0;
    }
    for (int64_t t = 0; t < wide; t += 2) {
      (t + 1 < wide ? multiply_pair : multiply_one)(part, found, sums + SIDE * t, SIDE * wide, begun);
      for (int64_t i = 0; i < found; i++) part[i].b += 2 * part[i].across;
      ask_for(ahead, aheads);
    }
    begun = 1;
  }
}

// sums [16, 16 wide]: a sum over a block's rows, of two rows a unit.
APART void multiply_rows(const float *left, const float *right, int64_t deep, int64_t wide, float *sums) {
  for (int64_t t = 0; t < wide; t += 4) {
    Stretch s = {left, right + t * deep * SIDES, UNITS, SIDE, deep * SIDES, deep};
    if (t + 4 <= wide) amx_stretches(1, 4, &s, 1, sums + SIDE * t, SIDE * wide, 0);
    else if (t + 2 <= wide) amx_stretches(1, 2, &s, 1, sums + SIDE * t, SIDE * wide, 0);
    if (t + 4 > wide && wide % 2) {
      s.b = right + (wide - 1) * deep * SIDES;
      amx_stretches(1, 1, &s, 1, sums + SIDE * (wide - 1), SIDE * wide, 0);
    }
  }
}

static void round_row(const float *sums, int64_t count, float alpha, uint16_t *to) {
  vecf factor = vall(alpha);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to, i, LANES, BF16, vloadf(sums + i) * factor);
  if (i < count) store(to, i, count - i, BF16, vloadf(sums + i) * factor);
}

// ---- blocks ------------------------------------------------------------------------------------------------------------

// Some rows and the terms that they have; where their sums go, one term's behind the other's.
typedef struct {
  int64_t row, rows, strips, first, count, sums;
} Block;

// A term in a block: S or, going backward, G, [ROWS, 32 a tile of it], with zeros beyond r; S turned, [r, UNITS], and G.
typedef struct {
  const Term *term;
  const Packed *two;
  uint16_t *inner;
  float *s, *g;
  float *da, *db;
} Active;

static int64_t depth(const Term *t) { return sides((t->r + 1) / 2); }  // tiles that S is deep

typedef struct {
  uint16_t *in, *both, *h, *line;  // [ROWS, d], [ROWS, 2 f] going backward, [ROWS, f] going forward, a row
  float *sums, *more;              // [STRIP, 16 WIDTH]
  float *pairs[PARTS];             // of gate's and up's gradient and of h: [WIDTH][ROWS / 32][16][16]; the first of dy, n
  float *terms;                    // of Actives
} Room;

static int64_t room_of_term(const Term *t, int back) {
  int64_t inner = ROWS * SIDE * depth(t), turned = SIDE * sides(t->r) * UNITS;
  return up(inner, 16) + (back ? 2 * turned : 0);
}

static int64_t plan_room(const Layer *l, int64_t terms, int back, float *arena, Room *room) {
  int64_t used = 0;
  room->in = (uint16_t *)take(arena, &used, ROWS * l->d / 2);
  room->both = back ? (uint16_t *)take(arena, &used, ROWS * l->f) : NULL;
  room->h = (uint16_t *)take(arena, &used, back ? 2 * SIDE * WIDTH : ROWS * l->f / 2);
  room->line = (uint16_t *)take(arena, &used, 4 * SIDE * WIDTH);
  room->sums = take(arena, &used, STRIP * SIDE * WIDTH);
  room->more = take(arena, &used, STRIP * SIDE * WIDTH);
  for (int part = 0; part < PARTS; part++)
    room->pairs[part] = back ? take(arena, &used, WIDTH * ROWS / 32 * SIDES) : NULL;
  room->terms = take(arena, &used, terms);
  return used;
}

// Floats of a block's sums for a term: its B's gradient, then A's.
static int64_t sums_of_term(const Layer *l, const Term *t) {
  return SIDE * sides(t->r) * (outputs_of(l, t) + inputs_of(l, t));
}

// Cut where rows begin or end to have a term, and between into blocks of as many rows each. How many blocks, and how many
// terms they have together; written where there is room for them.
static int64_t cut_blocks(const Layer *l, const Term *terms, int64_t count, Block *blocks, int64_t *of, int64_t *active) {
  int64_t found = 0, sums = 0;
  *active = 0;
  for (int64_t row = 0, stop; row < l->rows; row = stop) {
    stop = l->rows;
    for (int64_t i = 0; i < count; i++) {
      if (terms[i].start > row) stop = least(stop, terms[i].start);
      if (terms[i].stop > row) stop = least(stop, terms[i].stop);
    }
    int64_t pieces = (stop - row + ROWS - 1) / ROWS, each = (stop - row + pieces - 1) / pieces;
    for (int64_t at = row; at < stop; at += each, found++) {
      Block b = {at, least(each, stop - at), 0, *active, 0, sums};
      b.strips = (b.rows + STRIP - 1) / STRIP;
      for (int64_t i = 0; i < count; i++) {
        if (terms[i].start > at || terms[i].stop <= at) continue;
        if (of) of[b.first + b.count] = i;
        b.count++, sums += sums_of_term(l, terms + i);
      }
      *active += b.count;
      if (blocks) blocks[found] = b;
    }
  }
  return found;
}

typedef struct {
  const Layer *layer;
  const Term *terms;
  const Sides *sides;
  const int64_t *of;  // of all blocks, their terms' numbers
  float *sums;
  int back;
} Call;

// A block's terms, each with memory of its own.
static int64_t activate(const Call *call, const Block *b, const Room *room, Active *to) {
  int64_t used = 0;
  float *sums = call->sums + b->sums;
  for (int64_t i = 0; i < b->count; i++) {
    int64_t number = call->of[b->first + i];
    const Term *t = call->terms + number;
    int64_t high = SIDE * sides(t->r), turned = high * UNITS;
    Active a = {t, call->sides->terms + 2 * number};
    a.inner = (uint16_t *)take(room->terms, &used, ROWS * SIDE * depth(t));
    memset(a.inner, 0, ROWS * SIDE * depth(t) * 4);
    if (call->back) {
      a.s = take(room->terms, &used, turned), a.g = take(room->terms, &used, turned);
      a.db = sums, sums += high * outputs_of(call->layer, t);
      a.da = sums, sums += high * inputs_of(call->layer, t);
    }
    to[i] = a;
  }
  return b->count;
}

// Rows of memory as rows side by side, with zeros up to whole strips.
static void copy_rows(const uint16_t *from, int64_t by, const Block *b, int64_t count, uint16_t *to) {
  for (int64_t r = 0; r < b->rows; r++) memcpy(to + r * count, from + (b->row + r) * by, 2 * count);
  memset(to + b->rows * count, 0, 2 * count * (STRIP * b->strips - b->rows));
}

// inner = round(alpha left two[0]) of a term for a block, and in `to`, the term's own [.., r], if that is not NULL.
static void make_inner(const Block *b, const Room *room, const Active *a, const uint16_t *left, int64_t by, double alpha,
                       uint16_t *to) {
  int64_t r = a->term->r, wide = a->two->wide, ld = 2 * SIDE * depth(a->term);
  to = to ? to + (b->row - a->term->start) * r : NULL;
  for (int64_t row = 0; row < b->rows; row += STRIP)
    for (int64_t t = 0; t < wide; t += WIDTH) {
      int64_t some = least(WIDTH, wide - t), columns = least(SIDE * some, r - SIDE * t), across = a->two->deep * SIDES;
      Factor f = {left + row * by, by / 2, a->two->deep, a->two->at + t * across, across};
      multiply(&f, 1, some, room->sums, NULL, 0);
      for (int64_t i = 0; i < least(STRIP, b->rows - row); i++) {
        uint16_t *line = a->inner + (row + i) * ld + SIDE * t;
        round_row(room->sums + i * SIDE * some, columns, (float)alpha, line);
        if (to) memcpy(to + (row + i) * r + SIDE * t, line, 2 * columns);
      }
    }
}

// Rows of 32 deep values, two rows a unit, turned: to [r up to 16, UNITS].
static void turn(const uint16_t *from, int64_t deep, int64_t r, int64_t strips, float *to) {
  float spare[SIDES] __attribute__((aligned(64)));
  int64_t ld = 2 * SIDE * deep;
  for (int64_t i = 0; i < r; i += SIDE)
    for (int64_t s = 0; s < strips; s++) {
      const uint16_t *at = from + s * STRIP * ld + i;
      for (int64_t k = 0; k < SIDE; k++) pair_rows(at + 2 * k * ld, at + (2 * k + 1) * ld, SIDE, spare + SIDE * k);
      transpose_block((const Unit *)spare, SIDE, SIDE, SIDE, to + i * UNITS + SIDE * s, UNITS);
    }
}

// A strip's rows against tiles of columns from t on.
static Factor against(const uint16_t *left, int64_t by, const Packed *p, int64_t t) {
  int64_t across = p->deep * SIDES;
  return (Factor){left, by / 2, p->deep, p->at + t * across, across};
}

// The same of the terms of some parts, from `first` to `last`; how many.
static int64_t of_terms(const Active *all, int64_t count, int first, int last, int64_t row, int64_t t, Factor *to) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i++) {
    const Active *a = all + i;
    int64_t by = 2 * SIDE * depth(a->term);
    if (a->term->part >= first && a->term->part <= last) to[found++] = against(a->inner + row * by, by, a->two + 1, t);
  }
  return found;
}

static void gate_line(const uint16_t *gate, const uint16_t *up, int64_t count, uint16_t *h, int64_t act) {
  if (act == SILU) gate_row(gate, 0, up, 0, count, h, BF16, SILU);
  else if (act == GELU_TANH) gate_row(gate, 0, up, 0, count, h, BF16, GELU_TANH);
  else gate_row(gate, 0, up, 0, count, h, BF16, GELU);
}

static void slope_line(const uint16_t *dh, const uint16_t *gate, const uint16_t *up, int64_t count, uint16_t *dgate,
                       uint16_t *dup, uint16_t *h, int64_t act) {
  if (act == SILU) gate_slope_row(dh, 0, gate, 0, up, 0, count, dgate, dup, h, BF16, SILU);
  else if (act == GELU_TANH) gate_slope_row(dh, 0, gate, 0, up, 0, count, dgate, dup, h, BF16, GELU_TANH);
  else gate_slope_row(dh, 0, gate, 0, up, 0, count, dgate, dup, h, BF16, GELU);
}

// Rows [row, row + STRIP) of y or dn, as far as they are the block's, from their sums.
static void write_out(const Layer *l, const Block *b, int64_t row, int64_t t, int64_t wide, const float *sums) {
  for (int64_t i = 0; i < least(STRIP, b->rows - row); i++)
    round_row(sums + i * SIDE * wide, SIDE * wide, 1, l->out + (b->row + row + i) * l->out_by + SIDE * t);
}

// A copy past the caches: nobody reads it before long. Both stand at a multiple of 64 bytes, where there are whole lines.
static void stream_row(const uint16_t *from, int64_t count, uint16_t *to) {
#ifdef WIDE
  int64_t i = 0;
  for (; i + 32 <= count && (uintptr_t)(to + i) % 64 == 0; i += 32)
    _mm512_stream_si512((void *)(to + i), _mm512_loadu_si512(from + i));
  from += i, to += i, count -= i;
#endif
  memcpy(to, from, 2 * count);
}

// ---- forward -----------------------------------------------------------------------------------------------------------

// Columns of gate and up for a strip, and of h.
static void gate_strip(const Layer *l, const Block *b, const Room *room, int64_t row, int64_t t, int64_t wide) {
  int64_t count = SIDE * wide, there = least(STRIP, b->rows - row);
  for (int64_t i = 0; i < STRIP; i++) {
    uint16_t *h = room->h + (row + i) * l->f + SIDE * t, *gate = room->line, *up = gate + count;
    if (i >= there) {
      memset(h, 0, 2 * count);
      continue;
    }
    round_row(room->sums + i * count, count, 1, gate);
    round_row(room->more + i * count, count, 1, up);
    gate_line(gate, up, count, h, l->act);
    if (!l->both) continue;
    uint16_t *both = l->both + (b->row + row + i) * l->both_by + SIDE * t;
    stream_row(gate, count, both), stream_row(up, count, both + l->f);
  }
}

// A strip's columns of rows `by` values apart, from the one that stands at `at` on.
static Ahead strip_ahead(const uint16_t *at, int64_t by, int64_t rows, int64_t wide) {
  return (Ahead){(const char *)at, 2 * by, least(STRIP, rows), (wide + 1) / 2};
}

static void forward_block(const Call *call, const Block *b, const Room *room) {
  const Layer *l = call->layer;
  const Packed *weight = call->sides->weight;
  Active all[MOST_ACTIVE];
  Factor factors[MOST_FACTORS];
  int64_t count = activate(call, b, room, all);
  copy_rows(l->in, l->in_by, b, l->d, room->in);
  for (int64_t i = 0; i < count; i++)
    if (all[i].term->part != DOWN) make_inner(b, room, all + i, room->in, l->d, 1, all[i].term->s);
  for (int64_t t = 0, wide; t < sides(l->f); t += wide) {
    wide = least(WIDTH, sides(l->f) - t);
    for (int64_t row = 0; row < b->rows; row += STRIP) {
      for (int part = GATE; part <= UP; part++) {
        factors[0] = against(room->in + row * l->d, l->d, weight + part, t);
        int64_t found = 1 + of_terms(all, count, part, part, row, t, factors + 1);
        multiply(factors, found, wide, part == GATE ? room->sums : room->more, NULL, 0);
      }
      gate_strip(l, b, room, row, t, wide);
    }
  }
  for (int64_t i = 0; i < count; i++)
    if (all[i].term->part == DOWN) make_inner(b, room, all + i, room->h, l->f, 1, all[i].term->s);
  for (int64_t t = 0, wide; t < sides(l->d) && l->out; t += wide) {
    wide = least(WIDTH, sides(l->d) - t);
    for (int64_t row = 0; row < b->rows; row += STRIP) {
      factors[0] = against(room->h + row * l->f, l->f, weight + DOWN, t);
      multiply(factors, 1 + of_terms(all, count, DOWN, DOWN, row, t, factors + 1), wide, room->sums, NULL, 0);
      write_out(l, b, row, t, wide, room->sums);
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------------

// Two rows a unit: rows `by` apart to tiles of the strip that begins at `row`, those of the next columns `across` further.
static void pair_strip(const uint16_t *from, int64_t by, int64_t wide, float *to, int64_t across) {
  for (int64_t k = 0; k < SIDE; k++, from += 2 * by)
    for (int64_t t = 0; t < wide; t++) pair_rows(from + SIDE * t, from + by + SIDE * t, SIDE, to + t * across + SIDE * k);
}

// Columns of gate's and up's gradient for a strip, from those of h in `sums`, and h again; as rows, and two rows a unit.
static void slope_strip(const Layer *l, const Block *b, const Room *room, int64_t row, int64_t t, int64_t wide) {
  int64_t count = SIDE * wide, across = b->strips * SIDES, there = b->rows - row;
  uint16_t *both = room->both + row * 2 * l->f + SIDE * t;
  float *pairs[PARTS];
  for (int part = 0; part < PARTS; part++) pairs[part] = room->pairs[part] + row / STRIP * SIDES;
  for (int64_t i = 0; i < STRIP; i += 2, both += 4 * l->f) {
    for (int64_t j = i; j < i + 2; j++) {
      uint16_t *h = room->h + (j - i) * count, *dgate = both + (j - i) * 2 * l->f, *dup = dgate + l->f;
      if (j < there) {
        const uint16_t *gate = l->both + (b->row + row + j) * l->both_by + SIDE * t;
        round_row(room->sums + j * count, count, 1, room->line);
        slope_line(room->line, gate, gate + l->f, count, dgate, dup, h, l->act);
      } else {
        memset(h, 0, 2 * count), memset(dgate, 0, 2 * count), memset(dup, 0, 2 * count);
      }
    }
    const uint16_t *rows[PARTS] = {both, both + l->f, room->h};
    int64_t by[PARTS] = {2 * l->f, 2 * l->f, count};
    for (int part = 0; part < PARTS; part++, pairs[part - 1] += SIDE)
      for (int64_t c = 0; c < wide; c++)
        pair_rows(rows[part] + SIDE * c, rows[part] + by[part] + SIDE * c, SIDE, pairs[part] + c * across);
  }
}

// Sums over a block's rows for some tiles of columns: of B's gradient from S, of A's from G.
static void sum_rows(const float *inner, const Term *term, const float *pairs, const Block *b, int64_t t, int64_t wide,
                     float *to) {
  for (int64_t i = 0; i < SIDE * sides(term->r); i += SIDE)
    multiply_rows(inner + i * UNITS, pairs, b->strips, wide, to + SIDE * (t * SIDE * sides(term->r) + i * wide));
}

// What there is before gate's and up's gradient: of each term S, turned; of down's G, and of its B's gradient the sums.
static void begin_backward(const Layer *l, const Block *b, const Room *room, Active *all, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const Term *t = all[i].term;
    int64_t deep = depth(t);
    for (int64_t row = 0; row < b->rows; row++)
      memcpy(all[i].inner + row * 2 * SIDE * deep, t->s + (b->row - t->start + row) * t->r, 2 * t->r);
    turn(all[i].inner, deep, t->r, b->strips, all[i].s);
    if (t->part != DOWN) continue;
    make_inner(b, room, all + i, room->in, l->d, t->scaling, NULL);
    turn(all[i].inner, deep, t->r, b->strips, all[i].g);
  }
  for (int64_t t = 0, wide; t < sides(l->d); t += wide) {
    wide = least(WIDTH, sides(l->d) - t);
    for (int64_t s = 0; s < b->strips; s++)
      pair_strip(room->in + s * STRIP * l->d + SIDE * t, l->d, wide, room->pairs[0] + s * SIDES, b->strips * SIDES);
    for (int64_t i = 0; i < count; i++)
      if (all[i].term->part == DOWN) sum_rows(all[i].s, all[i].term, room->pairs[0], b, t, wide, all[i].db);
  }
}

// The sums of A's gradient of gate and up, from n, which takes the place of dy.
static void sum_inputs(const Layer *l, const Block *b, const Room *room, const Active *all, int64_t count) {
  int64_t wanted = 0;
  for (int64_t i = 0; i < count; i++) wanted += all[i].term->part != DOWN;
  if (!wanted) return;
  for (int64_t r = 0; r < b->rows; r++) {
    const uint16_t *x = l->x + (b->row + r) * l->x_by;
    uint16_t *n = room->in + r * l->d;
    if (!l->rstd) memcpy(n, x, 2 * l->d);
    else if (l->norm_kind == F32 && l->offset) norm_row(x, l->x_by, l->norm, l->rstd[b->row + r], l->d, n, BF16, F32, 1);
    else if (l->norm_kind == F32) norm_row(x, l->x_by, l->norm, l->rstd[b->row + r], l->d, n, BF16, F32, 0);
    else if (l->offset) norm_row(x, l->x_by, l->norm, l->rstd[b->row + r], l->d, n, BF16, BF16, 1);
    else norm_row(x, l->x_by, l->norm, l->rstd[b->row + r], l->d, n, BF16, BF16, 0);
  }
  for (int64_t t = 0, wide; t < sides(l->d); t += wide) {
    wide = least(WIDTH, sides(l->d) - t);
    for (int64_t s = 0; s < b->strips; s++)
      pair_strip(room->in + s * STRIP * l->d + SIDE * t, l->d, wide, room->pairs[0] + s * SIDES, b->strips * SIDES);
    for (int64_t i = 0; i < count; i++)
      if (all[i].term->part != DOWN) sum_rows(all[i].g, all[i].term, room->pairs[0], b, t, wide, all[i].da);
  }
}

static void backward_block(const Call *call, const Block *b, const Room *room) {
  const Layer *l = call->layer;
  const Packed *weight = call->sides->weight;
  Active all[MOST_ACTIVE];
  Factor factors[MOST_FACTORS];
  int64_t count = activate(call, b, room, all);
  copy_rows(l->in, l->in_by, b, l->d, room->in);
  begin_backward(l, b, room, all, count);
  for (int64_t t = 0, wide; t < sides(l->f); t += wide) {
    wide = least(WIDTH, sides(l->f) - t);
    for (int64_t row = 0; row < b->rows; row += STRIP) {
      const uint16_t *both = l->both + (b->row + row) * l->both_by + SIDE * t;
      Ahead ahead[2] = {strip_ahead(both, l->both_by, b->rows - row, wide),
                        strip_ahead(both + l->f, l->both_by, b->rows - row, wide)};
      factors[0] = against(room->in + row * l->d, l->d, weight + DOWN, t);
      multiply(factors, 1 + of_terms(all, count, DOWN, DOWN, row, t, factors + 1), wide, room->sums, ahead, 2);
      slope_strip(l, b, room, row, t, wide);
    }
    for (int64_t i = 0; i < count; i++) {
      const Active *a = all + i;
      if (a->term->part == DOWN) sum_rows(a->g, a->term, room->pairs[DOWN], b, t, wide, a->da);
      else sum_rows(a->s, a->term, room->pairs[a->term->part], b, t, wide, a->db);
    }
  }
  for (int64_t i = 0; i < count; i++) {
    const Term *t = all[i].term;
    if (t->part == DOWN) continue;
    make_inner(b, room, all + i, room->both + (t->part == UP) * l->f, 2 * l->f, t->scaling, NULL);
    turn(all[i].inner, depth(t), t->r, b->strips, all[i].g);
  }
  sum_inputs(l, b, room, all, count);
  for (int64_t t = 0, wide; t < sides(l->d) && l->out; t += wide) {
    wide = least(WIDTH, sides(l->d) - t);
    for (int64_t row = 0; row < b->rows; row += STRIP) {
      for (int part = GATE; part <= UP; part++)
        factors[part] = against(room->both + row * 2 * l->f + part * l->f, 2 * l->f, weight + part, t);
      multiply(factors, 2 + of_terms(all, count, GATE, UP, row, t, factors + 2), wide, room->sums, NULL, 0);
      write_out(l, b, row, t, wide, room->sums);
    }
  }
}

// ---- gradients of A and B ----------------------------------------------------------------------------------------------

// A call with its blocks, when all of them have been run.
typedef struct {
  const Call *call;
  const Block *blocks;
  int64_t found;
} All;

// Where a block has this term's sums: its B's, then A's for down; NULL where it has not the term.
static const float *sums_of(const All *all, const Block *b, int64_t number) {
  const float *at = all->call->sums + b->sums;
  for (int64_t i = 0; i < b->count; i++) {
    int64_t other = all->call->of[b->first + i];
    const Term *t = all->call->terms + other;
    if (other == number) return at;
    at += sums_of_term(all->call->layer, t);
  }
  return NULL;
}

// The columns of tiles [t, t + wide) of a term's gradients: db, or with `of_a` da.
static void add_sums(const All *all, int64_t number, int of_a, int64_t t, int64_t wide, float *sums) {
  const Layer *l = all->call->layer;
  const Term *term = all->call->terms + number;
  int64_t high = SIDE * sides(term->r), ld = SIDE * wide, before = high * (SIDE * t + (of_a ? outputs_of(l, term) : 0));
  for (int64_t i = 0; i < term->r; i += SIDE) {
    int64_t some = least(SIDE, term->r - i);
    memset(sums, 0, SIDE * ld * 4);
    for (int64_t j = 0; j < all->found; j++) {
      const float *at = sums_of(all, all->blocks + j, number);
      if (at) at += before + i * ld;
      for (int64_t c = 0; at && c < SIDE * ld; c += LANES) vstoref(sums + c, vloadf(sums + c) + vloadf(at + c));
    }
    for (int64_t r = 0; of_a && r < some; r++)
      memcpy(term->da + (i + r) * inputs_of(l, term) + SIDE * t, sums + r * ld, 4 * ld);
    for (int64_t c = 0; !of_a && c < ld; c += SIDE) {
      float turned[SIDES] __attribute__((aligned(64)));
      transpose_block((const Unit *)(sums + c), ld, SIDE, SIDE, turned, SIDE);
      for (int64_t o = 0; o < SIDE; o++)
        for (int64_t r = 0; r < some; r++)
          term->db[(SIDE * t + c + o) * term->r + i + r] = (float)term->scaling * turned[SIDE * o + r];
    }
  }
}

// Some columns of some term's: how many there are to be done, or where `number` is one of them, it is done.
static int64_t add_piece(const All *all, int64_t piece, float *sums) {
  const Layer *l = all->call->layer;
  int64_t before = 0;
  for (int64_t i = 0; i < all->call->sides->count; i++)
    for (int of_a = 0; of_a < 2; of_a++) {
      const Term *term = all->call->terms + i;
      int64_t columns = sides(of_a ? inputs_of(l, term) : outputs_of(l, term));
      int64_t pieces = (columns + WIDTH - 1) / WIDTH, t = WIDTH * (piece - before);
      if (piece >= before && piece < before + pieces) {
        add_sums(all, i, of_a, t, least(WIDTH, columns - t), sums);
        return 0;
      }
      before += pieces;
    }
  return before;
}

// ---- all of it ---------------------------------------------------------------------------------------------------------

// Packed sides, blocks' sums, and what each thread has: how many floats.
typedef struct {
  int64_t packed, sums, each, terms;
} Floats;

static void run_threads(const All *all, const Floats *floats, float *arena, int64_t threads) {
  const Call *call = all->call;
  int64_t next = 0, sides = pack_sides(call->sides, -1), sums = call->back ? add_piece(all, -1, NULL) : 0;
#pragma omp parallel num_threads(threads)
  {
    Room room;
    plan_room(call->layer, floats->terms, call->back, arena + omp_get_thread_num() * floats->each, &room);
    amx_begin();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < sides; i++) pack_sides(call->sides, i);
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < all->found;)
      (call->back ? backward_block : forward_block)(call, all->blocks + i, &room);
#ifdef WIDE
    _mm_sfence();  // what was streamed is seen by whoever waits for this thread
#endif
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < sums; i++) add_piece(all, i, room.sums);
    amx_end();
  }
}

static Floats floats_of(const Call *call, const Block *blocks, int64_t found, Sides *sides) {
  Floats floats = {.packed = plan_sides(call->layer, call->terms, sides->count, call->back, NULL, sides)};
  Room room;
  for (int64_t i = 0; i < found; i++) {
    int64_t here = 0, sums = blocks[i].sums;
    for (int64_t j = 0; j < blocks[i].count; j++) {
      const Term *t = call->terms + call->of[blocks[i].first + j];
      here += room_of_term(t, call->back);
      sums += sums_of_term(call->layer, t);
    }
    floats.terms = most(floats.terms, here), floats.sums = call->back ? sums : 0;
  }
  floats.each = plan_room(call->layer, floats.terms, call->back, NULL, &room);
  return floats;
}

static int run(const Layer *l, const Term *terms, int64_t count, int back, int64_t threads) {
  int64_t active, found = cut_blocks(l, terms, count, NULL, NULL, &active);
  Block *blocks = malloc(most(found, 1) * sizeof *blocks);
  int64_t *of = malloc(most(active, 1) * sizeof *of);
  Sides sides = {.terms = malloc(most(2 * count, 1) * sizeof *sides.terms), .count = count};
  int failed = !blocks || !of || !sides.terms, ours;
  if (!failed) {
    cut_blocks(l, terms, count, blocks, of, &active);
    Call call = {l, terms, &sides, of, NULL, back};
    Floats floats = floats_of(&call, blocks, found, &sides);
    threads = most(1, least(threads, found));
    float *arena = borrow(floats.packed + floats.sums + threads * floats.each, &ours);
    failed = !arena;
    if (arena) {
      plan_sides(l, terms, count, back, arena, &sides);
      call.sums = arena + floats.packed;
      run_threads(&(All){&call, blocks, found}, &floats, call.sums + floats.sums, threads);
    }
    give_back(arena, ours);
  }
  free(blocks), free(of), free(sides.terms);
  return failed;
}
#endif

// A layer, and its terms where they are shaped like that; forward, or with `back` backward. 0, or before anything was
// written 1 when memory ran out, 2 where this is not compiled for AMX or the system does not permit it.
int topwork_feedforward(const void *layer, const void *terms, int64_t count, int64_t back, int64_t threads) {
#ifdef AMX
  if (amx_permitted()) return run(layer, terms, count, (int)back, threads);
#endif
  (void)layer, (void)terms, (void)count, (void)back, (void)threads;
  return 2;
}

int topwork_feedforward_level(void) { return LEVEL; }
