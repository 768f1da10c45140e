// A team of CPU threads, for tests with ThreadSanitizer. ThreadSanitizer distinguishes the phases
// of a std::barrier. A reused pthread barrier would hide most missing barriers.
#pragma once

#include <barrier>
#include <thread>
#include <vector>

#include "team.h"

namespace featkd::FEATKD_ISA {

struct ThreadTeam : VectorLanes<16> {
  static constexpr int ROWS = 2, GRAM_ROWS = 4, UNROLL = 1, PACK_DEPTH = 8;
  static constexpr bool STAGED = true;

  int rank_, size_, dropped;
  std::barrier<>* meeting;

  int rank() const { return rank_; }
  int size() const { return size_; }
  template <int NUMBER>
  void barrier(At<NUMBER>) const {
    if (NUMBER != dropped) meeting->arrive_and_wait();
  }
};

// Runs body(team) in `size` threads. Barrier number `dropped` does nothing.
template <class Body>
void run_team(int size, int dropped, const Body& body) {
  std::barrier<> meeting(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; rank++)
    threads.emplace_back([&, rank] {
      ThreadTeam team;
      team.rank_ = rank, team.size_ = size, team.dropped = dropped, team.meeting = &meeting;
      body(team);
    });
  for (auto& thread : threads) thread.join();
}

}  // namespace featkd::FEATKD_ISA
