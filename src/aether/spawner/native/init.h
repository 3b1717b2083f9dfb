/* What the parts of aether-init share: the cell under construction and how a failure leaves it. */
#pragma once
#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdnoreturn.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Fixed phases of a launch, as reported; smaller numbers are steps of the plan. Order as PHASES in initwire.py. */
enum phase {
    PHASE_PROGRAM = 0x10000, PHASE_USERNS, PHASE_CLONE, PHASE_CGROUP, PHASE_NAMESPACES, PHASE_ID_MAP, PHASE_HOSTNAME,
    PHASE_LOOPBACK, PHASE_NEW_ROOT, PHASE_PIVOT, PHASE_IDS, PHASE_CAPABILITIES, PHASE_NO_NEW_PRIVS, PHASE_LANDLOCK,
    PHASE_SECCOMP, PHASE_SIGNALS,
};

struct cell {
    const struct program *program;
    int control;              /* socket to the spawner */
    int userns, netns;        /* namespaces made before, to join instead of making them, or -1 */
    int layers;               /* user namespace in which the owner of mapped layers is the job, or -1 */
    const int *attach, *exec_fds;
    int exec_fd_count;
};

int close_after(int fd, int result); /* closes `fd`, keeps errno, returns `result` */
noreturn void fail(const struct cell *cell, uint32_t step); /* reports errno at a step of the plan or a phase */

int loopback_up(void);                                           /* cell.c: 0 or -1 */
void build_root(const struct cell *cell);                        /* mounts.c */
int apply_landlock(const struct program *program);               /* cell.c: 0 or -1 */
int set_capabilities(uint32_t low);                              /* cell.c: 0 or -1 */
noreturn void run_cell(struct cell *cell);                       /* cell.c: in the new process */
noreturn void serve_cell(const struct cell *cell);               /* exec.c: PID 1 from here on */

/* A message to the spawner: `id` as a text field unless it is NULL, then the packed `body` as it lies. */
#define PACKED __attribute__((packed))
int send_message(int fd, uint16_t type, const char *id, const void *body, size_t size);
ssize_t receive_message(int fd, uint8_t *data, size_t size, int *fds, int *fd_count);
