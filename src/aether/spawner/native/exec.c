/* PID 1: starts executables on request, reports how they end, reaps everything else, and ends the cell when the
 * spawner closes the socket. Only this process holds the control socket, so no executable can report anything. */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EXECUTABLES_MAX = 32, FD_HIGH = 128 };

/* The order is that of EXEC_STEPS in linux/initwire.py. */
enum exec_step {
    EXEC_NONE, EXEC_SESSION, EXEC_STDIO, EXEC_DESCRIPTORS, EXEC_TERMINAL, EXEC_RLIMITS, EXEC_IDS, EXEC_CAPABILITIES,
    EXEC_NNP, EXEC_LANDLOCK, EXEC_SECCOMP, EXEC_CWD, EXEC_EXEC, EXEC_FORK,
};

/* What an executable writes into its report pipe: the kernel's answers before exec, an error when a step fails. */
struct report {
    uint32_t step, error;
    uint32_t uid, gid, groups, no_new_privs, seccomp, dumpable;
    uint64_t cap_effective, cap_permitted, cap_inheritable, cap_bounding;
};

struct executable { pid_t pid; int pipe; char id[ID_BYTES_MAX + 1]; };

static struct executable table[EXECUTABLES_MAX];
static int live;
static uint8_t message[MESSAGE_BYTES_MAX];
static struct exec_request request;

/* ---- in the executable's process, before exec */

static noreturn void give_up(int pipe, enum exec_step step, int error) {
    struct report report = {.step = step, .error = (uint32_t)error};
    if (write(pipe, &report, sizeof report) < 0) _exit(126);
    _exit(127);
}

static void place_descriptors(int *pipe, const struct exec_request *r, const int *fds) {
    int wanted[3 + EXTRA_FDS_MAX], count = 3 + (int)r->extra_fds, next = 0;
    *pipe = fcntl(*pipe, F_DUPFD_CLOEXEC, FD_HIGH);
    for (int i = 0; i < count; i++) { /* first out of the way: a source may sit on a target */
        int null = i < 3 && r->flags & (EXEC_NULL_0 << i);
        int fd = null ? open("/dev/null", (i ? O_WRONLY : O_RDONLY) | O_CLOEXEC) : fds[next++];
        wanted[i] = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, FD_HIGH);
        if (wanted[i] < 0) give_up(*pipe, EXEC_STDIO, errno);
    }
    for (int i = 0; i < count; i++)
        if (dup2(wanted[i], i) < 0) give_up(*pipe, EXEC_DESCRIPTORS, errno);
    if (dup3(*pipe, count, O_CLOEXEC) < 0) give_up(*pipe, EXEC_DESCRIPTORS, errno);
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
        int resource = (int)limits[i].resource;
        if (getrlimit((unsigned)resource, &old) < 0) give_up(pipe, EXEC_RLIMITS, errno);
        if (new.rlim_max > old.rlim_max) new.rlim_max = old.rlim_max;
        if (new.rlim_cur > new.rlim_max) new.rlim_cur = new.rlim_max;
        if (setrlimit((unsigned)resource, &new) < 0) give_up(pipe, EXEC_RLIMITS, errno);
    }
}

static void drop_to_job(int pipe, const struct cell *cell) {
    const struct program *p = cell->program;
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}};
    int error = 0;
    if (p->id_count > 1) {
        uid_t uid = p->job_uid + (cell->userns < 0 ? p->host_uid : 0);
        gid_t gid = p->job_gid + (cell->userns < 0 ? p->host_gid : 0);
        if (syscall(SYS_setresgid, gid, gid, gid) < 0 || syscall(SYS_setresuid, uid, uid, uid) < 0)
            give_up(pipe, EXEC_IDS, errno);
    }
    if (syscall(SYS_capset, &header, none) < 0) give_up(pipe, EXEC_CAPABILITIES, errno);
    if (p->flags & PROGRAM_PER_EXEC_LANDLOCK && p->landlock_size) apply_landlock(p, &error);
    if (error) give_up(pipe, EXEC_LANDLOCK, error);
}

static void report_facts(int pipe, uint32_t last_cap) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct caps[2];
    struct report r = {.uid = geteuid(), .gid = getegid()};
    int groups = getgroups(0, NULL);
    r.groups = groups < 0 ? 0 : (uint32_t)groups;
    r.no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1;
    r.seccomp = (uint32_t)prctl(PR_GET_SECCOMP, 0, 0, 0, 0);
    r.dumpable = (uint32_t)prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
    if (syscall(SYS_capget, &header, caps) < 0) memset(caps, 0xff, sizeof caps);
    r.cap_effective = caps[0].effective | (uint64_t)caps[1].effective << 32;
    r.cap_permitted = caps[0].permitted | (uint64_t)caps[1].permitted << 32;
    r.cap_inheritable = caps[0].inheritable | (uint64_t)caps[1].inheritable << 32;
    for (uint32_t cap = 0; cap <= last_cap; cap++)
        if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1) r.cap_bounding |= 1ull << cap;
    if (write(pipe, &r, sizeof r) != sizeof r) _exit(126);
}

