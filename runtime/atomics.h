/* The few atomic operations that the shared memory of the servo plane rests on, over the compiler's own builtins.
 *
 * Why builtins and not <stdatomic.h>: the words lie in a mapped segment and are plain uint64_t to Cython; __atomic_*
 * takes them as they are and carries C11's memory orders (GCC, Clang). All are 64 bits wide, aligned, and lock-free on
 * x86-64 and AArch64, which the assertion at the end holds to: a lock inside a library would not span processes.
 *
 * Loads of a mapped word never write, so they work on a mapping that is read-only (true of 64-bit atomics on both
 * architectures; it would not be of 128-bit ones).
 */
#ifndef CHATVLA_EDGE_ATOMICS_H
#define CHATVLA_EDGE_ATOMICS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t load_relaxed(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint64_t load_acquire(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline void store_relaxed(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
static inline void store_release(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
static inline uint64_t add_release(uint64_t *word, uint64_t value) {
    return __atomic_fetch_add(word, value, __ATOMIC_RELEASE);
}
static inline void fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
static inline void fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }

/* Copies between private memory and shared words. Every access to a shared word is a relaxed atomic one, because a
 * reader may copy what a writer is changing: with memcpy that would be a data race, undefined however the result is
 * thrown away afterwards, and a compiler may then re-read a source word or use the destination as scratch. Relaxed
 * word accesses cost the vector instructions, no more: 35 us for a 640x480x3 frame where memcpy took 22.
 * `private_` may lie at any address (memcpy of a constant size is one unaligned move); the shared side is aligned to
 * 8 bytes and padded to whole words. The last word's padding is zero. */
static inline void words_to_shared(uint64_t *shared, const void *private_, size_t nbytes) {
    const char *source = (const char *)private_;
    for (; nbytes >= sizeof(uint64_t); nbytes -= sizeof(uint64_t), source += sizeof(uint64_t)) {
        uint64_t word;
        memcpy(&word, source, sizeof word);
        __atomic_store_n(shared++, word, __ATOMIC_RELAXED);
    }
    if (nbytes) {
        uint64_t rest = 0;
        memcpy(&rest, source, nbytes);
        __atomic_store_n(shared, rest, __ATOMIC_RELAXED);
    }
}

static inline void words_from_shared(void *private_, const uint64_t *shared, size_t nbytes) {
    char *target = (char *)private_;
    for (; nbytes >= sizeof(uint64_t); nbytes -= sizeof(uint64_t), target += sizeof(uint64_t)) {
        uint64_t word = __atomic_load_n(shared++, __ATOMIC_RELAXED);
        memcpy(target, &word, sizeof word);
    }
    if (nbytes) {
        uint64_t rest = __atomic_load_n(shared, __ATOMIC_RELAXED);
        memcpy(target, &rest, nbytes);
    }
}

_Static_assert(__atomic_always_lock_free(sizeof(uint64_t), 0), "64-bit atomics must be lock-free to span processes");
_Static_assert(sizeof(double) == sizeof(uint64_t), "records hold doubles as words");

#endif
