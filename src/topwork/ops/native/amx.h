// AMX-bf16: eight tiles of 16 rows and 64 bytes, and what is done with them. One instruction multiplies two:
//
//     c [16, 16] += a [16, 32] b [32, 16]        a and b bf16, c fp32
//
// `a` is rows of 32 values, `b` is 16 rows of pairs: values (2 k, n) and (2 k + 1, n) follow each other. That is what
// tile.h calls units, so its panels and rows are read as they stand. A tile's number is part of an instruction, so it has
// to be written down: what takes one is a macro.
//
// The same operations in portable C (-DEMULATE_AMX) let every processor test what is written with them; -DNO_AMX leaves
// them out. The instruction takes values below 1.2e-38 for zero, and does not promise how a pair's two products are
// rounded before they are added: beside the emulation, 13,372 of 13,963 sums are the same to the bit and none is further
// off than 1.2e-7.

#pragma once
#include "simd.h"

#if defined(NO_AMX)
#elif defined(EMULATE_AMX)
#define AMX 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && defined(__AVX512BF16__)
#define AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef AMX
enum { SIDE = 16 };  // rows and 32-bit columns of a tile

#ifndef EMULATE_AMX

// Linux gives a process the tiles' 8 KiB of state when it asks. Whether it may use them.
static int amx_permitted(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };  // of arch_prctl
  static int known;  // 1: yes, 2: no; threads that ask at once get the same answer
  if (!known) known = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? 2 : 1;
  return known == 1;
}

// A thread's tiles take their sizes before their first use; whoever used them before (oneDNN) had others.
static void amx_begin(void) {
  struct __attribute__((packed, aligned(64))) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } sizes = {.palette = 1};
  for (int t = 0; t < 8; t++) sizes.rows[t] = SIDE, sizes.row_bytes[t] = 4 * SIDE;
  __asm__ volatile("" : : "r"(&sizes) : "memory");  // gcc 12 is told of eight bytes alone, and may leave the others out
  _tile_loadconfig(&sizes);
}
static void amx_end(void) { _tile_release(); }
// `ld`: from one row to the next, in units
#define AMX_ZERO(t) _tile_zero(t)
#define AMX_LOAD(t, from, ld) _tile_loadd(t, from, 4 * (ld))
#define AMX_STORE(t, to, ld) _tile_stored(t, to, 4 * (ld))
#define AMX_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#else

static __thread float amx_tiles[8][SIDE][SIDE];

static int amx_permitted(void) { return 1; }
static void amx_begin(void) { memset(amx_tiles, 0, sizeof amx_tiles); }
static void amx_end(void) { memset(amx_tiles, 0xff, sizeof amx_tiles); }  // NaN: for a use outside to be seen
static void amx_load(int t, const void *from, int64_t ld) {
  for (int r = 0; r < SIDE; r++) memcpy(amx_tiles[t][r], (const char *)from + 4 * ld * r, 4 * SIDE);
}
static void amx_store(int t, void *to, int64_t ld) {
  for (int r = 0; r < SIDE; r++) memcpy((char *)to + 4 * ld * r, amx_tiles[t][r], 4 * SIDE);
}
static inline float amx_half(float unit, int upper) {  // one bf16 of a unit
  uint32_t bits;
  memcpy(&bits, &unit, 4);
  bits = upper ? bits & 0xffff0000 : bits << 16;
  memcpy(&unit, &bits, 4);
  return unit;
}
static void amx_multiply(int c, int a, int b) {
  for (int m = 0; m < SIDE; m++)
    for (int k = 0; k < SIDE; k++)
      for (int half = 0; half < 2; half++) {
        float x = amx_half(amx_tiles[a][m][k], half);
        for (int n = 0; n < SIDE; n++) amx_tiles[c][m][n] += x * amx_half(amx_tiles[b][k][n], half);
      }
}
#define AMX_ZERO(t) memset(amx_tiles[t], 0, sizeof amx_tiles[t])
#define AMX_LOAD(t, from, ld) amx_load(t, from, ld)
#define AMX_STORE(t, to, ld) amx_store(t, to, ld)
#define AMX_MULTIPLY(c, a, b) amx_multiply(c, a, b)

#endif

// A part of a summed axis: `a` [.., 16 deep] against `b` [16 deep, ..], in units. `lda`, `ldb` are from row to row,
// `across` from one tile of b's columns to the next. Meanwhile `asked` rows from `ahead` on, as far apart as a's and as
// long, are asked for: what another core has just written is far away, and a processor does not foresee rows.
typedef struct {
  const void *a;
  const float *b;
  int64_t lda, ldb, across, deep;
  const char *ahead;
  int64_t asked;
} Stretch;

