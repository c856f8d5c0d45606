// A program larger than memory, and how fast the kernel swaps it out and in.
//
//   swapper MIB SECONDS [GATE]
//
// Fills MIB of memory with pages that tell what they are and that compress to about half, then visits them in several
// ways for at most SECONDS each. Each visit checks the page. Prints a JSON object for each way:
//
//   fill           writes pages, one after the other: the kernel swaps the first ones out; the rest is written untimed,
//                  and all swapped out, so that what is only read afterwards need not be written again
//   seq_in C       reads pages one after the other, with vm.page-cluster C
//   rand_in C      reads random pages that are not in memory
//   rand_in4 C     four threads do so
//   rand_write C   rewrites random pages that are not in memory: each comes in, and another goes out
//
// After "fill" and before the rest is written, and again before the pages are visited, it waits for somebody to make the
// file GATE, if one is named, and removes it: a disk that is throttled for what is measured need not be for the rest.
//
// `pages_per_s` of fill and seq_in is what the kernel itself counts; of the random ones, pages visited. Latencies are of
// single visits. `cpu` is the share of the time in which the guest's processor was busy, programs and kernel together.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, LOOK = 512, MOST = 1 << 18, THREADS = 4, FILL_LIMITS = 4 };

static uint64_t *memory;
static uint64_t pages;
static double limit_s;
static int vmstat_fd, stat_fd;
static float *times_us;
static atomic_uint samples;
static double until;

// splitmix64 (Steele, Lea, Flood 2014).
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

// The generation stands in the second word, so that rewritten pages can be checked too.
static void fill(uint64_t page, uint64_t generation) {
    uint64_t *at = memory + page * WORDS, x = mix(page << 20 | generation);
    at[0] = page;
    at[1] = generation;
    for (unsigned i = 2; i < WORDS; i++) {
        if (i < WORDS / 2)
            x += 0x9e3779b97f4a7c15u, at[i] = x ^ (x >> 27) * 0x94d049bb133111ebu;
        else
            at[i] = x;
    }
}

static void check(uint64_t page) {
    const uint64_t *at = memory + page * WORDS;
    uint64_t x = mix(page << 20 | at[1]) + (WORDS / 2 - 2) * 0x9e3779b97f4a7c15u;
    if (at[0] != page || at[WORDS / 2 - 1] != (x ^ (x >> 27) * 0x94d049bb133111ebu) || at[WORDS - 1] != x) {
        fprintf(stderr, "page %llu is not what was written\n", (unsigned long long)page);
        exit(3);
    }
}

static uint64_t counted(const char *name) {
    static char text[16384];
    ssize_t length = pread(vmstat_fd, text, sizeof text - 1, 0);
    text[length < 0 ? 0 : length] = 0;
    const char *line = strstr(text, name);
    return line ? strtoull(line + strlen(name), NULL, 10) : 0;
}

// Ticks of 10 ms in which the processors were busy.
static double busy(void) {
    char text[512];
    ssize_t length = pread(stat_fd, text, sizeof text - 1, 0);
    text[length < 0 ? 0 : length] = 0;
    double user, nice, kernel, idle, wait, irq, softirq;
    if (sscanf(text, "cpu %lf %lf %lf %lf %lf %lf %lf", &user, &nice, &kernel, &idle, &wait, &irq, &softirq) != 7)
        return 0;
    return (user + nice + kernel + irq + softirq) / (double)sysconf(_SC_CLK_TCK);
}

static void set_cluster(int cluster) {
    FILE *file = fopen("/proc/sys/vm/page-cluster", "w");
    if (!file || fprintf(file, "%d\n", cluster) < 0 || fclose(file)) {
        perror("vm.page-cluster");
        exit(1);
    }
}

