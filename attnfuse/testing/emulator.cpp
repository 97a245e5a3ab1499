// Runs the threads of a kernel on the CPU: one fiber for each, block after block. See emulator.h for what a kernel sees of it.
//
// A lane runs until it meets a collective or a barrier or ends; then the next lane of its warp runs. So a warp goes from one meeting
// to the next in rounds, and lanes that stop at different places are found at the end of a round. Between two meetings the
// order of lanes is free, and so is the order of warps between two barriers and that of blocks: the seed chooses.
//
// What may not depend on that order is checked by time stamps and not by trying orders: an access is ordered after another one if it is of
// the same thread, if all threads of the block met at sync_block between the two, or if both are of one warp and it met at
// sync_warp. Shuffles and matrix instructions order nothing, as CUDA says of them.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "emulator.h"

#if !defined(__x86_64__) || defined(EMULATED_UCONTEXT)
#define EMULATED_SWITCH_BY_UCONTEXT 1
#include <ucontext.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace emulated {

Now now;

namespace {

constexpr int LANES = 32;
constexpr int MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 << 10;
// Tops of stacks at equal distances would all lie in the same lines of the cache.
constexpr size_t STACK_STRIDE = STACK_BYTES + 17 * 64;
// What a lane may log between two meetings.
constexpr size_t MOST_LOGGED = 1 << 18;
// Left on a stack for what runs on it beside the kernel.
constexpr size_t STACK_SLACK = 16 << 10;

const char* const NAMES[] = {
    "the end of the kernel", "sync_block", "sync_warp", "shuffle_xor", "shuffle_from", "any_of_warp", "load_matrices",
    "load_matrices_transposed", "multiply_1688", "multiply_884<false, false>", "multiply_884<false, true>",
    "multiply_884<true, false>", "multiply_884<true, true>",
};

// ------ switching stacks

#ifdef EMULATED_SWITCH_BY_UCONTEXT
using Context = ucontext_t;

void switch_stacks(Context* from, Context* to) { swapcontext(from, to); }

void prepare(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = STACK_BYTES;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#else
// The stack pointer; what a called function must keep lies on the stack above it.
using Context = void*;

extern "C" __attribute__((visibility("hidden"))) void emulated_switch_stacks(Context* from, Context to);

asm(R"(
.text
.globl emulated_switch_stacks
.hidden emulated_switch_stacks
.type emulated_switch_stacks, @function
emulated_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch_stacks, . - emulated_switch_stacks
)");

void switch_stacks(Context* from, Context* to) { emulated_switch_stacks(from, *to); }

void prepare(Context* context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<u64>(stack + STACK_BYTES) & ~u64{15});
  *--top = nullptr;  // a function starts with its return address at a multiple of 16, less 8
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  *context = top;
}
#endif

// ------ state of a launch

struct Place {
  const char* file;
  int line;
};

// One access of a lane, until its warp's round ends and the lanes' are put together. `kind`: which line, access and size, in one number.
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

// ------ counting

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

// ------ races

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

// Checks one access to shared memory and gives its offset. With `whole_warp` it is one of the warp together, which does not come after
// what any of its lanes did, `thread` too.
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
      fail(thread, line, file, "race: shared word %llu is %s, which thread %u wrote at line %d with no barrier between", at,
           write ? "written" : "read", word->write.thread, word->write.line);
    if (write && read && !precedes(word->read, thread, whole_warp))
      fail(thread, line, file, "race: shared word %llu is written, which thread %u%s read at line %d with no barrier between",
           at, word->read.thread, word->read.others ? " and others" : "", word->read.line);
    note(write ? word->write : word->read, thread, whole_warp, !write && read, line);
  }
  return offset;
}

Registered& find_buffer(u64 address, int bytes, int line, const char* file) {
  auto holds = [&](const Registered& buffer) {
    return address >= buffer.given.address && address + bytes <= buffer.given.address + buffer.given.bytes;
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
    if (at == 0) fail(now.thread, line, file, "out of bounds: %d bytes of global memory, and no buffer is given", bytes);
    fail(now.thread, line, file, "out of bounds: %d bytes at byte %lld of buffer %d, which has %llu", bytes, below,
         buffers[at - 1].given.index, buffers[at - 1].given.bytes);
  }
  fail(now.thread, line, file, "out of bounds: %d bytes at byte %lld of buffer %d, which has %llu", bytes, -above,
       buffers[at].given.index, buffers[at].given.bytes);
}

