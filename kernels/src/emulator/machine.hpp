// The card's machine on a CPU: blocks, warps and threads, and in the place of machine.cuh its instructions.
//
// A thread of the card is a fiber: it runs until it waits for others. What the card does behind a thread's back is done
// late: products and stores when they are waited for, copies some time after they are asked for. So a kernel that takes
// something for done, or for free again, before it has waited for it has wrong results here.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __cluster_dims__(...)
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

using std::max;
using std::min;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  u32 x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
template <class V>
void __stcg(V* p, V v) { *p = v; }
template <class V>
V __ldcg(const V* p) { return *p; }
inline u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
inline u32 __funnelshift_l(u32 lo, u32 hi, u32 by) { return by % 32 ? hi << by % 32 | lo >> (32 - by % 32) : hi; }
inline float __uint_as_float(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline u32 __float_as_uint(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "%s\n", why);
  exit(1);
}

// ---- threads ---------------------------------------------------------------------------------
constexpr int WARP = 32, WARPGROUP = 128, MOST_WARPS = 16;

// Threads that go on when as many as are awaited have come.
struct Meeting {
  int come = 0;
  u64 times = 0;
};
// A barrier in shared memory.
struct Barrier {
  int count, pending;
  long bytes;
  u32 phase;
};
struct Warp {
  Meeting meeting;
  bool sleeps = false;
  u32 given[WARP][6];  // by its lanes to each other
};
struct Block;
struct Cluster {
  Meeting meeting;
  std::vector<Block*> blocks;
  int threads = 0;  // that have not ended
};
struct Thread;
struct Block {
  static constexpr int STATIC_BYTES = 64 << 10, SHARED = 1 << 19;
  int index, rank;  // of the grid, of the cluster
  Cluster* cluster;
  unsigned char* shared;  // first what is not dynamic
  std::map<u32, Barrier> barriers;
  std::map<int, u32> arrays;  // what is not dynamic, by the number of its declaration
  u32 arrays_end = 0;
  std::vector<Thread*> threads;
  bool begun = false;
  int left = 0;  // threads that have not ended
  Meeting meeting;
  Warp warps[MOST_WARPS];
  Meeting warpgroups[MOST_WARPS * WARP / WARPGROUP], named[16];
};
struct Index {
  u32 x, y;
};
struct Thread {
  void* stack;
  Block* block;
  Index in_block, block_in_grid;
  u64 cluster_time = ~0ull;  // when it last arrived at the cluster's meeting
  bool ended = false;
  std::vector<u32> loads;  // of 16 bytes of shared memory each, since the last fence
  // Products and stores that have been asked for, in groups; the last is still open.
  std::vector<std::vector<std::function<void()>>> products{1}, stores{1};
  std::vector<std::function<void()>> vectors;  // copies of its own
};
inline Thread* running;
inline void* scheduler;
inline u64 steps_taken;  // by any thread: what others may wait for

// Copies that have been asked for. One in four is done at once, and about half of the others whenever all threads wait or end.
inline std::vector<std::function<void()>> copies;
inline bool one_in(u32 n) {
  static u32 state = 1;
  state = state * 1664525 + 1013904223;
  return (state >> 16) % n == 0;
}
inline void ask_copy(std::function<void()> copy) {
  if (one_in(4)) copy();
  else copies.push_back(std::move(copy));
}
inline void do_copies() {
  auto asked = std::move(copies);
  copies.clear();
  for (auto& copy : asked) {
    if (one_in(2)) copy();
    else copies.push_back(std::move(copy));
  }
}
// Does all groups but the last `pending`, and the one that is open.
inline void do_groups(std::vector<std::vector<std::function<void()>>>& groups, size_t pending) {
  while (groups.size() > pending + 1) {
    for (auto& work : groups.front()) work();
    groups.erase(groups.begin());
  }
}

#define threadIdx (running->in_block)
#define blockIdx (running->block_in_grid)
inline Index gridDim;

