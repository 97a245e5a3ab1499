// Checks each access: its bounds and alignment, whether there is something to read, and whether it races with another.
//
// Races are found by time stamps and not by trying orders: an access is ordered after another one if it is of the same
// thread, if all threads of the block met at sync_block between the two, or if both are of one warp and it met at
// sync_warp. Shuffles and matrix instructions order nothing, as CUDA says of them.
#pragma once

#include "state.h"

namespace emulated {
namespace {

unsigned short short_line(int line) { return static_cast<unsigned short>(std::min(line, 0xffff)); }

// Whether all of this comes before what `thread`, or its whole warp together, does now.
bool precedes(const Past& past, u32 thread, bool whole_warp) {
  // nothing orders blocks
  if (past.stamp < block_start) return !past.stamp;
  if (past.stamp < block_stamp) return true;
  if (past.others == WARPS_OF_BLOCK || past.thread / LANES != thread / LANES) return false;
  if (past.stamp < warps[running_warp].stamp) return true;
  return !whole_warp && past.others == NOBODY && past.thread == thread;
}

// Notes what `thread`, or its whole warp, does now, beside what is noted where that does not come before it.
void note(Past& past, u32 thread, bool whole_warp, bool beside, int line) {
  u32 stamp = warps[running_warp].stamp;
  past.line = short_line(line);
  if (beside && past.stamp) {
    // what another block did counts for the rest of the launch
    if (past.stamp < block_start) return;
    if (past.stamp >= block_stamp) {
      if (past.others == WARPS_OF_BLOCK) return;
      if (past.thread / LANES != thread / LANES) {
        past.others = WARPS_OF_BLOCK;
        return;
      }
      if (past.stamp == stamp) {
        if (whole_warp || past.thread != thread) past.others = LANES_OF_WARP;
        return;
      }
    }
  }
  past.thread = thread;
  past.stamp = stamp;
  past.others = whole_warp ? LANES_OF_WARP : NOBODY;
}

// Checks one access to shared memory and gives its offset. With `whole_warp` it is one of the warp together, which does
// not come after what any of its lanes did, `thread` too.
u64 check_shared(bool write, const void* p, int bytes, int thread, bool whole_warp, int line, const char* file) {
  u64 offset = static_cast<const unsigned char*>(p) - now.shared;
  if (offset >= given.shared_bytes || offset + bytes > given.shared_bytes)
    fail(thread, line, file, "out of bounds: %d bytes at byte %lld of shared memory, which has %llu", bytes,
         static_cast<i64>(offset), given.shared_bytes);
  if (offset % bytes) fail(thread, line, file, "misaligned: %d bytes at byte %llu of shared memory", bytes, offset);
  u64 at = offset / 4;
  for (Accesses* word = &shared_accesses[at]; at < (offset + bytes) / 4; at++, word++) {
    // what a block before left is nothing to this one
    bool written = word->write.stamp >= block_start, read = word->read.stamp >= block_start;
    if (!write && !written)
      fail(thread, line, file, "uninitialised: shared word %llu is read, which no thread of this block wrote", at);
    if (written && !precedes(word->write, thread, whole_warp))
      fail(thread, line, file, "race: shared word %llu is %s, which thread %u wrote at line %d with no barrier between",
           at, write ? "written" : "read", word->write.thread, word->write.line);
    if (write && read && !precedes(word->read, thread, whole_warp))
      fail(thread, line, file,
           "race: shared word %llu is written, which thread %u%s read at line %d with no barrier between", at,
           word->read.thread, word->read.others ? " and others" : "", word->read.line);
    note(write ? word->write : word->read, thread, whole_warp, !write && read, line);
  }
  return offset;
}

Registered& find_buffer(u64 address, int bytes, int line, const char* file) {
  auto holds = [&](const Registered& buffer) {
    // no sum of addresses, which the last ones there are would wrap
    u64 begin = address - buffer.given.address, size = bytes;
    return address >= buffer.given.address && size <= buffer.given.bytes && begin <= buffer.given.bytes - size;
  };
  if (last_buffer < buffers.size() && holds(buffers[last_buffer])) return buffers[last_buffer];
  // they are in the order of their addresses
  size_t at = std::upper_bound(buffers.begin(), buffers.end(), address,
                               [](u64 x, const Registered& buffer) { return x < buffer.given.address; }) -
              buffers.begin();
  if (at > 0 && holds(buffers[at - 1])) {
    last_buffer = at - 1;
    return buffers[last_buffer];
  }
  if (!address) fail(now.thread, line, file, "out of bounds: %d bytes at a null pointer", bytes);
  i64 below = at > 0 ? address - buffers[at - 1].given.address : 1ll << 62;
  i64 above = at < buffers.size() ? buffers[at].given.address - address : 1ll << 62;
  if (at == buffers.size() || (at > 0 && below - static_cast<i64>(buffers[at - 1].given.bytes) < above)) {
    if (at == 0) fail(now.thread, line, file, "out of bounds: %d bytes of global memory, without any buffer", bytes);
    fail(now.thread, line, file, "out of bounds: %d bytes at byte %lld of buffer %d, which has %llu", bytes, below,
         buffers[at - 1].given.index, buffers[at - 1].given.bytes);
  }
  fail(now.thread, line, file, "out of bounds: %d bytes at byte %lld of buffer %d, which has %llu", bytes, -above,
       buffers[at].given.index, buffers[at].given.bytes);
}

// Checks what one access does to one element of a buffer that the kernel may write. Threads are numbered through all
// blocks.
void check_element(Registered& buffer, u64 element, int access, int line, const char* file) {
  GlobalAccesses& word = buffer.accesses[element];
  u32 thread = static_cast<u32>(now.block) * given.threads + now.thread;
  bool write = access == GLOBAL_STORE || access == GLOBAL_ATOMIC, constant = access == GLOBAL_LOAD;
  if (constant && (word.write.stamp || word.atomic.stamp))
    fail(now.thread, line, file, "element %llu of buffer %d is read as constant, which line %d wrote in this launch",
         element, buffer.given.index, word.write.stamp ? word.write.line : word.atomic.line);
  if (write && word.read.constant)
    fail(now.thread, line, file, "element %llu of buffer %d is written, which line %d reads as constant", element,
         buffer.given.index, word.read.line);
  auto check = [&](const Past& past, const char* verb) {
    if (!precedes(past, thread, false))
      fail(now.thread, line, file,
           "race: element %llu of buffer %d is %s, which thread %u of block %u%s %s at line %d with no barrier between",
           element, buffer.given.index, write ? "written" : "read", past.thread % given.threads,
           past.thread / given.threads, past.others ? " and others" : "", verb, past.line);
  };
  check(word.write, "wrote");
  if (access != GLOBAL_ATOMIC) check(word.atomic, "changed by an atomic");
  if (write) check(word.read, "read");
  if (access == GLOBAL_ATOMIC) return note(word.atomic, thread, false, true, line);
  note(write ? word.write : word.read, thread, false, !write, line);
  word.read.constant |= constant;
}

}  // namespace
}  // namespace emulated
