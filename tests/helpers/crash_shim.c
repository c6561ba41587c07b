/* Kills or hinders a process at its N-th operation on files below a directory.
 *
 * Preloaded (LD_PRELOAD), it stands between Python and the C library's calls for files. Once armed
 * it counts those that touch the directory, in every thread, one at a time, and writes one line for
 * each to a log:
 *
 *   number class name result errno handle offset flags path path2 bytes-in-hex    (tab-separated)
 *
 * At the chosen operation it sends SIGKILL before it, after it or, of a write, when some of its
 * bytes are out; or makes it fail, or go half-way. Processes forked from an armed one are left
 * alone. Paths are compared as they are given: hand it, and the process, absolute real ones.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* What may happen at the chosen operation. */
enum { NOTHING, BEFORE, MIDDLE, AFTER, FAIL_ONCE, FAIL_FROM, SHORT };
/* What an operation does; errors are given to some of these classes only. */
enum { READS = 1, NEEDS_ROOM = 2, CHANGES = 4, CLOSES = 8, NAMES = 16 };
enum { N_HANDLES = 4096 };
enum { NO_RESULT = -9 };

struct handle {
    char path[PATH_MAX]; /* empty: not below the directory */
    int flags;
};

static char root[PATH_MAX];
static int at, manner, number_of_error, error_classes, part, log_handle = -1, count;
static pid_t armed;
static struct handle handles[N_HANDLES];
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

struct operation {
    const char *name;
    int classes, handle, flags, hit;
    long long offset, result;
    const char *path, *path2;
    const unsigned char *data;
    size_t size;
};

#define REAL(name) ((__typeof__(name) *)real_function(#name))

static void *real_function(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) _exit(99);
    return found;
}

/* Starts counting. `which` is a sum of classes; `middle` is which bytes of a write go out before
 * the kill: 0 the first, 1 half, 2 all but the last. */
void shim_arm(const char *directory, int n, int what, int error, int which, int middle, int log) {
    snprintf(root, sizeof root, "%s", directory);
    memset(handles, 0, sizeof handles);
    at = n, manner = what, number_of_error = error, error_classes = which, part = middle;
    log_handle = log, count = 0, armed = getpid();
}

static void put(const char *text, size_t size) {
    while (size > 0) {
        long written = syscall(SYS_write, log_handle, text, size);
        if (written <= 0) _exit(98);
        text += written, size -= (size_t)written;
    }
}

static void write_line(const struct operation *op, int error) {
    static const char digits[] = "0123456789abcdef";
    static char line[3 * PATH_MAX];
    if (log_handle < 0) return;
    int size = snprintf(line, sizeof line, "%d\t%d\t%s\t%lld\t%d\t%d\t%lld\t%d\t%s\t%s\t", count,
                        op->classes, op->name, op->result, error, op->handle, op->offset, op->flags,
                        op->path ? op->path : "", op->path2 ? op->path2 : "");
    put(line, (size_t)size);
    size_t out = op->data && op->result > 0 ? (size_t)op->result : 0;
    char *hex = malloc(2 * out + 1);
    for (size_t i = 0; i < out; i++) {
        hex[2 * i] = digits[op->data[i] >> 4];
        hex[2 * i + 1] = digits[op->data[i] & 15];
    }
    hex[2 * out] = '\n';
    put(hex, 2 * out + 1);
    free(hex);
}

/* Lets the process say in the log what it believes to be done. */
void shim_note(const char *text) {
    if (getpid() != armed) return;
    pthread_mutex_lock(&one_at_a_time);
    struct operation op = {.name = "note", .path = text, .handle = -1};
    write_line(&op, 0);
    pthread_mutex_unlock(&one_at_a_time);
}

static int is_armed(void) { return armed && getpid() == armed; }

static int is_below(const char *path) {
    size_t size = strlen(root);
    return strncmp(path, root, size) == 0 && (path[size] == '/' || path[size] == 0);
}

static int is_tracked(int handle) {
    return handle >= 0 && handle < N_HANDLES && handles[handle].path[0] && is_armed();
}

