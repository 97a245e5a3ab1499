// What the machine knows of the launch that it runs.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "fibers.h"
#include "primitives.h"

namespace emulated {
namespace {

constexpr int LANES = 32;
constexpr int MOST_THREADS = 1024;

const char* const NAMES[] = {
    "the end of the kernel", "sync_block", "sync_warp", "shuffle_xor", "shuffle_from", "any_of_warp", "load_matrices",
    "load_matrices_transposed", "multiply_1688", "multiply_884<false, false>", "multiply_884<false, true>",
    "multiply_884<true, false>", "multiply_884<true, true>",
};

struct Place {
  const char* file;
  int line;
};

// One access of a lane, until its warp's round ends and the lanes' are put together. `kind`: which line, access and
// size, in one number.
struct Logged {
  u64 address, kind;
};

struct Lane {
  Context context;
  void* data;
  std::vector<Logged> log;
};

enum State { READY, AT_BARRIER, OVER };

struct Warp {
  State state;
  int position;  // of the lane that runs, in the order of this round
  unsigned char order[LANES];
  int collective, first;  // where the round's first lane has stopped, and which thread it is
  Place place;
  u32 stamp;  // of the last sync_warp or sync_block
};

// Who else of its block did it, beside the thread that is noted.
enum Others : unsigned char { NOBODY, LANES_OF_WARP, WARPS_OF_BLOCK };

// What was done to one word in one way, as far as what comes later can tell it apart. A stamp of 0: nothing.
struct Past {
  u32 stamp, thread;
  unsigned short line;
  Others others;
  bool constant;  // reads through the read-only path were among it
};

// Of a word of shared memory.
struct Accesses {
  Past write, read;
};

// Of an element of a buffer that may be written.
struct GlobalAccesses {
  Past write, read, atomic;
};

// Counts of one line of the kernel; emulated.py has the same.
struct Line {
  const char* file;
  int line, access, bytes;
  u64 instructions, wavefronts, ideal, sectors, asked;
};

// emulated.py has the same.
struct Totals {
  u64 multiply_884, multiply_1688, shuffles, votes, block_barriers, warp_barriers, exp2;
};

struct Registered {
  Buffer given;
  std::vector<GlobalAccesses> accesses;
};

Launch given;
void (*start)(const void*);
const void* argument;

Lane lanes[MOST_THREADS];
Warp warps[MOST_THREADS / LANES];
int warp_count, running_warp, warps_at_barrier, warps_over;
Context host;
char* stacks;
bool failed;
char message[1024];

std::vector<Accesses> shared_accesses;
std::vector<Registered> buffers;
size_t last_buffer;

// Stamps: `tick` grows at each meeting that orders accesses. All of this block are from `block_start` on.
u32 tick, block_start, block_stamp;
u64 steps, random_state;

Totals totals;
std::vector<Line> lines;
std::unordered_map<u64, size_t> line_index;
std::vector<const char*> files;
size_t last_file;
std::vector<u32> seen_words;
u32 seen_ticket;

u64 random_bits() {
  random_state += 0x9e3779b97f4a7c15ull;
  u64 x = random_state;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// Ends the launch: back on the host's stack, and the fibers are never run again.
[[noreturn]] __attribute__((format(printf, 4, 5))) void fail(int thread, int line, const char* file, const char* format,
                                                             ...) {
  int used = snprintf(message, sizeof message, "%s:%d: block %d, thread %d: ", file, line, now.block, thread);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + used, sizeof message - used, format, arguments);
  va_end(arguments);
  failed = true;
  switch_stacks(&lanes[now.thread].context, &host);
  __builtin_unreachable();
}

void step(int line, const char* file) {
  if (__builtin_expect(++steps > given.limit, 0))
    fail(now.thread, line, file, "the block has not ended after %llu accesses and collectives", given.limit);
}

}  // namespace
}  // namespace emulated
