#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace featkd {

Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const char* most = std::getenv("FEATKD_ISA");
    const bool no_512 = most && std::strcmp(most, "avx512") != 0;
    const bool no_2 = no_512 && std::strcmp(most, "avx2") != 0;
    __builtin_cpu_init();
    const bool has_2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_512 = has_2 && __builtin_cpu_supports("avx512f") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_512 && !no_512) return Isa::avx512;
    if (has_2 && !no_2) return Isa::avx2;
#endif
    return Isa::portable;
  }();
  return chosen;
}

}  // namespace featkd