/* Writes the absolute path of a name into `full`; tells whether it is below the directory. */
static int locate(int directory, const char *name, char *full) {
    if (!is_armed() || !name) return 0;
    if (name[0] == '/') {
        snprintf(full, PATH_MAX, "%s", name);
    } else if (directory == AT_FDCWD) {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        if (snprintf(full, PATH_MAX, "%s/%s", here, name) >= PATH_MAX) return 0;
    } else if (is_tracked(directory)) {
        if (snprintf(full, PATH_MAX, "%s/%s", handles[directory].path, name) >= PATH_MAX) return 0;
    } else {
        return 0;
    }
    return is_below(full);
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* Counts an operation; tells whether it is to fail instead of happening. */
static int begin(struct operation *op) {
    pthread_mutex_lock(&one_at_a_time);
    count++;
    op->result = NO_RESULT;
    op->hit = count == at;
    if (op->hit && (manner == BEFORE || (manner == MIDDLE && !op->data))) {
        write_line(op, 0);
        die();
    }
    int is_due = (manner == FAIL_ONCE && op->hit) || (manner == FAIL_FROM && at && count >= at);
    return is_due && (op->classes & error_classes);
}

static long long end(struct operation *op, long long result, int error) {
    op->result = result;
    write_line(op, result < 0 ? error : 0);
    if (op->hit && manner == AFTER) die();
    pthread_mutex_unlock(&one_at_a_time);
    errno = error;
    return result;
}

#define DO(op, call) \
    do { \
        if (begin(&(op))) return end(&(op), -1, number_of_error); \
        long long result_ = (call); \
        return end(&(op), result_, errno); \
    } while (0)

static int opening(int directory, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    if (!locate(directory, name, path)) return REAL(openat)(directory, name, flags, mode);
    int is_new = (flags & O_CREAT) && faccessat(AT_FDCWD, path, F_OK, 0);
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    struct operation op = {.name = is_new ? "create" : "open", .path = path, .flags = flags};
    op.classes = (writes ? CHANGES : READS) | (is_new ? NEEDS_ROOM : 0) | NAMES;
    op.handle = -1;
    if (begin(&op)) return (int)end(&op, -1, number_of_error);
    int opened = REAL(openat)(directory, name, flags, mode), error = errno;
    if (opened >= 0 && opened < N_HANDLES) {
        memcpy(handles[opened].path, path, sizeof path);
        handles[opened].flags = flags;
    }
    op.handle = opened;
    return (int)end(&op, opened, error);
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        return opening(AT_FDCWD, path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        return opening(directory, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t mode) {
    return opening(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int creat64(const char *path, mode_t mode) { return creat(path, mode); }

int close(int handle) {
    if (!is_tracked(handle)) return REAL(close)(handle);
    char path[PATH_MAX];
    memcpy(path, handles[handle].path, sizeof path);
    struct operation op = {.name = "close", .path = path, .handle = handle};
    op.classes = (handles[handle].flags & O_ACCMODE) == O_RDONLY ? 0 : CLOSES;
    int fails = begin(&op);
    handles[handle].path[0] = 0; /* its number may be another file's at once */
    int result = REAL(close)(handle), error = errno; /* closed, even if that is to fail */
    return (int)(fails ? end(&op, -1, number_of_error) : end(&op, result, error));
}

/* Writes at `offset`, or where the handle stands if it is negative. */
static ssize_t writing(int handle, const void *data, size_t size, long long offset) {
    struct operation op = {.name = "write", .path = handles[handle].path, .handle = handle};
    op.classes = NEEDS_ROOM | CHANGES, op.data = data, op.size = size;
    int fails = begin(&op);
    struct stat status;
    fstat(handle, &status);
    op.offset = offset;
    if (offset < 0 && handles[handle].flags & O_APPEND) op.offset = status.st_size;
    if (offset < 0 && !(handles[handle].flags & O_APPEND)) op.offset = lseek(handle, 0, SEEK_CUR);
    size_t some = size;
    if (op.hit && manner == MIDDLE)
        some = part == 0 ? (size > 0) : part == 1 ? size / 2 : size - (size > 0);
    /* A disk that fills up takes what fits and says so; the next write has the error. */
    int fills = op.hit && manner == FAIL_FROM && number_of_error != EIO && number_of_error != EROFS;
    if (fails || (op.hit && manner == SHORT)) some = size / 2;
    ssize_t result = 0;
    if (offset < 0 && (!fails || op.hit)) result = REAL(write)(handle, data, some);
    if (offset >= 0 && (!fails || op.hit)) result = REAL(pwrite)(handle, data, some, offset);
    int error = errno;
    if (op.hit && manner == MIDDLE) {
        op.result = result;
        write_line(&op, 0);
        die();
    }
    if (fails && !(fills && result > 0)) return end(&op, -1, number_of_error);
    return end(&op, result, error);
}

ssize_t write(int handle, const void *data, size_t size) {
    if (!is_tracked(handle)) return REAL(write)(handle, data, size);
    return writing(handle, data, size, -1);
}

ssize_t pwrite(int handle, const void *data, size_t size, off_t offset) {
    if (!is_tracked(handle)) return REAL(pwrite)(handle, data, size, offset);
    return writing(handle, data, size, offset);
}

ssize_t pwrite64(int handle, const void *data, size_t size, off64_t offset) {
    return pwrite(handle, data, size, offset);
}

ssize_t writev(int handle, const struct iovec *parts, int n_parts) {
    if (!is_tracked(handle)) return REAL(writev)(handle, parts, n_parts);
    for (int i = 0; i < n_parts; i++) /* a short write is legal: the first part that has bytes */
        if (parts[i].iov_len) return writing(handle, parts[i].iov_base, parts[i].iov_len, -1);
    return 0;
}

#define READ(function, parameters, arguments) \
    ssize_t function parameters { \
        if (!is_tracked(handle)) return REAL(function) arguments; \
        struct operation op = {.name = "read", .path = handles[handle].path, .handle = handle}; \
        op.classes = READS; \
        DO(op, REAL(function) arguments); \
    }
READ(read, (int handle, void *data, size_t size), (handle, data, size))
READ(pread, (int handle, void *data, size_t size, off_t offset), (handle, data, size, offset))
READ(pread64, (int handle, void *data, size_t size, off64_t offset), (handle, data, size, offset))
READ(readv, (int handle, const struct iovec *parts, int n_parts), (handle, parts, n_parts))

#define ON_HANDLE(function, said, parameters, arguments, where) \
    int function parameters { \
        if (!is_tracked(handle)) return REAL(function) arguments; \
        struct operation op = {.name = said, .path = handles[handle].path, .handle = handle}; \
        op.classes = NEEDS_ROOM | CHANGES, op.offset = where; \
        DO(op, REAL(function) arguments); \
    }
ON_HANDLE(fsync, "fsync", (int handle), (handle), 0)
ON_HANDLE(fdatasync, "fsync", (int handle), (handle), 0)
ON_HANDLE(ftruncate, "truncate", (int handle, off_t size), (handle, size), size)
ON_HANDLE(ftruncate64, "truncate", (int handle, off64_t size), (handle, size), size)
ON_HANDLE(fallocate, "allocate", (int handle, int how, off_t start, off_t size),
          (handle, how, start, size), start + size)

int posix_fallocate(int handle, off_t start, off_t size) {
    return fallocate(handle, 0, start, size) ? errno : 0;
}

int posix_fallocate64(int handle, off64_t start, off64_t size) {
    return posix_fallocate(handle, start, size);
}

#define ON_PATH(function, said, kinds, where, parameters, arguments) \
    int function parameters { \
        char full[PATH_MAX]; \
        if (!locate(where, path, full)) return REAL(function) arguments; \
        struct operation op = {.name = said, .path = full, .handle = -1}; \
        op.classes = CHANGES | NAMES | (kinds); \
        DO(op, REAL(function) arguments); \
    }
ON_PATH(unlink, "unlink", 0, AT_FDCWD, (const char *path), (path))
ON_PATH(rmdir, "rmdir", 0, AT_FDCWD, (const char *path), (path))
ON_PATH(remove, "unlink", 0, AT_FDCWD, (const char *path), (path))
ON_PATH(unlinkat, flags & AT_REMOVEDIR ? "rmdir" : "unlink", 0, directory,
        (int directory, const char *path, int flags), (directory, path, flags))
ON_PATH(mkdir, "mkdir", NEEDS_ROOM, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, "mkdir", NEEDS_ROOM, directory, (int directory, const char *path, mode_t mode),
        (directory, path, mode))
ON_PATH(truncate, "truncate by name", 0, AT_FDCWD, (const char *path, off_t size), (path, size))
ON_PATH(truncate64, "truncate by name", 0, AT_FDCWD, (const char *path, off64_t size), (path, size))

#define TWO_PATHS(function, said, where, where2, parameters, arguments) \
    int function parameters { \
        char full[PATH_MAX], full2[PATH_MAX]; \
        int below = locate(where, path, full), below2 = locate(where2, path2, full2); \
        if (!below && !below2) return REAL(function) arguments; \
        struct operation op = {.name = said, .path = full, .path2 = full2, .handle = -1}; \
        op.classes = NEEDS_ROOM | CHANGES | NAMES; \
        DO(op, REAL(function) arguments); \
    }
TWO_PATHS(rename, "rename", AT_FDCWD, AT_FDCWD, (const char *path, const char *path2),
          (path, path2))
TWO_PATHS(renameat, "rename", from, to, (int from, const char *path, int to, const char *path2),
          (from, path, to, path2))
TWO_PATHS(renameat2, flags ? "rename with flags" : "rename", from, to,
          (int from, const char *path, int to, const char *path2, unsigned flags),
          (from, path, to, path2, flags))
TWO_PATHS(link, "link", AT_FDCWD, AT_FDCWD, (const char *path, const char *path2), (path, path2))
TWO_PATHS(linkat, "link", from, to,
          (int from, const char *path, int to, const char *path2, int flags),
          (from, path, to, path2, flags))
