/* Bounded, allocation-free parsing of the messages described in wire.h. Fuzzed by fuzz.c. */
#include "wire.h"

#include <string.h>

struct reader { const uint8_t *at, *end; int bad; };

static uint64_t number(struct reader *r, size_t bytes) {
    uint64_t value = 0;
    if (r->bad || (size_t)(r->end - r->at) < bytes) return r->bad = 1, 0;
    memcpy(&value, r->at, bytes); /* little-endian, as both architectures are */
    r->at += bytes;
    return value;
}

static uint32_t u32(struct reader *r) { return (uint32_t)number(r, 4); }
static uint64_t u64(struct reader *r) { return number(r, 8); }

static uint32_t bounded(struct reader *r, uint32_t max) {
    uint32_t value = u32(r);
    if (value > max) r->bad = 1;
    return r->bad ? 0 : value;
}

/* A length, the bytes without NUL, one NUL. The result is usable as a C string in place. */
static const char *text(struct reader *r, size_t max) {
    size_t size = u32(r);
    if (r->bad || size > max || (size_t)(r->end - r->at) < size + 1 || memchr(r->at, 0, size) || r->at[size])
        return r->bad = 1, "";
    const char *start = (const char *)r->at;
    r->at += size + 1;
    return start;
}

static struct reader open_message(const uint8_t *message, size_t size, int type) {
    struct reader r = {message, message + size, 0};
    if (number(&r, 2) != (uint64_t)type || number(&r, 2) != WIRE_VERSION || u32(&r) != size) r.bad = 1;
    return r;
}

static int finish(const struct reader *r) { return r->bad || r->at != r->end ? -1 : 0; }

static uint32_t read_limits(struct reader *r, struct limit *out) {
    uint32_t count = bounded(r, RLIMITS_MAX);
    for (uint32_t i = 0; i < count; i++) {
        out[i].resource = bounded(r, 15);
        out[i].soft = u64(r);
        out[i].hard = u64(r);
    }
    return count;
}

static uint32_t read_strings(struct reader *r, char **out, uint32_t max) {
    uint32_t count = bounded(r, max);
    for (uint32_t i = 0; i < count; i++) out[i] = (char *)(uintptr_t)text(r, MESSAGE_BYTES_MAX);
    out[count] = NULL;
    return count;
}

static void read_exec(struct reader *r, struct exec_request *out) {
    out->id = text(r, ID_BYTES_MAX);
    out->cwd = text(r, PATH_BYTES_MAX);
    out->flags = u32(r);
    out->extra_fds = bounded(r, EXTRA_FDS_MAX);
    out->fd_count = 3 + (int)out->extra_fds - __builtin_popcount(out->flags & EXEC_NULLS);
    out->limit_count = read_limits(r, out->limits);
    out->argc = read_strings(r, out->argv, ARGS_MAX);
    out->envc = read_strings(r, out->env, ENV_MAX);
    if (!out->argc || !*out->argv[0] || !*out->id) r->bad = 1;
}

static void read_op(struct reader *r, struct op *out) {
    out->kind = u32(r);
    out->step = u32(r);
    out->mode = bounded(r, 07777);
    out->flags = u32(r);
    out->path = text(r, PATH_BYTES_MAX);
    out->text = text(r, MESSAGE_BYTES_MAX);
    out->text2 = text(r, PATH_BYTES_MAX);
    if (out->kind < OP_DIR || out->kind > OP_LAYER || out->path[0] != '/') r->bad = 1;
    int has_source = out->kind == OP_BIND || (out->kind == OP_LAYER && !(out->flags & LAYER_NEW));
    if (has_source && (out->text[0] != '/' || out->text2[0] == '/')) r->bad = 1;
}

int parse_program(const uint8_t *message, size_t size, struct program *out) {
    struct reader r = open_message(message, size, MSG_LAUNCH);
    out->started_us = u64(&r);
    out->clone_flags = u64(&r);
    out->unshare_flags = u64(&r);
    out->flags = u32(&r);
    out->attach_count = bounded(&r, ATTACH_MAX);
    uint32_t *ids[] = {&out->host_uid, &out->host_gid, &out->id_count, &out->init_uid, &out->init_gid, &out->job_uid,
                       &out->job_gid};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) *ids[i] = u32(&r);
    out->last_cap = bounded(&r, 63);
    out->hostname = text(&r, 64);
    out->op_count = bounded(&r, OPS_MAX);
    for (uint32_t i = 0; i < out->op_count; i++) read_op(&r, &out->ops[i]);
    out->landlock_abi = u32(&r);
    out->landlock_size = bounded(&r, sizeof out->landlock_attr);
    for (size_t i = 0; i < 3; i++) out->landlock_attr[i] = u64(&r);
    out->rule_count = bounded(&r, RULES_MAX);
    for (uint32_t i = 0; i < out->rule_count; i++) {
        out->rules[i].access = u64(&r);
        out->rules[i].path = text(&r, PATH_BYTES_MAX);
    }
    out->limit_count = read_limits(&r, out->limits);
    out->filter_count = bounded(&r, FILTER_MAX);
    out->filter = r.at;
    if ((size_t)(r.end - r.at) < (size_t)out->filter_count * 8) r.bad = 1;
    if (r.bad) return -1;
    r.at += (size_t)out->filter_count * 8;
    if (out->flags & PROGRAM_EXEC) read_exec(&r, &out->exec);
    if (!out->id_count || !out->job_uid || !out->filter_count) r.bad = 1;
    return finish(&r);
}

int parse_exec(const uint8_t *message, size_t size, struct exec_request *out) {
    struct reader r = open_message(message, size, MSG_EXEC);
    read_exec(&r, out);
    return finish(&r);
}

int parse_signal(const uint8_t *message, size_t size, const char **id, int *signo) {
    struct reader r = open_message(message, size, MSG_SIGNAL);
    *id = text(&r, ID_BYTES_MAX);
    *signo = (int)bounded(&r, 64);
    return finish(&r);
}
