/* What the parts of aether-init share: the cell under construction and how a failure leaves it. */
#ifndef AETHER_INIT_H
#define AETHER_INIT_H

#include "wire.h"

#include <stdnoreturn.h>
#include <sys/types.h>

/* Fixed phases of a launch, reported as PHASE_BASE + phase; smaller numbers are steps of the plan. The order is
 * that of PHASES in linux/initwire.py. */
enum phase {
    PHASE_PROGRAM, PHASE_USERNS, PHASE_CLONE, PHASE_CGROUP, PHASE_NAMESPACES, PHASE_ID_MAP, PHASE_HOSTNAME,
    PHASE_LOOPBACK, PHASE_NEW_ROOT, PHASE_PIVOT, PHASE_IDS, PHASE_CAPABILITIES, PHASE_NO_NEW_PRIVS, PHASE_LANDLOCK,
    PHASE_SECCOMP, PHASE_SIGNALS,
};
enum { PHASE_BASE = 0x10000 };

struct cell {
    const struct program *program;
    int control;              /* socket to the spawner */
    int userns, netns;        /* namespaces made before, to join instead of making them, or -1 */
    const int *attach, *exec_fds;
    int exec_fd_count;
    int64_t started_us;
};

int64_t now_us(void);
int close_after(int fd, int result); /* closes `fd`, keeps errno, returns `result` */
noreturn void fail_step(const struct cell *cell, uint32_t step, int error);
noreturn void fail_phase(const struct cell *cell, enum phase phase, int error);

int loopback_up(void);                                           /* cell.c: 0 or -1 */
void build_root(const struct cell *cell);                        /* mounts.c */
void apply_landlock(const struct program *program, int *error);  /* cell.c: *error is 0 or an errno */
noreturn void run_cell(struct cell *cell);                       /* cell.c: in the new process */
noreturn void serve_cell(const struct cell *cell);               /* exec.c: PID 1 from here on */

/* Appending to a message under construction. Events are small: a full buffer is a programming error. */
struct writer { uint8_t data[512]; size_t size; };
void begin_message(struct writer *w, int type);
void put(struct writer *w, const void *bytes, size_t size);
void put_u32(struct writer *w, uint32_t value);
void put_u64(struct writer *w, uint64_t value);
void put_text(struct writer *w, const char *text);
int send_message(int fd, struct writer *w);
ssize_t receive_message(int fd, uint8_t *data, size_t size, int *fds, int *fd_count);

#endif