extern "C" void switch_stack(void** from, void* to);
asm(R"(.text
.globl switch_stack
switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
// Lets others run. Not inlined, so that nothing of the thread that runs is kept over it.
__attribute__((noinline)) inline void yield() { switch_stack(&running->stack, scheduler); }

inline void meet(Meeting& meeting, int count) {
  u64 time = meeting.times;
  if (++meeting.come == count) {
    meeting.come = 0;
    ++meeting.times;
    ++steps_taken;
  } else {
    while (meeting.times == time) yield();
  }
}
// A block whose memory another one uses.
inline Block* live(Block* block) {
  if (!block->begun) fail("a block uses the memory of one that has not begun");
  if (!block->left) fail("a block uses the memory of one that has ended");
  return block;
}
inline Block* block_of_cluster(u32 rank) { return live(running->block->cluster->blocks[rank]); }
// Goes on with all threads of a cluster that have not ended, when they have come.
inline void meet_cluster(Cluster& cluster) {
  if (cluster.meeting.come == cluster.threads) cluster.meeting.come = 0, ++cluster.meeting.times, ++steps_taken;
}
inline Warp& this_warp() { return running->block->warps[threadIdx.x / WARP]; }
inline int this_lane() { return threadIdx.x % WARP; }
inline void __syncthreads() { meet(running->block->meeting, running->block->threads.size()); }
inline void __syncwarp() { meet(this_warp().meeting, WARP); }
inline void sync_warpgroup() { meet(running->block->warpgroups[threadIdx.x / WARPGROUP], WARPGROUP); }

inline unsigned char* shared_at(u32 address) { return running->block->shared + address; }
inline unsigned char* shared_array(int declaration, u32 bytes) {
  Block& block = *running->block;
  auto [found, is_new] = block.arrays.emplace(declaration, block.arrays_end);
  if (is_new) block.arrays_end += (bytes + 15) / 16 * 16;
  if (block.arrays_end > Block::STATIC_BYTES) fail("too many arrays in shared memory");
  return block.shared + found->second;
}

// ---- machine.cuh -----------------------------------------------------------------------------
inline void await_previous() {}
inline void start_next() {}
inline void prefetch(const void*) {}
inline float to_float(T v) { return __uint_as_float((u32)v << 16); }
inline T from_float(float f) {
  u32 bits = __float_as_uint(f);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_halves(float lo, float hi) { return from_float(lo) | (u32)from_float(hi) << 16; }
// The half `k` of those that the lanes of a quad, the first of which is `lane`, have in their words `low` and `high`.
inline float half_of(const Warp& warp, int lane, int low, int high, int k) { return to_float(warp.given[lane + k % 8 / 2][k < 8 ? low : high] >> 16 * (k & 1)); }
inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  Warp& warp = this_warp();
  int lane = this_lane();
  u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(warp.given[lane], mine, sizeof mine);
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) c[i] += half_of(warp, lane / 4 * 4, i / 2, 2 + i / 2, k) * half_of(warp, (lane % 4 * 2 + i % 2) * 4, 4, 5, k);
  __syncwarp();
}
inline u32 count_up(u32* flag) {
  ++steps_taken;
  return (*flag)++;
}
inline u32 atomicAdd(u32* to, u32 v) {
  u32 old = *to;
  *to += v;
  return old;
}
inline void __threadfence() {}
inline u32 __shfl_sync(u32, u32 v, int from) {
  Warp& warp = this_warp();
  warp.given[this_lane()][0] = v;
  __syncwarp();
  v = warp.given[from][0];
  __syncwarp();
  return v;
}
inline float __shfl_xor_sync(u32, float v, int mask) { return __uint_as_float(__shfl_sync(~0u, __float_as_uint(v), this_lane() ^ mask)); }
inline void await_count(const u32* flag, u32 count) {
  while (*(const volatile u32*)flag < count) yield();
}
inline u32 signs_of_halves(u32 v) { return (v & 0x80 ? 0xffff : 0) | (v & 0x800000 ? 0xffff0000 : 0); }
inline u32 high_signs_of_halves(u32 v) { return signs_of_halves(v >> 8); }
inline void late(int&) {}
inline u32 load_here(const u32* p) { return *p; }
inline float zero_here() { return 0.f; }
template <int COUNT>
void sync_some(int id) { meet(running->block->named[id], COUNT); }
