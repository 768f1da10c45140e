// The instruction sets that the CPU's kernels are compiled for, and the choice among them.
#pragma once

namespace featkd {

enum class Isa { portable, avx2, avx512 };

// The best that this processor has, or at most the one named by FEATKD_ISA (avx512, avx2,
// portable); looked up once.
Isa isa();

}  // namespace featkd

// The one of name_portable, name_avx2 and name_avx512, three functions or constants of `type`, for
// this processor.
#if defined(__x86_64__)
#define FEATKD_FOR_EACH_ISA(type, name) extern type name##_portable, name##_avx2, name##_avx512;
#define FEATKD_CHOSEN(name)                                 \
  (::featkd::isa() == ::featkd::Isa::avx512 ? name##_avx512 \
   : ::featkd::isa() == ::featkd::Isa::avx2 ? name##_avx2   \
                                            : name##_portable)
#else
#define FEATKD_FOR_EACH_ISA(type, name) extern type name##_portable;
#define FEATKD_CHOSEN(name) (name##_portable)
#endif
