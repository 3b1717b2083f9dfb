/* A new process becomes PID 1 of a cell: namespaces, root, ids, capabilities, Landlock, seccomp, in the one
 * order the kernel accepts. Each comment names the fact that fixes the place of its call. */
#include "init.h"

#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/if.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

/* execute, write_file, read_file, truncate, ioctl_dev: older headers lack the names of the last two. */
enum { FILE_RIGHTS = 1 | 2 | 4 | 1 << 14 | 1 << 15 };

int close_after(int fd, int result) {
    int error = errno;
    if (fd >= 0) close(fd);
    errno = error;
    return result;
}

noreturn void fail(const struct cell *cell, uint32_t step) {
    uint32_t body[] = {step, (uint32_t)errno};
    send_message(cell->control, MSG_STEP_FAILED, NULL, body, sizeof body);
    _exit(1);
}

static int write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    return fd < 0 ? -1 : close_after(fd, write(fd, text, strlen(text)) < 0 ? -1 : 0);
}

/* One id, mapped by the process itself: what an ordinary user may do (user_namespaces(7)). */
static void map_own_id(const struct cell *cell) {
    const struct program *p = cell->program;
    char uid[64], gid[64];
    snprintf(uid, sizeof uid, "%u %u 1", p->job_uid, p->host_uid);
    snprintf(gid, sizeof gid, "%u %u 1", p->job_gid, p->host_gid);
    if (write_file("/proc/self/setgroups", "deny") < 0 || write_file("/proc/self/uid_map", uid) < 0 ||
        write_file("/proc/self/gid_map", gid) < 0)
        fail(cell, PHASE_ID_MAP);
}

int loopback_up(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    return close_after(fd, ioctl(fd, SIOCSIFFLAGS, &request));
}

static void enter_namespaces(const struct cell *cell) {
    const struct program *p = cell->program;
    if (p->clone_flags & CLONE_NEWUSER) map_own_id(cell);
    /* Attach before NEWCGROUP, so that the cgroup is the root of what the cell sees. */
    for (uint32_t i = 0; i < p->attach_count; i++) {
        if (write(cell->attach[i], "0", 1) != 1) fail(cell, PHASE_CGROUP);
        close(cell->attach[i]);
    }
    uint64_t flags = p->unshare_flags;
    if (cell->netns >= 0) {
        if (setns(cell->netns, CLONE_NEWNET) < 0) fail(cell, PHASE_NAMESPACES);
        close(cell->netns);
        flags &= ~(uint64_t)CLONE_NEWNET;
    }
    if (flags && unshare((int)flags) < 0) fail(cell, PHASE_NAMESPACES);
    if (p->unshare_flags & CLONE_NEWUTS && sethostname(p->hostname, strlen(p->hostname)) < 0)
        fail(cell, PHASE_HOSTNAME);
    if (flags & CLONE_NEWNET && loopback_up() < 0) fail(cell, PHASE_LOOPBACK);
}

/* Nothing is inheritable, which empties the ambient set too (capabilities(7)). */
int set_capabilities(uint32_t low) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{.effective = low, .permitted = low}};
    return (int)syscall(SYS_capset, &header, data);
}

/* PID 1 as another id than the executables keeps what it needs to start and signal them, inside the cell's user
 * namespace; PID 1 with their id keeps nothing. */
static void drop_privilege(const struct cell *cell) {
    const struct program *p = cell->program;
    int block = p->id_count > 1;
    uint32_t kept = 0;
    if (block && syscall(SYS_setgroups, 0, NULL) < 0) fail(cell, PHASE_IDS);
    if (cell->userns >= 0) { /* setns(2) after setresuid is EPERM, and it refills the bounding set */
        if (setns(cell->userns, CLONE_NEWUSER) < 0) fail(cell, PHASE_USERNS);
        close(cell->userns);
    }
    for (uint32_t cap = 0; cap <= p->last_cap; cap++) /* needs CAP_SETPCAP: before the ids change */
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0 && errno != EPERM) fail(cell, PHASE_CAPABILITIES);
    if (block) {
        kept = 1u << CAP_SETUID | 1u << CAP_SETGID | 1u << CAP_KILL;
        prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0);
        if (syscall(SYS_setresgid, p->init_gid, p->init_gid, p->init_gid) < 0 ||
            syscall(SYS_setresuid, p->init_uid, p->init_uid, p->init_uid) < 0)
            fail(cell, PHASE_IDS);
        prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0);
    }
    if (set_capabilities(kept) < 0) fail(cell, PHASE_CAPABILITIES);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) fail(cell, PHASE_NO_NEW_PRIVS);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0); /* no ptrace, no /proc/1/mem, no /proc/1/fd for the same id */
}

int apply_landlock(const struct program *p) {
    int set = (int)syscall(SYS_landlock_create_ruleset, p->landlock_attr, (size_t)p->landlock_size, 0);
    for (uint32_t i = 0; i < p->rule_count && set >= 0; i++) {
        struct landlock_path_beneath_attr attr = {.allowed_access = p->rules[i].access};
        struct stat st;
        attr.parent_fd = open(p->rules[i].path, O_PATH | O_CLOEXEC);
        /* A rule on anything but a directory may name file rights only (landlock_add_rule(2), EINVAL). */
        if (attr.parent_fd >= 0 && fstat(attr.parent_fd, &st) == 0 && !S_ISDIR(st.st_mode))
            attr.allowed_access &= FILE_RIGHTS;
        int added = (int)syscall(SYS_landlock_add_rule, set, LANDLOCK_RULE_PATH_BENEATH, &attr, 0);
        if (close_after(attr.parent_fd, added) < 0) return close_after(set, -1);
    }
    return close_after(set, set < 0 ? -1 : (int)syscall(SYS_landlock_restrict_self, set, 0));
}

/* Once for PID 1; executables inherit both, so that starting one costs no more than fork and exec. Without a pid
 * namespace Landlock waits for the executable: its signal scope then keeps executables away from this process. */
static void confine(const struct cell *cell) {
    const struct program *p = cell->program;
    struct sock_fprog filter = {(unsigned short)p->filter_count, (struct sock_filter *)(uintptr_t)p->filter};
    if (p->landlock_size && !(p->flags & PROGRAM_PER_EXEC_LANDLOCK) && apply_landlock(p) < 0)
        fail(cell, PHASE_LANDLOCK);
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter) < 0) fail(cell, PHASE_SECCOMP);
}

noreturn void run_cell(struct cell *cell) {
    const struct program *p = cell->program;
    enter_namespaces(cell);
    if (p->unshare_flags & CLONE_NEWNS) build_root(cell);
    drop_privilege(cell);
    /* After the ids: a change of credentials clears it (prctl(2)). A spawner that died before shows as EOF. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0) fail(cell, PHASE_SIGNALS);
    if (!(p->clone_flags & CLONE_NEWPID)) prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    confine(cell);
    serve_cell(cell);
}
