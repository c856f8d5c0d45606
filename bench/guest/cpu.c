// What a processor gets done: three small programs, each timed. The same binary runs on the host and in a guest, so the
// quotient of their times is how much slower the guest's processor is.
//
//   cpu
//
// Prints a JSON object: seconds of `sort` (branches), `mix` (multiplications and shifts) and `chase` (dependent loads
// from 1 MiB).
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { SORTED = 1 << 17, MIXED = 1 << 23, CHASED = 1 << 17, STEPS = 1 << 22 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

// splitmix64 (Steele, Lea, Flood 2014).
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static int order(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

int main(void) {
    uint64_t *memory = malloc((SORTED > CHASED ? SORTED : CHASED) * sizeof *memory);
    if (!memory)
        return 1;
    for (uint64_t i = 0; i < SORTED; i++)
        memory[i] = mix(i);
    double began = now();
    qsort(memory, SORTED, sizeof *memory, order);
    double sorted = now() - began;

    uint64_t sum = memory[SORTED / 2];
    began = now();
    for (uint64_t i = 0; i < MIXED; i++)
        sum = mix(sum + i);
    double mixed = now() - began;

    // One cycle through all of it (Sattolo 1986).
    for (uint64_t i = 0; i < CHASED; i++)
        memory[i] = i;
    for (uint64_t i = CHASED - 1; i > 0; i--) {
        uint64_t j = mix(i) % i, other = memory[i];
        memory[i] = memory[j];
        memory[j] = other;
    }
    uint64_t at = sum % CHASED;
    began = now();
    for (int i = 0; i < STEPS; i++)
        at = memory[at];
    double chased = now() - began;

    // The result is printed, so that no compiler leaves the work out.
    printf("{\"sort\": %.6f, \"mix\": %.6f, \"chase\": %.6f, \"result\": %llu}\n", sorted, mixed, chased,
           (unsigned long long)(sum ^ at));
    return 0;
}
