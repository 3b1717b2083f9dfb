/* The launcher: `aether-init FD`, resident, child of the spawner, one request at a time over a SEQPACKET socket.
 *
 * A cell is cloned from this small process instead of from the interpreter (whose fork costs a millisecond), with
 * CLONE_PARENT so that the spawner is the parent, holds the pidfd, and PDEATHSIG ties the cell to it. As root one
 * network namespace is made ahead while idle, the largest single cost of a launch (0.4 ms); each serves one cell. */
#include "init.h"

#include <linux/sched.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { IDLE_MS = 3 }; /* made at once it would compete with the cell that was just launched */

static uint8_t message[MESSAGE_BYTES_MAX];
static struct program program;
static int home = -1, netns = -1; /* our own network namespace; one made ahead */

int send_message(int fd, uint16_t type, const char *id, const void *body, size_t size) {
    size_t text = id ? strlen(id) : 0, start = id ? 12 : 8;
    struct PACKED { uint16_t type, version; uint32_t total, text; } head = {type, WIRE_VERSION, 0, (uint32_t)text};
    struct iovec parts[] = {
        {&head, start}, {(void *)(uintptr_t)id, id ? text + 1 : 0}, {(void *)(uintptr_t)body, size}};
    struct msghdr packet = {.msg_iov = parts, .msg_iovlen = 3};
    head.total = (uint32_t)(start + parts[1].iov_len + size);
    while (sendmsg(fd, &packet, MSG_NOSIGNAL) < 0)
        if (errno != EINTR) return -1;
    return 0;
}

ssize_t receive_message(int fd, uint8_t *data, size_t size, int *fds, int *fd_count) {
    union { char bytes[CMSG_SPACE(MESSAGE_FDS_MAX * sizeof(int))]; struct cmsghdr align; } control;
    struct iovec iov = {data, size};
    struct msghdr head = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes};
    head.msg_controllen = sizeof control.bytes;
    *fd_count = 0;
    ssize_t got = recvmsg(fd, &head, MSG_CMSG_CLOEXEC);
    if (got < 0) return -1;
    struct cmsghdr *c = CMSG_FIRSTHDR(&head);
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
        *fd_count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(c), (size_t)*fd_count * sizeof(int));
    }
    return head.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? (errno = EMSGSIZE, 0) : got;
}

/* Made by this process for itself and left again; -1 where that is not allowed. */
static int make_netns(void) {
    if (unshare(CLONE_NEWNET) < 0) return -1;
    int fd = loopback_up() < 0 ? -1 : open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (setns(home, CLONE_NEWNET) < 0) _exit(1);
    return fd;
}

/* Descriptors of a launch, in order: control; v2 directory, user namespace to join, that of mapped layers, each if
 * its flag is set; attach files; those of the executable. */
static pid_t launch(int socket_fd, const int *fds, int fd_count) {
    const struct program *p = &program;
    const int *next = fds + 1;
    int dir = p->clone_flags & CLONE_INTO_CGROUP ? *next++ : -1;
    struct cell cell = {.program = p, .control = *fds, .userns = -1, .netns = -1, .layers = -1};
    if (p->flags & PROGRAM_JOIN_USERNS) cell.userns = *next++;
    if (p->flags & PROGRAM_LAYERS) cell.layers = *next++;
    cell.attach = next;
    cell.exec_fds = next + p->attach_count;
    cell.exec_fd_count = fd_count - (int)(cell.exec_fds - fds);
    if (cell.exec_fd_count < 0) return errno = EBADMSG, -1;
    /* With CLONE_PARENT the exit signal must be 0: the child has that of this process (clone(2)). */
    struct clone_args args = {.flags = p->clone_flags | CLONE_PARENT, .cgroup = (uint32_t)dir};
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0 && errno == ENOSYS && dir < 0) /* the answer of a seccomp filter, such as Docker's default profile */
        pid = (pid_t)syscall(SYS_clone, args.flags, NULL, NULL, NULL, NULL);
    if (p->id_count > 1 && p->unshare_flags & CLONE_NEWNET) cell.netns = netns;
    if (pid == 0) {
        close(socket_fd);
        close_after(dir, 0);
        close_after(home, 0);
        if (cell.netns < 0) close_after(netns, 0);
        run_cell(&cell);
    }
    if (pid > 0 && cell.netns >= 0) netns = close_after(netns, -1);
    return pid;
}

/* `aether-init serve FD`: PID 1 of a container that an OCI runtime has built. The runtime made namespaces and root;
 * the program, which arrives as the first message with the descriptors of a launch, says only who to be and what to
 * give up, so that executables start, end and are signalled as in every other cell. */
static int serve(int socket_fd) {
    static int fds[MESSAGE_FDS_MAX];
    int fd_count;
    if (fcntl(socket_fd, F_SETFD, FD_CLOEXEC) < 0) return 64;
    /* Runtimes have left descriptors of the host open in PID 1 (CVE-2024-21626). */
    if (syscall(SYS_close_range, socket_fd + 1, 0x7fffffff, 0) < 0) return 64;
    ssize_t size = receive_message(socket_fd, message, sizeof message, fds, &fd_count);
    struct cell cell = {.program = &program, .control = socket_fd, .userns = -1, .netns = -1, .layers = -1};
    if (size <= 0 || parse_program(message, (size_t)size, &program) < 0) errno = EBADMSG, fail(&cell, PHASE_PROGRAM);
    cell.exec_fds = fds;
    cell.exec_fd_count = fd_count;
    run_cell(&cell);
}

int main(int argc, char **argv) {
    static int fds[MESSAGE_FDS_MAX];
    int fd_count;
    if (argc == 3 && !strcmp(argv[1], "serve")) return serve(atoi(argv[2]));
    if (argc != 2) return 64;
    int socket_fd = atoi(argv[1]);
    /* The spawner dies: so does its launcher. It may have died before this call: the socket then ends. */
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (fcntl(socket_fd, F_SETFD, FD_CLOEXEC) < 0) return 64;
    setsid(); /* cells belong to this session: no terminal of the spawner reaches them */
    if (geteuid() == 0) home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    for (;;) {
        struct pollfd request = {.fd = socket_fd, .events = POLLIN};
        if (home >= 0 && netns < 0 && poll(&request, 1, IDLE_MS) == 0 && (netns = make_netns()) < 0)
            home = close_after(home, -1);
        ssize_t size = receive_message(socket_fd, message, sizeof message, fds, &fd_count);
        if (size <= 0) return 0;
        pid_t pid = -1;
        errno = EBADMSG;
        if (parse_program(message, (size_t)size, &program) == 0) pid = launch(socket_fd, fds, fd_count);
        uint32_t phase = pid < 0 && errno == EBADMSG ? PHASE_PROGRAM : PHASE_CLONE;
        uint32_t answer[] = {(uint32_t)pid, phase, pid < 0 ? (uint32_t)errno : 0};
        if (send_message(socket_fd, MSG_LAUNCHED, NULL, answer, sizeof answer) < 0) return 1;
        for (int i = 0; i < fd_count; i++) close(fds[i]);
        memset(message, 0, (size_t)size); /* the next cell's PID 1 inherits this memory */
    }
}
