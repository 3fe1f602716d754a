// Hopper: how the blocks of a cluster add up rank-sized sums of a strip of rows, each block those of its own rows, while all
// of them multiply the next. Options: RT ranks, DOWN 1 = on.
constexpr int STRIP = 64;      // rows
constexpr int MOST_GROUP = 8;  // blocks
// Few sums go to the others from registers; more are added up in the block before, and go through the copy engine.
constexpr bool AT_ONCE = RT != 64;
constexpr int MEETS = AT_ONCE ? 2 : 1;    // strips whose sums may be on their way at once
constexpr int SENDERS = AT_ONCE ? 2 : 1;  // of a block: its warpgroups, or both together
constexpr int MEET_BYTES = DOWN ? SENDERS * (STRIP + MOST_GROUP) * RT * 4 : 0, SUMS_BYTES = DOWN && !AT_ONCE ? STRIP * RT * 4 : 0;

// Of the threads of two warpgroups.
struct ClusterSum {
  unsigned char* come;  // sums of this block's rows, [MEETS][sender][row][RT]
  unsigned char* own;   // not AT_ONCE: sums of this block, [STRIP][RT]
  u32 met, taken;       // MEETS barriers each: all have come, all blocks have read theirs
  int group, rank, strips;
  int first, rows, most_rows;  // of a strip: those that this block adds up, and the most of any block

  __device__ __forceinline__ ClusterSum(unsigned char* come, unsigned char* own, u32 met, u32 taken, int group, int rank, int strips)
      : come(come), own(own), met(met), taken(taken), group(group), rank(rank), strips(strips) {
    first = first_row(rank), rows = first_row(rank + 1) - first, most_rows = first_row(1);
  }
  __device__ __forceinline__ int first_row(int block) const { return (STRIP * block + group - 1) / group; }
  // Of one thread.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < MEETS; ++i) barrier_init(met + 8 * i, 1), barrier_init(taken + 8 * i, 8 * group);  // all warps that multiply
  }
  __device__ __forceinline__ void expect(int strip, int thread) const {
    int senders = AT_ONCE ? 2 * group : group - 1;
    if (thread == 0 && strip < strips) barrier_expect(met + 8 * (strip % MEETS), senders * rows * RT * 4);
  }
  // Bytes to the place of 8 ranks of a row; in `own`, eight rows of them come from all banks.
  __device__ __forceinline__ static int place(int row, int eight) { return (row * RT + (AT_ONCE ? eight : eight ^ (row & 7)) * 8) * 4; }
  // Where the sums of a sender for this block's rows come; `sender` is one of SENDERS * group.
  __device__ __forceinline__ unsigned char* from(int sender, int slot) const { return come + slot * MEET_BYTES + sender * most_rows * RT * 4; }

  // Sends the sums of a warpgroup, as wgmma has them, to the blocks whose rows they are of, when all of them have read those
  // that were there before, and those of this block have left it.
  __device__ __forceinline__ void give(const float (&sums)[RT / 8][4], int strip, int thread) const {
    int slot = strip % MEETS, math = thread / 128, g = thread % 32 / 4, t = thread % 4, row0 = thread % 128 / 32 * 16 + g;
    u32 bar = met + 8 * slot;
    if (strip >= MEETS) barrier_wait(taken + 8 * slot, (strip / MEETS & 1) ^ 1);
    if constexpr (AT_ONCE) {
      u32 there = shared_address(from(rank * 2 + math, slot)) + 8 * t;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int row = row0 + h * 8, owner = row * group / STRIP;
        u32 to = in_block(there - first_row(owner) * RT * 4, owner), bar_there = in_block(bar, owner);
#pragma unroll
        for (int n = 0; n < RT / 8; ++n) send(to + place(row, n), sums[n][2 * h], sums[n][2 * h + 1], bar_there);
      }
    } else {
      auto both_sync = [] { sync_some<256>(3); };
      // `taken` has been waited for, which all warps of this block arrive at too; this is for racecheck, which does not follow
      // arrivals by an address of the cluster, and costs nothing.
      both_sync();
      // Each warpgroup adds up half of the ranks of both.
      auto at = [&](int n, int h) { return reinterpret_cast<float2*>(own + place(row0 + h * 8, n)) + t; };
#pragma unroll
      for (int n = 0; n < RT / 8; ++n)
        if (n / (RT / 16) != math)
#pragma unroll
          for (int h = 0; h < 2; ++h) *at(n, h) = make_float2(sums[n][2 * h], sums[n][2 * h + 1]);
      both_sync();
#pragma unroll
      for (int n = 0; n < RT / 8; ++n)
        if (n / (RT / 16) == math)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float2 v = *at(n, h);
            *at(n, h) = make_float2(v.x + sums[n][2 * h], v.y + sums[n][2 * h + 1]);
          }
      fence_shared();
      both_sync();
      // Its own rows stay where they are: memcheck takes a copy to the block itself for an error.
      int block = thread;
      if (block < group && block != rank) {
        int its = first_row(block), bytes = (first_row(block + 1) - its) * RT * 4;
        send(in_block(shared_address(from(rank, slot)), block), shared_address(own) + its * RT * 4, bytes, in_block(bar, block));
      }
    }
  }

  // Adds up what has come, always in the same order: put(row of the strip, pair of ranks, sums).
  template <class Put>
  __device__ __forceinline__ void add_up(int strip, int thread, Put put) const {
    int slot = strip % MEETS;
    barrier_wait(met + 8 * slot, strip / MEETS & 1);
    expect(strip + MEETS, thread);
    for (int at = thread; at < rows * (RT / 2); at += 256) {
      int row = first + at / (RT / 2), pair = at % (RT / 2);
      int within = place(row, pair / 4) - first * RT * 4 + pair % 4 * 8;
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll 8
      for (int sender = 0; sender < SENDERS * group; ++sender) {
        const unsigned char* part = !AT_ONCE && sender == rank ? own + first * RT * 4 : from(sender, slot);
        float2 v = *reinterpret_cast<const float2*>(part + within);
        sum.x += v.x, sum.y += v.y;
      }
      put(row, pair, sum);
    }
    // What this warp has read has come, since it is added up: the arrival needs no barrier of memory.
    __syncwarp();
    if (strip + MEETS < strips && thread % 32 < group) barrier_arrive_at(taken + 8 * slot, thread % 32);
  }
};