static int run_program(const char *const *argv, const char *const *env) {
    const char *search = "/usr/local/bin:/usr/bin:/bin", *name = argv[0];
    char path[PATH_BYTES_MAX * 2];
    int error = ENOENT;
    if (strchr(name, '/')) {
        execve(name, (char *const *)(uintptr_t)argv, (char *const *)(uintptr_t)env);
        return errno;
    }
    for (const char *const *e = env; *e; e++)
        if (!strncmp(*e, "PATH=", 5)) search = *e + 5;
    while (*search) {
        int size = (int)strcspn(search, ":");
        if (size && snprintf(path, sizeof path, "%.*s/%s", size, search, name) < (int)sizeof path) {
            execve(path, (char *const *)(uintptr_t)argv, (char *const *)(uintptr_t)env);
            if (errno != ENOENT && errno != ENOTDIR) error = errno;
        }
        search += size + (search[size] == ':');
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

static void send_event(const struct cell *cell, struct writer *w) {
    if (send_message(cell->control, w) < 0) _exit(0); /* the spawner is gone: the namespace ends with us */
}

static void send_exec_failed(const struct cell *cell, const char *id, uint32_t step, uint32_t error) {
    struct writer w;
    begin_message(&w, MSG_EXEC_FAILED);
    put_text(&w, id);
    put_u32(&w, step);
    put_u32(&w, error);
    send_event(cell, &w);
}

static void start(const struct cell *cell, const struct exec_request *r, const int *fds, int fd_count) {
    struct executable *slot = NULL;
    int ends[2];
    for (int i = 0; i < EXECUTABLES_MAX && !slot; i++)
        if (!table[i].pid) slot = &table[i];
    if (fd_count != exec_fd_count(r)) return send_exec_failed(cell, r->id, EXEC_DESCRIPTORS, EINVAL);
    if (!slot) return send_exec_failed(cell, r->id, EXEC_FORK, EAGAIN);
    if (pipe2(ends, O_CLOEXEC) < 0) return send_exec_failed(cell, r->id, EXEC_FORK, errno);
    pid_t pid = fork();
    if (pid == 0) become(cell, r, fds, ends[1]);
    int error = errno;
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        return send_exec_failed(cell, r->id, EXEC_FORK, (uint32_t)error);
    }
    slot->pid = pid;
    slot->pipe = ends[0];
    snprintf(slot->id, sizeof slot->id, "%s", r->id);
    live++;
}

/* The report pipe is at its end: the executable runs, or it never will. Returns 0 in the second case. */
static int settle_start(const struct cell *cell, struct executable *e) {
    struct report facts = {0}, next;
    struct writer w;
    ssize_t got = read(e->pipe, &facts, sizeof facts);
    int failed = got != sizeof facts || facts.error;
    uint32_t step = got == sizeof facts ? facts.step : EXEC_FORK;
    uint32_t error = got == sizeof facts ? facts.error : ECHILD;
    if (!failed && read(e->pipe, &next, sizeof next) == sizeof next) {
        failed = 1;
        step = next.step;
        error = next.error;
    }
    close(e->pipe);
    e->pipe = -1;
    if (failed) {
        send_exec_failed(cell, e->id, step, error);
        return 0;
    }
    begin_message(&w, MSG_STARTED);
    put_text(&w, e->id);
    put_u32(&w, (uint32_t)e->pid);
    put(&w, &facts.uid, 6 * sizeof(uint32_t));
    put(&w, &facts.cap_effective, 4 * sizeof(uint64_t));
    send_event(cell, &w);
    return 1;
}

static void forget(struct executable *e) {
    e->pid = 0;
    live--;
}

static void report_exit(const struct cell *cell, struct executable *e, int status, const struct rusage *usage) {
    struct writer w;
    if (e->pipe >= 0 && !settle_start(cell, e)) return forget(e);
    begin_message(&w, MSG_EXITED);
    put_text(&w, e->id);
    put_u32(&w, WIFSIGNALED(status) ? (uint32_t)WTERMSIG(status) : 0);
    put_u32(&w, WIFEXITED(status) ? (uint32_t)WEXITSTATUS(status) : 0);
    put_u64(&w, (uint64_t)usage->ru_utime.tv_sec * 1000000 + (uint64_t)usage->ru_utime.tv_usec);
    put_u64(&w, (uint64_t)usage->ru_stime.tv_sec * 1000000 + (uint64_t)usage->ru_stime.tv_usec);
    put_u64(&w, (uint64_t)usage->ru_maxrss);
    forget(e);
    send_event(cell, &w);
}

static void reap(const struct cell *cell) {
    struct rusage usage;
    int status;
    for (pid_t pid; (pid = wait4(-1, &status, WNOHANG, &usage)) > 0;)
        for (int i = 0; i < EXECUTABLES_MAX; i++)
            if (table[i].pid == pid) report_exit(cell, &table[i], status, &usage);
}

static noreturn void end_cell(const struct cell *cell) {
    if (!(cell->program->clone_flags & CLONE_NEWPID)) /* no namespace that dies with us */
        for (int i = 0; i < EXECUTABLES_MAX; i++)
            if (table[i].pid && kill(-table[i].pid, SIGKILL) < 0) kill(table[i].pid, SIGKILL);
    _exit(0);
}

static void signal_executable(const char *id, int signo) {
    for (int i = 0; i < EXECUTABLES_MAX; i++)
        if (table[i].pid && !strcmp(table[i].id, id) && kill(-table[i].pid, signo) < 0) /* before its setsid */
            kill(table[i].pid, signo);
}

static void handle_request(const struct cell *cell) {
    int fds[MESSAGE_FDS_MAX], fd_count, signo;
    const char *id;
    ssize_t size = receive_message(cell->control, message, sizeof message, fds, &fd_count);
    if (size < 0 && (errno == EINTR || errno == EAGAIN)) return;
    int type = size <= 0 ? MSG_SHUTDOWN : parse_type(message, (size_t)size);
    if (type == MSG_EXEC && parse_exec(message, (size_t)size, &request) == 0)
        start(cell, &request, fds, fd_count);
    else if (type == MSG_SIGNAL && parse_signal(message, (size_t)size, &id, &signo) == 0)
        signal_executable(id, signo);
    else
        end_cell(cell); /* shutdown, the end of the socket, or bytes that no spawner of ours sends */
    for (int i = 0; i < fd_count; i++) close(fds[i]);
}

static void send_ready(const struct cell *cell) {
    static const char *const kinds[] = {"user", "pid", "mnt", "net", "ipc", "uts", "cgroup"};
    char path[32];
    struct stat st;
    struct writer w;
    begin_message(&w, MSG_READY);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i]);
        put_u64(&w, stat(path, &st) < 0 ? 0 : st.st_ino);
    }
    put_u32(&w, cell->program->landlock_size ? cell->program->landlock_abi : 0);
    put_u64(&w, (uint64_t)(now_us() - cell->started_us));
    send_event(cell, &w);
}

