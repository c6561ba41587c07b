/* Kills or hinders a process at its N-th operation on files below a directory.
 *
 * Preloaded (LD_PRELOAD), it stands between Python and the C library's calls for files. It counts
 * those that touch the directory, and at the chosen one sends SIGKILL before it, after it or, of a
 * write, when half the bytes are out; or fails it, and all that would change something from then
 * on, with an error such as ENOSPC.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { BEFORE = 0, MIDDLE = 1, AFTER = 2, FAIL = 3 };
enum { N_HANDLES = 4096 };

static char root[4096];
static int at, how, error_number, count, log_handle = -1;
static char tracked[N_HANDLES];

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

void shim_arm(const char *directory, int n, int manner, int number, int log) {
    strncpy(root, directory, sizeof root - 1);
    memset(tracked, 0, sizeof tracked);
    at = n, how = manner, error_number = number, log_handle = log, count = 0;
}

static int below(const char *path) {
    return root[0] && path && strncmp(path, root, strlen(root)) == 0;
}

static int is_tracked(int handle) {
    return root[0] && handle >= 0 && handle < N_HANDLES && tracked[handle];
}

/* Counts an operation; tells whether it is the chosen one, or must fail. */
static int begin(const char *name, int changes) {
    int n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (log_handle >= 0) {
        char line[32];
        size_t length = strlen(name);
        memcpy(line, name, length);
        line[length] = '\n';
        REAL(ssize_t, "write", int, const void *, size_t)(log_handle, line, length + 1);
    }
    if (how == FAIL) return at && n >= at && changes;
    if (n == at && how == BEFORE) kill(getpid(), SIGKILL);
    return n == at;
}

static int end(int hit) {
    if (hit && how != FAIL) kill(getpid(), SIGKILL);
    return 0;
}

#define FAILS(hit) \
    if ((hit) && how == FAIL) { \
        errno = error_number; \
        return -1; \
    }

static int opening(const char *name, const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);
    if (!below(path)) return real(path, flags, mode);
    int hit = begin("open", flags & (O_WRONLY | O_RDWR | O_CREAT));
    FAILS(hit)
    int handle = real(path, flags, mode);
    if (handle >= 0 && handle < N_HANDLES) tracked[handle] = 1;
    end(hit);
    return handle;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return opening(#name, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int handle, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = REAL(ssize_t, "write", int, const void *, size_t);
    if (!is_tracked(handle)) return real(handle, data, size);
    int hit = begin("write", 1);
    if (hit && (how == MIDDLE || how == FAIL)) real(handle, data, size / 2);
    FAILS(hit)
    if (hit && how == MIDDLE) kill(getpid(), SIGKILL);
    ssize_t result = real(handle, data, size);
    end(hit);
    return result;
}

ssize_t read(int handle, void *data, size_t size) {
    ssize_t (*real)(int, void *, size_t) = REAL(ssize_t, "read", int, void *, size_t);
    if (!is_tracked(handle)) return real(handle, data, size);
    int hit = begin("read", 0);
    ssize_t result = real(handle, data, size);
    end(hit);
    return result;
}

int close(int handle) {
    int (*real)(int) = REAL(int, "close", int);
    if (!is_tracked(handle)) return real(handle);
    int hit = begin("close", 0);
    tracked[handle] = 0;
    int result = real(handle);
    end(hit);
    return result;
}

int fsync(int handle) {
    int (*real)(int) = REAL(int, "fsync", int);
    if (!is_tracked(handle)) return real(handle);
    int hit = begin("fsync", 1);
    FAILS(hit)
    int result = real(handle);
    end(hit);
    return result;
}

#define TWO_PATHS(name) \
    int name(const char *from, const char *to) { \
        int (*real)(const char *, const char *) = REAL(int, #name, const char *, const char *); \
        if (!below(from) && !below(to)) return real(from, to); \
        int hit = begin(#name, 1); \
        FAILS(hit) \
        int result = real(from, to); \
        end(hit); \
        return result; \
    }
TWO_PATHS(rename)
TWO_PATHS(link)

int unlink(const char *path) {
    int (*real)(const char *) = REAL(int, "unlink", const char *);
    if (!below(path)) return real(path);
    int hit = begin("unlink", 0);
    int result = real(path);
    end(hit);
    return result;
}

int mkdir(const char *path, mode_t mode) {
    int (*real)(const char *, mode_t) = REAL(int, "mkdir", const char *, mode_t);
    if (!below(path)) return real(path, mode);
    int hit = begin("mkdir", 1);
    FAILS(hit)
    int result = real(path, mode);
    end(hit);
    return result;
}
