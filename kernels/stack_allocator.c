/* Memory in stacks: one range of virtual addresses for each lifetime of the EM algorithm (run > iteration > batch >
 * chunk; Zhang et al. 2018, section 3), all over one pool of equal physical chunks.
 *
 * Inside a scope freed blocks are used again (neighbours merge); at its end its range is empty down to the mark where
 * the scope began, so no hole outlives its scope. Blocks tile a range from its base to its top; a hole belongs to the
 * scope and the stream that freed it and serves no other.
 *
 * The physical memory is a GPU's, through the driver's virtual memory calls, or the host's: everything but the
 * functions `host_*` and `cuda_*` is the same code. Python: torchem/runtime/memory.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { RUN, ITERATION, BATCH, CHUNK, RANGES };
enum { ALLOCATE, RELEASE, OPEN, CLOSE, MAP, UNMAP }; /* kinds of events in a trace */
enum { ALIGNMENT = 512, SMALLEST_CHUNK = 2 << 20, CLASSES = 64, BUCKETS = 1 << 16, DEPTH = 64, TEXT = 4096 };

static const char *const NO_HOST_MEMORY = "no host memory is left for the books";
static const char *const NAMES[RANGES] = {"run", "iteration", "batch", "chunk"};

/* a stream that works on a block without owning it */
typedef struct User {
    void *stream;
    struct User *next;
} User;

typedef struct Block {
    char *start;
    size_t size;
    struct Block *below, *above;   /* neighbours in the range, by address */
    struct Block *previous, *next; /* live: of its bucket; hole: of its size class */
    uint64_t scope;                /* serial number of the scope it belongs to; 0: none */
    void *stream;
    uint64_t where; /* what the caller calls the place that asked for it; 0: unknown */
    int64_t number; /* of the request that made it */
    User *users;
    int range;
    bool live;
} Block;

/* bytes, sizes rounded up to the alignment; holes are top - live */
typedef struct {
    int64_t live, top, mapped, blocks, peak_live, peak_top, peak_mapped, peak_holes;
} RangeFigures;

typedef struct {
    RangeFigures ranges[RANGES];
    int64_t live, top, mapped, peak_live, peak_top, peak_mapped, peak_holes; /* of all ranges at one time */
    int64_t holes_at_peak; /* when the tops together were highest: what holes cost */
    int64_t waste;       /* most bytes that a scope left behind at its end, holes and survivors */
    int64_t allocations; /* requests served */
    int64_t elsewhere;   /* of them, those of other streams and threads, which went to the run range */
    int64_t survivors;   /* blocks that outlived their scope */
    int64_t moved;       /* chunks taken from another range's idle end, instead of failing */
    int64_t strays;      /* releases of what is not a live block */
} Figures;

typedef struct {
    double seconds;
    int32_t kind, range;
    int64_t size, top, live; /* top and live: of the range */
    int64_t block;           /* which one, counted from 1; 0: none */
} Event;

typedef struct {
    int64_t size;
    uint64_t where;
} Survivor;

typedef struct {
    char *base;
    uint64_t *handles; /* of the chunks mapped at its start */
    size_t chunks;
    Block *last; /* the highest, which ends at the top */
    Block *holes[CLASSES];
    uint64_t filled; /* bit c: there are holes of class c, sizes from 2^c to 2^(c+1) - 1 */
    uint64_t scope;  /* innermost scope open in this range */
    size_t mark;     /* where that began */
    size_t crest;    /* highest top since the last iteration ended */
} Range;

typedef struct {
    int range, outer_place;
    uint64_t serial, outer_scope;
    size_t mark, outer_mark;
} Scope;

/* CUDA's driver, of which no header is needed; every call returns 0 or an error */
typedef struct {
    int type, id;
} Location;

typedef struct {
    int type, shared_as;
    Location location;
    void *windows;
    uint64_t flags;
} Property;

typedef struct {
    Location location;
    int flags;
} Access;

#define DRIVER(call)                                                                                                   \
    call(cuInit, (unsigned))                                                                                           \
    call(cuGetErrorString, (int, const char **))                                                                       \
    call(cuDeviceGet, (int *, int))                                                                                    \
    call(cuDeviceTotalMem_v2, (size_t *, int))                                                                         \
    call(cuDeviceGetAttribute, (int *, int, int))                                                                      \
    call(cuDevicePrimaryCtxRetain, (void **, int))                                                                     \
    call(cuCtxPushCurrent_v2, (void *))                                                                                \
    call(cuCtxPopCurrent_v2, (void **))                                                                                \
    call(cuCtxSynchronize, (void))                                                                                     \
    call(cuEventCreate, (void **, unsigned))                                                                           \
    call(cuEventRecord, (void *, void *))                                                                              \
    call(cuStreamWaitEvent, (void *, void *, unsigned))                                                                \
    call(cuMemAddressReserve, (uint64_t *, size_t, size_t, uint64_t, unsigned long long))                              \
    call(cuMemAddressFree, (uint64_t, size_t))                                                                         \
    call(cuMemCreate, (uint64_t *, size_t, const Property *, unsigned long long))                                      \
    call(cuMemRelease, (uint64_t))                                                                                     \
    call(cuMemMap, (uint64_t, size_t, size_t, uint64_t, unsigned long long))                                           \
    call(cuMemUnmap, (uint64_t, size_t))                                                                               \
    call(cuMemSetAccess, (uint64_t, size_t, const Access *, size_t))

