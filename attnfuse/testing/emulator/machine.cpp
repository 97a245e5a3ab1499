// Runs the threads of a kernel on the CPU: one fiber for each, block after block. primitives.h is what kernels see.
//
// A lane runs until it meets a collective or a barrier or ends; then the next lane of its warp runs. So a warp goes
// from one meeting to the next in rounds, and lanes that stop at different places are found at the end of a round.
// Between two meetings the order of lanes is free, and so is the order of warps between two barriers and that of
// blocks: the seed chooses. What may not depend on that order is checked in races.h.
#include <sys/mman.h>

#include "collectives.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace emulated {

Now now;

namespace {

void resume(int thread) {
  int previous = now.thread;
  if (thread == previous) return;
  now.thread = thread;
  switch_stacks(&lanes[previous].context, &lanes[thread].context);
}

// The thread that begins the next round of a warp.
int begin_round(int warp) {
  Warp& it = warps[warp];
  running_warp = warp;
  it.position = 0;
  if (given.seed) {
    // one of 16384 orders, at the price of one random number
    u32 bits = static_cast<u32>(random_bits());
    u32 factor = (bits & 31) | 1, offset = bits >> 5 & 31, mask = bits >> 10 & 31;
    for (u32 i = 0; i < LANES; i++) it.order[i] = ((factor * i + offset) & 31) ^ mask;
  }
  return warp * LANES + it.order[0];
}

void release_barrier() {
  int waiting = 0;
  while (warps[waiting].state != AT_BARRIER) waiting++;
  const Warp& one = warps[waiting];
  for (int warp = 0; warp < warp_count; warp++) {
    if (warps[warp].state == OVER)
      fail(one.first, one.place.line, one.place.file,
           "deadlock: this thread waits at sync_block, and thread %d has ended", warp * LANES);
    if (warps[warp].place.line != one.place.line || warps[warp].place.file != one.place.file)
      fail(one.first, one.place.line, one.place.file,
           "divergence: this thread waits at this sync_block, thread %d at the one of line %d", warps[warp].first,
           warps[warp].place.line);
  }
  totals.block_barriers++;
  block_stamp = ++tick;
  warps_at_barrier = 0;
  for (int warp = 0; warp < warp_count; warp++) {
    warps[warp].state = READY;
    warps[warp].stamp = tick;
  }
}

int next_warp() {
  if (warps[running_warp].state == READY && (!given.seed || (random_bits() & 3))) return running_warp;
  int from = given.seed ? random_bits() % warp_count : running_warp;
  for (int i = 0; i < warp_count; i++)
    if (warps[(from + i) % warp_count].state == READY) return (from + i) % warp_count;
  return -1;
}

// All lanes of the warp have stopped at the same place.
void finish_round() {
  Warp& warp = warps[running_warp];
  if (given.count) count_round(running_warp);
  if (warp.collective == ENDED) {
    warp.state = OVER;
    warps_over++;
  } else if (warp.collective == SYNC_BLOCK) {
    warp.state = AT_BARRIER;
    warps_at_barrier++;
  } else {
    perform(warp.collective, warp.place);
  }
  if (warps_at_barrier && warps_at_barrier + warps_over == warp_count) release_barrier();
  if (warps_over == warp_count) {
    switch_stacks(&lanes[now.thread].context, &host);
    __builtin_unreachable();
  }
  resume(begin_round(next_warp()));
}

[[noreturn]] void diverged(int collective, int line, const char* file) {
  const Warp& warp = warps[running_warp];
  if (collective == ENDED)
    fail(warp.first, warp.place.line, warp.place.file,
         "divergence: this thread is at %s, thread %d of its warp has ended", NAMES[warp.collective], now.thread);
  if (warp.collective == ENDED)
    fail(now.thread, line, file, "divergence: this thread is at %s, thread %d of its warp has ended", NAMES[collective],
         warp.first);
  fail(now.thread, line, file, "divergence: this thread is at %s, thread %d of its warp at %s of line %d",
       NAMES[collective], warp.first, NAMES[warp.collective], warp.place.line);
}

void fiber() {
  start(argument);
  meet(ENDED, nullptr, 0, "");
  __builtin_unreachable();
}

void run_block(int block) {
  now.block = block;
  memset(now.shared, 0xff, given.shared_bytes);
  block_start = block_stamp = ++tick;
  warps_at_barrier = warps_over = 0;
  steps = 0;
  for (int thread = 0; thread < given.threads; thread++) {
    prepare(&lanes[thread].context, stacks + thread * STACK_STRIDE, fiber);
    lanes[thread].log.clear();
  }
  for (int warp = 0; warp < warp_count; warp++) {
    warps[warp].state = READY;
    warps[warp].stamp = tick;
    for (int i = 0; i < LANES; i++) warps[warp].order[i] = i;
  }
  now.thread = begin_round(given.seed ? random_bits() % warp_count : 0);
  switch_stacks(&host, &lanes[now.thread].context);
}

int refused(const char* format, u64 value) {
  snprintf(message, sizeof message, format, value);
  return 1;
}

int run() {
  message[0] = 0;
  failed = false;
  totals = {};
  lines.clear();
  line_index.clear();
  files.clear();
  now.exp2 = 0;
  if (given.threads <= 0 || given.threads > MOST_THREADS || given.threads % LANES)
    return refused("%llu threads a block: take a multiple of 32, at most 1024", given.threads);
  if (given.shared_bytes % 16) return refused("%llu bytes of shared memory: take a multiple of 16", given.shared_bytes);
  if (!stacks) {
    void* memory = mmap(nullptr, MOST_THREADS * STACK_STRIDE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return refused("no memory for stacks, %llu bytes", MOST_THREADS * STACK_STRIDE);
    stacks = static_cast<char*>(memory);
  }
  warp_count = given.threads / LANES;
  std::vector<U4> shared_storage(given.shared_bytes / 16 + 1);
  now.shared = reinterpret_cast<unsigned char*>(shared_storage.data());
  shared_accesses.assign(given.shared_bytes / 4, {});
  seen_words.assign(given.shared_bytes / 4, 0);
  seen_ticket = tick = 0;
  random_state = given.seed;
  buffers.clear();
  for (int i = 0; i < given.buffer_count; i++) {
    const Buffer& buffer = given.buffers[i];
    buffers.push_back({buffer, {}});
    if (buffer.writable && given.track) buffers.back().accesses.resize(buffer.bytes / buffer.element_bytes);
  }
  std::sort(buffers.begin(), buffers.end(),
            [](const Registered& a, const Registered& b) { return a.given.address < b.given.address; });
  for (size_t i = 1; i < buffers.size(); i++)
    if (buffers[i - 1].given.address + buffers[i - 1].given.bytes > buffers[i].given.address)
      return refused("buffer %llu overlaps another one", buffers[i].given.index);
  std::vector<int> order(given.blocks);
  for (int i = 0; i < given.blocks; i++) order[i] = i;
  for (int i = given.blocks - 1; given.seed && i > 0; i--) std::swap(order[i], order[random_bits() % (i + 1)]);
  for (int block : order) {
    run_block(block);
    if (failed) return 1;
  }
  totals.exp2 = now.exp2;
  return 0;
}

}  // namespace

// ------ what the kernel calls

void meet(int collective, void* data, int line, const char* file) {
  step(line, file);
  char here;
  if (&here < stacks + now.thread * STACK_STRIDE + STACK_SLACK) fail(now.thread, line, file, "the stack has run over");
  Warp& warp = warps[running_warp];
  if (warp.position == 0) {
    warp.collective = collective;
    warp.place = {file, line};
    warp.first = now.thread;
  } else if (warp.collective != collective || warp.place.line != line || warp.place.file != file) {
    diverged(collective, line, file);
  }
  lanes[now.thread].data = data;
  if (++warp.position < LANES)
    resume(running_warp * LANES + warp.order[warp.position]);
  else
    finish_round();
}

void shared(int access, const void* p, int bytes, int line, const char* file) {
  step(line, file);
  u64 offset = check_shared(access == SHARED_STORE, p, bytes, now.thread, false, line, file);
  log_access(access, offset, bytes, line, file);
}

void global(int access, const void* p, int bytes, int line, const char* file) {
  step(line, file);
  u64 address = reinterpret_cast<u64>(p);
  Registered& buffer = find_buffer(address, bytes, line, file);
  if (address % bytes) fail(now.thread, line, file, "misaligned: %d bytes at byte %llu of buffer %d", bytes,
                            address - buffer.given.address, buffer.given.index);
  bool write = access == GLOBAL_STORE || access == GLOBAL_ATOMIC;
  u64 size = buffer.given.element_bytes, begin = address - buffer.given.address;
  if (write && !buffer.given.writable)
    fail(now.thread, line, file, "byte %llu of buffer %d is written, which is read only", begin, buffer.given.index);
  if (buffer.given.inside || !buffer.accesses.empty()) {
    for (u64 element = begin / size; element * size < begin + bytes; element++) {
      int inside = buffer.given.inside ? buffer.given.inside[element] : 3;
      if (!inside)
        fail(now.thread, line, file, "out of bounds: element %llu of the memory of buffer %d is not of its tensor",
             element, buffer.given.index);
      if (write && !(inside & 2))
        fail(now.thread, line, file, "element %llu of buffer %d is written, which is read only", element,
             buffer.given.index);
      if (!buffer.accesses.empty()) check_element(buffer, element, access, line, file);
    }
  }
  log_access(access, address, bytes, line, file);
}

int launch(const Launch& launch, void (*kernel)(const void*), const void* kernel_argument) {
  given = launch;
  start = kernel;
  argument = kernel_argument;
  return run();
}

int refuse(const char* kernel, const char* what, u64 value, u64 wanted) {
  snprintf(message, sizeof message, "%s: %llu %s, not %llu", kernel, wanted, what, value);
  return 1;
}

}  // namespace emulated

// ------ what the host calls

EXPORTED const char* emulated_message() { return emulated::message; }

EXPORTED const emulated::Totals* emulated_totals() { return &emulated::totals; }

EXPORTED int emulated_line_count() { return static_cast<int>(emulated::lines.size()); }

EXPORTED const emulated::Line* emulated_lines() { return emulated::lines.data(); }