// Checks what one access does to one element of a buffer that the kernel may write. Threads are numbered through all blocks.
void check_element(Registered& buffer, u64 element, int access, int line, const char* file) {
  GlobalAccesses& word = buffer.accesses[element];
  u32 thread = static_cast<u32>(now.block) * given.threads + now.thread;
  bool write = access == GLOBAL_STORE || access == GLOBAL_ATOMIC, constant = access == GLOBAL_LOAD;
  if (constant && (word.write.stamp || word.atomic.stamp))
    fail(now.thread, line, file, "element %llu of buffer %d is read as constant, which line %d wrote in this launch", element,
         buffer.given.index, word.write.stamp ? word.write.line : word.atomic.line);
  if (write && word.read.constant)
    fail(now.thread, line, file, "element %llu of buffer %d is written, which line %d reads as constant", element,
         buffer.given.index, word.read.line);
  auto check = [&](const Past& past, const char* verb) {
    if (!precedes(past, thread, false))
      fail(now.thread, line, file,
           "race: element %llu of buffer %d is %s, which thread %u of block %u%s %s at line %d with no barrier between", element,
           buffer.given.index, write ? "written" : "read", past.thread % given.threads, past.thread / given.threads,
           past.others ? " and others" : "", verb, past.line);
  };
  check(word.write, "wrote");
  if (access != GLOBAL_ATOMIC) check(word.atomic, "changed by an atomic");
  if (write) check(word.read, "read");
  if (access == GLOBAL_ATOMIC) return note(word.atomic, thread, false, true, line);
  note(write ? word.write : word.read, thread, false, !write, line);
  word.read.constant |= constant;
}

// ------ collectives

// What the lanes of the warp have brought with them.
template <class T>
struct Brought {
  T* of[LANES];

  Brought() {
    const Lane* lane = lanes + running_warp * LANES;
    for (int i = 0; i < LANES; i++) of[i] = static_cast<T*>(lane[i].data);
  }
  T& operator[](int lane) const { return *of[lane]; }
};

void shuffle(bool by_xor, const Place& place) {
  totals.shuffles++;
  const Brought<Shuffle> brought;
  u32 values[LANES];
  for (int lane = 0; lane < LANES; lane++) values[lane] = brought[lane].value;
  for (int lane = 0; lane < LANES; lane++) {
    Shuffle& data = brought[lane];
    if (data.lane < 0 || data.lane >= LANES)
      fail(running_warp * LANES + lane, place.line, place.file, "a shuffle %s %d: lanes are 0 to 31",
           by_xor ? "by mask" : "from lane", data.lane);
    data.result = values[by_xor ? lane ^ data.lane : data.lane];
  }
}

void any() {
  totals.votes++;
  const Brought<Shuffle> brought;
  u32 result = 0;
  for (int lane = 0; lane < LANES; lane++) result |= brought[lane].value;
  for (int lane = 0; lane < LANES; lane++) brought[lane].result = result;
}

void load_matrices_of_warp(bool transposed, const Place& place) {
  const Brought<Matrices> brought;
  u64 offsets[LANES];
  u16 elements[4][8][8];
  for (int lane = 0; lane < LANES; lane++) {
    const u32* row = brought[lane].row;
    offsets[lane] = check_shared(false, row, 16, running_warp * LANES + lane, true, place.line, place.file);
    memcpy(elements[lane / 8][lane % 8], row, 16);
  }
  if (given.count) count_instruction(kind_of(MATRIX_LOAD, 16, place.line, place.file), offsets, ~0u);
  for (int lane = 0; lane < LANES; lane++) {
    int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
      u16 low = transposed ? elements[i][column][row] : elements[i][row][column];
      u16 high = transposed ? elements[i][column + 1][row] : elements[i][row][column + 1];
      brought[lane].r[i] = low | static_cast<u32>(high) << 16;
    }
  }
}

// Eight halves, the low one of each word first.
void floats_of_halves(float (&out)[8], const u32* words) {
#ifdef __F16C__
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words))));
#else
  for (int i = 0; i < 8; i++) out[i] = float_of_half(static_cast<u16>(words[i / 2] >> i % 2 * 16));
#endif
}

