// Counts accesses by the lines that they stand on: lanes log theirs, and the logs of a warp are put together where its
// lanes meet.
#pragma once

#include "state.h"

namespace emulated {
namespace {

// What a lane may log between two meetings.
constexpr size_t MOST_LOGGED = 1 << 18;

u64 kind_of(int access, int bytes, int line, const char* file) {
  if (last_file >= files.size() || files[last_file] != file) {
    last_file = std::find(files.begin(), files.end(), file) - files.begin();
    if (last_file == files.size()) files.push_back(file);
  }
  return u64{last_file} << 48 | static_cast<u64>(line) << 16 | access << 8 | bytes;
}

Line& line_of(u64 kind) {
  auto found = line_index.emplace(kind, lines.size());
  if (found.second)
    lines.push_back({files[kind >> 48], static_cast<int>(kind >> 16), static_cast<int>(kind >> 8 & 255),
                     static_cast<int>(kind & 255), 0, 0, 0, 0, 0});
  return lines[found.first->second];
}

// Wavefronts of one shared access of a warp: in a wavefront each of 32 banks gives one word, to all who ask for it.
void count_shared(Line& line, const u64* addresses, u32 active, int bytes) {
  int phase = bytes == 4 ? 32 : bytes == 8 ? 16 : 8;
  u64 gaps = ~active;
  for (int lane = 0; lane < LANES; lane++) gaps |= addresses[lane] - addresses[0] - lane * bytes;
  if (!gaps) {
    // one word after the other, as most are
    line.wavefronts += LANES / phase;
    line.ideal += LANES / phase;
    return;
  }
  for (int begin = 0; begin < LANES; begin += phase) {
    unsigned char used[32] = {};
    int most = 0;
    seen_ticket++;
    for (int lane = begin; lane < begin + phase; lane++) {
      if (!(active >> lane & 1)) continue;
      for (u64 word = addresses[lane] / 4, end = word + bytes / 4; word < end; word++) {
        if (seen_words[word] == seen_ticket) continue;
        seen_words[word] = seen_ticket;
        most = std::max<int>(most, ++used[word % 32]);
      }
    }
    line.wavefronts += most;
    line.ideal += most > 0;
  }
}

void count_global(Line& line, const u64* addresses, u32 active, int bytes) {
  u64 sectors[LANES];
  int count = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (!(active >> lane & 1)) continue;
    line.asked += bytes;
    u64 sector = addresses[lane] / 32;
    if (count && sectors[count - 1] == sector) continue;
    if (std::find(sectors, sectors + count, sector) == sectors + count) sectors[count++] = sector;
  }
  line.sectors += count;
}

void count_instruction(u64 kind, const u64* addresses, u32 active) {
  Line& line = line_of(kind);
  line.instructions++;
  if (line.access == SHARED_LOAD || line.access == SHARED_STORE || line.access == MATRIX_LOAD)
    count_shared(line, addresses, active, line.bytes);
  else
    count_global(line, addresses, active, line.bytes);
}

// What the lanes did for the n-th time at one place since they last met is one instruction.
void count_uneven_round(Lane* mine) {
  struct Keyed {
    u64 kind, time;
    int lane;
    u64 address;
  };
  std::vector<Keyed> keyed;
  for (int lane = 0; lane < LANES; lane++) {
    std::unordered_map<u64, u64> times;
    for (const Logged& at : mine[lane].log) keyed.push_back({at.kind, times[at.kind]++, lane, at.address});
  }
  std::sort(keyed.begin(), keyed.end(), [](const Keyed& a, const Keyed& b) {
    return a.kind != b.kind ? a.kind < b.kind : a.time != b.time ? a.time < b.time : a.lane < b.lane;
  });
  u64 addresses[LANES];
  for (size_t i = 0; i < keyed.size();) {
    const Keyed& first = keyed[i];
    u32 active = 0;
    for (; i < keyed.size() && keyed[i].kind == first.kind && keyed[i].time == first.time; i++) {
      addresses[keyed[i].lane] = keyed[i].address;
      active |= 1u << keyed[i].lane;
    }
    count_instruction(first.kind, addresses, active);
  }
}

// Puts the logs of a warp's lanes together.
void count_round(int warp) {
  Lane* mine = lanes + warp * LANES;
  size_t length = mine[0].log.size();
  bool even = true;
  for (int lane = 1; lane < LANES; lane++) even &= mine[lane].log.size() == length;
  if (even && !length) return;
  for (int lane = 1; even && lane < LANES; lane++)
    for (size_t i = 0; i < length; i++) even &= mine[lane].log[i].kind == mine[0].log[i].kind;
  if (even) {
    u64 addresses[LANES];
    for (size_t i = 0; i < length; i++) {
      for (int lane = 0; lane < LANES; lane++) addresses[lane] = mine[lane].log[i].address;
      count_instruction(mine[0].log[i].kind, addresses, ~0u);
    }
  } else {
    count_uneven_round(mine);
  }
  for (int lane = 0; lane < LANES; lane++) mine[lane].log.clear();
}

void log_access(int access, u64 address, int bytes, int line, const char* file) {
  if (!given.count) return;
  std::vector<Logged>& log = lanes[now.thread].log;
  if (log.size() == MOST_LOGGED)
    fail(now.thread, line, file, "more than %zu accesses of a thread between two collectives: run without counts",
         MOST_LOGGED);
  log.push_back({address, kind_of(access, bytes, line, file)});
}

}  // namespace
}  // namespace emulated
