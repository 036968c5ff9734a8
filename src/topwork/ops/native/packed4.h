// 4-bit block-wise weights: unpacking some values of the flat weight into fp32 or 16 bits.
//
// The format is bitsandbytes': the weight is flat, row by row; two values to a byte, the first in the high nibble; a
// block of `block` values shares one constant. A value is code[nibble] * constant in fp32, rounded once to the output.
// With double quantization the constant itself is nested_code[byte] * nested[block / 256] + offset.
//
// Each block's sixteen possible outputs are made first (16 products instead of one per value); unpacking is then a
// table look-up, 32 values at a time with AVX-512.

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512BW__) || defined(__F16C__)
#include <immintrin.h>
#endif

enum { OUT_F32 = 0, OUT_BF16 = 1, OUT_F16 = 2 };
#define NESTED 256

static inline uint16_t bf16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);  // NaN stays NaN
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline uint16_t f16_of(float x) {
#ifdef __F16C__
  return (uint16_t)_cvtss_sh(x, 0);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x7f800000) return (uint16_t)(sign | 0x7c00 | (magnitude > 0x7f800000 ? 0x200 : 0));
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds beyond the largest half
  if (magnitude < 0x38800000) {                                   // subnormal half: a multiple of 2^-24
    float scaled = fabsf(x) * 16777216.0f;
    return (uint16_t)(sign | (uint32_t)lrintf(scaled));
  }
  uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
#endif
}

typedef struct {
  const uint8_t *codes;
  const void *absmax;         // float[blocks], or uint8_t[blocks] when nested
  const float *nested;        // float[ceil(blocks / 256)]; NULL without double quantization
  const float *nested_code;   // float[256]
  float offset;
  const float *code;          // float[16]
  int64_t block;
} Packed4;

static inline float constant(const Packed4 *w, int64_t block) {
  if (!w->nested) return ((const float *)w->absmax)[block];
  return w->nested_code[((const uint8_t *)w->absmax)[block]] * w->nested[block / NESTED] + w->offset;
}

static void unpack16(const uint8_t *codes, int64_t from, int64_t count, const uint16_t table[16], uint16_t *out) {
  int64_t i = 0;
  if ((from & 1) && count > 0) out[i++] = table[codes[from >> 1] & 15];
  const uint8_t *bytes = codes + ((from + i) >> 1);
#ifdef __AVX512BW__
  __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
  for (; i + 32 <= count; i += 32, bytes += 16) {
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
    __m512i second = _mm512_and_si512(_mm512_slli_epi32(x, 16), _mm512_set1_epi32(0xf0000));
    __m512i index = _mm512_or_si512(_mm512_srli_epi32(x, 4), second);
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, words));
  }
#endif
  for (; i + 2 <= count; i += 2, bytes++) {
    out[i] = table[*bytes >> 4];
    out[i + 1] = table[*bytes & 15];
  }
  if (i < count) out[i] = table[*bytes >> 4];
}

static void unpack32(const uint8_t *codes, int64_t from, int64_t count, const float table[16], float *out) {
  for (int64_t i = 0; i < count; i++) {
    uint8_t byte = codes[(from + i) >> 1];
    out[i] = table[(from + i) & 1 ? byte & 15 : byte >> 4];
  }
}

// The sixteen outputs of a block in 16 bits.
static inline void small_table(const float *code, float scale, int kind, uint16_t table[16]) {
#ifdef __AVX512BW__
  __m512 x = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale));
  __m256i small;
  if (kind == OUT_BF16) {  // the instruction for this would take subnormal values for zero
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    small = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  } else {
    small = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  _mm256_storeu_si256((__m256i *)table, small);
#else
  for (int i = 0; i < 16; i++) table[i] = kind == OUT_BF16 ? bf16_of(code[i] * scale) : f16_of(code[i] * scale);
#endif
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define BY_TABLE 1
#define SUBNORMAL 1e-30f  // a block's constant from here on makes no subnormal values, which rounding here takes for zero

static inline __m512i table_of(__m512 code, float scale) {
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(scale))));
}

// 32 values of a block in bf16, from an even place: two nibbles of a byte are shifted to where a look-up of 16-bit words
// reads them, which looks at five bits of a word and finds the table twice.
static inline __m512i looked_up(__m512i table, const uint8_t *bytes) {
  const __m512i where = _mm512_set1_epi64(0x08080c0c00000404);
  __m512i x = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *)bytes));
  return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(where, x), table);
}

static inline void unpack_block(const uint8_t *bytes, int64_t count, __m512 code, float scale, uint16_t *out) {
  __m512i table = table_of(code, scale);
  for (int64_t i = 0; i < count; i += 32, bytes += 16) _mm512_storeu_si512(out + i, looked_up(table, bytes));
}
#endif

static void unpack_row(const Packed4 *w, int64_t from, int64_t count, int kind, void *out) {
  int64_t block = from / w->block, stop = (block + 1) * w->block, end = from + count;
  for (; from < end; block++, stop += w->block) {
    int64_t n = (stop < end ? stop : end) - from;
    float scale = constant(w, block);
    if (kind == OUT_F32) {
      float table[16];
      for (int i = 0; i < 16; i++) table[i] = w->code[i] * scale;
      unpack32(w->codes, from, n, table, (float *)out);
      out = (float *)out + n;
#ifdef BY_TABLE
    } else if (kind == OUT_BF16 && !(from & 1) && n % 32 == 0 && scale > SUBNORMAL) {
      unpack_block(w->codes + (from >> 1), n, _mm512_loadu_ps(w->code), scale, out);
      out = (uint16_t *)out + n;
#endif
    } else {
      uint16_t table[16];
      small_table(w->code, scale, kind, table);
      unpack16(w->codes, from, n, table, (uint16_t *)out);
      out = (uint16_t *)out + n;
    }
    from += n;
  }
}

// `count` values of a row of int8 codes: code * (absmax / 127), as bitsandbytes has it: code * absmax * 7.874...e-3.
static void unpack_row8(const int8_t *codes, float scale, int64_t count, int kind, void *out) {
  for (int64_t c = 0; c < count; c++) {
    float value = codes[c] * scale * 7.874015718698502e-3f;
    if (kind == OUT_F32) ((float *)out)[c] = value;
    else ((uint16_t *)out)[c] = kind == OUT_BF16 ? bf16_of(value) : f16_of(value);
  }
}
