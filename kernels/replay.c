/* A recorded sequence of requests again, for torchem/benchmarks/memory.py: against the stack, and against one slab with
 * a linked list of its pieces, as RELION keeps one: the first free piece that is larger, merged with free neighbours
 * when given back; a piece that fits exactly is passed over. */
#include "stack_allocator.c"

typedef struct Piece {
    size_t start, size;
    bool live;
    struct Piece *below, *above;
} Piece;

static Piece *list_allocate(Piece *first, size_t size) {
    size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Piece *piece = first;
    while (piece && (piece->live || piece->size <= size)) piece = piece->above;
    Piece *rest = piece ? malloc(sizeof *rest) : NULL;
    if (!rest) return NULL;
    *rest = (Piece){piece->start + size, piece->size - size, false, piece, piece->above};
    if (rest->above) rest->above->below = rest;
    piece->above = rest;
    piece->size = size;
    piece->live = true;
    return piece;
}

/* the upper of two free neighbours goes */
static void list_merge(Piece *low, Piece *high) {
    if (!low || !high || low->live || high->live) return;
    low->size += high->size;
    low->above = high->above;
    if (high->above) high->above->below = low;
    free(high);
}

static void list_release(Piece *piece) {
    piece->live = false;
    list_merge(piece, piece->above);
    list_merge(piece->below, piece);
}

typedef struct {
    int64_t failed;   /* the event at which there was no room; -1: it went through */
    int64_t reserved; /* most bytes that it took: mapped, or up to the highest piece in use */
    int64_t largest;  /* smallest, over the ends of batches and iterations, of the largest request then served */
} Outcome;

typedef struct {
    Arena *arena;
    Piece *first; /* where there is no arena */
} Allocator;

static void *serve(const Allocator *from, size_t size) {
    return from->arena ? stack_allocate(from->arena, size, 0, NULL) : list_allocate(from->first, size);
}

static void take_back(const Allocator *from, void *block) {
    if (from->arena) stack_release(from->arena, block);
    else list_release(block);
}

static void probe(const Allocator *from, size_t limit, Outcome *outcome) {
    size_t most = 0, step = 1;
    while (2 * step <= limit) step *= 2;
    /* a thousandth of it is precise enough */
    for (size_t last = step >> 10; step > last; step /= 2) {
        void *block = most + step <= limit ? serve(from, most + step) : NULL;
        if (!block) continue;
        most += step;
        take_back(from, block);
    }
    if ((int64_t)most < outcome->largest) outcome->largest = (int64_t)most;
}

static double nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

/* events: of a trace; scale: of all sizes; list: not the stack; probing: also look for the largest request; times: if
 * not NULL, nanoseconds that each event took */
void replay(const Event *events, int64_t n, double scale, size_t limit, int list, int probing, float *times,
            Outcome *outcome) {
    int64_t blocks = 1;
    for (int64_t i = 0; i < n; i++)
        if (events[i].block >= blocks) blocks = events[i].block + 1;
    void **held = calloc((size_t)blocks, sizeof *held);
    Piece *slab = malloc(sizeof *slab);
    *slab = (Piece){0, limit / ALIGNMENT * ALIGNMENT, false, NULL, NULL};
    Allocator from = {list ? NULL : stack_new(NULL, 0, limit, 0), slab};
    *outcome = (Outcome){-1, 0, INT64_MAX};
    for (int64_t i = 0; i < n && outcome->failed < 0; i++) {
        const Event *event = &events[i];
        if (event->kind == ALLOCATE) {
            size_t size = (size_t)(scale * (double)event->size);
            if (from.arena && from.arena->place != event->range) stack_place(from.arena, event->range);
            double start = nanoseconds();
            void *block = serve(&from, size);
            if (times) times[i] = (float)(nanoseconds() - start);
            held[event->block] = block;
            if (!block) outcome->failed = i;
            else if (list) {
                int64_t end = (int64_t)(((Piece *)block)->start + ((Piece *)block)->size);
                if (end > outcome->reserved) outcome->reserved = end;
            }
        } else if (event->kind == RELEASE && held[event->block]) {
            double start = nanoseconds();
            take_back(&from, held[event->block]);
            if (times) times[i] = (float)(nanoseconds() - start);
        } else if (event->kind == OPEN && from.arena) {
            stack_open(from.arena, event->range);
        } else if (event->kind == CLOSE) {
            if (probing && event->range <= BATCH) {
                if (from.arena) stack_place(from.arena, RUN);
                probe(&from, limit, outcome);
            }
            if (from.arena) stack_close(from.arena, NULL, 0);
        }
    }
    if (from.arena) {
        outcome->reserved = from.arena->figures.peak_mapped;
        stack_delete(from.arena);
    }
    while (slab) {
        Piece *above = slab->above;
        free(slab);
        slab = above;
    }
    free(held);
}
