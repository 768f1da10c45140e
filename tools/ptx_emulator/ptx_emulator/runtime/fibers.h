// Fibers: cooperative threads with stacks of their own, one per CUDA thread.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

#include "thread.h"

// PTX_EMULATOR_PORTABLE_FIBERS selects the portable version on x86-64, for tests.
#if defined(__x86_64__) && !defined(PTX_EMULATOR_PORTABLE_FIBERS)

// in engine.cpp
extern "C" HIDDEN void ptx_emulator_switch(void** save, void* to);
struct Context {
  void* pointer = nullptr;
  void start(char* stack, size_t bytes, void (*entry)()) {
    void** top = (void**)(((size_t)stack + bytes) & ~(size_t)15);
    *--top = nullptr;  // aligns the stack of the entry as after a call
    *--top = (void*)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    pointer = top;
  }
};
inline void switch_context(Context& from, Context& to) {
  ptx_emulator_switch(&from.pointer, to.pointer);
}

#else
#include <ucontext.h>

struct Context {
  ucontext_t state;
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = bytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

// Memory of the stacks of a cluster. Pages are allocated when used, and reused by later clusters.
class Stacks {
 public:
  Stacks(size_t count, size_t bytes) : bytes_(bytes), total_(count * bytes) {
    memory_ = (char*)mmap(nullptr, total_, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == (char*)MAP_FAILED) throw std::bad_alloc();
  }
  ~Stacks() { munmap(memory_, total_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  char* operator[](size_t i) { return memory_ + i * bytes_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, total_;
  char* memory_;
};
