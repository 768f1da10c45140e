// Copies of a box of a tensor that a tensor map describes. In shared memory the rows of the box are
// contiguous and swizzled; elements outside of the tensor are zero.
#pragma once
#include "bulk.h"

// Written by Python as TensorMap.pack of tensor_map.py.
struct TensorMap {
  u64 address;
  u32 rank, item;
  u64 sizes[5], strides[5];  // innermost first, strides in bytes
  u32 box[5], swizzle, magic, unused;
};
static_assert(sizeof(TensorMap) == 128, "as long as a CUtensorMap");
constexpr u32 kTensorMagic = 0x70616d74;

inline const TensorMap* find_map(Thread& t, u64 address, u32 rank, u32 line) {
  const auto* map = (const TensorMap*)address;
  if (address && address >> 56 == 0 && map->magic == kTensorMagic && map->rank == rank) return map;
  if constexpr (kCheck) report(t, BAD_TENSOR_MAP, line);
  return nullptr;
}

inline u32 box_bytes(const TensorMap& map) {
  u32 bytes = map.item;
  for (u32 size : map.box) bytes *= size;
  return bytes;
}

// Calls row(byte offset in the box, address in the tensor, bytes) for the part of each row of the
// box that lies inside of the tensor.
template <class F>
inline void for_each_row(const TensorMap& map, const s32* at, F row) {
  const u32 width = map.box[0] * map.item;
  const s64 first = std::max<s64>(0, -(s64)at[0]);
  const s64 last = std::min<s64>(map.box[0], (s64)map.sizes[0] - at[0]);
  const u32 rows = box_bytes(map) / width;
  for (u32 i = 0; i < rows && first < last; i++) {
    u64 address = map.address + (at[0] + first) * map.item;
    bool inside = true;
    for (u32 d = 1, rest = i; d < map.rank; rest /= map.box[d++]) {
      const s64 position = (s64)at[d] + rest % map.box[d];
      inside &= position >= 0 && position < (s64)map.sizes[d];
      address += position * map.strides[d];
    }
    if (inside) row(i * width + (u32)first * map.item, address, (u32)(last - first) * map.item);
  }
}

// Permutes the 16-byte units within each 8 rows of the swizzle pattern.
inline std::vector<u8> swizzled(const std::vector<u8>& bytes, u32 row_bytes) {
  if (!row_bytes) return bytes;
  std::vector<u8> result(bytes.size());
  for (u32 at = 0; at < bytes.size(); at += 16)
    memcpy(&result[at ^ (at >> 7 & (row_bytes / 16 - 1)) << 4], &bytes[at], 16);
  return result;
}

inline bool check_alignment(Thread& t, const TensorMap& map, u64 address, u32 line) {
  const u32 pattern = std::max(128u, 8 * map.swizzle);
  if constexpr (kCheck)
    if ((address & kOffsetMask) % pattern)
      report(t, MISALIGNED, line, SHARED, address & kOffsetMask, box_bytes(map));
  return (address & kOffsetMask) % pattern == 0;
}

void tensor_load(Thread& t, u64 to, u64 map_address, u32 rank, const s32* at, u64 barrier, u32 mask,
                 u32 line, u32 site) {
  const TensorMap* map = find_map(t, map_address, rank, line);
  if (!map || !check_alignment(t, *map, to, line)) return;
  std::vector<u8> box(box_bytes(*map));
  for_each_row(*map, at, [&](u32 offset, u64 address, u32 bytes) {
    log_access(t, GLOBAL, address, bytes, READ, site);
    const u8* source = global_access(t, address, bytes, 1, READ, false, line);
    if (source != (u8*)dummy_memory) memcpy(&box[offset], source, bytes);
  });
  box = swizzled(box, map->swizzle);
  if (!mask) return start_tensor_copy(t, to & kOffsetMask, box, barrier, line);
  for (u32 r = 0; r < t.block->cluster.blocks.size(); r++)
    if (mask >> r & 1)
      start_tensor_copy(t, map_shared(to & kOffsetMask, r), box, map_shared(barrier, r), line);
}

void tensor_store(Thread& t, u64 map_address, u32 rank, const s32* at, u64 from, u32 line,
                  u32 site) {
  const TensorMap* map = find_map(t, map_address, rank, line);
  if (!map || !check_alignment(t, *map, from, line)) return;
  for_each_row(*map, at, [&](u32, u64 address, u32 bytes) {
    log_access(t, GLOBAL, address, bytes, WRITE, site);
  });
  const u32 bytes = box_bytes(*map);
  const u8* source = bulk_source(t, SHARED, from, bytes, line);
  if (!source) return;
  t.engine->stores.push_back(
      {0, from & kOffsetMask, bytes, t.store_group, line, kCheck ? checksum_of(source, bytes) : 0});
  t.engine->stores.back().map = map;
  std::copy(at, at + 5, t.engine->stores.back().at);
}

inline void write_tensor(Thread& t, const BulkStore& s) {
  const std::vector<u8> box =
      swizzled(s.data, s.map->swizzle);  // the permutation is its own inverse
  for_each_row(*s.map, s.at, [&](u32 offset, u64 address, u32 bytes) {
    u8* target = global_access(t, address, bytes, 1, WRITE, false, s.line);
    if (target != (u8*)dummy_memory) memcpy(target, &box[offset], bytes);
  });
}
