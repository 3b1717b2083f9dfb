/* PID 1: starts executables on request, reports how they end, reaps everything else, and ends the cell when the
 * spawner closes the socket. Only this process holds the control socket, so no executable can report anything. */
#include "init.h"

#include <linux/capability.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>

enum { EXECUTABLES_MAX = 32, FD_HIGH = 128 };

/* The order is that of EXEC_STEPS in linux/initwire.py. */
enum exec_step {
    EXEC_NONE, EXEC_SESSION, EXEC_STDIO, EXEC_DESCRIPTORS, EXEC_TERMINAL, EXEC_RLIMITS, EXEC_IDS, EXEC_CAPABILITIES,
    EXEC_NNP, EXEC_LANDLOCK, EXEC_SECCOMP, EXEC_CWD, EXEC_EXEC, EXEC_FORK,
};

/* What an executable writes into its report pipe: the kernel's answers before exec, an error when a step fails.
 * From `pid` on it is the body of MSG_STARTED. */
struct PACKED report {
    uint32_t step, error;
    uint32_t pid, uid, gid, groups, no_new_privs, seccomp, dumpable;
    struct __user_cap_data_struct caps[2];
    uint64_t bounding;
};

struct executable { pid_t pid; int pipe; char id[ID_BYTES_MAX + 1]; };

static struct executable table[EXECUTABLES_MAX];
static uint8_t message[MESSAGE_BYTES_MAX];
static struct exec_request request;

/* ---- in the executable's process, before exec */

static noreturn void give_up(int pipe, enum exec_step step, int error) {
    struct report report = {.step = step, .error = (uint32_t)error};
    _exit(write(pipe, &report, sizeof report) < 0 ? 126 : 127);
}

static void place_descriptors(int *pipe, const struct exec_request *r, const int *fds) {
    int wanted[3 + EXTRA_FDS_MAX + 1], count = 3 + (int)r->extra_fds, next = 0;
    *pipe = fcntl(*pipe, F_DUPFD_CLOEXEC, FD_HIGH);
    for (int i = 0; i < count; i++) { /* first out of the way: a source may sit on a target */
        int null = i < 3 && r->flags & (EXEC_NULL_0 << i);
        int fd = null ? open("/dev/null", (i ? O_WRONLY : O_RDONLY) | O_CLOEXEC) : fds[next++];
        wanted[i] = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, FD_HIGH);
        if (wanted[i] < 0) give_up(*pipe, EXEC_STDIO, errno);
    }
    wanted[count] = *pipe;
    for (int i = 0; i <= count; i++)
        if (dup3(wanted[i], i, i < count ? 0 : O_CLOEXEC) < 0) give_up(*pipe, EXEC_DESCRIPTORS, errno);
    *pipe = count;
    /* Really closed, not only close-on-exec: an open descriptor counts against RLIMIT_NOFILE. gVisor takes no
     * number above that of the highest descriptor there can be. */
    if (syscall(SYS_close_range, count + 1, 0x7fffffff, 0) < 0) give_up(*pipe, EXEC_DESCRIPTORS, errno);
    if (r->flags & EXEC_TTY && ioctl(0, TIOCSCTTY, 0) < 0) give_up(*pipe, EXEC_TERMINAL, errno);
}

/* Limits only ever narrow: a hard limit above the inherited one becomes the inherited one. */
static void set_limits(int pipe, const struct limit *limits, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        struct rlimit old, new = {limits[i].soft, limits[i].hard};
        if (getrlimit(limits[i].resource, &old) < 0) give_up(pipe, EXEC_RLIMITS, errno);
        if (new.rlim_max > old.rlim_max) new.rlim_max = old.rlim_max;
        if (new.rlim_cur > new.rlim_max) new.rlim_cur = new.rlim_max;
        if (setrlimit(limits[i].resource, &new) < 0) give_up(pipe, EXEC_RLIMITS, errno);
    }
}

static void drop_to_job(int pipe, const struct cell *cell) {
    const struct program *p = cell->program;
    if (p->id_count > 1 && (syscall(SYS_setresgid, p->job_gid, p->job_gid, p->job_gid) < 0 ||
                            syscall(SYS_setresuid, p->job_uid, p->job_uid, p->job_uid) < 0))
        give_up(pipe, EXEC_IDS, errno);
    if (set_capabilities(0) < 0) give_up(pipe, EXEC_CAPABILITIES, errno);
    if (p->flags & PROGRAM_PER_EXEC_LANDLOCK && p->landlock_size && apply_landlock(p) < 0)
        give_up(pipe, EXEC_LANDLOCK, errno);
}

