/* The root of a cell: the operations of the plan against a new tmpfs that then becomes "/".
 *
 * Destinations are resolved by openat2 beneath the new root without following any link, because a writable bind
 * may hold links that an earlier job made. Sources are resolved beneath the allowed root that the spawner named.
 * Trees are cloned detached, get their flags, and only then become visible. */
#include "init.h"

#include <linux/mount.h>
#include <linux/openat2.h>
#include <sys/mount.h>
#include <sys/sysmacros.h>

enum { SEALED = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY };

static int open_beneath(int dir, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolve | RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, dir, *path ? path : ".", &how, sizeof how);
}

static int open_source(const struct op *op, uint64_t flags, uint64_t resolve) {
    int allowed = open(op->text, O_PATH | O_DIRECTORY | O_CLOEXEC);
    return allowed < 0 ? -1 : close_after(allowed, open_beneath(allowed, op->text2, O_PATH | flags, resolve));
}

static int open_inside(int root, const char *path) {
    return open_beneath(root, path + 1, O_PATH, RESOLVE_NO_SYMLINKS);
}

/* The directory that shall hold `path`, made with its parents where missing; *leaf is the last component. */
static int open_parent(int root, const char *path, const char **leaf) {
    char above[PATH_BYTES_MAX + 1];
    const char *name;
    *leaf = strrchr(path, '/') + 1;
    snprintf(above, sizeof above, "%.*s", (int)(*leaf - path - 1), path);
    if (!*above) return fcntl(root, F_DUPFD_CLOEXEC, 0);
    int fd = open_inside(root, above);
    if (fd >= 0 || errno != ENOENT) return fd;
    int parent = open_parent(root, above, &name);
    if (parent < 0 || (mkdirat(parent, name, 0755) < 0 && errno != EEXIST)) return close_after(parent, -1);
    return close_after(parent, open_beneath(parent, name, O_PATH | O_DIRECTORY, RESOLVE_NO_SYMLINKS));
}

static int make_dir(int root, const char *path, uint32_t mode) {
    const char *leaf;
    int parent = open_parent(root, path, &leaf);
    int made = parent < 0 ? -1 : mkdirat(parent, leaf, mode);
    return close_after(parent, parent >= 0 && made < 0 && errno == EEXIST ? 0 : made);
}

/* Without content a mount point: what is there stays as it is. */
static int make_file(int root, const char *path, const char *content, uint32_t mode) {
    const char *leaf;
    ssize_t size = content ? (ssize_t)strlen(content) : 0;
    int parent = open_parent(root, path, &leaf);
    if (parent < 0) return -1;
    int flags = O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC | (content ? O_TRUNC : 0);
    int fd = close_after(parent, openat(parent, leaf, flags, mode));
    if (fd < 0) return errno == EROFS || errno == EACCES ? 0 : -1; /* an existing mount point: the mount decides */
    errno = ENOSPC; /* what a short write means on a tmpfs */
    return close_after(fd, size && write(fd, content, (size_t)size) != size ? -1 : 0);
}

static int make_symlink(int root, const char *path, const char *target) {
    const char *leaf;
    int parent = open_parent(root, path, &leaf);
    return parent < 0 ? -1 : close_after(parent, symlinkat(target, parent, leaf));
}

/* Put a detached mount at `path`, which must exist. Closes `tree`. */
static int attach_tree(int tree, int root, const char *path) {
    unsigned flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    int at = tree < 0 ? -1 : open_inside(root, path);
    int moved = at < 0 ? -1 : (int)syscall(SYS_move_mount, tree, "", at, "", flags);
    return close_after(tree, close_after(at, moved));
}

static int clone_tree(int source, uint64_t attributes, int userns) {
    struct mount_attr attr = {.attr_set = attributes, .propagation = MS_PRIVATE};
    if (userns >= 0) {
        attr.attr_set |= MOUNT_ATTR_IDMAP;
        attr.userns_fd = (uint32_t)userns;
    }
    /* Recursive: in a user namespace a tree with locked mounts below may only be cloned whole. */
    unsigned flags = AT_EMPTY_PATH | AT_RECURSIVE;
    int tree = (int)syscall(SYS_open_tree, source, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | flags);
    if (tree < 0 || syscall(SYS_mount_setattr, tree, "", flags, &attr, sizeof attr) == 0) return tree;
    return close_after(tree, -1);
}

