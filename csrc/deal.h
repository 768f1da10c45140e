// Deals work to threads, each with scratch memory of its own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace featkd {

// Runs `body(context)` in up to `count` threads at once, at least one.
using Parallel = void (*)(int count, void (*body)(void* context), void* context);

constexpr std::align_val_t ALIGNMENT{64};

struct Release {
  void operator()(char* p) const { ::operator delete(p, ALIGNMENT); }
};

// Calls body(index, scratch) for every index below `count`, in threads that take the next one as
// they come free, each with its own scratch memory of `bytes`.
template <class Body>
void deal(int64_t count, int threads, Parallel parallel, size_t bytes, const Body& body) {
  struct Queue {
    const Body& body;
    int64_t count;
    size_t bytes;
    std::unique_ptr<char, Release> memory;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
  };
  if (threads > count) threads = int(count);
  if (threads < 1) return;
  bytes = (bytes + 63) / 64 * 64;
  // all of it before any thread starts: where there is too little, nothing has run
  char* memory = static_cast<char*>(::operator new(bytes * size_t(threads), ALIGNMENT));
  Queue queue{body, count, bytes, std::unique_ptr<char, Release>(memory)};
  const auto work = [](void* context) {
    Queue& own = *static_cast<Queue*>(context);
    char* scratch = own.memory.get() + size_t(own.workers.fetch_add(1)) * own.bytes;
    int64_t index;
    while ((index = own.next.fetch_add(1)) < own.count) own.body(index, scratch);
  };
  if (threads == 1)
    work(&queue);
  else
    parallel(threads, work, &queue);
}

}  // namespace featkd
