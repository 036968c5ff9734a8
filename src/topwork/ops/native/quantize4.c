// 4-bit block-wise and int8 weights: packing, and unpacking a panel of rows and columns into a dense tile. The formats:
// packed4.h.

#include "packed4.h"

// out [rows, columns] dense and contiguous, of the weight's rows [row, row + rows) and columns [column, column + columns).
void topwork_dequantize_4bit(
    const uint8_t *codes, const void *absmax, const float *nested, const float *nested_code, float offset,
    const float *code, int64_t block, int64_t in_features, int64_t row, int64_t rows, int64_t column, int64_t columns,
    int kind, void *out, int threads) {
  Packed4 w = {codes, absmax, nested, nested_code, offset, code, block};
  int64_t size = kind == OUT_F32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++)
    unpack_row(&w, (row + r) * in_features + column, columns, kind, (char *)out + r * columns * size);
}

// out [rows, columns] of int8 rows, likewise.
void topwork_dequantize_int8(
    const int8_t *codes, const float *absmax, int64_t in_features, int64_t row, int64_t rows, int64_t column,
    int64_t columns, int kind, void *out, int threads) {
  int64_t size = kind == OUT_F32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++)
    unpack_row8(codes + (row + r) * in_features + column, absmax[row + r], columns, kind,
                (char *)out + r * columns * size);
}

// Packs `count` fp32 values. `bounds` are the 15 midpoints of the sorted code, `order` the nibble of each rank; the
// nibble after an odd count is that of zero, which has rank 7 in both codes.
void topwork_quantize_4bit(
    const float *values, int64_t count, int64_t block, const float *bounds, const uint8_t *order, uint8_t *codes,
    float *absmax, int threads) {
  int64_t blocks = (count + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    int64_t from = b * block, n = count - from < block ? count - from : block;
    const float *x = values + from;
    uint32_t bits, most = 0;  // of magnitudes, whose bits rise as they do; infinity and NaN are above all others
    for (int64_t i = 0; i < n; i++) {
      memcpy(&bits, x + i, 4);
      bits &= 0x7fffffff;
      most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    int whole = n == block;
    float floor = largest < 1e-38f ? 1e-38f : largest, factor = 1.0f / floor;
    absmax[b] = whole ? largest : floor;
    uint8_t rank[32];
    for (int64_t i = 0; i < n; i += 32) {  // a block is even and begins on a byte
      int m = n - i < 32 ? (int)(n - i) : 32;
      for (int j = 0; j < m; j++) {
        float scaled = whole ? x[i + j] * factor : x[i + j] / floor;
        uint8_t above = 0;
        for (int k = 0; k < 15; k++) above += scaled > bounds[k];
        rank[j] = above;
      }
      for (int j = 0; j < m; j += 2) {
        uint8_t second = j + 1 < m ? order[rank[j + 1]] : order[7];
        codes[(from + i + j) >> 1] = (uint8_t)(order[rank[j]] << 4 | second);
      }
    }
  }
}
