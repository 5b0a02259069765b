/* Random programs, two threads, and timings of the stack allocator; tests/runtime/test_memory.py builds and runs it,
 * with sanitizers and without. It includes the source, so that it can look at the books. */
#include "../../kernels/stack_allocator.c"

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "line %d: %s\n%s\n", __LINE__, #condition, message);                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

enum { LIVE = 256 };
static const size_t MIB = 1 << 20;

typedef struct {
    unsigned char *start;
    size_t size;
    unsigned char fill;
    int scope; /* depth of the scope it belongs to; -1: none */
} Held;

static uint64_t random_state;

static uint64_t draw(uint64_t below) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state % below;
}

/* its ends, a page each */
static void fill(const Held *held) {
    size_t end = held->size < 4096 ? held->size : 4096;
    memset(held->start, held->fill, end);
    memset(held->start + held->size - end, held->fill, end);
}

static bool intact(const Held *held) {
    size_t end = held->size < 4096 ? held->size : 4096;
    for (size_t i = 0; i < end; i++)
        if (held->start[i] != held->fill || held->start[held->size - 1 - i] != held->fill) return false;
    return true;
}

/* the books agree with each other */
static void audit(const Arena *arena) {
    size_t chunks = arena->spare;
    int64_t all = 0, tops = 0;
    for (int r = 0; r < RANGES; r++) {
        const Range *range = &arena->ranges[r];
        const RangeFigures *is = &arena->figures.ranges[r];
        int64_t live = 0, holes = 0, blocks = 0, listed = 0;
        for (const Block *block = range->last; block; block = block->below) {
            REQUIRE(block->range == r && block->size && block->size % ALIGNMENT == 0);
            REQUIRE((uintptr_t)block->start % ALIGNMENT == 0);
            REQUIRE(block->start == (block->below ? block->below->start + block->below->size : range->base));
            REQUIRE(!alike(block, block->below));
            *(block->live ? &live : &holes) += (int64_t)block->size;
            blocks += block->live;
        }
        for (int c = 0; c < CLASSES; c++) {
            REQUIRE(!range->holes[c] == !(range->filled >> c & 1));
            for (const Block *hole = range->holes[c]; hole; hole = hole->next) {
                REQUIRE(!hole->live && class_of(hole->size) == c);
                listed += (int64_t)hole->size;
            }
        }
        REQUIRE(listed == holes && live == is->live && blocks == is->blocks && live + holes == is->top);
        REQUIRE(is->top <= is->mapped && is->mapped == (int64_t)(range->chunks * arena->chunk));
        REQUIRE(is->top <= is->peak_top && range->crest >= top_of(range));
        chunks += range->chunks;
        all += live;
        tops += is->top;
    }
    REQUIRE(chunks == arena->created && chunks <= arena->most);
    REQUIRE(all == arena->figures.live && tops == arena->figures.top);
}

/* whether all tops, and `size` more bytes in range `r`, need more chunks than there may be */
static bool too_much(const Arena *arena, int r, size_t size) {
    size_t chunks = 0;
    for (int i = 0; i < RANGES; i++)
        chunks += (top_of(&arena->ranges[i]) + (i == r ? size : 0) + arena->chunk - 1) / arena->chunk;
    return chunks > arena->most;
}

static void let_go(Arena *arena, Held *held, int *n, int i) {
    REQUIRE(intact(&held[i]));
    REQUIRE(!stack_release(arena, held[i].start));
    held[i] = held[--*n];
}

