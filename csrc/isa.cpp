#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace featkd {

Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const char* limit = std::getenv("FEATKD_ISA");
    const bool below_avx512 = limit && std::strcmp(limit, "avx512") != 0;
    const bool below_avx2 = below_avx512 && std::strcmp(limit, "avx2") != 0;
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    if (has_avx512 && !below_avx512) return Isa::avx512;
    if (has_avx2 && !below_avx2) return Isa::avx2;
#endif
    return Isa::portable;
  }();
  return chosen;
}

}  // namespace featkd