typedef struct {
#define DECLARE(name, arguments) int(*name) arguments;
    DRIVER(DECLARE)
} Driver;

typedef struct Arena Arena;

/* where physical memory comes from; a function that returns false has said why by `fail` */
typedef struct {
    bool (*open)(Arena *);
    bool (*reserve)(Arena *, size_t size, char **base);
    bool (*create)(Arena *, uint64_t *handle); /* one chunk */
    bool (*map)(Arena *, char *at, uint64_t handle);
    bool (*allow)(Arena *, char *at, size_t size); /* reading and writing what is mapped there */
    void (*unmap)(Arena *, char *at, size_t size);
    void (*destroy)(Arena *, uint64_t handle);
    void (*discard)(Arena *, char *base, size_t size);
    void (*fence)(Arena *);                              /* wait until the device is idle */
    void (*follow)(Arena *, void *first, void *then);    /* what stream `then` gets from now on waits for `first` */
} Memory;

struct Arena {
    const Memory *memory;
    pthread_mutex_t lock;
    char library[256];
    int device;
    size_t limit, chunk, most; /* bytes, bytes, chunks that may exist at once */
    bool ready;
    Driver driver;
    void *context, *event;
    uint64_t *pool; /* chunks mapped nowhere */
    size_t spare, created;
    Range ranges[RANGES];
    Block *live[BUCKETS];
    Scope scopes[DEPTH];
    int depth, place; /* scopes open; the range that the owner's requests go to */
    pthread_t owner;  /* the thread that opened them */
    void *stream;     /* the one that computes */
    uint64_t serial;
    uint64_t (*where)(void);
    Figures figures;
    bool tracing;
    Event *events;
    size_t n_events, room;
};

static _Thread_local char message[TEXT];
static _Thread_local bool in_scope; /* this thread has scopes open */

/* reports */

static size_t append(char *text, size_t at, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int more = at < TEXT ? vsnprintf(text + at, TEXT - at, format, arguments) : 0;
    va_end(arguments);
    return at + (more > 0 ? (size_t)more : 0);
}

static double mib(double size) { return size / (1 << 20); }

/* what is where, in MiB, range by range, with its three largest blocks */
static size_t describe(const Arena *arena, char *text, size_t at) {
    const Figures *all = &arena->figures;
    at = append(text, at, "%.1f MiB mapped of %.1f allowed, %.1f live (at most %.1f mapped, %.1f live)\n",
                mib(all->mapped), mib(arena->limit), mib(all->live), mib(all->peak_mapped), mib(all->peak_live));
    at = append(text, at, "%-10s%10s%10s%10s%10s%10s  %s", "MiB", "live", "top", "holes", "mapped", "peak top",
                "largest blocks");
    for (int r = 0; r < RANGES; r++) {
        const RangeFigures *is = &all->ranges[r];
        at = append(text, at, "\n%-10s%10.1f%10.1f%10.1f%10.1f%10.1f ", NAMES[r], mib(is->live), mib(is->top),
                    mib(is->top - is->live), mib(is->mapped), mib(is->peak_top));
        size_t largest[3] = {0, 0, 0};
        for (const Block *block = arena->ranges[r].last; block; block = block->below) {
            size_t size = block->live ? block->size : 0;
            for (int i = 0; i < 3; i++)
                if (size > largest[i]) {
                    size_t smaller = largest[i];
                    largest[i] = size;
                    size = smaller;
                }
        }
        for (int i = 0; i < 3 && largest[i]; i++) at = append(text, at, " %.1f", mib(largest[i]));
    }
    return at;
}

/* keep what went wrong, and the plan, as this thread's last error */
static bool fail(const Arena *arena, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int said = vsnprintf(message, TEXT, format, arguments);
    va_end(arguments);
    if (arena->ready) describe(arena, message, append(message, said > 0 ? (size_t)said : 0, "\n"));
    return false;
}

static void note(Arena *arena, int kind, int range, int64_t size, int64_t block) {
    if (!arena->tracing) return;
    if (arena->n_events == arena->room) {
        size_t room = arena->room ? 2 * arena->room : 4096;
        Event *events = realloc(arena->events, room * sizeof *events);
        if (!events) {
            arena->tracing = false; /* the trace ends here; the run goes on */
            return;
        }
        arena->events = events;
        arena->room = room;
    }
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const RangeFigures *is = &arena->figures.ranges[range];
    arena->events[arena->n_events++] =
        (Event){(double)now.tv_sec + 1e-9 * (double)now.tv_nsec, kind, range, size, is->top, is->live, block};
}

static void count_peak(int64_t value, int64_t *peak) {
    if (value > *peak) *peak = value;
}

/* host memory: a chunk's handle only counts, since its pages come with the first touch */

static bool host_open(Arena *arena) {
    (void)arena;
    return true;
}

