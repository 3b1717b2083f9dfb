/* The first process of the test guest: loads the modules that it was packed with, mounts the host's root
 * read-only by 9p over virtio, goes there and becomes the program named in /exec (one argument per line).
 *
 * A pivot_root(2) out of the initial rootfs is refused, so the new root is moved over it, as switch_root(8) does.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARGS_MAX 16

static void fail(const char *what) {
    perror(what);
    sync();
    reboot(RB_POWER_OFF);
    _exit(1);
}

static void load(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
        perror(path);
    close(fd);
}

static char *slurp(const char *path) {
    static char text[1 << 16];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (size < 0)
        fail(path);
    close(fd);
    text[size] = 0;
    return strdup(text);
}

int main(void) {
    char *argv[ARGS_MAX + 1] = {0};
    int count = 0;
    char *modules = slurp("/modules/order"), *words = slurp("/exec");
    for (char *name = strtok(modules, "\n"); name; name = strtok(NULL, "\n"))
        load(name);
    for (char *word = strtok(words, "\n"); word && count < ARGS_MAX; word = strtok(NULL, "\n"))
        argv[count++] = word;
    if (mount("host", "/host", "9p", MS_RDONLY, "trans=virtio,version=9p2000.L,msize=524288,cache=loose") < 0)
        fail("cannot mount the host's root");
    if (mount("proc", "/host/proc", "proc", 0, "") < 0 || mount("sys", "/host/sys", "sysfs", 0, "") < 0 ||
        mount("dev", "/host/dev", "devtmpfs", 0, "") < 0)
        fail("cannot mount proc, sys or dev");
    if (chdir("/host") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0)
        fail("cannot enter the host's root");
    execv(argv[0], argv);
    fail(argv[0]);
}