// c [16 high, 16 wide] (+)= the sum over `count` stretches of a b, in tiles, of which at most four are sums: that is how
// many the instruction's latency asks for. high and wide are constants where it is called.
INLINE void amx_stretches(const int high, const int wide, const Stretch *stretches, int64_t count, float *c,
                          int64_t ldc, int add) {
#define EACH_SUM(DO)                     \
  DO(0, 0, 0)                            \
  if (high == 2 && wide == 2) {          \
    DO(1, 0, 1) DO(2, 1, 0) DO(3, 1, 1)  \
  } else if (high == 1) {                \
    if (wide > 1) { DO(1, 0, 1) }        \
    if (wide > 2) { DO(2, 0, 2) }        \
    if (wide > 3) { DO(3, 0, 3) }        \
  } else {                               \
    DO(1, 1, 0)                          \
    if (high > 2) { DO(2, 2, 0) }        \
    if (high > 3) { DO(3, 3, 0) }        \
  }
#define LOAD_SUM(t, m, n) AMX_LOAD(t, c + m * SIDE * ldc + n * SIDE, ldc);
#define ZERO_SUM(t, m, n) AMX_ZERO(t);
#define STORE_SUM(t, m, n) AMX_STORE(t, c + m * SIDE * ldc + n * SIDE, ldc);
#define LEFT(t, m) AMX_LOAD(t, a + 4 * SIDE * (m) * lda, lda);
#define RIGHT(t, n) AMX_LOAD(t, b + (n) * across, ldb);
  if (add) { EACH_SUM(LOAD_SUM) } else { EACH_SUM(ZERO_SUM) }
  for (; count; count--, stretches++) {
    const char *a = stretches->a, *ahead = stretches->ahead;
    const float *b = stretches->b;
    int64_t lda = stretches->lda, ldb = stretches->ldb, across = stretches->across, asked = stretches->asked;
    for (int64_t k = stretches->deep; k; k--, a += 4 * SIDE, b += SIDE * ldb) {
      for (int64_t row = 0; row < asked; row++) __builtin_prefetch(ahead + 4 * row * lda, 0, 2);
      ahead += asked ? 4 * SIDE : 0;
      if (high == 2 && wide == 2) {
        LEFT(4, 0) RIGHT(6, 0)
        AMX_MULTIPLY(0, 4, 6);
        RIGHT(7, 1)
        AMX_MULTIPLY(1, 4, 7);
        LEFT(5, 1)
        AMX_MULTIPLY(2, 5, 6);
        AMX_MULTIPLY(3, 5, 7);
      } else if (high == 1) {
        LEFT(4, 0) RIGHT(5, 0)
        AMX_MULTIPLY(0, 4, 5);
        if (wide > 1) { RIGHT(6, 1) AMX_MULTIPLY(1, 4, 6); }
        if (wide > 2) { RIGHT(7, 2) AMX_MULTIPLY(2, 4, 7); }
        if (wide > 3) { RIGHT(5, 3) AMX_MULTIPLY(3, 4, 5); }
      } else {
        RIGHT(4, 0) LEFT(5, 0)
        AMX_MULTIPLY(0, 5, 4);
        LEFT(6, 1)
        AMX_MULTIPLY(1, 6, 4);
        if (high > 2) { LEFT(7, 2) AMX_MULTIPLY(2, 7, 4); }
        if (high > 3) { LEFT(5, 3) AMX_MULTIPLY(3, 5, 4); }
      }
    }
  }
  EACH_SUM(STORE_SUM)
#undef EACH_SUM
#undef LOAD_SUM
#undef ZERO_SUM
#undef STORE_SUM
#undef LEFT
#undef RIGHT
}

// The same of one stretch, the columns of b side by side. `last`: where it is not NULL, another 16 columns of `a`, rows
// of 16 units; they meet the rows of `b` that follow.
INLINE void amx_product(const int high, const int wide, const void *a, int64_t lda, const void *last, const float *b,
                        int64_t ldb, int64_t deep, float *c, int64_t ldc, int add) {
  const Stretch stretches[2] = {{a, b, lda, ldb, SIDE, deep}, {last, b + SIDE * ldb * deep, SIDE, ldb, SIDE, 1}};
  amx_stretches(high, wide, stretches, last ? 2 : 1, c, ldc, add);
}
#endif