static bool host_reserve(Arena *arena, size_t size, char **base) {
    void *found = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return fail(arena, "cannot reserve %.1f MiB of the host's addresses", mib(size));
    *base = found;
    return true;
}

static bool host_create(Arena *arena, uint64_t *handle) {
    *handle = arena->created;
    return true;
}

static bool host_map(Arena *arena, char *at, uint64_t handle) {
    (void)arena, (void)at, (void)handle;
    return true;
}

static bool host_allow(Arena *arena, char *at, size_t size) {
    return !mprotect(at, size, PROT_READ | PROT_WRITE) || fail(arena, "the host refuses %.1f MiB", mib(size));
}

static void host_unmap(Arena *arena, char *at, size_t size) {
    (void)arena;
    mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

static void host_destroy(Arena *arena, uint64_t handle) { (void)arena, (void)handle; }

static void host_discard(Arena *arena, char *base, size_t size) {
    (void)arena;
    munmap(base, size);
}

static void host_fence(Arena *arena) { (void)arena; }

static void host_follow(Arena *arena, void *first, void *then) { (void)arena, (void)first, (void)then; }

static const Memory HOST = {host_open,    host_reserve, host_create,  host_map,   host_allow,
                            host_unmap,   host_destroy, host_discard, host_fence, host_follow};

/* GPU memory */

static bool check(const Arena *arena, const char *call, int status) {
    const char *text = NULL;
    if (status) arena->driver.cuGetErrorString(status, &text);
    return !status || fail(arena, "%s: %s", call, text ? text : "unknown error");
}
#define CHECK(call, arguments) check(arena, #call, arena->driver.call arguments)

static Location here(const Arena *arena) { return (Location){1, arena->device}; /* a device's memory */ }

static bool cuda_open(Arena *arena) {
    void *library = dlopen(arena->library, RTLD_NOW);
    if (!library) return fail(arena, "cannot load CUDA's driver: %s", dlerror());
#define LOAD(name, arguments)                                                                                          \
    if (!(*(void **)&arena->driver.name = dlsym(library, #name)))                                                      \
        return fail(arena, "%s has no %s: the driver is too old", arena->library, #name);
    DRIVER(LOAD)
    int device, has_virtual_memory;
    size_t total;
    if (!CHECK(cuInit, (0)) || !CHECK(cuDeviceGet, (&device, arena->device)) ||
        !CHECK(cuDeviceGetAttribute, (&has_virtual_memory, 102, device)))
        return false;
    if (!has_virtual_memory)
        return fail(arena, "this GPU, or the virtual machine that it is shared with, does not map memory to addresses; "
                           "use memory.allocator=torch");
    if (!CHECK(cuDeviceTotalMem_v2, (&total, device)) || !CHECK(cuDevicePrimaryCtxRetain, (&arena->context, device)) ||
        !CHECK(cuCtxPushCurrent_v2, (arena->context)))
        return false;
    if (!arena->limit || arena->limit > total) arena->limit = total;
    bool made = arena->event || CHECK(cuEventCreate, (&arena->event, 2)); /* it keeps no time */
    arena->driver.cuCtxPopCurrent_v2(NULL);
    return made;
}

static bool cuda_reserve(Arena *arena, size_t size, char **base) {
    uint64_t address = 0;
    bool done = CHECK(cuMemAddressReserve, (&address, size, 0, 0, 0));
    *base = (char *)(uintptr_t)address;
    return done;
}

static bool cuda_create(Arena *arena, uint64_t *handle) {
    Property pinned = {.type = 1, .location = here(arena)};
    return CHECK(cuMemCreate, (handle, arena->chunk, &pinned, 0));
}

static bool cuda_map(Arena *arena, char *at, uint64_t handle) {
    return CHECK(cuMemMap, ((uint64_t)(uintptr_t)at, arena->chunk, 0, handle, 0));
}

static bool cuda_allow(Arena *arena, char *at, size_t size) {
    Access both = {here(arena), 3};
    return CHECK(cuMemSetAccess, ((uint64_t)(uintptr_t)at, size, &both, 1));
}

static void cuda_unmap(Arena *arena, char *at, size_t size) {
    /* one call undoes one mapping */
    for (size_t done = 0; done < size; done += arena->chunk)
        arena->driver.cuMemUnmap((uint64_t)(uintptr_t)at + done, arena->chunk);
}

static void cuda_destroy(Arena *arena, uint64_t handle) { arena->driver.cuMemRelease(handle); }

static void cuda_discard(Arena *arena, char *base, size_t size) {
    arena->driver.cuMemAddressFree((uint64_t)(uintptr_t)base, size);
}

static void cuda_fence(Arena *arena) {
    arena->driver.cuCtxPushCurrent_v2(arena->context);
    arena->driver.cuCtxSynchronize();
    arena->driver.cuCtxPopCurrent_v2(NULL);
}

static void cuda_follow(Arena *arena, void *first, void *then) {
    if (first == then) return;
    const Driver *driver = &arena->driver;
    driver->cuCtxPushCurrent_v2(arena->context);
    /* a wait keeps the event as it is at the call, so one event serves all */
    if (driver->cuEventRecord(arena->event, first) || driver->cuStreamWaitEvent(then, arena->event, 0))
        driver->cuCtxSynchronize();
    driver->cuCtxPopCurrent_v2(NULL);
}

static const Memory CUDA = {cuda_open,  cuda_reserve, cuda_create,  cuda_map,   cuda_allow,
                            cuda_unmap, cuda_destroy, cuda_discard, cuda_fence, cuda_follow};

/* the pool of chunks */

/* start the memory at the first request, since a GPU must not start before */
static bool prepare(Arena *arena) {
    if (arena->ready) return true;
    if (!arena->memory->open(arena)) return false;
    /* mapping takes a time a chunk; at most about a thousand */
    for (size_t chunk = SMALLEST_CHUNK; !arena->chunk; chunk *= 2)
        if (2 * chunk > arena->limit / 1024) arena->chunk = chunk;
    arena->most = arena->limit / arena->chunk;
    if (!arena->most)
        return fail(arena, "a limit of %.1f MiB is less than one chunk of %.1f", mib(arena->limit), mib(arena->chunk));
    if (!arena->pool && !(arena->pool = calloc(arena->most, sizeof *arena->pool))) return fail(arena, NO_HOST_MEMORY);
    for (int r = 0; r < RANGES; r++) {
        Range *range = &arena->ranges[r];
        if (!range->handles && !(range->handles = calloc(arena->most, sizeof *range->handles)))
            return fail(arena, NO_HOST_MEMORY);
        if (!range->base && !arena->memory->reserve(arena, arena->most * arena->chunk, &range->base)) return false;
    }
    return arena->ready = true;
}

static size_t top_of(const Range *range) {
    return range->last ? (size_t)(range->last->start - range->base) + range->last->size : 0;
}

static void count_mapped(Arena *arena, int r, int64_t chunks) {
    RangeFigures *is = &arena->figures.ranges[r];
    int64_t size = chunks * (int64_t)arena->chunk;
    is->mapped += size;
    arena->figures.mapped += size;
    count_peak(is->mapped, &is->peak_mapped);
    count_peak(arena->figures.mapped, &arena->figures.peak_mapped);
    note(arena, size > 0 ? MAP : UNMAP, r, size, 0);
}

static size_t chunks_of(const Arena *arena, size_t size) { return (size + arena->chunk - 1) / arena->chunk; }

/* give up to `count` chunks of a range that lie above `height` back to the pool; returns how many */
static size_t give_back(Arena *arena, int r, size_t height, size_t count) {
    Range *range = &arena->ranges[r];
    /* some may have moved to another range since its top was that high */
    size_t kept = range->chunks ? chunks_of(arena, height) : 0;
    if (kept >= range->chunks) return 0;
    if (count > range->chunks - kept) count = range->chunks - kept;
    if (!count) return 0;
    arena->memory->fence(arena); /* kernels may still use what the host has freed */
    range->chunks -= count;
    arena->memory->unmap(arena, range->base + range->chunks * arena->chunk, count * arena->chunk);
    for (size_t i = 0; i < count; i++) arena->pool[arena->spare++] = range->handles[range->chunks + i];
    count_mapped(arena, r, -(int64_t)count);
    return count;
}

/* blocks and holes */

static void push(Block **list, Block *block) {
    block->previous = NULL;
    block->next = *list;
    if (*list) (*list)->previous = block;
    *list = block;
}

static void pull(Block **list, Block *block) {
    if (block->previous) block->previous->next = block->next;
    else *list = block->next;
    if (block->next) block->next->previous = block->previous;
}

static int class_of(size_t size) { return 63 - __builtin_clzll(size); }

static void push_hole(Range *range, Block *hole) {
    int class = class_of(hole->size);
    push(&range->holes[class], hole);
    range->filled |= 1ull << class;
}

static void pull_hole(Range *range, Block *hole) {
    int class = class_of(hole->size);
    pull(&range->holes[class], hole);
    if (!range->holes[class]) range->filled &= ~(1ull << class);
}

/* the multiplication mixes: blocks of one size differ in few bits of their addresses */
static Block **bucket(Arena *arena, const char *start) {
    return &arena->live[((uintptr_t)start / ALIGNMENT * 0x9E3779B97F4A7C15ull) >> 48];
}

static Block *find(Arena *arena, const char *start) {
    Block *block = *bucket(arena, start);
    while (block && block->start != start) block = block->next;
    return block;
}

/* put a new block of `size` bytes above `below`, in a range's chain */
static Block *chain(Range *range, Block *below, size_t size) {
    Block *block = calloc(1, sizeof *block);
    if (!block) return NULL;
    block->start = below ? below->start + below->size : range->base;
    block->size = size;
    block->below = below;
    block->above = below ? below->above : NULL;
    if (block->above) block->above->below = block;
    else range->last = block;
    if (below) below->above = block;
    return block;
}

static void unchain(Range *range, Block *block) {
    if (block->below) block->below->above = block->above;
    if (block->above) block->above->below = block->below;
    else range->last = block->below;
    free(block);
}

/* of the holes that are large enough, of one stream or of any: for a small request the smallest, for a large one the
 * lowest, so that large ones gather at the bottom and the top comes down */
static Block *find_hole(Range *range, size_t size, uint64_t scope, void *stream, bool any) {
    uint64_t classes = range->filled >> class_of(size) << class_of(size);
    bool large = size >= SMALLEST_CHUNK;
    Block *best = NULL;
    for (; classes && (large || !best); classes &= classes - 1)
        for (Block *hole = range->holes[__builtin_ctzll(classes)]; hole; hole = hole->next)
            if (hole->size >= size && hole->scope == scope && (any || hole->stream == stream) &&
                (!best || (large ? hole->start < best->start : hole->size < best->size))) {
                best = hole;
                if (!large && hole->size == size) return best;
            }
    return best;
}

/* one hole of two neighbours, neither of them listed */
static Block *merge(Range *range, Block *low, Block *high) {
    low->size += high->size;
    unchain(range, high);
    return low;
}

static bool alike(const Block *one, const Block *other) {
    return one && other && !one->live && !other->live && one->scope == other->scope && one->stream == other->stream;
}

/* lower the top over holes, at most to the mark of the open scope; other streams keep theirs, which only they may
 * use without waiting, unless the computing stream is to wait for them */
static void settle(Arena *arena, int r, bool wait) {
    Range *range = &arena->ranges[r];
    while (range->last && !range->last->live && (wait || range->last->stream == arena->stream) &&
           (size_t)(range->last->start - range->base) >= range->mark) {
        arena->memory->follow(arena, range->last->stream, arena->stream);
        pull_hole(range, range->last);
        unchain(range, range->last);
    }
}

/* `size` more bytes live, in `blocks` more blocks, once the range has settled */
static void count_live(Arena *arena, int r, int64_t size, int blocks) {
    Figures *all = &arena->figures;
    RangeFigures *is = &all->ranges[r];
    Range *range = &arena->ranges[r];
    size_t top = top_of(range);
    is->live += size;
    is->blocks += blocks;
    all->live += size;
    all->top += (int64_t)top - is->top;
    is->top = (int64_t)top;
    if (top > range->crest) range->crest = top;
    count_peak(is->live, &is->peak_live);
    count_peak(is->top, &is->peak_top);
    count_peak(is->top - is->live, &is->peak_holes);
    count_peak(all->live, &all->peak_live);
    if (all->top > all->peak_top) all->holes_at_peak = all->top - all->live;
    count_peak(all->top, &all->peak_top);
    count_peak(all->top - all->live, &all->peak_holes);
}

/* lower the top over holes of other streams, too */
static void lower(Arena *arena, int r) {
    settle(arena, r, true);
    count_live(arena, r, 0, 0);
}

/* map `count` more chunks to the end of a range: from the pool, new ones, else those idle in other ranges */
static bool grow(Arena *arena, int r, size_t count) {
    const Memory *memory = arena->memory;
    Range *range = &arena->ranges[r];
    while (arena->spare < count && arena->created < arena->most && memory->create(arena, &arena->pool[arena->spare])) {
        arena->spare++;
        arena->created++;
    }
    for (int other = RANGES - 1; other >= 0; other--)
        if (other != r && arena->spare < count) {
            lower(arena, other);
            arena->figures.moved +=
                (int64_t)give_back(arena, other, top_of(&arena->ranges[other]), count - arena->spare);
        }
    if (arena->spare < count) return false;
    char *at = range->base + range->chunks * arena->chunk;
    size_t done = 0;
    while (done < count && memory->map(arena, at + done * arena->chunk, arena->pool[arena->spare - 1 - done])) done++;
    if (done < count || !memory->allow(arena, at, count * arena->chunk)) {
        if (done) memory->unmap(arena, at, done * arena->chunk);
        return false;
    }
    for (size_t i = 0; i < count; i++) range->handles[range->chunks++] = arena->pool[--arena->spare];
    count_mapped(arena, r, (int64_t)count);
    return true;
}

static bool is_owner(const Arena *arena) { return !arena->depth || pthread_equal(arena->owner, pthread_self()); }

static Block *allocate(Arena *arena, size_t size, void *stream) {
    /* the lifetimes of what others ask for are not nested in the owner's scopes */
    bool own = stream == arena->stream && is_owner(arena);
    int r = own ? arena->place : RUN;
    Range *range = &arena->ranges[r];
    uint64_t scope = own ? range->scope : 0;
    if (size > arena->limit) {
        fail(arena, "no room for %.1f MiB in the %s range", mib(size), NAMES[r]);
        return NULL;
    }
    size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t mapped = range->chunks * arena->chunk;
    Block *block = find_hole(range, size, scope, stream, false);
    /* to wait for another stream's work is better than to take more memory */
    if (!block && top_of(range) + size > mapped && !(block = find_hole(range, size, scope, stream, true)))
        lower(arena, r);
    if (block) {
        pull_hole(range, block);
        arena->memory->follow(arena, block->stream, stream);
        size_t rest = block->size - size;
        block->size = size;
        Block *hole = rest ? chain(range, block, rest) : NULL;
        if (hole) {
            hole->scope = scope, hole->stream = block->stream, hole->range = r;
            push_hole(range, hole);
        } else {
            block->size += rest;
        }
    } else {
        size_t end = top_of(range) + size;
        if (end > mapped && !grow(arena, r, chunks_of(arena, end - mapped))) {
            char why[256]; /* what the memory said, if it failed */
            snprintf(why, sizeof why, "%s%.*s", *message ? ": " : "", (int)strcspn(message, "\n"), message);
            fail(arena, "no room for %.1f MiB in the %s range%s", mib(size), NAMES[r], why);
            return NULL;
        }
        block = chain(range, range->last, size);
        if (!block) {
            fail(arena, NO_HOST_MEMORY);
            return NULL;
        }
        block->scope = scope, block->range = r;
        arena->memory->follow(arena, arena->stream, stream);
    }
    block->stream = stream;
    block->live = true;
    block->number = ++arena->figures.allocations;
    push(bucket(arena, block->start), block);
    count_live(arena, r, (int64_t)block->size, 1);
    arena->figures.elsewhere += !own;
    note(arena, ALLOCATE, r, (int64_t)block->size, block->number);
    return block;
}

static void release(Arena *arena, Block *block) {
    int r = block->range;
    Range *range = &arena->ranges[r];
    int64_t size = (int64_t)block->size, number = block->number;
    while (block->users) {
        User *user = block->users;
        block->users = user->next;
        arena->memory->follow(arena, user->stream, block->stream);
        free(user);
    }
    pull(bucket(arena, block->start), block);
    block->live = false;
    if (alike(block->below, block)) {
        pull_hole(range, block->below);
        block = merge(range, block->below, block);
    }
    if (alike(block, block->above)) {
        pull_hole(range, block->above);
        merge(range, block, block->above);
    }
    push_hole(range, block);
    settle(arena, r, false);
    count_live(arena, r, -size, -1);
    note(arena, RELEASE, r, size, number);
}

/* end the innermost scope; what outlives it joins the scope around it in that range */
static int64_t end_scope(Arena *arena, Survivor *survivors, int64_t room) {
    Scope scope = arena->scopes[--arena->depth];
    Range *range = &arena->ranges[scope.range];
    int64_t count = 0;
    range->scope = scope.outer_scope;
    range->mark = scope.outer_mark;
    arena->place = scope.outer_place;
    for (Block *block = range->last, *below; block; block = below) {
        below = block->below;
        if (block->scope == scope.serial) {
            block->scope = scope.outer_scope;
            if (block->live && count++ < room) survivors[count - 1] = (Survivor){(int64_t)block->size, block->where};
        }
        if (alike(block, block->above)) {
            pull_hole(range, block);
            pull_hole(range, block->above);
            push_hole(range, merge(range, block, block->above));
        }
        /* the first block under the mark was reached only to be merged */
        if ((size_t)(block->start - range->base) < scope.mark) break;
    }
    settle(arena, scope.range, false);
    count_live(arena, scope.range, 0, 0);
    arena->figures.survivors += count;
    count_peak(arena->figures.ranges[scope.range].top - (int64_t)scope.mark, &arena->figures.waste);
    note(arena, CLOSE, scope.range, 0, 0);
    /* between iterations, what none of the ranges needed in the last one serves the others in the next; what other
     * streams needed for a while in the run range, too */
    if (scope.range == ITERATION && !range->scope)
        for (int r = 0; r < RANGES; r++) {
            lower(arena, r);
            size_t top = top_of(&arena->ranges[r]);
            give_back(arena, r, r == RUN ? top : arena->ranges[r].crest, SIZE_MAX);
            arena->ranges[r].crest = top;
        }
    return count;
}

/* what Python calls; functions that can fail return NULL or -1 then, and `stack_error` says why */

const char *stack_error(void) { return message; }

/* driver: file name of CUDA's driver library, NULL for host memory; limit: bytes, 0: all that the device has;
 * chunk: bytes, 0: what suits the limit */
Arena *stack_new(const char *driver, int device, size_t limit, size_t chunk) {
    Arena *arena = calloc(1, sizeof *arena);
    if (!arena) return NULL;
    arena->memory = driver ? &CUDA : &HOST;
    if (driver) snprintf(arena->library, sizeof arena->library, "%s", driver);
    arena->device = device;
    arena->limit = limit;
    arena->chunk = chunk;
    pthread_mutex_init(&arena->lock, NULL);
    return arena;
}

void stack_delete(Arena *arena) {
    for (int r = 0; r < RANGES; r++) {
        Range *range = &arena->ranges[r];
        while (range->last) {
            while (range->last->users) {
                User *user = range->last->users;
                range->last->users = user->next;
                free(user);
            }
            unchain(range, range->last);
        }
        give_back(arena, r, 0, SIZE_MAX);
        if (range->base) arena->memory->discard(arena, range->base, arena->most * arena->chunk);
        free(range->handles);
    }
    for (size_t i = 0; i < arena->spare; i++) arena->memory->destroy(arena, arena->pool[i]);
    pthread_mutex_destroy(&arena->lock);
    free(arena->pool);
    free(arena->events);
    free(arena);
}

/* NULL for no bytes, too, with an empty error */
void *stack_allocate(Arena *arena, size_t size, int device, void *stream) {
    message[0] = 0;
    if (!size) return NULL;
    /* before the lock: it takes Python's own lock, which is always taken first; and only in the thread that opens
     * scopes: others may be what a holder of Python's lock waits for */
    uint64_t where = arena->where && in_scope ? arena->where() : 0;
    pthread_mutex_lock(&arena->lock);
    Block *block = NULL;
    if (device != arena->device) fail(arena, "memory asked for on device %d; this is device %d", device, arena->device);
    else if (prepare(arena)) block = allocate(arena, size, stream);
    if (block) block->where = where;
    pthread_mutex_unlock(&arena->lock);
    return block ? block->start : NULL;
}

int stack_release(Arena *arena, void *start) {
    if (!start) return 0;
    pthread_mutex_lock(&arena->lock);
    Block *block = find(arena, start);
    if (block) release(arena, block);
    else {
        arena->figures.strays++;
        fail(arena, "released %p, which is no live block", start);
    }
    pthread_mutex_unlock(&arena->lock);
    return block ? 0 : -1;
}

/* another stream works on a block: once freed, it is not used again before that stream has done what it now has */
int stack_record(Arena *arena, void *start, void *stream) {
    pthread_mutex_lock(&arena->lock);
    Block *block = find(arena, start);
    bool done = block || fail(arena, "recorded %p, which is no live block", start);
    if (block && block->stream != stream) {
        User *user = block->users;
        while (user && user->stream != stream) user = user->next;
        if (!user && (done = (user = malloc(sizeof *user)) || fail(arena, NO_HOST_MEMORY))) {
            *user = (User){stream, block->users};
            block->users = user;
        }
    }
    pthread_mutex_unlock(&arena->lock);
    return done ? 0 : -1;
}

int stack_open(Arena *arena, int range) {
    pthread_mutex_lock(&arena->lock);
    bool done = false;
    int outer = arena->depth ? arena->scopes[arena->depth - 1].range : RUN;
    if (!is_owner(arena)) fail(arena, "%s scope opened while another thread has scopes open", NAMES[range]);
    else if (range < outer) fail(arena, "%s scope opened inside a %s scope", NAMES[range], NAMES[outer]);
    else if (arena->depth == DEPTH) fail(arena, "more than %d scopes opened", DEPTH);
    else {
        done = true;
        Range *in = &arena->ranges[range];
        arena->owner = pthread_self();
        in_scope = true;
        arena->scopes[arena->depth++] =
            (Scope){range, arena->place, ++arena->serial, in->scope, top_of(in), in->mark};
        in->scope = arena->serial;
        in->mark = top_of(in);
        arena->place = range;
        note(arena, OPEN, range, 0, 0);
    }
    pthread_mutex_unlock(&arena->lock);
    return done ? 0 : -1;
}

/* returns how many blocks outlived the innermost scope, of which it lists at most `room` */
int64_t stack_close(Arena *arena, Survivor *survivors, int64_t room) {
    pthread_mutex_lock(&arena->lock);
    bool may = arena->depth && is_owner(arena);
    int64_t count = may ? end_scope(arena, survivors, room) : -1;
    if (may) in_scope = arena->depth > 0;
    if (!may) fail(arena, "no scope of this thread is open");
    pthread_mutex_unlock(&arena->lock);
    return count;
}

/* which range a block is in; -1: it is none of this arena's */
int stack_range(Arena *arena, void *start) {
    pthread_mutex_lock(&arena->lock);
    Block *block = find(arena, start);
    int range = block ? block->range : -1;
    pthread_mutex_unlock(&arena->lock);
    return range;
}

/* from now on requests go to another range, whose innermost scope must be open; returns the range before */
int stack_place(Arena *arena, int range) {
    pthread_mutex_lock(&arena->lock);
    int before = -1;
    if (!is_owner(arena)) fail(arena, "placed in the %s range while another thread has scopes open", NAMES[range]);
    else if (range != RUN && !arena->ranges[range].scope) fail(arena, "no %s scope is open", NAMES[range]);
    else {
        before = arena->place;
        arena->place = range;
    }
    pthread_mutex_unlock(&arena->lock);
    return before;
}

void stack_figures(Arena *arena, Figures *figures) {
    pthread_mutex_lock(&arena->lock);
    *figures = arena->figures;
    pthread_mutex_unlock(&arena->lock);
}

const char *stack_plan(Arena *arena) {
    pthread_mutex_lock(&arena->lock);
    describe(arena, message, 0);
    pthread_mutex_unlock(&arena->lock);
    return message;
}

/* where: called before each request, in the thread that makes it; NULL: not at all */
void stack_ask_where(Arena *arena, uint64_t (*where)(void)) { arena->where = where; }

void stack_trace(Arena *arena, int on) {
    pthread_mutex_lock(&arena->lock);
    arena->tracing = on;
    pthread_mutex_unlock(&arena->lock);
}

/* copies at most `room` events; returns how many there are */
int64_t stack_events(Arena *arena, Event *events, int64_t room) {
    pthread_mutex_lock(&arena->lock);
    int64_t count = (int64_t)arena->n_events;
    if (room > count) room = count;
    if (room > 0) memcpy(events, arena->events, (size_t)room * sizeof *events);
    pthread_mutex_unlock(&arena->lock);
    return count;
}

/* what PyTorch calls (torch.cuda.memory.CUDAPluggableAllocator) */

static Arena *served;

void stack_serve(Arena *arena) { served = arena; }

/* NULL would become a tensor at address 0, so an error is thrown as torch throws its own */
static void throw_error(void) {
    /* libraries of an extension module are not in the global scope: ask for the one that is loaded */
    void *c10 = dlopen("libc10.so", RTLD_NOW | RTLD_NOLOAD);
    void (*throw)(const char *, const char *, uint32_t, const char *) = NULL;
    if (c10) *(void **)&throw = dlsym(c10, "_ZN3c106detail14torchCheckFailEPKcS2_jS2_");
    if (throw) throw(__func__, "stack_allocator.c", __LINE__, message);
    fprintf(stderr, "%s\n", message);
    abort();
}

void *torch_malloc(size_t size, int device, void *stream) {
    void *start = stack_allocate(served, size, device, stream);
    if (!start && size) throw_error();
    return start;
}

/* called by destructors, which must not throw */
void torch_free(void *start, size_t size, int device, void *stream) {
    (void)size, (void)device, (void)stream;
    if (stack_release(served, start)) fprintf(stderr, "%s\n", message);
}

void torch_record_stream(void *start, void *stream) {
    if (start && stack_record(served, start, stream)) throw_error();
}

/* On a CPU PyTorch has no such interface: its library libc10 asks the C library. Its requests are taken over where the
 * loader keeps the addresses of what it calls. */

static int host_memalign(void **start, size_t alignment, size_t size) {
    if (alignment > ALIGNMENT || !size) return posix_memalign(start, alignment, size);
    *start = stack_allocate(served, size, served->device, NULL);
    if (!*start) throw_error();
    return 0;
}

static void host_free(void *start) {
    char *at = start;
    size_t room = served->most * served->chunk;
    for (int r = 0; r < RANGES; r++)
        if (served->ranges[r].base && at >= served->ranges[r].base && at < served->ranges[r].base + room) {
            torch_free(start, 0, 0, NULL);
            return;
        }
    free(start);
}

/* addresses in libc10 that say where these functions are */
typedef struct {
    void **slots[16];
    bool asks[16]; /* posix_memalign, else free */
    int count;
} Calls;

static int find_calls(struct dl_phdr_info *library, size_t size, void *found) {
    (void)size;
    Calls *calls = found;
    const char *name = strrchr(library->dlpi_name, '/');
    if (!name || strcmp(name, "/libc10.so")) return 0;
    const ElfW(Dyn) *entry = NULL;
    for (int i = 0; i < library->dlpi_phnum; i++)
        if (library->dlpi_phdr[i].p_type == PT_DYNAMIC)
            entry = (const ElfW(Dyn) *)(library->dlpi_addr + library->dlpi_phdr[i].p_vaddr);
    const ElfW(Sym) *symbols = NULL;
    const char *names = NULL;
    const ElfW(Rela) *tables[2] = {NULL, NULL}; /* of calls, of other addresses */
    size_t sizes[2] = {0, 0};
    for (; entry && entry->d_tag != DT_NULL; entry++) {
        const void *at = (const void *)entry->d_un.d_ptr;
        if (entry->d_tag == DT_SYMTAB) symbols = at;
        if (entry->d_tag == DT_STRTAB) names = at;
        if (entry->d_tag == DT_JMPREL) tables[0] = at;
        if (entry->d_tag == DT_PLTRELSZ) sizes[0] = entry->d_un.d_val / sizeof(ElfW(Rela));
        if (entry->d_tag == DT_RELA) tables[1] = at;
        if (entry->d_tag == DT_RELASZ) sizes[1] = entry->d_un.d_val / sizeof(ElfW(Rela));
    }
    for (int t = 0; t < 2 && symbols && names; t++)
        for (size_t i = 0; tables[t] && i < sizes[t] && calls->count < 16; i++) {
            const char *called = names + symbols[ELF64_R_SYM(tables[t][i].r_info)].st_name;
            bool asks = !strcmp(called, "posix_memalign");
            if (!asks && strcmp(called, "free")) continue;
            calls->slots[calls->count] = (void **)(library->dlpi_addr + tables[t][i].r_offset);
            calls->asks[calls->count++] = asks;
        }
    return 1;
}

/* serve PyTorch's requests for host memory, too; -1 where this libc10 makes them in another way */
int stack_serve_host(Arena *arena) {
    Calls calls = {.count = 0};
    int kinds = 0;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    dl_iterate_phdr(find_calls, &calls);
    for (int i = 0; i < calls.count; i++) {
        char *slot = (char *)calls.slots[i], *first = slot - (uintptr_t)slot % page;
        if (mprotect(first, (size_t)(slot - first) + sizeof(void *), PROT_READ | PROT_WRITE)) return -1;
        kinds |= calls.asks[i] ? 1 : 2;
    }
    if (kinds != 3) return -1;
    served = arena;
    for (int i = 0; i < calls.count; i++)
        *calls.slots[i] = (void *)(calls.asks[i] ? (uintptr_t)host_memalign : (uintptr_t)host_free);
    return 0;
}