static void report_facts(int pipe, uint32_t last_cap) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct report r = {
        .pid = (uint32_t)getpid(), .uid = geteuid(), .gid = getegid(), .groups = (uint32_t)getgroups(0, NULL),
        .no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
        .seccomp = (uint32_t)prctl(PR_GET_SECCOMP, 0, 0, 0, 0),
        .dumpable = (uint32_t)prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)};
    if (syscall(SYS_capget, &header, r.caps) < 0) memset(r.caps, 0xff, sizeof r.caps);
    for (uint32_t cap = 0; cap <= last_cap; cap++)
        if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1) r.bounding |= 1ull << cap;
    if (write(pipe, &r, sizeof r) != sizeof r) _exit(126);
}

static int run_program(char *const *argv, char *const *env) {
    char path[PATH_BYTES_MAX * 2];
    const char *search = "/usr/local/bin:/usr/bin:/bin", *end;
    int error = ENOENT;
    if (strchr(argv[0], '/')) return execve(argv[0], argv, env), errno;
    for (char *const *variable = env; *variable; variable++)
        if (!strncmp(*variable, "PATH=", 5)) search = *variable + 5;
    for (; *search; search = end + !!*end) {
        end = strchrnul(search, ':');
        int size = snprintf(path, sizeof path, "%.*s/%s", (int)(end - search), search, *argv);
        if (end == search || size >= (int)sizeof path) continue;
        execve(path, argv, env);
        if (errno != ENOENT && errno != ENOTDIR) error = errno;
    }
    return error;
}

static noreturn void become(const struct cell *cell, const struct exec_request *r, const int *fds, int pipe) {
    const struct program *p = cell->program;
    sigset_t none;
    if (setsid() < 0) give_up(pipe, EXEC_SESSION, errno);
    place_descriptors(&pipe, r, fds);
    set_limits(pipe, p->limits, p->limit_count);
    set_limits(pipe, r->limits, r->limit_count);
    drop_to_job(pipe, cell);
    if (chdir(r->cwd) < 0) give_up(pipe, EXEC_CWD, errno);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (!(p->clone_flags & CLONE_NEWPID)) prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    report_facts(pipe, p->last_cap);
    give_up(pipe, EXEC_EXEC, run_program(r->argv, r->env));
}

/* ---- in PID 1 */

static void send_event(const struct cell *cell, uint16_t type, const char *id, const void *body, size_t size) {
    if (send_message(cell->control, type, id, body, size) < 0) _exit(0); /* no spawner: the namespace ends with us */
}

static void *send_exec_failed(const struct cell *cell, const char *id, uint32_t step, int error) {
    uint32_t body[] = {step, (uint32_t)error};
    send_event(cell, MSG_EXEC_FAILED, id, body, sizeof body);
    return NULL;
}

/* Nothing is copied: until exec the child only reads our memory and writes its own frames, and we wait for it. */
static pid_t spawn(const struct cell *cell, const struct exec_request *r, const int *fds, int pipe) {
    pid_t pid = vfork();
    if (pid == 0) become(cell, r, fds, pipe);
    return pid;
}

static struct executable *start(const struct cell *cell, const struct exec_request *r, const int *fds, int fd_count) {
    struct executable *slot = table;
    int ends[2];
    while (slot < table + EXECUTABLES_MAX && slot->pid) slot++;
    if (fd_count != r->fd_count) return send_exec_failed(cell, r->id, EXEC_DESCRIPTORS, EINVAL);
    if (slot == table + EXECUTABLES_MAX) return send_exec_failed(cell, r->id, EXEC_FORK, EAGAIN);
    if (pipe2(ends, O_CLOEXEC) < 0) return send_exec_failed(cell, r->id, EXEC_FORK, errno);
    pid_t pid = spawn(cell, r, fds, ends[1]);
    int error = close_after(ends[1], errno);
    if (pid < 0) return send_exec_failed(cell, r->id, EXEC_FORK, close_after(ends[0], error));
    *slot = (struct executable){.pid = pid, .pipe = ends[0]};
    snprintf(slot->id, sizeof slot->id, "%s", r->id);
    return slot;
}

