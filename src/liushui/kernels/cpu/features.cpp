// Which of the compiled instruction sets this processor, and its system, can run.
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define LS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

#if defined(__x86_64__)
bool bit(unsigned word, int number) { return word >> number & 1; }

struct Features {
  bool avx2 = false, avx512 = false, avx512bf16 = false, amx = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return;  // OSXSAVE
    const bool fma = bit(c, 12), f16c = bit(c, 29), avx = bit(c, 28);
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = avx && fma && f16c && bit(b, 5) && (low & 0x6) == 0x6;
    // F, DQ, BW, VL; VNNI
    avx512 = avx2 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11) && (low & 0xe6) == 0xe6;
    const bool vbmi = bit(c, 1), tiles = bit(d, 22) && bit(d, 24) && bit(d, 25);  // BF16, TILE, INT8
    avx512bf16 = avx512 && vbmi && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
    amx = avx512bf16 && tiles && (low & 0x60000) == 0x60000 && tiles_granted();
  }

  // Linux keeps the tiles' state only for processes that have asked; threads started later inherit the permission.
  static bool tiles_granted() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }
};
#endif

}  // namespace

LS_EXPORT int liushui_supports(const char* isa) {
#if defined(__x86_64__)
  static const Features features;
  if (!strcmp(isa, "avx2")) return features.avx2;
#if defined(LS_EMULATE)  // software stands in for what the machine lacks
  if (!strncmp(isa, "avx512", 6) || !strcmp(isa, "amx")) return features.avx2;
#endif
  if (!strcmp(isa, "avx512")) return features.avx512;
  if (!strcmp(isa, "avx512bf16")) return features.avx512bf16;
  if (!strcmp(isa, "amx")) return features.amx;
#endif
  return !strcmp(isa, "generic");
}
