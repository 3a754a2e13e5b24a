/* SocketCAN for a process on a kernel without it: AF_CAN raw sockets become AF_UNIX sequenced-packet sockets that carry
 * the same struct can_frame to the stand-in which serves the interface. Loaded with LD_PRELOAD; everything that is not
 * a raw CAN socket goes to libc untouched.
 *
 * CHATVLA_EDGE_CAN names the folder in which each interface is a socket, `can0`, and a page of two ints, `can0.page`:
 * an errno, and to how many of the next frames sent it applies (below 0: to all), for faults of the interface itself.
 * Options of the socket (filters, loopback) are sent on as a message that is no frame: int option, then its value.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define FDS 4096
#define NAMES 16
#define SOL_CAN_RAW_ 101
#define INDEX 7000

struct page { volatile int error, left; };

static char is_can[FDS];
static struct page *pages[FDS];
static char names[NAMES][IFNAMSIZ];

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int known(int fd) { return fd >= 0 && fd < FDS && is_can[fd]; }

static const char *folder(void) { return getenv("CHATVLA_EDGE_CAN"); }

static int path_of(char *path, size_t size, const char *name, const char *suffix)
{
    return folder() && snprintf(path, size, "%s/%s%s", folder(), name, suffix) < (int)size ? 0 : -1;
}

int socket(int domain, int type, int protocol)
{
    REAL(socket);
    if (domain != AF_CAN || !folder())
        return real(domain, type, protocol);
    int fd = real(AF_UNIX, SOCK_SEQPACKET | (type & (SOCK_CLOEXEC | SOCK_NONBLOCK)), 0);
    if (fd >= FDS) {
        close(fd);
        errno = EMFILE;
        return -1;
    }
    if (fd >= 0)
        is_can[fd] = 1;
    return fd;
}

int ioctl(int fd, unsigned long request, ...)
{
    REAL(ioctl);
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!known(fd) || request != SIOCGIFINDEX)
        return real(fd, request, argument);
    struct ifreq *wanted = argument;
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    if (path_of(path, sizeof path, wanted->ifr_name, "") || access(path, F_OK)) {
        errno = ENODEV;
        return -1;
    }
    for (int i = 0; i < NAMES; i++) {
        if (!names[i][0])
            memcpy(names[i], wanted->ifr_name, IFNAMSIZ - 1);
        if (!strncmp(names[i], wanted->ifr_name, IFNAMSIZ)) {
            wanted->ifr_ifindex = INDEX + i;
            return 0;
        }
    }
    errno = ENODEV;
    return -1;
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    REAL(bind);
    if (!known(fd))
        return real(fd, address, length);
    int index;
    memcpy(&index, (const char *)address + 4, sizeof index); /* can_ifindex of struct sockaddr_can */
    struct sockaddr_un server = {.sun_family = AF_UNIX};
    char path[sizeof server.sun_path];
    if (index < INDEX || index >= INDEX + NAMES || path_of(path, sizeof path, names[index - INDEX], ".page")) {
        errno = ENODEV;
        return -1;
    }
    int file = open(path, O_RDWR | O_CLOEXEC);
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file >= 0)
        close(file);
    pages[fd] = page == MAP_FAILED ? NULL : page;
    path_of(server.sun_path, sizeof server.sun_path, names[index - INDEX], "");
    int flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
    int outcome = connect(fd, (struct sockaddr *)&server, sizeof server);
    fcntl(fd, F_SETFL, flags);
    if (outcome)
        errno = ENODEV;
    return outcome;
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
    REAL(setsockopt);
    if (!known(fd) || level != SOL_CAN_RAW_)
        return real(fd, level, name, value, length);
    char message[4 + 512];
    if (length > 512) {
        errno = EINVAL;
        return -1;
    }
    memcpy(message, &name, 4);
    memcpy(message + 4, value, length);
    /* A filter of two entries would be as long as a frame: one byte more says that it is none. */
    return send(fd, message, 4 + length + (4 + length == 16), MSG_EOR | MSG_NOSIGNAL) < 0 ? -1 : 0;
}

/* Whether the next frame is refused; errno is then set. */
static int refused(int fd, size_t length)
{
    struct page *page = pages[fd];
    if (!page || length != 16 || !page->left)
        return 0;
    if (page->left > 0)
        page->left--;
    errno = page->error;
    return 1;
}

ssize_t write(int fd, const void *data, size_t length)
{
    REAL(write);
    return known(fd) && refused(fd, length) ? -1 : real(fd, data, length);
}

ssize_t send(int fd, const void *data, size_t length, int flags)
{
    REAL(send);
    return known(fd) && refused(fd, length) ? -1 : real(fd, data, length, flags | (known(fd) ? MSG_NOSIGNAL : 0));
}

int close(int fd)
{
    REAL(close);
    if (known(fd)) {
        is_can[fd] = 0;
        if (pages[fd])
            munmap(pages[fd], sizeof(struct page));
        pages[fd] = NULL;
    }
    return real(fd);
}
