// The counters of memory traffic, from what the lanes of each warp accessed together.
#pragma once
#include "machine.h"

// What each warp instruction touched: 32-byte sectors of global memory, 4-byte banks of shared.
inline void Block::flush_log() {
  u64* totals = worker.totals;
  std::stable_sort(log.begin(), log.end(), [](const Logged& a, const Logged& b) {
    return std::tie(a.warp, a.site, a.run) < std::tie(b.warp, b.site, b.run);
  });
  for (size_t i = 0; i < log.size();) {
    size_t end = i;
    while (end < log.size() && log[end].warp == log[i].warp && log[end].site == log[i].site && log[end].run == log[i].run) end++;
    if ((log[i].site & 3) == 0) {
      // wide accesses go in as many turns as it takes to move 128 bytes each
      const size_t lanes = std::max<size_t>(1, 128 / std::max(log[i].bytes, 4u));
      totals[T_SHARED_REQUESTS]++;
      for (size_t part = i; part < end; part += lanes) {
        std::vector<u64> words;
        for (size_t j = part; j < std::min(end, part + lanes); j++)
          for (u64 word = log[j].address / 4; word <= (log[j].address + log[j].bytes - 1) / 4; word++) words.push_back(word);
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
        for (u64 sector = log[j].address / 32; sector <= (log[j].address + log[j].bytes - 1) / 32; sector++) sectors.push_back(sector);
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
