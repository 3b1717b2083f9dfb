/* The root of a cell: the operations of the plan against a new tmpfs that then becomes "/".
 *
 * Destinations are resolved by openat2 beneath the new root without following any link, because a writable bind
 * may hold links that an earlier job made. Sources are resolved beneath the allowed root that the spawner named.
 * Trees are cloned detached, get their flags, and only then become visible. */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ROOT_ATTR = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV };

static int open_beneath(int dir, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolve | RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, dir, *path ? path : ".", &how, sizeof how);
}

static int open_inside(int root, const char *path) {
    return open_beneath(root, path + 1, O_PATH, RESOLVE_NO_SYMLINKS);
}

/* The directory that shall hold `path`, made with its parents where missing; *leaf is the last component. */
static int open_parent(int root, const char *path, const char **leaf) {
    char part[PATH_BYTES_MAX + 1];
    size_t size = (size_t)(strrchr(path, '/') - path);
    *leaf = path + size + 1;
    if (size > PATH_BYTES_MAX) return errno = ENAMETOOLONG, -1;
    memcpy(part, path, size);
    part[size] = 0;
    if (!size) return fcntl(root, F_DUPFD_CLOEXEC, 0);
    int fd = open_inside(root, part);
    if (fd >= 0 || errno != ENOENT) return fd;
    const char *name;
    int above = open_parent(root, part, &name);
    if (above < 0) return -1;
    if (mkdirat(above, name, 0755) < 0 && errno != EEXIST) {
        close(above);
        return -1;
    }
    fd = open_beneath(above, name, O_PATH | O_DIRECTORY, RESOLVE_NO_SYMLINKS);
    close(above);
    return fd;
}

static int make_dir(int root, const char *path, uint32_t mode) {
    const char *leaf;
    int parent = open_parent(root, path, &leaf);
    if (parent < 0) return -1;
    int result = mkdirat(parent, leaf, mode);
    if (result < 0 && errno == EEXIST) result = 0;
    close(parent);
    return result;
}

static int make_file(int root, const char *path, const char *content, uint32_t mode) {
    const char *leaf;
    size_t size = strlen(content);
    int parent = open_parent(root, path, &leaf);
    if (parent < 0) return -1;
    int fd = openat(parent, leaf, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, mode);
    close(parent);
    if (fd < 0) return errno == EROFS || errno == EACCES ? 0 : -1; /* an existing mount point: the mount decides */
    ssize_t done = size ? write(fd, content, size) : 0;
    close(fd);
    if (done != (ssize_t)size) return errno = ENOSPC, -1;
    return 0;
}

static int make_symlink(int root, const char *path, const char *target) {
    const char *leaf;
    int parent = open_parent(root, path, &leaf);
    if (parent < 0) return -1;
    int result = symlinkat(target, parent, leaf);
    close(parent);
    return result;
}