noreturn void serve_cell(const struct cell *cell) {
    const struct program *p = cell->program;
    struct pollfd polls[2 + EXECUTABLES_MAX];
    struct signalfd_siginfo info;
    sigset_t set;
    sigfillset(&set);
    sigprocmask(SIG_SETMASK, &set, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    int signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0) fail_phase(cell, PHASE_SIGNALS, errno);
    if (p->flags & PROGRAM_EXEC) start(cell, &p->exec, cell->exec_fds, cell->exec_fd_count);
    for (int i = 0; i < cell->exec_fd_count; i++) close(cell->exec_fds[i]);
    send_ready(cell); /* while the first executable runs */
    for (;;) {
        polls[0] = (struct pollfd){.fd = cell->control, .events = POLLIN};
        polls[1] = (struct pollfd){.fd = signals, .events = POLLIN};
        for (int i = 0; i < EXECUTABLES_MAX; i++) /* a negative descriptor is skipped by poll(2) */
            polls[2 + i] = (struct pollfd){.fd = table[i].pid ? table[i].pipe : -1, .events = POLLIN};
        if (poll(polls, (nfds_t)(live ? 2 + EXECUTABLES_MAX : 2), -1) < 0) continue;
        for (int i = 0; live && i < EXECUTABLES_MAX; i++)
            /* Data alone means "about to exec": only the end of the pipe settles it. */
            if (polls[2 + i].fd >= 0 && polls[2 + i].revents & POLLHUP && !settle_start(cell, &table[i])) {
                waitpid(table[i].pid, NULL, 0);
                forget(&table[i]);
            }
        if (polls[1].revents && read(signals, &info, sizeof info) >= 0) reap(cell);
        if (polls[0].revents) handle_request(cell);
    }
}