/* one random program of scopes, places, requests and releases; adds up its peaks of mapped, live and hole bytes */
static void program(uint64_t seed, double peaks[3]) {
    random_state = seed * 0x9E3779B97F4A7C15ull + 1;
    Arena *arena = stack_new(NULL, 0, (8 + draw(56)) * MIB, 2 * MIB);
    Held held[LIVE];
    int n = 0;
    size_t tops[DEPTH];
    for (int step = 0; step < 600; step++) {
        uint64_t what = draw(100);
        if (what < 50 && n < LIVE) {
            size_t size = (size_t)1 << draw(22);
            size += draw(size);
            void *stream = (void *)(uintptr_t)(draw(20) == 0);
            int r = stream ? RUN : arena->place, scope = arena->depth - 1;
            while (scope >= 0 && (stream || arena->scopes[scope].range != r)) scope--;
            unsigned char *start = stack_allocate(arena, size, 0, stream);
            if (start) {
                held[n] = (Held){start, size, (unsigned char)draw(256), scope};
                for (int i = 0; i < n; i++)
                    REQUIRE(start + size <= held[i].start || held[i].start + held[i].size <= start);
                fill(&held[n++]);
                REQUIRE(stack_range(arena, start) == r);
            } else {
                REQUIRE(strstr(message, "no room") && strstr(message, "largest") && too_much(arena, r, size));
            }
        } else if (what < 85 && n) {
            let_go(arena, held, &n, (int)draw((uint64_t)n));
        } else if (what < 92 && arena->depth < 8) {
            int outer = arena->depth ? arena->scopes[arena->depth - 1].range : RUN, range = (int)draw(RANGES);
            size_t top = top_of(&arena->ranges[range]);
            int done = stack_open(arena, range);
            REQUIRE(done == (range < outer ? -1 : 0));
            if (!done) tops[arena->depth - 1] = top;
        } else if (what < 95) {
            int range = (int)draw(RANGES), before = stack_place(arena, range);
            REQUIRE((before < 0) == (range != RUN && !arena->ranges[range].scope));
        } else if (arena->depth) {
            int scope = arena->depth - 1, range = arena->scopes[scope].range, left = 0, parent = scope - 1;
            bool careless = draw(8) == 0, alone = true;
            while (parent >= 0 && arena->scopes[parent].range != range) parent--;
            for (int i = n - 1; i >= 0; i--)
                if (held[i].scope == scope && !(careless && draw(4) == 0)) let_go(arena, held, &n, i);
            for (int i = 0; i < n; i++)
                if (held[i].scope == scope) held[i].scope = parent, left++;
            for (const Block *block = arena->ranges[range].last; block; block = block->below)
                alone = alone && !block->stream;
            Survivor survivors[2];
            REQUIRE(stack_close(arena, survivors, 2) == left);
            for (int i = 0; i < left && i < 2; i++) REQUIRE(survivors[i].size > 0);
            REQUIRE(left || !alone || top_of(&arena->ranges[range]) <= tops[scope]);
        } else {
            REQUIRE(stack_close(arena, NULL, 0) == -1);
        }
        audit(arena);
    }
    REQUIRE(!stack_allocate(arena, 0, 0, NULL) && !*stack_error());
    REQUIRE(!stack_allocate(arena, 1, 3, NULL) && strstr(message, "device 3"));
    REQUIRE(!stack_allocate(arena, SIZE_MAX, 0, NULL) && strstr(message, "no room"));
    REQUIRE(stack_release(arena, &held) == -1 && arena->figures.strays == 1);
    while (n) let_go(arena, held, &n, n - 1);
    while (arena->depth) REQUIRE(!stack_close(arena, NULL, 0));
    audit(arena);
    for (int r = 1; r < RANGES; r++) REQUIRE(!arena->ranges[r].last);
    peaks[0] += (double)arena->figures.peak_mapped;
    peaks[1] += (double)arena->figures.peak_live;
    for (int r = 0; r < RANGES; r++) peaks[2] += (double)arena->figures.ranges[r].peak_holes;
    stack_delete(arena);
}

/* a thread without scopes asks and releases while the main thread opens and closes its own */
static void *other_thread(void *arena) {
    Held held = {.fill = 7};
    for (int i = 0; i < 2000; i++) {
        held.size = (size_t)(i % 50 + 1) * 1000;
        REQUIRE(held.start = stack_allocate(arena, held.size, 0, NULL));
        fill(&held);
        REQUIRE(stack_open(arena, CHUNK) == -1);
        REQUIRE(intact(&held) && !stack_release(arena, held.start));
    }
    return NULL;
}

