/* Syncs as slow as a hard disk's: 8 ms more each. Built and preloaded by tests/bench/cold.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

static const struct timespec seek = {0, 8000000};
#define SLOW(name) \
    int name(int fd) { nanosleep(&seek, 0); return ((int (*)(int))dlsym(RTLD_NEXT, #name))(fd); }
SLOW(fsync) SLOW(fdatasync) SLOW(syncfs)
