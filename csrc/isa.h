// Instruction sets that the CPU kernels are compiled for, and the selection at run time.
#pragma once

namespace featkd {

enum class Isa { portable, avx2, avx512 };

// Returns the best instruction set of this processor, but none better than FEATKD_ISA (avx512, avx2
// or portable) if it is set. The result is cached.
Isa isa();

}  // namespace featkd

// Each kernel exists as name_portable, name_avx2 and name_avx512, three functions or constants of
// `type`. The first macro declares them; the second one selects the one for this processor.
#if defined(__x86_64__)
#define FEATKD_DECLARE_FOR_EACH_ISA(type, name) \
  extern type name##_portable, name##_avx2, name##_avx512;
#define FEATKD_FOR_THIS_CPU(name)                           \
  (::featkd::isa() == ::featkd::Isa::avx512 ? name##_avx512 \
   : ::featkd::isa() == ::featkd::Isa::avx2 ? name##_avx2   \
                                            : name##_portable)
#else
#define FEATKD_DECLARE_FOR_EACH_ISA(type, name) extern type name##_portable;
#define FEATKD_FOR_THIS_CPU(name) (name##_portable)
#endif