static int by_size(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void report(const char *way, int cluster, double count, double seconds, double busy_s) {
    printf("{\"way\": \"%s\", \"cluster\": %d, \"pages\": %.0f, \"seconds\": %.3f, \"pages_per_s\": %.1f, \"cpu\": %.3f, "
           "\"cpu_us\": %.1f",
           way, cluster, count, seconds, count / seconds, busy_s / seconds, busy_s / (count > 0 ? count : 1) * 1e6);
    unsigned n = samples < MOST ? samples : MOST;
    if (n) {
        qsort(times_us, n, sizeof *times_us, by_size);
        printf(", \"p50_us\": %.1f, \"p99_us\": %.1f", times_us[n / 2], times_us[n - 1 - n / 100]);
    }
    printf("}\n");
    fflush(stdout);
}

static void wait_at(const char *gate) {
    struct timespec pause = {.tv_nsec = 10000000};
    while (gate && unlink(gate))
        nanosleep(&pause, NULL);
}

// Pages that the kernel counts as swapped out but that the device does not have yet are not.
static int64_t swapped_out(void) {
    return (int64_t)counted("pswpout ") - (int64_t)counted("nr_writeback ");
}

// Without it, most pages in memory would never have been written, and each page that comes in would drive one out.
static void swap_out_all(void) {
    struct timespec pause = {.tv_nsec = 10000000};
    if (madvise(memory, pages * PAGE, MADV_PAGEOUT)) {
        perror("MADV_PAGEOUT");
        exit(1);
    }
    while (counted("nr_writeback "))
        nanosleep(&pause, NULL);
}

// Timed from when the kernel swaps in earnest, for FILL_LIMITS times the limit at most.
static void fill_all(const char *gate) {
    int64_t before = swapped_out(), first = before;
    uint64_t page = 0;
    double began = now(), busy_before = busy();
    for (; page < pages && (first == before || now() - began < FILL_LIMITS * limit_s); page++) {
        fill(page, 0);
        if (page % LOOK || first > before)
            continue;
        int64_t out = swapped_out();
        if (out > before + LOOK)
            first = out, began = now(), busy_before = busy();
    }
    report("fill", -1, (double)(swapped_out() - first), now() - began, busy() - busy_before);
    wait_at(gate);
    for (; page < pages; page++)
        fill(page, 0);
    swap_out_all();
    printf("{\"way\": \"filled\"}\n");
    fflush(stdout);
    wait_at(gate);
}

static void visit_in_order(int cluster) {
    set_cluster(cluster);
    uint64_t before = counted("pswpin ");
    double began = now(), busy_before = busy(), end = began + limit_s;
    // From another place each time, so that what the last visit brought in does not count.
    static uint64_t page;
    for (uint64_t n = 0; n < pages && (n % 64 || now() < end); n++, page = (page + 1) % pages)
        check(page);
    report("seq_in", cluster, (double)(counted("pswpin ") - before), now() - began, busy() - busy_before);
}

struct visitor {
    pthread_t thread;
    uint64_t seed;
    int write;
};

static void *visit_at_random(void *argument) {
    struct visitor *visitor = argument;
    while (now() < until && samples < MOST) {
        uint64_t page = (visitor->seed = mix(visitor->seed)) % pages;
        unsigned char resident;
        if (mincore(memory + page * WORDS, PAGE, &resident) || resident & 1)
            continue;
        double began = now();
        check(page);
        if (visitor->write)
            fill(page, memory[page * WORDS + 1] + 1);
        unsigned at = atomic_fetch_add(&samples, 1);
        if (at < MOST)
            times_us[at] = (float)((now() - began) * 1e6);
    }
    return NULL;
}

static void visit_randomly(const char *way, int cluster, int threads, int write) {
    static struct visitor visitors[THREADS];
    static uint64_t seed = 1;
    set_cluster(cluster);
    samples = 0;
    double began = now(), busy_before = busy();
    until = began + limit_s;
    for (int i = 0; i < threads; i++) {
        visitors[i].seed = mix(seed++);
        visitors[i].write = write;
        if (i > 0 && pthread_create(&visitors[i].thread, NULL, visit_at_random, &visitors[i])) {
            fprintf(stderr, "no thread\n");
            exit(1);
        }
    }
    visit_at_random(&visitors[0]);
    for (int i = 1; i < threads; i++)
        pthread_join(visitors[i].thread, NULL);
    report(way, cluster, samples, now() - began, busy() - busy_before);
    samples = 0;
}

int main(int argc, char **argv) {
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: swapper MIB SECONDS [GATE]\n");
        return 2;
    }
    pages = strtoull(argv[1], NULL, 10) * 256;
    limit_s = strtod(argv[2], NULL);
    vmstat_fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
    stat_fd = open("/proc/stat", O_RDONLY | O_CLOEXEC);
    times_us = malloc(MOST * sizeof *times_us);
    if (vmstat_fd < 0 || stat_fd < 0 || !times_us)
        return 1;
    // What measures is not to be swapped itself.
    memset(times_us, 0, MOST * sizeof *times_us);
    if (mlockall(MCL_CURRENT))
        perror("mlockall");
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "no memory: %s\n", strerror(errno));
        return 1;
    }
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    set_cluster(3);
    fill_all(argv[3]);
    for (int cluster = 3; cluster >= 0; cluster -= 3)
        visit_in_order(cluster);
    for (int cluster = 3; cluster >= 0; cluster -= 3) {
        visit_randomly("rand_in", cluster, 1, 0);
        visit_randomly("rand_in4", cluster, THREADS, 0);
    }
    visit_randomly("rand_write", 3, 1, 1);
    set_cluster(3);
    return 0;
}
