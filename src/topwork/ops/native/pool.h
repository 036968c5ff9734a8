// Threads that help with a list of steps, each of them tasks that may run in any order, and wait for nobody else.
//
// A loop's barrier waits for every thread, also for one that the system has taken off its core with nothing in its
// hands, and while it spins it may keep that very core. Here whoever is there takes tasks, and a step ends when its tasks
// are done: a helper that comes late finds them done and goes on to the next step.

#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

enum { MOST_HELPERS = 63, LOOKS = 2000 };  // how often a thread looks before it lets others have its core

typedef struct {
  atomic_llong next, done;
  int64_t tasks;
} Counter;

typedef void (*Task)(const void *job, int64_t step, int64_t task, int64_t thread);

typedef struct {
  const void *job;
  Task task;
  int64_t steps, helpers;
  Counter *counters;
} Job;

static struct {
  pthread_mutex_t taken, lock;  // one job at a time; what helpers sleep by
  pthread_cond_t come;
  atomic_llong number, open, inside, asleep;  // of the job; whether it may be entered; helpers in it; those that sleep
  Job job;
  int64_t helpers;
  pid_t process;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};

static inline void look_again(int64_t looks) {
  if (looks < LOOKS) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  } else {
    sched_yield();
  }
}

static void take_tasks(const Job *job, int64_t thread) {
  for (int64_t step = 0; step < job->steps; step++) {
    Counter *c = job->counters + step;
    for (int64_t task; (task = atomic_fetch_add(&c->next, 1)) < c->tasks; atomic_fetch_add(&c->done, 1))
      job->task(job->job, step, task, thread);
    for (int64_t looks = 0; atomic_load(&c->done) < c->tasks; looks++) look_again(looks);
  }
}

static void *help(void *number) {
  int64_t thread = (int64_t)number;
  for (long long seen = 0;;) {
    int64_t looks = 0;
    while (atomic_load(&pool.number) == seen && looks < LOOKS) look_again(looks++);
    if (atomic_load(&pool.number) == seen) {
      pthread_mutex_lock(&pool.lock);
      atomic_fetch_add(&pool.asleep, 1);
      while (atomic_load(&pool.number) == seen) pthread_cond_wait(&pool.come, &pool.lock);
      atomic_fetch_sub(&pool.asleep, 1);
      pthread_mutex_unlock(&pool.lock);
    }
    seen = atomic_load(&pool.number);
    atomic_fetch_add(&pool.inside, 1);  // before the look at `open`: a job that is open now waits for us
    if (atomic_load(&pool.open) && thread <= pool.job.helpers) take_tasks(&pool.job, thread);
    atomic_fetch_sub(&pool.inside, 1);
  }
  return NULL;
}

static void hire(int64_t helpers) {
  if (pool.process != getpid()) {  // the first time, or a child that inherited no threads
    pool.process = getpid(), pool.helpers = 0;
    atomic_store(&pool.inside, 0), atomic_store(&pool.asleep, 0);
    pthread_mutex_init(&pool.lock, NULL), pthread_cond_init(&pool.come, NULL);
  }
  for (pthread_t thread; pool.helpers < helpers && pool.helpers < MOST_HELPERS; pool.helpers++) {
    if (pthread_create(&thread, NULL, help, (void *)(intptr_t)(pool.helpers + 1))) return;
    pthread_detach(thread);
  }
}

// Every task of every step, step after step, by this thread and at most threads - 1 helpers; one list at a time has
// helpers. Threads are numbered from 0, which is this one. `counters` have the number of tasks of each step.
static void run_job(const void *of, Task task, Counter *counters, int64_t steps, int64_t threads) {
  Job job = {of, task, steps, threads - 1, counters};
  int helped = threads > 1 && !pthread_mutex_trylock(&pool.taken);
  if (helped) {
    hire(threads - 1);
    pool.job = job;
    atomic_store(&pool.open, 1);
    atomic_fetch_add(&pool.number, 1);
    if (atomic_load(&pool.asleep)) {
      pthread_mutex_lock(&pool.lock);
      pthread_cond_broadcast(&pool.come);
      pthread_mutex_unlock(&pool.lock);
    }
  }
  take_tasks(&job, 0);
  if (helped) {
    atomic_store(&pool.open, 0);
    for (int64_t looks = 0; atomic_load(&pool.inside); looks++) look_again(looks);
    pthread_mutex_unlock(&pool.taken);
  }
}
