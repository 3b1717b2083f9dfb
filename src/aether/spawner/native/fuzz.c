/* Parser harness: mutates well-formed messages read from files, or takes bytes from libFuzzer.
 * Built with ASan and UBSan; a run that returns 0 found no invalid access. Usage: fuzz ROUNDS SEED FILE... */
#include "wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct program program;
static struct exec_request request;

static size_t touch(const char *s) { return strlen(s); }

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size ? size : 1); /* exact size: ASan sees one byte too far */
    const char *id;
    int signo;
    size_t total = 0;
    memcpy(copy, data, size);
    if (parse_program(copy, size, &program) == 0) {
        total += touch(program.hostname);
        for (uint32_t i = 0; i < program.op_count; i++)
            total += touch(program.ops[i].path) + touch(program.ops[i].text) + touch(program.ops[i].text2);
        for (uint32_t i = 0; i < program.rule_count; i++) total += touch(program.rules[i].path);
        for (uint32_t i = 0; i < program.filter_count * 8; i++) total += program.filter[i];
    }
    if (parse_exec(copy, size, &request) == 0)
        for (char **s = request.argv; *s; s++) total += touch(*s);
    if (parse_signal(copy, size, &id, &signo) == 0) total += touch(id);
    free(copy);
    return total == (size_t)-1;
}

#ifndef AETHER_LIBFUZZER
static uint64_t state;

static uint32_t random_below(uint32_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return n ? (uint32_t)(state >> 33) % n : 0;
}

static size_t mutate(uint8_t *data, size_t size) {
    for (uint32_t changes = 1 + random_below(4); changes && size; changes--) {
        size_t at = random_below((uint32_t)size);
        switch (random_below(4)) {
        case 0: data[at] = (uint8_t)random_below(256); break;
        case 1: data[at] ^= (uint8_t)(1u << random_below(8)); break;
        case 2: memset(data + at, random_below(2) ? 0xff : 0, size - at < 4 ? size - at : 4); break;
        default: size = at; break;
        }
    }
    if (size >= 8 && random_below(4)) /* keep the length field right most of the time, to get deeper */
        for (int i = 0; i < 4; i++) data[4 + i] = (uint8_t)(size >> (8 * i));
    return size;
}

int main(int argc, char **argv) {
    static uint8_t seed[MESSAGE_BYTES_MAX], work[MESSAGE_BYTES_MAX];
    if (argc < 4) return 2;
    state = strtoull(argv[2], NULL, 0);
    for (int i = 3; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file) return 2;
        size_t size = fread(seed, 1, sizeof seed, file);
        fclose(file);
        LLVMFuzzerTestOneInput(seed, size);
        for (long round = strtol(argv[1], NULL, 0); round > 0; round--) {
            memcpy(work, seed, size);
            LLVMFuzzerTestOneInput(work, mutate(work, size));
        }
    }
    return 0;
}
#endif