/* Until the report pipe is at its end: the executable runs, or it never will. No code of the job runs before. */
static void settle(const struct cell *cell, struct executable *e) {
    struct report reports[2] = {0}; /* the facts, then the error of exec; or the error of an earlier step alone */
    size_t got = 0;
    for (ssize_t more; got < sizeof reports && (more = read(e->pipe, (char *)reports + got, sizeof reports - got)) > 0;)
        got += (size_t)more;
    close(e->pipe);
    const struct report *last = &reports[got == sizeof reports];
    if (got >= sizeof *last && !last->error)
        return send_event(cell, MSG_STARTED, e->id, &last->pid, sizeof *last - offsetof(struct report, pid));
    send_exec_failed(cell, e->id, got ? last->step : EXEC_FORK, got ? (int)last->error : ECHILD);
    waitpid(e->pid, NULL, 0);
    e->pid = 0;
}

static void reap(const struct cell *cell) {
    struct { int status, unused; struct rusage usage; } body = {0};
    for (pid_t pid; (pid = wait4(-1, &body.status, WNOHANG, &body.usage)) > 0;)
        for (struct executable *e = table; e < table + EXECUTABLES_MAX; e++) {
            if (e->pid != pid) continue;
            e->pid = 0;
            send_event(cell, MSG_EXITED, e->id, &body, sizeof body);
        }
}

/* The executable `id`, or with NULL every one. */
static void signal_executables(const char *id, int signo) {
    for (struct executable *e = table; e < table + EXECUTABLES_MAX; e++)
        if (e->pid && (!id || !strcmp(e->id, id)) && kill(-e->pid, signo) < 0) /* before its setsid */
            kill(e->pid, signo);
}

static noreturn void end_cell(const struct cell *cell) {
    if (!(cell->program->clone_flags & CLONE_NEWPID)) signal_executables(NULL, SIGKILL); /* nothing dies with us */
    _exit(0);
}

static void handle_request(const struct cell *cell) {
    int fds[MESSAGE_FDS_MAX], fd_count, signo;
    struct executable *started = NULL;
    const char *id;
    ssize_t size = receive_message(cell->control, message, sizeof message, fds, &fd_count);
    size_t bytes = size < 0 ? 0 : (size_t)size;
    if (parse_exec(message, bytes, &request) == 0)
        started = start(cell, &request, fds, fd_count);
    else if (parse_signal(message, bytes, &id, &signo) == 0)
        signal_executables(id, signo);
    else
        end_cell(cell); /* shutdown, the end of the socket, or bytes that no spawner of ours sends */
    for (int i = 0; i < fd_count; i++) close(fds[i]);
    if (started) settle(cell, started);
}

static void send_ready(const struct cell *cell) {
    static const char *const kinds[] = {"user", "pid", "mnt", "net", "ipc", "uts", "cgroup"};
    struct PACKED { uint64_t namespaces[7]; uint32_t landlock_abi; uint64_t setup_us; } body = {0};
    struct timespec now;
    char path[32];
    struct stat st;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i]);
        if (stat(path, &st) == 0) body.namespaces[i] = st.st_ino;
    }
    if (cell->program->landlock_size) body.landlock_abi = cell->program->landlock_abi;
    clock_gettime(CLOCK_MONOTONIC, &now);
    body.setup_us = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000 - cell->program->started_us;
    send_event(cell, MSG_READY, NULL, &body, sizeof body);
}

noreturn void serve_cell(const struct cell *cell) {
    const struct program *p = cell->program;
    struct signalfd_siginfo info;
    sigset_t set;
    sigfillset(&set);
    sigprocmask(SIG_SETMASK, &set, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    int signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0) fail(cell, PHASE_SIGNALS);
    struct executable *first = NULL;
    if (p->flags & PROGRAM_EXEC) first = start(cell, &p->exec, cell->exec_fds, cell->exec_fd_count);
    for (int i = 0; i < cell->exec_fd_count; i++) close(cell->exec_fds[i]);
    send_ready(cell); /* while the first executable runs */
    if (first) settle(cell, first);
    struct pollfd polls[] = {{.fd = cell->control, .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    for (;;) {
        if (poll(polls, 2, -1) < 0) continue;
        if (polls[1].revents && read(signals, &info, sizeof info) >= 0) reap(cell);
        if (polls[0].revents) handle_request(cell);
    }
}
