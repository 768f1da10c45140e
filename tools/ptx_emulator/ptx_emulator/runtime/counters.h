// Counters of memory traffic, from the accesses that the lanes of a warp make together.
#pragma once
#include "machine.h"

// Counts, for each warp instruction, sectors of global memory (32 bytes) and passes over the banks
// of shared memory (32 banks of 4 bytes).
inline void Block::flush_log() {
  u64* totals = worker.totals;
  std::stable_sort(log.begin(), log.end(), [](const LoggedAccess& a, const LoggedAccess& b) {
    const u32 warp_a = a.thread / 32, warp_b = b.thread / 32;
    return std::tie(warp_a, a.site, a.run, a.thread) < std::tie(warp_b, b.site, b.run, b.thread);
  });
  for (size_t i = 0; i < log.size();) {
    size_t end = i;
    while (end < log.size() && log[end].thread / 32 == log[i].thread / 32 &&
           log[end].site == log[i].site && log[end].run == log[i].run)
      end++;
    if ((log[i].site & 3) == 0) {
      // wide accesses are split into groups of adjacent lanes that access 128 bytes
      const u32 lanes = std::max(1u, 128 / std::max(log[i].bytes, 4u));
      totals[T_SHARED_REQUESTS]++;
      for (size_t part = i, next; part < end; part = next) {
        std::vector<u64> words;
        const u32 turn = log[part].thread / lanes;
        for (next = part; next < end && log[next].thread / lanes == turn; next++)
          for (u64 word = log[next].address / 4;
               word <= (log[next].address + log[next].bytes - 1) / 4; word++)
            words.push_back(word);
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        u32 banks[32] = {}, most = 0;
        for (u64 word : words) most = std::max(most, ++banks[word % 32]);
        totals[T_SHARED_WAVEFRONTS] += most;
        totals[T_SHARED_CONFLICTS] += most - 1;
      }
    } else {
      std::vector<u64> sectors;
      for (size_t j = i; j < end; j++)
        for (u64 sector = log[j].address / 32; sector <= (log[j].address + log[j].bytes - 1) / 32;
             sector++)
          sectors.push_back(sector);
      std::sort(sectors.begin(), sectors.end());
      const u64 distinct = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
      const bool read = (log[i].site & 3) == 1;
      totals[read ? T_READ_SECTORS : T_WRITE_SECTORS] += distinct;
      totals[read ? T_READ_REQUESTS : T_WRITE_REQUESTS]++;
    }
    i = end;
  }
  log.clear();
}
