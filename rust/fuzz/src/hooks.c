/* What libFuzzer lacks for C that gcc compiled: coverage, and how much memory is in use. */

#include <stddef.h>
#include <stdint.h>

int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void *, size_t),
                                              void (*)(const volatile void *));
size_t __sanitizer_get_allocated_size(const volatile void *);

/* libFuzzer counts these like its own. */
__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t counters[1 << 16];

/* gcc calls it at every edge; libFuzzer has one that only warns. */
void __wrap___sanitizer_cov_trace_pc(void) {
  uintptr_t at = (uintptr_t)__builtin_return_address(0);
  uint8_t *counter = &counters[(at ^ at >> 16) & (sizeof counters - 1)];
  *counter += *counter < 255;
}

void __sanitizer_cov_trace_cmpf(float a, float b) { (void)a, (void)b; }
void __sanitizer_cov_trace_cmpd(double a, double b) { (void)a, (void)b; }

static size_t live, peak;

static void allocated(const volatile void *at, size_t size) {
  (void)at;
  size_t now = __atomic_add_fetch(&live, size, __ATOMIC_RELAXED);
  if (now > __atomic_load_n(&peak, __ATOMIC_RELAXED))
    __atomic_store_n(&peak, now, __ATOMIC_RELAXED);
}

static void freed(const volatile void *at) {
  if (at)
    __atomic_sub_fetch(&live, __sanitizer_get_allocated_size(at), __ATOMIC_RELAXED);
}

void meter_start(void) {
  static int installed;
  if (!installed)
    installed = __sanitizer_install_malloc_and_free_hooks(allocated, freed);
  live = peak = (size_t)1 << 40;
}

/* Most bytes that were in use at once since the start, beyond those at the start. */
size_t meter_peak(void) { return peak - ((size_t)1 << 40); }
