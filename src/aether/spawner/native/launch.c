/* The launcher: `aether-init FD`, resident, child of the spawner, one request at a time over a SEQPACKET socket.
 *
 * A cell is cloned from this small process instead of from the interpreter (whose fork costs a millisecond), with
 * CLONE_PARENT so that the spawner is the parent, holds the pidfd, and PDEATHSIG ties the cell to it. User
 * namespaces of id blocks are made once and kept: a block serves one cell at a time, and mounts that belong to the
 * initial user namespace cannot be undone from inside. As root one network namespace is made ahead while idle, the
 * largest single cost of a launch (0.4 ms); each serves one cell. */
#include "init.h"

#include <linux/sched.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { USERNS_KEPT = 64, IDLE_MS = 3 };

static struct { uint32_t host_uid, host_gid, count; int fd; } kept[USERNS_KEPT];
static unsigned kept_next;
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
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&head); c; c = CMSG_NXTHDR(&head, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        *fd_count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(c), (size_t)*fd_count * sizeof(int));
    }
    return head.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? (errno = EMSGSIZE, 0) : got;
}

static int write_map(pid_t pid, const char *file, uint32_t inside, uint32_t host, uint32_t count) {
    char path[64], line[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
    int size = snprintf(line, sizeof line, "%u %u %u", inside, host, count);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t done = write(fd, line, (size_t)size);
    int error = errno;
    close(fd);
    errno = error;
    return done == size ? 0 : -1;
}

/* clone3(2), or clone(2) where a seccomp filter answers clone3 with ENOSYS, as Docker's default profile does. */
static pid_t new_process(const struct clone_args *args) {
    pid_t pid = (pid_t)syscall(SYS_clone3, args, sizeof *args);
    if (pid >= 0 || errno != ENOSYS || args->flags & CLONE_INTO_CGROUP) return pid;
    return (pid_t)syscall(SYS_clone, args->flags | args->exit_signal, NULL, NULL, NULL, NULL);
}

/* A user namespace with `count` ids mapped; its first process is gone, the descriptor keeps it. */
static int make_userns(const uint32_t inside[2], const uint32_t host[2], uint32_t count) {
    char path[64];
    struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
    pid_t pid = new_process(&args);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        for (;;) pause();
    }
    if (pid < 0) return -1;
    int fd = -1;
    if (write_map(pid, "uid_map", inside[0], host[0], count) == 0 &&
        write_map(pid, "gid_map", inside[1], host[1], count) == 0) {
        snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
    }
    int error = errno;
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    errno = error;
    return fd;
}

static int userns_of(const struct program *p) {
    for (int i = 0; i < USERNS_KEPT; i++)
        if (kept[i].count == p->id_count && kept[i].host_uid == p->host_uid && kept[i].host_gid == p->host_gid)
            return kept[i].fd;
    const uint32_t inside[2] = {0, 0}, host[2] = {p->host_uid, p->host_gid};
    int fd = make_userns(inside, host, p->id_count);
    if (fd < 0) return -1;
    unsigned slot = kept_next++ % USERNS_KEPT;
    if (kept[slot].count) close(kept[slot].fd);
    kept[slot].host_uid = p->host_uid;
    kept[slot].host_gid = p->host_gid;
    kept[slot].count = p->id_count;
    kept[slot].fd = fd;
    return fd;
}

static int has_mapped_layer(const struct program *p) {
    for (uint32_t i = 0; i < p->op_count; i++)
        if (p->ops[i].kind == OP_LAYER && p->ops[i].flags & LAYER_MAPPED) return 1;
    return 0;
}

/* For mount_setattr(2), MOUNT_ATTR_IDMAP: ids of the file system are "inside", those that are seen "host". */
static int layers_of(const struct program *p) {
    const uint32_t inside[2] = {p->layer_uid, p->layer_gid};
    const uint32_t host[2] = {p->host_uid + p->job_uid, p->host_gid + p->job_gid};
    return make_userns(inside, host, 1);
}

