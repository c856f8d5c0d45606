// Fills memory with a pattern, so that the kernel must swap, and verifies it, pass after pass.
//
//   memory MIB SECONDS STOP_FILE PAUSE_MS
//
// Runs until SECONDS have passed or STOP_FILE exists, then verifies every page once more. Exit code 0: every page
// was intact in every pass; 3: one was not (named on stderr); 1: there was not enough memory to start.
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, BATCH = 256 };

// splitmix64 (Steele, Lea, Flood 2014): the word at (page, generation, index) is computable in any order.
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Every second word is the same over the page, so that LZ4 has something to gain; every 16th page is all one word.
static uint64_t word(uint64_t page, uint64_t generation, unsigned index) {
    uint64_t seed = mix(page * 1000003 + generation);
    if (page % 16 == 0 || index % 64 >= 24)
        return seed;
    return mix(seed + index);
}

static void fill(uint64_t *at, uint64_t page, uint64_t generation) {
    for (unsigned i = 0; i < WORDS; i++)
        at[i] = word(page, generation, i);
}

static int intact(const uint64_t *at, uint64_t page, uint64_t generation) {
    for (unsigned i = 0; i < WORDS; i++) {
        if (at[i] != word(page, generation, i)) {
            fprintf(stderr, "page %llu is not intact: word %u is %016llx, should be %016llx (generation %llu)\n",
                    (unsigned long long)page, i, (unsigned long long)at[i],
                    (unsigned long long)word(page, generation, i), (unsigned long long)generation);
            return 0;
        }
    }
    return 1;
}

// In pass n every page of residue n modulo 4 is rewritten, so that swapped copies become stale and must be replaced,
// not only read back. This is how often `page` was rewritten before `pass`.
static uint64_t rewrites(uint64_t page, uint64_t pass) {
    uint64_t residue = page % 4 ? page % 4 : 4;
    return pass <= residue ? 0 : (pass - 1 - residue) / 4 + 1;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void pause_ms(long ms) {
    struct timespec t = {ms / 1000, (ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

static int ended(double until, const char *stop_file) {
    return now() >= until || access(stop_file, F_OK) == 0;
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: memory MIB SECONDS STOP_FILE PAUSE_MS\n");
        return 2;
    }
    uint64_t pages = strtoull(argv[1], NULL, 10) * 256;
    double until = now() + strtod(argv[2], NULL);
    const char *stop_file = argv[3];
    long pause = strtol(argv[4], NULL, 10);
    uint64_t *memory =
        mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "no memory: %s\n", strerror(errno));
        return 1;
    }
    // Transparent huge pages would be split on the way to swap; the pattern is per small page.
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (uint64_t page = 0; page < pages; page++)
        fill(memory + page * WORDS, page, 0);
    printf("filled %llu pages\n", (unsigned long long)pages);

    uint64_t verified = 0;
    int stop = 0;
    for (uint64_t pass = 1; !stop; pass++) {
        // The pass that begins after the end is the last one: it only reads.
        int last = stop = ended(until, stop_file);
        for (uint64_t page = 0; page < pages; page++) {
            uint64_t *at = memory + page * WORDS;
            uint64_t generation = rewrites(page, pass);
            if (!intact(at, page, generation))
                return 3;
            verified++;
            if (last)
                continue;
            if (pass % 4 == page % 4)
                fill(at, page, generation + 1);
            if (page % BATCH == BATCH - 1 && !ended(until, stop_file))
                pause_ms(pause);
        }
        printf("pass %llu: %llu pages intact\n", (unsigned long long)pass, (unsigned long long)pages);
    }
    printf("verified %llu pages, all intact\n", (unsigned long long)verified);
    return 0;
}