/* Put a detached mount at `path`, which must exist. Closes `tree`. */
static int attach_tree(int tree, int root, const char *path) {
    int at = open_inside(root, path);
    int result = at < 0 ? -1
                        : (int)syscall(SYS_move_mount, tree, "", at, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int error = errno;
    if (at >= 0) close(at);
    close(tree);
    errno = error;
    return result;
}

static int clone_tree(int source, uint64_t attributes) {
    struct mount_attr attr = {.attr_set = attributes, .propagation = MS_PRIVATE};
    /* Recursive: in a user namespace a tree with locked mounts below may only be cloned whole. */
    unsigned flags = AT_EMPTY_PATH | AT_RECURSIVE;
    int tree = (int)syscall(SYS_open_tree, source, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | flags);
    if (tree >= 0 && syscall(SYS_mount_setattr, tree, "", flags, &attr, sizeof attr) < 0) {
        int error = errno;
        close(tree);
        errno = error;
        return -1;
    }
    return tree;
}

static int new_mount(const char *type, const char *const *options, unsigned attributes) {
    int context = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
    if (context < 0) return -1;
    int failed = 0;
    for (; options && *options && !failed; options += 2)
        failed = syscall(SYS_fsconfig, context, FSCONFIG_SET_STRING, options[0], options[1], 0) < 0;
    failed = failed || syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0;
    int mount = failed ? -1 : (int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, attributes);
    int error = errno;
    close(context);
    errno = error;
    return mount;
}

static int new_tmpfs(uint64_t size, uint64_t inodes, uint32_t mode, unsigned attributes) {
    char bytes[24], count[24], octal[12];
    snprintf(bytes, sizeof bytes, "%llu", (unsigned long long)size);
    snprintf(count, sizeof count, "%llu", (unsigned long long)inodes);
    snprintf(octal, sizeof octal, "%o", mode);
    const char *options[] = {"size", bytes, "nr_inodes", count, "mode", octal, NULL};
    return new_mount("tmpfs", options, attributes);
}

static int bind(int root, const struct op *op) {
    struct stat st;
    unsigned attributes = MOUNT_ATTR_NOSUID;
    if (!(op->flags & BIND_WRITABLE)) attributes |= MOUNT_ATTR_RDONLY;
    if (op->flags & BIND_DEVICE) attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC;
    else attributes |= MOUNT_ATTR_NODEV;
    int allowed = open(op->text, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (allowed < 0) return -1;
    int source = open_beneath(allowed, op->text2, O_PATH, op->flags ? RESOLVE_NO_SYMLINKS : 0);
    close(allowed);
    if (source < 0 || fstat(source, &st) < 0) return -1;
    if (op->flags & BIND_DEVICE && !S_ISCHR(st.st_mode)) return errno = ENODEV, -1;
    int made = S_ISDIR(st.st_mode) ? make_dir(root, op->path, 0755) : make_file(root, op->path, "", 0444);
    int tree = made < 0 ? -1 : clone_tree(source, attributes);
    int error = errno;
    close(source);
    errno = error;
    return tree < 0 ? -1 : attach_tree(tree, root, op->path);
}

static int mount_at(int root, const char *path, int mount) {
    if (mount < 0) return -1;
    if (make_dir(root, path, 0755) == 0) return attach_tree(mount, root, path);
    close(mount);
    return -1;
}

/* A node of its own where the kernel lets us (root in the initial user namespace), else the host's bound. */
static int add_device(int dev, const char *name, unsigned minor) {
    char path[32];
    if (mknodat(dev, name, S_IFCHR | 0666, makedev(1, minor)) == 0) return 0; /* umask is 0 */
    if (errno != EPERM) return -1;
    snprintf(path, sizeof path, "/%s", name);
    struct op op = {.flags = BIND_DEVICE, .path = path, .text = "/dev", .text2 = name};
    return bind(dev, &op);
}

static int add_pty(int dev) {
    const char *options[] = {"ptmxmode", "0666", "mode", "0620", NULL};
    int mount = new_mount("devpts", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
    if (mount_at(dev, "/pts", mount) < 0) return -1;
    return symlinkat("pts/ptmx", dev, "ptmx");
}

static int minimal_dev(int root, const struct op *op) {
    static const struct { const char *name; unsigned minor; } nodes[] = {
        {"null", 3}, {"zero", 5}, {"full", 7}, {"random", 8}, {"urandom", 9}};
    static const char *const links[][2] = {
        {"fd", "/proc/self/fd"}, {"stdin", "fd/0"}, {"stdout", "fd/1"}, {"stderr", "fd/2"}};
    struct mount_attr sealed = {.attr_set = MOUNT_ATTR_RDONLY};
    int mount = new_tmpfs(65536, 64, 0755, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
    if (mount < 0) return -1;
    int dev = fcntl(mount, F_DUPFD_CLOEXEC, 0);
    int failed = mount_at(root, op->path, mount) < 0;
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes && !failed; i++)
        failed = add_device(dev, nodes[i].name, nodes[i].minor) < 0;
    for (size_t i = 0; i < sizeof links / sizeof *links && !failed; i++)
        failed = symlinkat(links[i][1], dev, links[i][0]) < 0;
    failed = failed || mkdirat(dev, "shm", 01777) < 0;
    failed = failed || (op->flags & DEV_PTY && add_pty(dev) < 0);
    failed = failed || syscall(SYS_mount_setattr, dev, "", AT_EMPTY_PATH, &sealed, sizeof sealed) < 0;
    int error = errno;
    close(dev);
    errno = error;
    return failed ? -1 : 0;
}

static int mask(int root, const char *path) {
    struct stat st;
    int tree, target = open_inside(root, path);
    if (target < 0) return errno == ENOENT ? 0 : -1;
    int unknown = fstat(target, &st) < 0;
    close(target);
    if (unknown) return -1;
    if (S_ISDIR(st.st_mode)) {
        tree = new_tmpfs(4096, 2, 0555, ROOT_ATTR | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY);
    } else {
        int null = open_inside(root, "/dev/null");
        if (null < 0) return -1;
        tree = clone_tree(null, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
        close(null);
    }
    return tree < 0 ? -1 : attach_tree(tree, root, path);
}

static int perform(int root, const struct op *op) {
    switch (op->kind) {
    case OP_DIR: return make_dir(root, op->path, op->mode);
    case OP_SYMLINK: return make_symlink(root, op->path, op->text);
    case OP_FILE: return make_file(root, op->path, op->text, op->mode);
    case OP_BIND: return bind(root, op);
    case OP_TMPFS:
        return mount_at(root, op->path, new_tmpfs(op->size, op->inodes, op->mode,
                                                  ROOT_ATTR | (op->flags & TMPFS_NOEXEC ? MOUNT_ATTR_NOEXEC : 0)));
    case OP_PROC:
        return mount_at(root, op->path, new_mount("proc", NULL, ROOT_ATTR | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY));
    case OP_DEV: return minimal_dev(root, op);
    default: return mask(root, op->path);
    }
}

void build_root(const struct cell *cell) {
    const struct program *p = cell->program;
    struct mount_attr sealed = {.attr_set = MOUNT_ATTR_RDONLY};
    umask(0);
    /* Slave: nothing of the cell reaches the host. Unmounts on the host still arrive, so nothing is pinned. */
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0) fail_phase(cell, PHASE_NEW_ROOT, errno);
    int root = new_tmpfs(1 << 20, 2048, 0755, ROOT_ATTR);
    /* Over "/": a path lookup that starts at the process's root does not see it, so sources stay reachable. */
    if (root < 0 || syscall(SYS_move_mount, root, "", AT_FDCWD, "/", MOVE_MOUNT_F_EMPTY_PATH) < 0)
        fail_phase(cell, PHASE_NEW_ROOT, errno);
    for (uint32_t i = 0; i < p->op_count; i++)
        if (perform(root, &p->ops[i]) < 0) fail_step(cell, p->ops[i].step, errno);
    if (syscall(SYS_mount_setattr, root, "", AT_EMPTY_PATH, &sealed, sizeof sealed) < 0)
        fail_phase(cell, PHASE_NEW_ROOT, errno);
    /* pivot_root(2), "pivot_root(".", ".")": the old root ends on top of the new one and is taken off. */
    if (fchdir(root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        fail_phase(cell, PHASE_PIVOT, errno);
    close(root);
    umask(022);
}