/* Made by this process for itself and left again; -1 where that is not allowed. */
static int make_netns(void) {
    if (unshare(CLONE_NEWNET) < 0) return -1;
    int fd = loopback_up() < 0 ? -1 : open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (setns(home, CLONE_NEWNET) < 0) _exit(1);
    return fd;
}

/* Descriptors of a launch, in order: control, the v2 directory if any, attach files, those of the executable. */
static pid_t launch(int socket_fd, const int *fds, int fd_count, uint32_t *phase) {
    const struct program *p = &program;
    int has_dir = !!(p->flags & PROGRAM_CGROUP2);
    int fixed = 1 + has_dir + (int)p->attach_count;
    *phase = PHASE_PROGRAM;
    if (fd_count < fixed) return errno = EBADMSG, -1;
    struct cell cell = {.program = p, .control = fds[0], .userns = -1, .netns = -1, .layers = -1, .attach = fds + 1 + has_dir};
    cell.exec_fds = fds + fixed;
    cell.exec_fd_count = fd_count - fixed;
    cell.started_us = now_us();
    *phase = PHASE_USERNS;
    if (p->flags & PROGRAM_JOIN_USERNS && (cell.userns = userns_of(p)) < 0) return -1;
    if (has_mapped_layer(p) && (cell.layers = layers_of(p)) < 0) return -1;
    *phase = PHASE_CLONE;
    /* With CLONE_PARENT the exit signal must be 0: the child has that of this process (clone(2)). */
    struct clone_args args = {.flags = p->clone_flags | CLONE_PARENT};
    if (has_dir) {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = (uint32_t)fds[1];
    }
    pid_t pid = new_process(&args);
    int spare = p->id_count > 1 && p->unshare_flags & CLONE_NEWNET ? netns : -1;
    if (pid != 0) {
        close_after(cell.layers, 0);
        if (pid > 0 && spare >= 0) {
            close(spare);
            netns = -1;
        }
        return pid;
    }
    cell.netns = spare;
    if (spare < 0 && netns >= 0) close(netns);
    close(socket_fd);
    if (home >= 0) close(home);
    if (has_dir) close(fds[1]);
    for (int i = 0; i < USERNS_KEPT; i++)
        if (kept[i].count && kept[i].fd != cell.userns) close(kept[i].fd);
    run_cell(&cell);
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
    struct cell cell = {.program = &program, .control = socket_fd, .userns = -1, .netns = -1, .layers = -1, .exec_fds = fds};
    if (size <= 0 || parse_program(message, (size_t)size, &program) < 0) errno = EBADMSG, fail(&cell, PHASE_PROGRAM);
    cell.exec_fd_count = fd_count;
    cell.started_us = now_us();
    run_cell(&cell);
}

int main(int argc, char **argv) {
    int fds[MESSAGE_FDS_MAX], fd_count;
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
        if (home >= 0 && netns < 0 && poll(&request, 1, IDLE_MS) == 0 && (netns = make_netns()) < 0) {
            close(home);
            home = -1;
        }
        uint32_t phase = PHASE_PROGRAM;
        ssize_t size = receive_message(socket_fd, message, sizeof message, fds, &fd_count);
        if (size < 0 && errno == EINTR) continue;
        if (size <= 0) return 0;
        pid_t pid = -1;
        errno = EBADMSG;
        if (parse_program(message, (size_t)size, &program) == 0) pid = launch(socket_fd, fds, fd_count, &phase);
        uint32_t answer[] = {(uint32_t)pid, phase, pid < 0 ? (uint32_t)errno : 0};
        if (send_message(socket_fd, MSG_LAUNCHED, NULL, answer, sizeof answer) < 0) return 1;
        for (int i = 0; i < fd_count; i++) close(fds[i]);
        memset(message, 0, (size_t)size); /* the next cell's PID 1 inherits this memory */
    }
}