static void threads(void) {
    Arena *arena = stack_new(NULL, 0, 64 * MIB, 2 * MIB);
    pthread_t thread;
    REQUIRE(!stack_open(arena, ITERATION));
    REQUIRE(!pthread_create(&thread, NULL, other_thread, arena));
    for (int i = 0; i < 500; i++) {
        REQUIRE(!stack_open(arena, CHUNK));
        Held held[4] = {{.size = 3000, .fill = 1}, {.size = 70000, .fill = 2}, {.size = 1, .fill = 3}, {.size = 512}};
        for (int j = 0; j < 4; j++) {
            REQUIRE(held[j].start = stack_allocate(arena, held[j].size, 0, NULL));
            fill(&held[j]);
        }
        for (int j = 0; j < 4; j++) REQUIRE(intact(&held[j]) && !stack_release(arena, held[j].start));
        REQUIRE(stack_close(arena, NULL, 0) == 0);
    }
    REQUIRE(!pthread_join(thread, NULL) && stack_close(arena, NULL, 0) == 0);
    audit(arena);
    REQUIRE(!arena->figures.live && arena->figures.elsewhere == 2000);
    stack_delete(arena);
}

/* nanoseconds for each request or release of a sequence like a refinement's */
typedef struct {
    int n;
    double values[1 << 17];
} Times;

static Times asked, freed;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

static void *timed_allocate(Arena *arena, size_t size) {
    double start = now();
    void *block = stack_allocate(arena, size, 0, NULL);
    asked.values[asked.n++] = now() - start;
    REQUIRE(block);
    return block;
}

static void timed_release(Arena *arena, void *block) {
    double start = now();
    stack_release(arena, block);
    freed.values[freed.n++] = now() - start;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(Times *times, double share) {
    qsort(times->values, (size_t)times->n, sizeof(double), compare);
    return times->values[(int)(share * (times->n - 1))];
}

/* blocks of a scope of each lifetime, and the scopes inside it; blocks of the last are freed early, in any order */
static void lifetime(Arena *arena, int range) {
    static const int blocks[RANGES] = {20, 30, 40, 60}, inner[RANGES] = {3, 10, 20, 0};
    void *held[64];
    int n = 0;
    REQUIRE(!stack_open(arena, range));
    for (int i = 0; i < blocks[range]; i++) {
        held[n++] = timed_allocate(arena, 512 + draw((size_t)1 << (10 + draw(13))));
        if (range == CHUNK && n > 12) {
            int gone = (int)draw((uint64_t)n);
            timed_release(arena, held[gone]);
            held[gone] = held[--n];
        }
    }
    for (int i = 0; i < inner[range]; i++) lifetime(arena, range + 1);
    while (n) timed_release(arena, held[--n]);
    REQUIRE(stack_close(arena, NULL, 0) == 0);
}

static void timing(void) {
    random_state = 1;
    Arena *arena = stack_new(NULL, 0, 1024 * MIB, 2 * MIB);
    lifetime(arena, RUN);
    int64_t holes = 0;
    for (int r = 0; r < RANGES; r++) holes += arena->figures.ranges[r].peak_holes;
    double live = (double)arena->figures.peak_live;
    printf("%.0f %.0f %.3f %.3f\n", quantile(&asked, 0.5), quantile(&freed, 0.5),
           (double)arena->figures.peak_mapped / live, (double)holes / live);
    stack_delete(arena);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "programs")) {
        double peaks[3] = {0, 0, 0};
        uint64_t first = argc > 3 ? strtoull(argv[3], NULL, 10) : 0;
        for (int i = 0; i < atoi(argv[2]); i++) program(first + (uint64_t)i, peaks);
        printf("%.3f %.3f\n", peaks[0] / peaks[1], peaks[2] / peaks[1]);
    } else if (!strcmp(what, "threads")) threads();
    else if (!strcmp(what, "timing")) timing();
    else return 2;
    return 0;
}