/* Directories that the next overlay is made of. A layer with other ids is a mount, and overlayfs takes layers only
 * from mounts of our namespace (before Linux 6.15): it hangs where the overlay will be, and is taken off again. */
static struct { int fd, mapped; } layers[LAYERS_MAX];
static unsigned layer_count;

static int add_layer(const struct cell *cell, int root, const struct op *op) {
    int mapped = op->flags & LAYER_MAPPED, made = op->flags & LAYER_NEW;
    if (layer_count == LAYERS_MAX) return errno = E2BIG, -1;
    if ((made || (mapped && op->path[1])) && make_dir(root, op->path, 0755) < 0) return -1;
    int fd = made ? open_inside(root, op->path) : open_source(op, O_DIRECTORY, RESOLVE_NO_SYMLINKS);
    if (fd >= 0 && mapped) {
        fd = close_after(fd, clone_tree(fd, SEALED & ~MOUNT_ATTR_NOEXEC, cell->layers));
        if (fd >= 0 && attach_tree(fcntl(fd, F_DUPFD_CLOEXEC, 0), root, op->path) < 0) return close_after(fd, -1);
    }
    if (fd < 0) return -1;
    layers[layer_count].fd = fd;
    layers[layer_count++].mapped = mapped;
    return 0;
}

/* Names a layer for mount(2): by descriptor, so that mountinfo tells the cell nothing of the host's paths. */
static void name_layer(char *path, size_t size, unsigned number) {
    snprintf(path, size, "/proc/self/fd/%d", number < layer_count ? layers[number].fd : -1);
}

static int release_layers(void) {
    char path[32];
    int failed = 0;
    for (; layer_count; layer_count--) {
        name_layer(path, sizeof path, layer_count - 1);
        failed |= layers[layer_count - 1].mapped && umount2(path, MNT_DETACH) < 0;
        close_after(layers[layer_count - 1].fd, 0);
    }
    return failed ? -1 : 0;
}

/* A new file system as a detached mount; `options` are lines of key=value: @N is layer N, @ alone no value. */
static int new_mount(const char *type, const char *options, unsigned attributes) {
    char key[32], value[PATH_BYTES_MAX + 1];
    int used, failed = 0, context = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
    if (context < 0) return -1;
    for (; !failed && sscanf(options, " %31[^=]=%1024[^\n]%n", key, value, &used) == 2; options += used) {
        int flag = !strcmp(value, "@");
        if (*value == '@' && !flag) name_layer(value, sizeof value, (unsigned)value[1] - '0');
        unsigned how = flag ? FSCONFIG_SET_FLAG : FSCONFIG_SET_STRING;
        failed = syscall(SYS_fsconfig, context, how, key, flag ? NULL : value, 0) < 0;
    }
    failed = failed || syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0;
    return close_after(context, failed ? -1 : (int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, attributes));
}

static int bind(int root, const struct op *op) {
    struct stat st;
    int device = op->flags & BIND_DEVICE, tree = -1;
    unsigned attributes = MOUNT_ATTR_NOSUID | (device ? MOUNT_ATTR_NOEXEC : MOUNT_ATTR_NODEV);
    if (!op->flags) attributes |= MOUNT_ATTR_RDONLY;
    int source = open_source(op, 0, op->flags ? RESOLVE_NO_SYMLINKS : 0);
    if (source < 0 || fstat(source, &st) < 0) return close_after(source, -1);
    if (device && !S_ISCHR(st.st_mode)) return errno = ENODEV, close_after(source, -1);
    if ((S_ISDIR(st.st_mode) ? make_dir(root, op->path, 0755) : make_file(root, op->path, NULL, 0444)) == 0)
        tree = clone_tree(source, attributes, -1);
    return attach_tree(close_after(source, tree), root, op->path);
}

