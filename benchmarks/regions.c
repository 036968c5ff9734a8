// Stands before the OpenMP library (LD_PRELOAD) and counts parallel regions by who enters them: `regions.py` reads it.
//
// gcc calls GOMP_parallel for a region, and one of its like for a loop that is handed out in chunks. Of each caller:
// regions, those of more than one thread, the time from entering to leaving, and the time in which threads were there
// and had nothing left to do.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { CALLERS = 512 };

typedef struct {
  const void *at;
  int64_t regions, shared, spent, idle;  // nanoseconds
} Caller;

typedef struct {
  void (*run)(void *);
  void *data;
  atomic_llong worked, threads;
} Region;

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);
typedef void Loop(void (*)(void *), void *, unsigned, long, long, long, long, unsigned);

static Caller callers[CALLERS];
static int64_t known;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void *real(const char *name) { return dlsym(dlopen("libgomp.so.1", RTLD_LAZY), name); }

static void run(void *given) {
  Region *region = given;
  int64_t start = now();
  region->run(region->data);
  atomic_fetch_add(&region->worked, now() - start);
  atomic_fetch_add(&region->threads, 1);
}

// One thread starts regions here: those of others at the same time would be counted among them, or lost.
static void count(const void *at, const Region *region, int64_t spent) {
  int64_t i = 0;
  while (i < known && callers[i].at != at) i++;
  if (i == CALLERS) return;
  if (i == known) callers[known++].at = at;
  Caller *c = callers + i;
  c->regions++, c->shared += region->threads > 1, c->spent += spent;
  c->idle += region->threads * spent - region->worked;
}

void GOMP_parallel(void (*what)(void *), void *data, unsigned threads, unsigned flags) {
  static Parallel *plain;
  if (!plain) plain = real("GOMP_parallel");
  Region region = {what, data};
  int64_t start = now();
  plain(run, &region, threads, flags);
  count(__builtin_return_address(0), &region, now() - start);
}

#define LOOP(NAME)                                                                                              \
  void NAME(void (*what)(void *), void *data, unsigned threads, long from, long to, long by, long chunk, unsigned flags) { \
    static Loop *plain;                                                                                         \
    if (!plain) plain = real(#NAME);                                                                            \
    Region region = {what, data};                                                                               \
    int64_t start = now();                                                                                      \
    plain(run, &region, threads, from, to, by, chunk, flags);                                                   \
    count(__builtin_return_address(0), &region, now() - start);                                                 \
  }
LOOP(GOMP_parallel_loop_dynamic)
LOOP(GOMP_parallel_loop_guided)
LOOP(GOMP_parallel_loop_nonmonotonic_dynamic)
LOOP(GOMP_parallel_loop_nonmonotonic_guided)

// What was counted since, of caller `i`; its function and library, as far as the loader knows them. 0 when there is none.
int regions_of(int64_t i, int64_t found[4], const char **function, const char **library) {
  Dl_info info = {0};
  if (i >= known) return 0;
  dladdr(callers[i].at, &info);
  memcpy(found, &callers[i].regions, 4 * sizeof *found);
  *function = info.dli_sname ? info.dli_sname : "", *library = info.dli_fname ? info.dli_fname : "";
  return 1;
}

void regions_forget(void) { known = 0, memset(callers, 0, sizeof callers); }
