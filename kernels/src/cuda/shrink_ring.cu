// Hopper: s[m, j] = scale_j * sum_k D(x)[m, k] * a[j, k], one pass over x by the whole card. A block takes one unit of rows,
// through the copy engine.
//
// The warps of a block split the depth: a team of MEMBERS warps, of 16 * TILES rows each, takes every TEAMS-th 64
// columns and has a ring of its own, of STAGES boxes of x and of `a`, that is filled far ahead: drawing a mask waits for no
// memory. The sums of the teams meet in shared memory in a fixed order. With a mask, a team takes two boxes in a row, for whose
// columns a thread has its words.
//
// Options: DTYPE 1 or 2, RT ranks a block (16, 32 or 64), MT, TEAM, SPLITS, BLOCKS of a multiprocessor, DROPOUT.

template <int RANKS, int TILES, int MEMBERS, int TEAMS, int STAGES, bool MASKED>
struct ShrinkRing {
  static_assert(STAGES >= 2, "a box is to be on its way while another is read");
  static constexpr int WARPS = TEAMS * MEMBERS, ROWS = 16 * TILES * MEMBERS, NT = RANKS / 8, COLS = 64;
  static constexpr int X_BYTES = ROWS * 128, STAGE_BYTES = X_BYTES + RANKS * 128, BYTES = TEAMS * STAGES * STAGE_BYTES;
  static constexpr int SUMS_BYTES = TEAMS * ROWS * RANKS * 4;
  static constexpr int TURN = MASKED ? 2 : 1;  // boxes in a row
  static constexpr int BARRIERS = 2 * TEAMS * STAGES;

  const TensorMap& x_map;  // [rows, cols], box 64 x ROWS
  const TensorMap& a_map;  // [ranks, cols or padded cols], box 64 x RANKS
  int cols, rank0;
  int lane, team, member, count;  // boxes of this team
  u32 ring, full, empty;
  bool loads;

