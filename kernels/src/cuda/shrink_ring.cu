// Hopper: s[m, j] = scale_j * sum_k D(x)[m, k] * a[j, k], one pass over x by the whole card. A block takes ROWS rows,
// through the copy engine.
//
// The warps of a block split the depth: a team of TEAM warps, of 16 * MT rows each, takes every SPLITS-th 64 columns and has a
// ring of its own, of STAGES boxes of x and of `a`, that is filled far ahead: drawing a mask waits for no memory. The sums of
// the teams meet in shared memory in a fixed order. With a mask, a team takes two boxes in a row, for whose columns a thread has
// its words.
//
// Options: DTYPE 1 or 2, RT ranks a block (16, 32 or 64), MT, TEAM, SPLITS, BLOCKS of a multiprocessor, DROPOUT.

constexpr int WARPS = SPLITS * TEAM, THREADS = WARPS * 32, ROWS = 16 * MT * TEAM, NT = RT / 8, COLS = 64;
constexpr int X_BYTES = ROWS * 128, STAGE_BYTES = X_BYTES + RT * 128;
constexpr int ROOM = (BLOCKS == 1 ? 200 : 104) << 10;  // as in shrink_ring.rs
constexpr int STAGES = ROOM / (SPLITS * STAGE_BYTES);
static_assert(STAGES >= 2, "a box is to be on its way while another is read");
constexpr int TURN = DROPOUT ? 2 : 1;  // boxes in a row

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) shrink_ring(
    const __grid_constant__ TensorMap x_map,  // [rows, cols], box 64 x ROWS
    const __grid_constant__ TensorMap a_map,  // [ranks, padded cols], box 64 x RT
    T* __restrict__ s,                        // [rows, lds]
    int rows, int cols, int lds, int early,   // 1: x was there before the kernel before this one
    const __grid_constant__ Scales scales, Dropout dropout) {
  DYNAMIC_SHARED(shared);
  SHARED_BARRIERS(barriers, 2 * SPLITS * STAGES);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp / TEAM, member = warp % TEAM;
  int row0 = blockIdx.x * ROWS, rank0 = blockIdx.y * RT, boxes = (cols + COLS - 1) / COLS;
  u32 ring = shared_address(shared) + team * STAGES * STAGE_BYTES;
  u32 full = shared_address(barriers) + team * STAGES * 8, empty = full + SPLITS * STAGES * 8;
  auto column = [&](int i) { return ((i / TURN * SPLITS + team) * TURN + i % TURN) * COLS; };
  int count = ((boxes + TURN - 1) / TURN - team + SPLITS - 1) / SPLITS * TURN;  // boxes of this team
  if (count > 0 && column(count - 1) >= cols) --count;

  bool loads = member == 0 && lane == 0;
  auto fetch_x = [&](int i, int stage) {
    barrier_expect(full + 8 * stage, STAGE_BYTES);
    load_box(ring + stage * STAGE_BYTES, x_map, column(i), row0, full + 8 * stage);
  };
  auto fetch_a = [&](int i, int stage) { load_box(ring + stage * STAGE_BYTES + X_BYTES, a_map, column(i), rank0, full + 8 * stage); };
  if (loads) {
    for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + 8 * stage, 1), barrier_init(empty + 8 * stage, TEAM);
    fence_barriers();
    for (int i = 0; i < min(count, STAGES); ++i)
      if (early) fetch_x(i, i);
      else prefetch_box(x_map, column(i), row0);
  }
  __syncthreads();
  await_previous();
  start_next();
  if (loads)
    for (int i = 0; i < min(count, STAGES); ++i) {
      if (!early) fetch_x(i, i);
      fetch_a(i, i);
    }

  int stage = 0, parity = 0, ahead = STAGES;  // the next box to fetch
  u32 kept[MT][2];
  float acc[MT][NT][4] = {};
  for (int i = 0; i < count; ++i) {
    u32 x = ring + stage * STAGE_BYTES + member * MT * 16 * 128, a = ring + stage * STAGE_BYTES + X_BYTES;
    if constexpr (DROPOUT) {
      u64 first = first_word(row0 + member * MT * 16 + lane / 4, column(i), cols) + (lane & 3);
#pragma unroll
      for (int h = 0; h < 2 * MT; ++h) kept[h / 2][h % 2] = i % TURN == 0 ? kept_word(dropout, first + h * 32 * ((cols + 127) / 128)) : kept[h / 2][h % 2] >> 8;
    }
    barrier_wait(full + 8 * stage, parity);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 xv[MT][2][4], av[NT / 2][2][4];  // 16 columns each
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        int chunk = 4 * half + 2 * k;
#pragma unroll
        for (int m = 0; m < MT; ++m) ldmatrix(xv[m][k], swizzled(x, m * 16 + (lane & 15), chunk + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < NT / 2; ++n) ldmatrix(av[n][k], swizzled(a, n * 16 + (lane >> 4) * 8 + (lane & 7), chunk + (lane >> 3 & 1)));
      }
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          u32(&v)[4] = xv[m][k];
          if constexpr (DROPOUT)
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
      fetch_x(ahead, stage), fetch_a(ahead, stage);
      ++ahead;
    }
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

  // The sums of the teams, where the rings were: [team, row, rank].
  float* sums = reinterpret_cast<float*>(shared);
  __syncthreads();  // the rings are read
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(&sums[(team * ROWS + (member * MT + m) * 16 + h * 8 + lane / 4) * RT + n * 8 + 2 * (lane & 3)]) = make_float2(acc[m][n][2 * h], acc[m][n][2 * h + 1]);
  __syncthreads();
  for (int at = 2 * threadIdx.x; at < ROWS * RT; at += 2 * THREADS) {
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int split = 0; split < SPLITS; ++split) {
      float2 v = *reinterpret_cast<float2*>(&sums[split * ROWS * RT + at]);
      sum.x += v.x, sum.y += v.y;
    }
    int row = row0 + at / RT, rank = rank0 + at % RT;
    float scale = scales.of[min(rank / 16, 63)];
#if DROPOUT
    scale *= dropout.scale;
#endif
    if (row < rows) *reinterpret_cast<u32*>(s + (i64)row * lds + rank) = pack_halves(scale * sum.x, scale * sum.y);
  }
}
