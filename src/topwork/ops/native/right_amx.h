// The right side of a product on AMX's tiles, packed: [16 columns][16 units][16][16], tile behind tile.

#pragma once
#include "matrix.h"
#include "tile.h"

#define SIDES 256  // floats of a tile

static inline int64_t sides(int64_t count) { return (count + SIDE - 1) / SIDE; }

// [k, n], of which one axis is contiguous.
typedef struct {
  Matrix at;
  int64_t k, n, kind;
} Right;

// `count` values from `at` on as bf16, times alpha, rounded again: what was bf16 before gives the same. Zeros up to 16.
INLINE void narrow16(const char *at, int64_t count, int64_t kind, float alpha, uint16_t *to) {
  for (int64_t i = 0; i < 16; i += LANES) {
    int64_t some = least(LANES, count - i);
    vecf x = some == LANES ? load(at, i, LANES, (int)kind) : some > 0 ? load(at, i, some, (int)kind) : vall(0);
    vech small = to_bf16(rounded(x, BF16) * vall(alpha));
    memcpy(to + i, &small, sizeof small);
  }
}

// One tile: columns [column, column + 16) and units [unit, unit + 16) of a right side times alpha, zeros beyond it.
static void pack_tile(const Right *p, float alpha, int64_t column, int64_t unit, float *to) {
  int64_t count = least(SIDE, p->n - column), from = 2 * unit, some = least(32, p->k - from);
  int64_t size = bytes_of(p->kind);
  int plain = p->kind == BF16 && alpha == 1;
  const char *at = value_at(p->at, from, column, p->kind);
  if (p->at.column == 1) {
    int64_t by = p->at.row * size;
    for (int64_t s = 0; s < SIDE; s++, at += 2 * by) {
      uint16_t two[2][16] __attribute__((aligned(32)));
      if (plain && count == SIDE && 2 * s + 1 < some) {
        pair_rows((const uint16_t *)at, (const uint16_t *)(at + by), SIDE, to + SIDE * s);
        continue;
      }
      for (int64_t half = 0; half < 2; half++)
        narrow16(at + half * by, 2 * s + half < some ? count : 0, p->kind, alpha, two[half]);
      pair_rows(two[0], two[1], SIDE, to + SIDE * s);
    }
    return;
  }
  int64_t by = p->at.column * size;
  if (plain && some == 32 && by % 4 == 0) {
    for (int64_t c = 2 * SIDE; c < 3 * SIDE; c++) __builtin_prefetch(at + c * by, 0, 2);  // the next pair's
    transpose_block((const Unit *)at, by / 4, count, SIDE, to, SIDE);
    return;
  }
  uint16_t rows[16][32] __attribute__((aligned(64)));
  for (int64_t c = 0; c < SIDE; c++)
    for (int64_t half = 0; half < 32; half += 16)
      narrow16(at + c * by + half * size, c < count ? least(16, some - half) : 0, p->kind, alpha, rows[c] + half);
  transpose_block((const Unit *)rows, SIDE, SIDE, SIDE, to, SIDE);
}

#if defined(WIDE)
// A row of tiles that lies within a right side whose rows are contiguous, two tiles at a time from whole cache lines; a
// tile follows the one before it at `across`.
static void pack_row_of_tiles(const Right *p, int64_t column, int64_t wide, int64_t unit, float *to, int64_t across) {
  const char *at = value_at(p->at, 2 * unit, column, BF16);
  int64_t by = p->at.row * 2;
  for (int64_t s = 0; s < SIDE; s++, at += 2 * by)
    for (int64_t t = 0; t < wide; t += 2) {
      const char *here = at + 32 * t;
      float *tile = to + t * across + SIDE * s;
      __builtin_prefetch(here + 16 * by, 0, 2), __builtin_prefetch(here + 17 * by, 0, 2);
      pair_lines(here, here + by, tile, tile + across);
    }
}
#endif

// The tiles of columns [column, column + 16 wide) and units [unit, unit + 16 deep), those of the next columns `across`
// further on. Rows that are contiguous are read as they follow each other.
static void pack_tiles(const Right *p, float alpha, int64_t column, int64_t wide, int64_t unit, int64_t deep,
                       float *to, int64_t across) {
  for (int64_t d = 0; d < deep; d++) {
    int64_t t = 0;
#if defined(WIDE)
    if (alpha == 1 && p->kind == BF16 && p->at.column == 1 && 2 * (unit + SIDE * (d + 1)) <= p->k) {
      t = 2 * least(wide / 2, (p->n - column) / (2 * SIDE));
      pack_row_of_tiles(p, column, t, unit + SIDE * d, to + d * SIDES, across);
    }
#endif
    for (; t < wide; t++) pack_tile(p, alpha, column + SIDE * t, unit + SIDE * d, to + t * across + d * SIDES);
  }
}