  // Threads are WARPS whole warps; `shared` has BYTES, aligned to 1024, and `barriers` are BARRIERS.
  __device__ __forceinline__ ShrinkRing(const TensorMap& x_map, const TensorMap& a_map, int cols, int rank0, const void* shared, const u64* barriers)
      : x_map(x_map), a_map(a_map), cols(cols), rank0(rank0) {
    int warp = threadIdx.x >> 5, boxes = (cols + COLS - 1) / COLS;
    lane = threadIdx.x & 31, team = warp / MEMBERS, member = warp % MEMBERS;
    count = ((boxes + TURN - 1) / TURN - team + TEAMS - 1) / TEAMS * TURN;
    if (count > 0 && column(count - 1) >= cols) --count;
    ring = shared_address(shared) + team * STAGES * STAGE_BYTES;
    full = shared_address(barriers) + team * STAGES * 8, empty = full + TEAMS * STAGES * 8;
    loads = member == 0 && lane == 0;
  }
  __device__ __forceinline__ void init_barriers() const {
    if (!loads) return;
    for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + 8 * stage, 1), barrier_init(empty + 8 * stage, MEMBERS);
    fence_barriers();
  }
  __device__ __forceinline__ int column(int i) const { return ((i / TURN * TEAMS + team) * TURN + i % TURN) * COLS; }
  __device__ __forceinline__ void fetch_x(int unit, int i, int stage) const {
    barrier_expect(full + 8 * stage, STAGE_BYTES);
    load_box(ring + stage * STAGE_BYTES, x_map, column(i), unit * ROWS, full + 8 * stage);
  }
  __device__ __forceinline__ void fetch_a(int i, int stage) const { load_box(ring + stage * STAGE_BYTES + X_BYTES, a_map, column(i), rank0, full + 8 * stage); }
  // Boxes that there is room for at once.
  __device__ __forceinline__ int first() const { return min(count, STAGES); }
  // Makes unit `unit`, after its `first` boxes: `put(row, rank, two sums)`. `sums` have SUMS_BYTES, which may be the rings'.
  template <class Put>
  __device__ __forceinline__ void run(int unit, float* sums, const Dropout& dropout, Put put) const {
    int row0 = unit * ROWS, stage = 0, parity = 0, ahead = STAGES;  // the next box to fetch
    u32 kept[TILES][2];
    float acc[TILES][NT][4] = {};
    for (int i = 0; i < count; ++i) {
      u32 x = ring + stage * STAGE_BYTES + member * TILES * 16 * 128, a = ring + stage * STAGE_BYTES + X_BYTES;
      if constexpr (MASKED) {
        u64 first = first_word(row0 + member * TILES * 16 + lane / 4, column(i), cols) + (lane & 3);
#pragma unroll
        for (int h = 0; h < 2 * TILES; ++h) kept[h / 2][h % 2] = i % TURN == 0 ? kept_word(dropout, first + h * 32 * ((cols + 127) / 128)) : kept[h / 2][h % 2] >> 8;
      }
      barrier_wait(full + 8 * stage, parity);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 xv[TILES][2][4], av[NT / 2][2][4];  // 16 columns each
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          int chunk = 4 * half + 2 * k;
#pragma unroll
          for (int m = 0; m < TILES; ++m) ldmatrix(xv[m][k], swizzled(x, m * 16 + (lane & 15), chunk + (lane >> 4)));
#pragma unroll
          for (int n = 0; n < NT / 2; ++n) ldmatrix(av[n][k], swizzled(a, n * 16 + (lane >> 4) * 8 + (lane & 7), chunk + (lane >> 3 & 1)));
        }
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            u32(&v)[4] = xv[m][k];
            if constexpr (MASKED)
#pragma unroll
              for (int r = 0; r < 4; ++r) v[r] = drop_halves(v[r], kept[m][r % 2], 4 * half + 2 * k + r / 2);
#pragma unroll
            for (int n = 0; n < NT; ++n) mma(acc[m][n], v[0], v[1], v[2], v[3], av[n / 2][k][n % 2 * 2], av[n / 2][k][n % 2 * 2 + 1]);
          }
      }
      fence_loads();
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
      if (loads && ahead < count) {
        barrier_wait(empty + 8 * stage, parity);
        fetch_x(unit, ahead, stage), fetch_a(ahead, stage);
        ++ahead;
      }
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    __syncthreads();  // the rings are read
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          *reinterpret_cast<float2*>(&sums[(team * ROWS + (member * TILES + m) * 16 + h * 8 + lane / 4) * RANKS + n * 8 + 2 * (lane & 3)]) = make_float2(acc[m][n][2 * h], acc[m][n][2 * h + 1]);
    __syncthreads();
    for (int at = 2 * threadIdx.x; at < ROWS * RANKS; at += 2 * WARPS * 32) {
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int split = 0; split < TEAMS; ++split) {
        float2 v = *reinterpret_cast<float2*>(&sums[split * ROWS * RANKS + at]);
        sum.x += v.x, sum.y += v.y;
      }
      put(row0 + at / RANKS, rank0 + at % RANKS, sum);
    }
  }
};

constexpr int ROOM = (BLOCKS == 1 ? 200 : 104) << 10;  // as in shrink_ring.rs
constexpr int STAGES = ROOM / (SPLITS * (16 * MT * TEAM + RT) * 128);
using Rings = ShrinkRing<RT, MT, TEAM, SPLITS, STAGES, DROPOUT != 0>;

extern "C" __global__ void __launch_bounds__(Rings::WARPS * 32, BLOCKS) shrink_ring(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap a_map,
    T* __restrict__ s,                       // [rows, lds]
    int rows, int cols, int lds, int early,  // 1: x was there before the kernel before this one
    const __grid_constant__ Scales scales, Dropout dropout) {
  DYNAMIC_SHARED(shared);
  SHARED_BARRIERS(barriers, Rings::BARRIERS);
  int unit = blockIdx.x;
  Rings rings(x_map, a_map, cols, blockIdx.y * RT, shared, barriers);
  rings.init_barriers();
  if (rings.loads)
    for (int i = 0; i < rings.first(); ++i)
      if (early) rings.fetch_x(unit, i, i);
      else prefetch_box(x_map, rings.column(i), unit * Rings::ROWS);
  __syncthreads();
  await_previous();
  start_next();
  if (rings.loads)
    for (int i = 0; i < rings.first(); ++i) {
      if (!early) rings.fetch_x(unit, i, i);
      rings.fetch_a(i, i);
    }
  rings.run(unit, reinterpret_cast<float*>(shared), dropout, [&](int row, int rank, float2 sum) {
    float scale = scales.of[min(rank / 16, 63)];
#if DROPOUT
    scale *= dropout.scale;
#endif
    if (row < rows) *reinterpret_cast<u32*>(s + (i64)row * lds + rank) = pack_halves(scale * sum.x, scale * sum.y);
  });
}
