// Matrices as tables tell of them.

#pragma once
#include "simd.h"

typedef struct {
  char *at;
  int64_t row, column;  // from one to the next, in values
} Matrix;

static inline int64_t bytes_of(int64_t kind) { return kind == BF16 ? 2 : 4; }
static inline const char *value_at(Matrix x, int64_t row, int64_t column, int64_t kind) {
  return x.at + (row * x.row + column * x.column) * bytes_of(kind);
}
