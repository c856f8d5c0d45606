// What a processor gets done: four small programs of the kinds that programs and kernels are made of, each timed. The
// same binary runs on the host and in a guest, so the quotient of their times is how much slower the guest's is.
//
//   cpu
//
// Prints a JSON object with the seconds of
//   sort       qsort() of numbers: calls and branches that cannot be foretold
//   compress   finds repetitions with a hash table, as LZ4 does: loads and stores of all sizes
//   interpret  a loop over the instructions of a small machine, as interpreters do: jumps to anywhere
//   pipe       a page through a pipe to oneself: system calls
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { NUMBERS = 1 << 16, TEXT = 1 << 20, HASHES = 1 << 12, STEPS = 1 << 21, PAGE = 4096, PAGES = 4000 };

static uint64_t numbers[NUMBERS];
static uint8_t text[TEXT + 8], page[PAGE];

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

static uint64_t sort(void) {
    for (uint64_t i = 0; i < NUMBERS; i++)
        numbers[i] = mix(i);
    qsort(numbers, NUMBERS, sizeof *numbers, order);
    return numbers[NUMBERS / 2];
}

// Words of two to nine letters out of a vocabulary of a thousand.
static void write_text(void) {
    for (uint64_t at = 0, n = 0; at < TEXT; n++) {
        uint64_t word = mix(mix(n) % 1000);
        for (unsigned left = 2 + word % 8; left && at < TEXT; left--, word >>= 5)
            text[at++] = (uint8_t)('a' + word % 26);
        if (at < TEXT)
            text[at++] = ' ';
    }
}

static uint64_t compress(void) {
    static uint32_t seen[HASHES];
    memset(seen, 0, sizeof seen);
    uint64_t out = 0;
    for (uint32_t at = 1; at < TEXT - 16;) {
        uint32_t word, other, length = 4;
        memcpy(&word, text + at, 4);
        uint32_t *place = &seen[word * 2654435761u >> 20];
        uint32_t before = *place;
        *place = at;
        memcpy(&other, text + before, 4);
        if (word != other) {
            at++, out++;
            continue;
        }
        while (at + length < TEXT && text[before + length] == text[at + length])
            length++;
        at += length, out += 3;
    }
    return out;
}

static uint64_t interpret(void) {
    static uint8_t program[251];
    for (unsigned i = 0; i < sizeof program; i++)
        program[i] = (uint8_t)(mix(i) % 8);
    uint64_t stack[16] = {1, 2, 3}, a = 1;
    unsigned top = 3, at = 0;
    for (unsigned step = 0; step < STEPS; step++) {
        switch (program[at]) {
        case 0: a += stack[top]; break;
        case 1: a ^= a << 7; break;
        case 2: stack[top = (top + 1) % 16] = a; break;
        case 3: a -= stack[top = (top + 15) % 16]; break;
        case 4: a = a >> 3 | a << 61; break;
        case 5: at = (at + (a & 7)) % sizeof program; break;
        case 6: stack[top] ^= a; break;
        default: a++; break;
        }
        at = (at + 1) % sizeof program;
    }
    return a;
}

static uint64_t through_a_pipe(void) {
    int ends[2];
    uint64_t moved = 0;
    if (pipe(ends))
        exit(1);
    for (unsigned i = 0; i < PAGES; i++) {
        if (write(ends[1], page, PAGE) != PAGE)
            exit(1);
        moved += (uint64_t)read(ends[0], page, PAGE);
    }
    close(ends[0]);
    close(ends[1]);
    return moved;
}

int main(void) {
    static const struct {
        const char *name;
        uint64_t (*run)(void);
    } programs[] = {{"sort", sort}, {"compress", compress}, {"interpret", interpret}, {"pipe", through_a_pipe}};
    write_text();
    uint64_t result = 0;
    printf("{");
    for (unsigned i = 0; i < sizeof programs / sizeof *programs; i++) {
        programs[i].run(); // the first time finds its memory untouched
        double began = now();
        result ^= programs[i].run();
        printf("\"%s\": %.6f, ", programs[i].name, now() - began);
    }
    // Printed, so that no compiler leaves the work out.
    printf("\"result\": %llu}\n", (unsigned long long)result);
    return 0;
}
