/* The binary messages of aether-init: parsed forms and bounds. See linux/initwire.py for the layout.
 *
 * Parsing allocates nothing: every pointer of a parsed form points into the message, which must outlive it.
 * A parse function returns 0, or -1 for anything that is not exactly one message of its type. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum {
    WIRE_VERSION = 4,
    MESSAGE_BYTES_MAX = 160 * 1024,
    MESSAGE_FDS_MAX = 64,
    OPS_MAX = 512,
    LAYERS_MAX = 3,
    RULES_MAX = 64,
    RLIMITS_MAX = 16,
    FILTER_MAX = 1024,
    ARGS_MAX = 1024,
    ENV_MAX = 512,
    ATTACH_MAX = 16,
    EXTRA_FDS_MAX = 16,
    ID_BYTES_MAX = 64,
    PATH_BYTES_MAX = 1024,
};

enum message_type {
    MSG_LAUNCH = 1, MSG_EXEC, MSG_SIGNAL, MSG_SHUTDOWN,
    MSG_LAUNCHED = 16, MSG_READY, MSG_STEP_FAILED, MSG_STARTED, MSG_EXEC_FAILED, MSG_EXITED,
};

enum op_kind { OP_DIR = 1, OP_SYMLINK, OP_FILE, OP_BIND, OP_MOUNT, OP_DEVICE, OP_SEAL, OP_MASK, OP_LAYER };
enum op_flag { BIND_WRITABLE = 1, BIND_DEVICE = 2, LAYER_NEW = 1, LAYER_MAPPED = 2 };
enum program_flag { PROGRAM_JOIN_USERNS = 1, PROGRAM_PER_EXEC_LANDLOCK = 2, PROGRAM_EXEC = 4, PROGRAM_LAYERS = 8 };
enum exec_flag { EXEC_NULL_0 = 1, EXEC_NULLS = 7, EXEC_TTY = 8 };

struct op { /* one operation of the plan; `step` is its index there, for failure messages */
    uint32_t kind, step, mode, flags;
    const char *path, *text, *text2; /* symlink: target; file: content; bind: root and path beneath it; mount: options
                                      * and type, with attributes in flags; device: minor in mode */
};

struct rule { uint64_t access; const char *path; };
struct limit { uint32_t resource; uint64_t soft, hard; };

struct exec_request {
    const char *id, *cwd;
    uint32_t flags, extra_fds, limit_count, argc, envc;
    int fd_count; /* descriptors that must come with it */
    struct limit limits[RLIMITS_MAX];
    char *argv[ARGS_MAX + 1], *env[ENV_MAX + 1]; /* NULL-terminated */
};

struct program {
    uint64_t started_us, clone_flags, unshare_flags; /* started: when the spawner was asked, CLOCK_MONOTONIC */
    uint32_t flags, attach_count;
    uint32_t host_uid, host_gid, id_count; /* what one id is mapped to; more than one is a block */
    uint32_t init_uid, init_gid, job_uid, job_gid, last_cap;
    const char *hostname;
    uint32_t op_count, rule_count, limit_count, filter_count, landlock_size, landlock_abi;
    uint64_t landlock_attr[3]; /* handled fs, handled net, scoped */
    struct op ops[OPS_MAX];
    struct rule rules[RULES_MAX];
    struct limit limits[RLIMITS_MAX];
    const uint8_t *filter; /* filter_count classic BPF instructions of 8 bytes */
    struct exec_request exec; /* with PROGRAM_EXEC */
};

int parse_program(const uint8_t *message, size_t size, struct program *out);
int parse_exec(const uint8_t *message, size_t size, struct exec_request *out);
int parse_signal(const uint8_t *message, size_t size, const char **id, int *signo);
