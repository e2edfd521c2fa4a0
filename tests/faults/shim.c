/* Counts the operations on files below a folder, and at the chosen one kills the process or fails with an error.

   Loaded by LD_PRELOAD. arm(n, code, folder): the n-th operation from now on, 0 for none, fails with errno `code`, or
   with code 0 kills the process with SIGKILL, a write after half of its bytes. operations(): how many there were. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static long count, strike_at;
static int code;
static char folder[PATH_MAX];

void arm(long n, int error, const char *below) {
    count = 0, strike_at = n, code = error;
    snprintf(folder, sizeof folder, "%s/", below);
}

long operations(void) { return count; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Whether this is the chosen operation; without `kills` the caller kills the process itself. */
static int strikes(int directory, const char *path, int kills) {
    char full[2 * PATH_MAX], link[64];
    ssize_t n = 0;
    if (!folder[0]) return 0;
    if (!path || path[0] != '/') {
        if (directory == AT_FDCWD) n = getcwd(full, PATH_MAX) ? (ssize_t)strlen(full) : 0;
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
            n = readlink(link, full, PATH_MAX - 1);
            if (n < 0) return 0;
        }
        full[n] = 0;
    }
    if (path) snprintf(full + n, sizeof full - n, "%s%s", n ? "/" : "", path);
    if (strncmp(full, folder, strlen(folder))) return 0;
    if (__sync_add_and_fetch(&count, 1) != strike_at) return 0;
    if (!code && kills) kill(getpid(), SIGKILL);
    errno = code;
    return 1;
}

static mode_t mode_of(int flags, va_list arguments) {
    return flags & (O_CREAT | O_TMPFILE) ? (mode_t)va_arg(arguments, int) : 0;
}

#define OPEN(name)                                                           \
    int name(const char *path, int flags, ...) {                             \
        va_list arguments;                                                   \
        va_start(arguments, flags);                                          \
        mode_t mode = mode_of(flags, arguments);                             \
        va_end(arguments);                                                   \
        return strikes(AT_FDCWD, path, 1) ? -1 : REAL(name)(path, flags, mode); \
    }
#define OPENAT(name)                                                                       \
    int name(int directory, const char *path, int flags, ...) {                            \
        va_list arguments;                                                                 \
        va_start(arguments, flags);                                                        \
        mode_t mode = mode_of(flags, arguments);                                           \
        va_end(arguments);                                                                 \
        return strikes(directory, path, 1) ? -1 : REAL(name)(directory, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *bytes, size_t size) {
    if (strikes(file, NULL, 0)) {
        if (code) return -1;
        REAL(write)(file, bytes, size / 2);
        kill(getpid(), SIGKILL);
    }
    return REAL(write)(file, bytes, size);
}

int fsync(int file) { return strikes(file, NULL, 1) ? -1 : REAL(fsync)(file); }
int ftruncate(int file, off_t size) { return strikes(file, NULL, 1) ? -1 : REAL(ftruncate)(file, size); }
int mkdir(const char *path, mode_t mode) { return strikes(AT_FDCWD, path, 1) ? -1 : REAL(mkdir)(path, mode); }
int rmdir(const char *path) { return strikes(AT_FDCWD, path, 1) ? -1 : REAL(rmdir)(path); }
int unlink(const char *path) { return strikes(AT_FDCWD, path, 1) ? -1 : REAL(unlink)(path); }
int unlinkat(int directory, const char *path, int flags) {
    return strikes(directory, path, 1) ? -1 : REAL(unlinkat)(directory, path, flags);
}
int rename(const char *from, const char *to) { return strikes(AT_FDCWD, to, 1) ? -1 : REAL(rename)(from, to); }