/* A node of its own where the kernel lets us (root in the initial user namespace), else the host's bound. */
static int make_device(int root, const struct op *op) {
    const char *leaf;
    int parent = open_parent(root, op->path, &leaf);
    if (parent < 0) return -1;
    if (close_after(parent, mknodat(parent, leaf, S_IFCHR | 0666, makedev(1, op->mode))) == 0) return 0; /* umask 0 */
    struct op host = {.flags = BIND_DEVICE, .path = op->path, .text = "/dev", .text2 = leaf};
    return errno == EPERM ? bind(root, &host) : -1;
}

/* Read-only from here on: the mount at `path`, not those below it. */
static int seal(int root, const char *path) {
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY};
    int at = open_inside(root, path);
    return at < 0 ? -1 : close_after(at, (int)syscall(SYS_mount_setattr, at, "", AT_EMPTY_PATH, &attr, sizeof attr));
}

static int mask(int root, const char *path) {
    struct stat st;
    int target = open_inside(root, path);
    if (target < 0) return errno == ENOENT ? 0 : -1;
    if (close_after(target, fstat(target, &st)) < 0) return -1;
    if (S_ISDIR(st.st_mode))
        return attach_tree(new_mount("tmpfs", "nr_inodes=2\nmode=0555", SEALED), root, path);
    int null = open_inside(root, "/dev/null");
    int tree = null < 0 ? -1 : clone_tree(null, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, -1);
    return attach_tree(close_after(null, tree), root, path);
}

static int add_mount(int root, const struct op *op) {
    if (op->path[1] && make_dir(root, op->path, 0755) < 0) return -1;
    int mount = new_mount(op->text2, op->text, op->flags);
    if (mount < 0 || release_layers() < 0) return close_after(mount, -1);
    if (op->path[1]) return attach_tree(mount, root, op->path);
    /* In place of the root, not on top of it: the end of build_root takes one mount off the old root's ".". An
     * overlay holds its layers itself, so what lies in the old one stays. */
    char old[32];
    snprintf(old, sizeof old, "/proc/self/fd/%d", root);
    int failed = umount2(old, MNT_DETACH) < 0 ||
                 syscall(SYS_move_mount, mount, "", AT_FDCWD, "/", MOVE_MOUNT_F_EMPTY_PATH) < 0;
    return close_after(mount, failed ? -1 : dup3(mount, root, O_CLOEXEC));
}

static int perform(const struct cell *cell, int root, const struct op *op) {
    switch (op->kind) {
    case OP_DIR: return make_dir(root, op->path, op->mode);
    case OP_SYMLINK: return make_symlink(root, op->path, op->text);
    case OP_FILE: return make_file(root, op->path, op->text, op->mode);
    case OP_BIND: return bind(root, op);
    case OP_MOUNT: return add_mount(root, op);
    case OP_DEVICE: return make_device(root, op);
    case OP_SEAL: return seal(root, op->path);
    case OP_LAYER: return add_layer(cell, root, op);
    default: return mask(root, op->path);
    }
}

void build_root(const struct cell *cell) {
    const struct program *p = cell->program;
    umask(0);
    /* Slave: nothing of the cell reaches the host. Unmounts on the host still arrive, so nothing is pinned. */
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0) fail(cell, PHASE_NEW_ROOT);
    int root = new_mount("tmpfs", "size=1m\nnr_inodes=2048\nmode=0755", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
    /* Over "/": a path lookup that starts at the process's root does not see it, so sources stay reachable. */
    if (root < 0 || syscall(SYS_move_mount, root, "", AT_FDCWD, "/", MOVE_MOUNT_F_EMPTY_PATH) < 0)
        fail(cell, PHASE_NEW_ROOT);
    for (uint32_t i = 0; i < p->op_count; i++)
        if (perform(cell, root, &p->ops[i]) < 0) fail(cell, p->ops[i].step);
    /* pivot_root(2), "pivot_root(".", ".")": the old root ends on top of the new one and is taken off. */
    if (fchdir(root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        fail(cell, PHASE_PIVOT);
    close(root);
    close_after(cell->layers, 0);
    umask(022);
}
