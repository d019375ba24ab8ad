/* Copies a file, so that the target is either the old one or all of the new one. */

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define COPY_BUFFER_SIZE 65536
#define COPY_PATH_MAX 4096

/* Write all bytes, whatever interrupts it. */
static bool write_all(int target, const char *bytes, size_t length)
{
    while (length > 0) {
        ssize_t written = write(target, bytes, length);
        if (written < 0) {
            if (errno == EINTR) {
                continue;
            }
            return false;
        }
        bytes += written;
        length -= (size_t)written;
    }
    return true;
}

static bool copy_bytes(int source, int target)
{
    char buffer[COPY_BUFFER_SIZE];
    for (;;) {
        ssize_t length = read(source, buffer, sizeof buffer);
        if (length == 0) {
            return true;
        }
        if (length < 0) {
            if (errno == EINTR) {
                continue;
            }
            return false;
        }
        if (!write_all(target, buffer, (size_t)length)) {
            return false;
        }
    }
}

/* Copy the content of `from` to `temporary`, with its permissions, down to the disk. */
static bool copy_to_temporary(int source, const char *temporary)
{
    struct stat status;
    if (fstat(source, &status) != 0) {
        return false;
    }
    int target = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (target < 0) {
        return false;
    }
    bool good = copy_bytes(source, target) && fchmod(target, status.st_mode & 0777) == 0 &&
                fsync(target) == 0;
    if (close(target) != 0) {
        good = false;
    }
    if (!good) {
        int saved = errno;
        unlink(temporary);
        errno = saved;
    }
    return good;
}

/* Copy `from` to `to`. Returns 0, or -1 with errno set; then `to` is as it was. */
int file_copy(const char *from, const char *to)
{
    char temporary[COPY_PATH_MAX];
    int length = snprintf(temporary, sizeof temporary, "%s.%ld.tmp", to, (long)getpid());
    if (length < 0 || (size_t)length >= sizeof temporary) {
        errno = ENAMETOOLONG;
        return -1;
    }
    int source = open(from, O_RDONLY | O_CLOEXEC);
    if (source < 0) {
        return -1;
    }
    bool good = copy_to_temporary(source, temporary);
    int saved = errno;
    close(source);
    if (!good) {
        errno = saved;
        return -1;
    }
    if (rename(temporary, to) != 0) {
        saved = errno;
        unlink(temporary);
        errno = saved;
        return -1;
    }
    return 0;
}
