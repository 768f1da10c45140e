// Distributes work over threads, each with its own scratch memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace featkd {

// Calls `body(context)` in one to `count` threads at the same time.
using ThreadRunner = void (*)(int count, void (*body)(void* context), void* context);

constexpr std::align_val_t ALIGNMENT{64};

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, ALIGNMENT); }
};

// Calls body(index, scratch) for every index below `count`. A thread takes the next index when it
// is done with one; each thread has its own scratch memory of `bytes`. Throws std::bad_alloc.
template <class Body>
void parallel_for_each(int64_t count, int threads, ThreadRunner run_threads, size_t bytes,
                       const Body& body) {
  struct Queue {
    const Body& body;
    int64_t count;
    size_t bytes;
    std::unique_ptr<char, AlignedDelete> memory;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
  };
  if (threads > count) threads = int(count);
  if (threads < 1) return;
  bytes = (bytes + 63) / 64 * 64;
  // Allocate for all threads before any of them starts, so that a failure leaves no partial result.
  char* memory = static_cast<char*>(::operator new(bytes * size_t(threads), ALIGNMENT));
  Queue queue{body, count, bytes, std::unique_ptr<char, AlignedDelete>(memory)};
  const auto work = [](void* context) {
    Queue& own = *static_cast<Queue*>(context);
    char* scratch = own.memory.get() + size_t(own.workers.fetch_add(1)) * own.bytes;
    int64_t index;
    while ((index = own.next.fetch_add(1)) < own.count) own.body(index, scratch);
  };
  if (threads == 1)
    work(&queue);
  else
    run_threads(threads, work, &queue);
}

}  // namespace featkd
