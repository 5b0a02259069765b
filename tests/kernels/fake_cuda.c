/* CUDA's driver as far as the stack allocator calls it, over host memory: a chunk is a piece of one memory file, so that
 * two mappings of one chunk would show each other's contents. It keeps a log of what orders streams. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2 };

static int file = -1;
static uint64_t created, chunk_size, event;
static uint64_t mapped[64]; /* where each chunk is; 0: nowhere */
static char events[4096];

static void *pointer(uint64_t address) { return (void *)(uintptr_t)address; }

static void record(const char *format, void *stream) {
    size_t length = strlen(events);
    snprintf(events + length, sizeof events - length, format, (int)(uintptr_t)stream);
}

const char *fake_log(void) { return events; }

int cuInit(unsigned flags) { return flags ? INVALID : OK; }

int cuGetErrorString(int status, const char **text) {
    *text = status == OUT_OF_MEMORY ? "out of memory" : "invalid value";
    return OK;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? OK : INVALID;
}

/* more than there is: others hold the rest */
int cuDeviceTotalMem_v2(size_t *size, int device) {
    *size = 64 << 20;
    return device;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 102 && !getenv("FAKE_CUDA_HAS_NO_VIRTUAL_MEMORY");
    return device;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = events;
    return device;
}

int cuCtxPushCurrent_v2(void *context) { return context == events ? OK : INVALID; }

int cuCtxPopCurrent_v2(void **context) { return context ? INVALID : OK; }

int cuCtxSynchronize(void) {
    record("fence;", NULL);
    return OK;
}

int cuEventCreate(void **made, unsigned flags) {
    *made = &event;
    return flags == 2 ? OK : INVALID;
}

int cuEventRecord(void *which, void *stream) {
    record("record %d;", stream);
    return which == &event ? OK : INVALID;
}

int cuStreamWaitEvent(void *stream, void *which, unsigned flags) {
    record("wait %d;", stream);
    return which == &event && !flags ? OK : INVALID;
}

int cuMemAddressReserve(uint64_t *address, size_t size, size_t alignment, uint64_t hint, unsigned long long flags) {
    void *base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *address = (uint64_t)(uintptr_t)base;
    return base == MAP_FAILED || alignment || hint || flags ? INVALID : OK;
}

int cuMemAddressFree(uint64_t address, size_t size) { return munmap(pointer(address), size); }

int cuMemCreate(uint64_t *handle, size_t size, const void *property, unsigned long long flags) {
    if (file < 0) file = memfd_create("fake_cuda", 0);
    if (!property || flags || (chunk_size && size != chunk_size)) return INVALID;
    if ((created + 1) * size > 32 << 20) return OUT_OF_MEMORY;
    chunk_size = size;
    *handle = created++;
    return ftruncate(file, (off_t)(created * size)) ? OUT_OF_MEMORY : OK;
}

int cuMemRelease(uint64_t handle) { return mapped[handle] ? INVALID : OK; }

int cuMemMap(uint64_t address, size_t size, size_t offset, uint64_t handle, unsigned long long flags) {
    if (size != chunk_size || offset || flags || mapped[handle]) return INVALID;
    mapped[handle] = address;
    void *at = mmap(pointer(address), size, PROT_NONE, MAP_SHARED | MAP_FIXED, file, (off_t)(handle * size));
    return at == MAP_FAILED ? INVALID : OK;
}

/* one mapping at a time */
int cuMemUnmap(uint64_t address, size_t size) {
    uint64_t handle = 0;
    while (handle < created && mapped[handle] != address) handle++;
    if (handle == created || size != chunk_size) abort();
    mapped[handle] = 0;
    void *at = mmap(pointer(address), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return at == MAP_FAILED ? INVALID : OK;
}

int cuMemSetAccess(uint64_t address, size_t size, const void *access, size_t count) {
    return access && count == 1 ? mprotect(pointer(address), size, PROT_READ | PROT_WRITE) : INVALID;
}
