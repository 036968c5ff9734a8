// Memory that stays from call to call: new pages would cost as much as the products of a small call. One call has it at
// a time; another that comes meanwhile brings its own.

#pragma once
#include <stdint.h>
#include <stdlib.h>

#define MOST_HELD (16 << 20)  // floats kept for the next call

static struct {
  int taken;
  float *at;
  int64_t floats;
} held;

static float *borrow(int64_t floats, int *ours) {
  *ours = !__atomic_exchange_n(&held.taken, 1, __ATOMIC_ACQUIRE);
  if (!*ours) return aligned_alloc(64, (floats + 15) / 16 * 64);
  if (held.floats < floats) {
    free(held.at);
    held.at = aligned_alloc(64, (floats + 15) / 16 * 64);
    held.floats = held.at ? floats : 0;
  }
  return held.at;
}

static void give_back(float *at, int ours) {
  if (!ours) {
    free(at);
    return;
  }
  if (held.floats > MOST_HELD) free(held.at), held.at = NULL, held.floats = 0;
  __atomic_store_n(&held.taken, 0, __ATOMIC_RELEASE);
}