// d [ROWS, 8] += a [ROWS, DEPTH] @ b [DEPTH, 8]. Products are exact in double, and so are almost all sums; one rounding at the end.
template <int ROWS, int DEPTH>
void multiply(double (&d)[ROWS][8], const double (&a)[ROWS][DEPTH], const double (&b)[DEPTH][8]) {
  for (int row = 0; row < ROWS; row++)
    for (int k = 0; k < DEPTH; k++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
}

// PTX ISA 9.7.14.5.1. Lanes from 16 on have the lower half of the rows of a and d, and the right half of the columns of b.
void multiply_884_of_warp(bool a_col, bool b_row) {
  totals.multiply_884++;
  const Brought<Products> brought;
  for (int pair = 0; pair < 4; pair++) {
    double a[8][4], b[4][8], d[8][8];
    for (int i = 0; i < 8; i++) {
      int lane = pair * 4 + i % 4 + i / 4 * 16, in_quad = i % 4, half = i / 4 * 4;
      const Products& data = brought[lane];
      float halves[8];
      floats_of_halves(halves, data.halves);
      for (int k = 0; k < 4; k++) {
        (a_col ? a[half + k][in_quad] : a[half + in_quad][k]) = halves[k];
        (b_row ? b[in_quad][half + k] : b[k][half + in_quad]) = halves[4 + k];
      }
      for (int k = 0; k < 8; k++) d[(lane & 1) + (k & 2) + half][(k & 4) + (lane & 2) + (k & 1)] = data.d[k];
    }
    multiply(d, a, b);
    for (int i = 0; i < 8; i++) {
      int lane = pair * 4 + i % 4 + i / 4 * 16, half = i / 4 * 4;
      float* out = brought[lane].d;
      for (int k = 0; k < 8; k++)
        out[k] = static_cast<float>(d[(lane & 1) + (k & 2) + half][(k & 4) + (lane & 2) + (k & 1)]);
    }
  }
}

// PTX ISA 9.7.14.5.7 (m16n8k8).
void multiply_1688_of_warp() {
  totals.multiply_1688++;
  const Brought<Products> brought;
  double a[16][8], b[8][8], d[16][8];
  for (int lane = 0; lane < LANES; lane++) {
    const Products& data = brought[lane];
    int row = lane / 4, column = lane % 4 * 2;
    float halves[8];
    floats_of_halves(halves, data.halves);
    for (int i = 0; i < 4; i++) a[row + i / 2 * 8][column + i % 2] = halves[i];
    for (int i = 0; i < 2; i++) b[column + i][row] = halves[4 + i];
    for (int i = 0; i < 4; i++) d[row + i / 2 * 8][column + i % 2] = data.d[i];
  }
  multiply(d, a, b);
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < 4; i++)
      brought[lane].d[i] = static_cast<float>(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}

void perform(int collective, const Place& place) {
  switch (collective) {
    case SYNC_WARP:
      totals.warp_barriers++;
      warps[running_warp].stamp = ++tick;
      return;
    case SHUFFLE_XOR:
    case SHUFFLE_FROM:
      return shuffle(collective == SHUFFLE_XOR, place);
    case ANY_OF_WARP:
      return any();
    case LOAD_MATRICES:
    case LOAD_MATRICES_TRANSPOSED:
      return load_matrices_of_warp(collective == LOAD_MATRICES_TRANSPOSED, place);
    case MULTIPLY_1688:
      return multiply_1688_of_warp();
    default:
      return multiply_884_of_warp((collective - MULTIPLY_884) & 2, (collective - MULTIPLY_884) & 1);
  }
}

// ------ scheduling

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
    u32 bits = static_cast<u32>(random_bits()), factor = (bits & 31) | 1, offset = bits >> 5 & 31, mask = bits >> 10 & 31;
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
      fail(one.first, one.place.line, one.place.file, "deadlock: this thread waits at sync_block, and thread %d has ended",
           warp * LANES);
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
    fail(warp.first, warp.place.line, warp.place.file, "divergence: this thread is at %s, thread %d of its warp has ended",
         NAMES[warp.collective], now.thread);
  if (warp.collective == ENDED)
    fail(now.thread, line, file, "divergence: this thread is at %s, thread %d of its warp has ended", NAMES[collective],
         warp.first);
  fail(now.thread, line, file, "divergence: this thread is at %s, thread %d of its warp at %s of line %d", NAMES[collective],
       warp.first, NAMES[warp.collective], warp.place.line);
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
        fail(now.thread, line, file, "out of bounds: element %llu of the memory of buffer %d is not of its tensor", element,
             buffer.given.index);
      if (write && !(inside & 2))
        fail(now.thread, line, file, "element %llu of buffer %d is written, which is read only", element, buffer.given.index);
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
